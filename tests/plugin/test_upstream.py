"""What the installed packages have become is noticed when the plugin takes hold: one line, or one error on every rank.

Installed classes are altered here as a release would alter them.
"""

import subprocess
import sys
from contextlib import ExitStack, contextmanager

import accelerate
import pytest
import torch.distributed as dist
import transformers
from accelerate import Accelerator

from accel_tp_ddp import TensorParallelDDPPlugin
from accel_tp_ddp.core.errors import UpstreamError
from accel_tp_ddp.core.override import attributes
from accel_tp_ddp.plugin import upstream
from accel_tp_ddp.plugin.overrides import TABLES

from ..helpers.logs import heard
from ..helpers.models import build_model
from ..helpers.ranks import run_on_ranks
from ..helpers.sharded import accelerator_for


@contextmanager
def without(owner, name):
    before = vars(owner)[name]
    delattr(owner, name)
    try:
        yield
    finally:
        setattr(owner, name, before)


def prepare_model(self, model, mesh, device_placement=None, evaluation_mode=False):
    """With an argument that nobody here passes."""


def save_model(self, model, save_directory, max_shard_size="10GB", safe_serialization=True):
    """By other means than `get_state_dict`."""


@contextmanager
def module_gone():
    from transformers.generation import utils

    with ExitStack() as stack:
        stack.enter_context(without(transformers.generation, "utils"))
        stack.enter_context(attributes(transformers.generation, __path__=[]))
        stack.callback(sys.modules.__setitem__, utils.__name__, utils)
        del sys.modules[utils.__name__]
        yield


ALTERED = {
    "argument": lambda: attributes(accelerate.Accelerator, prepare_model=prepare_model),
    "body": lambda: attributes(accelerate.Accelerator, save_model=save_model),
    "method": lambda: without(accelerate.Accelerator, "clip_grad_norm_"),
    "lesser method": lambda: without(accelerate.Accelerator, "join_uneven_inputs"),
    "module": module_gone,
}


def taken_hold(altered, then=lambda accelerator: None, only=None):
    """What is said when the plugin takes hold of an accelerator of the altered release."""
    with heard() as lines:
        if only is None or dist.get_rank() == only:
            with ALTERED[altered]():
                accelerator = accelerator_for(2)
                then(accelerator)
        else:
            then(accelerator_for(2))
    return lines


SAID = {
    "body": "`accelerate.Accelerator.save_model` does not use `get_state_dict` (which, unless it is replaced, writes",
    "lesser method": "there is no `accelerate.Accelerator.join_uneven_inputs` (which,",
    "module": "there is no `transformers.generation.utils` (which,",
    "argument": "`accelerate.Accelerator.prepare_model` takes `device_placement` as argument 3, not 2 (which, unless",
}


@pytest.mark.parametrize("altered", SAID)
def test_what_is_another_by_now_is_one_line_on_the_main_process(altered):
    main, peer = run_on_ranks(taken_hold, 2, altered)
    (line,) = main
    package = "transformers" if altered == "module" else "accelerate"
    version = sys.modules[package].__version__
    assert line.startswith(f"{package} {version} is not as accel_tp_ddp knows it, which was written for {package} ")
    assert SAID[altered] in line and "\n" not in line and peer == []


def prepare(accelerator):
    accelerator.prepare(build_model("llama"))


def save(accelerator):
    accelerator.save_model(accelerator.prepare(build_model("llama")), "nowhere")


@pytest.mark.parametrize("altered, use", [("argument", prepare), ("body", save)])
def test_and_it_is_an_error_on_every_rank_where_it_is_used(altered, use):
    for raised in run_on_ranks(taken_hold, 2, altered, use, expect_raise=True):
        assert raised.type_name == "UpstreamError" and SAID[altered] in raised.message


@pytest.mark.parametrize("only", [None, 1])
def test_what_counts_and_has_gone_is_an_error_on_every_rank_when_the_plugin_takes_hold(only):
    for raised in run_on_ranks(taken_hold, 2, "method", only=only, expect_raise=True):
        assert raised.type_name == "UpstreamError" and "\n" not in raised.message
        assert "there is no `accelerate.Accelerator.clip_grad_norm_`" in raised.message
        assert "takes the norm of each rank's own shards" in raised.message


def loads_in_slices():
    """As where transformers compares tied weights by itself, before 5.23."""
    plugin = TensorParallelDDPPlugin(tp_size=2)
    Accelerator(parallelism_config=plugin)
    with ExitStack() as stack:
        if hasattr(transformers.modeling_utils, "_tied_params_are_equal"):
            stack.enter_context(without(transformers.modeling_utils, "_tied_params_are_equal"))
        stack.enter_context(plugin.sharded_loading())


def test_loading_in_slices_is_refused_on_every_rank_where_transformers_loads_otherwise():
    for raised in run_on_ranks(loads_in_slices, 2, expect_raise=True):
        assert "RuntimeError" in raised.type_names and "\n" not in raised.message
        assert "_tied_params_are_equal" in raised.message and "without sharded_loading" in raised.message


def test_of_the_installed_releases_nothing_is_said():
    """With everything imported that a row names, as far as it is installed."""
    script = (
        "import importlib\n"
        "from accel_tp_ddp.core.override import check\n"
        "from accel_tp_ddp.plugin.overrides import TABLES\n"
        "rows = [row for table in TABLES.values() for row in table]\n"
        "for row in rows:\n"
        "    try:\n        row.upstream()\n    except (ImportError, AttributeError, RuntimeError):\n        pass\n"
        "check(rows)\n"
        "print(sum(row.is_loaded() for row in rows))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0 and "is not as" not in done.stderr, done.stderr
    assert int(done.stdout.split()[-1]) > 50


def test_only_what_is_not_called_by_a_signature_has_none():
    rows = [row for rows in TABLES.values() for row in rows]
    assert len(rows) > 60 and {row.package for row in rows} >= {"accelerate", "transformers", "trl", "peft", "torch"}
    assert {row for row in rows if row.since} and {row for row in rows if row.needs}


# --- releases that are too old ---------------------------------------------------------------------------------------


def test_a_release_older_than_allowed_is_an_error():
    upstream.check_releases(upstream._required())
    upstream.check_releases(["torch>=2.8", "transformers", "numpy>=999", "not-installed>=3"])
    with pytest.raises(
        UpstreamError, match=r"transformers 5\S+ \(the oldest is 999\.1\).*pip install 'transformers>=999"
    ):
        upstream.check_releases(["torch>=2.8", "transformers>=999.1"])


def too_old_on_one_rank():
    required = ["transformers>=999"] if dist.get_rank() == 1 else []
    with attributes(upstream, _required=lambda: required):
        accelerator_for(2)


def test_and_on_every_rank_if_it_is_one_on_one_of_them():
    for raised in run_on_ranks(too_old_on_one_rank, 2, expect_raise=True):
        assert raised.type_name == "UpstreamError" and "'transformers>=999'" in raised.message
