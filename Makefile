# make train   fine-tune a small causal LM at tp 2 x dp 2, on 4 CPU ranks: about five minutes on two cores, no network
#              other than pip's. CONFIG=recipes/configs/node8_tp2_dp4.yaml picks another layout, ARGS="..." goes to the script.
# make test    ruff, mypy and pytest; PYTEST_ARGS="tests/system/test_recipe.py -k name" narrows it.
# make docs    the documentation as a site, in site/, with an environment of its own.
# make clean   remove the virtual environments and outputs.
# make constraints   make constraints.txt again, with the newest releases of what constraints/chosen.txt does not hold.
#
# Both install the versions of constraints.txt. Each other set gets an environment of its own, of the day it was made on:
#   CONSTRAINTS=                         the newest of everything
#   CONSTRAINTS=constraints/torch.txt    the newest of everything but torch, of which pip may know a CPU build
#   CONSTRAINTS=constraints/oldest.txt   the oldest that setup.cfg allows; the whole suite is made for newer ones, see noxfile.py
#   CONSTRAINTS=mine.txt                 yours

PYTHON ?= python3
CONFIG ?= recipes/configs/cpu_tp2_dp2.yaml
ARGS ?=
PYTEST_ARGS ?=
CONSTRAINTS ?= constraints.txt
UV ?= uv

SET := $(if $(strip $(CONSTRAINTS)),$(subst /,-,$(basename $(strip $(CONSTRAINTS)))),newest)
VENV ?= .venv$(patsubst %,-%,$(filter-out constraints,$(SET)))
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed-$(SET)

# Ranks on CPU, on a machine that has GPUs as well: Accelerate takes this from the environment only.
cpu_env = $(if $(findstring /cpu_,$(CONFIG)),ACCELERATE_USE_CPU=true)
constrained = $(patsubst %,-c %,$(CONSTRAINTS))
build_constrained = $(patsubst %,--build-constraint %,$(CONSTRAINTS))

.PHONY: train test docs clean constraints

train: $(INSTALLED)
	$(cpu_env) $(BIN)/accelerate launch --config_file $(CONFIG) recipes/finetune_causal_lm.py $(ARGS)

test: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

docs: .venv-docs/.installed
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

# What the extra `docs` names, and no more: the reference is read off the sources, nothing is imported.
.venv-docs/.installed: setup.cfg
	test -x .venv-docs/bin/python || $(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -c "from configparser import ConfigParser as C; c = C(); c.read('setup.cfg'); \
		print(c['options.extras_require']['docs'])" | xargs .venv-docs/bin/python -m pip install --quiet
	touch $@

# Installed again only when what there is to install changes. pip first: older ones cannot constrain a build.
$(INSTALLED): setup.py setup.cfg $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	rm -f $(VENV)/.installed*
	$(BIN)/python -m pip install --quiet --upgrade $(constrained) pip
	$(BIN)/python -m pip install --quiet --upgrade --upgrade-strategy eager $(constrained) $(build_constrained) -e '.[test]'
	touch $@

constraints:
	sed '/^[^#]/,$$d' constraints.txt > constraints.part
	printf '%s\n' pip setuptools wheel | $(UV) pip compile --universal --python-version 3.10 --extra test --upgrade \
		--no-header --no-emit-index-url --annotation-style line -c constraints/chosen.txt setup.py - >> constraints.part
	mv constraints.part constraints.txt

clean:
	rm -rf $(VENV) .venv .venv-* outputs site
