# make train   fine-tune a small causal LM at tp 2 x dp 2, on 4 CPU ranks: about five minutes on two cores, no network
#              other than pip's. CONFIG=recipes/configs/node8_tp2_dp4.yaml picks another layout, ARGS="..." goes to the script.
# make test    ruff and pytest; PYTEST_ARGS="tests/test_recipe.py -k name" narrows it.
# make clean   remove the virtual environment and outputs.

PYTHON ?= python3
VENV ?= .venv
CONFIG ?= recipes/configs/cpu_tp2_dp2.yaml
ARGS ?=
PYTEST_ARGS ?=

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# Ranks on CPU, on a machine that has GPUs as well: Accelerate takes this from the environment only.
cpu_env = $(if $(findstring /cpu_,$(CONFIG)),ACCELERATE_USE_CPU=true)

.PHONY: train test clean

train: $(INSTALLED)
	$(cpu_env) $(BIN)/accelerate launch --config_file $(CONFIG) recipes/finetune_causal_lm.py $(ARGS)

test: $(INSTALLED)
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

# Installed again only when what there is to install changes.
$(INSTALLED): setup.py setup.cfg constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) outputs
