"""Run a script that knows nothing of tensor parallelism under it: only the launch line changes.

    accelerate launch --config_file tp2_dp2.yaml -m accel_tp_ddp.launch script.py ARGS
    accelerate launch --config_file tp2_dp2.yaml -m accel_tp_ddp.launch -m package.module ARGS
    accelerate launch --num_processes 4 --multi_gpu -m accel_tp_ddp.launch --tp_size 2 script.py ARGS
    python -m accel_tp_ddp.launch --num_processes 4 --tp_size 2 script.py ARGS

In the last, options of `accelerate launch` stand among those here, and the ranks are started as it starts them.
Every `Accelerator` that the script makes, also inside `Trainer`, then has a `TensorParallelDDPPlugin`. The sizes come
from the launcher's YAML (its `parallelism_config` keys), or from the options here, which beat it.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import runpy
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import accelerate.accelerator
import torch.distributed as dist
from accelerate.state import PartialState

from ..checkpoint.background import wait_for_save
from ..core.control import barrier
from ..core.errors import UpstreamError
from ..core.override import Override, install_for_all
from .config import TensorParallelDDPPlugin
from .replica_view import current_view
from .start import asks_for_ranks, start_ranks
from .trainer import override_trainers

__all__ = ["OVERRIDES", "activate", "main"]

# option: (environment variable that the plugin reads, help)
_OPTIONS = {
    "tp_size": ("PARALLELISM_CONFIG_TP_SIZE", "ranks that share one model replica"),
    "dp_replicate_size": ("PARALLELISM_CONFIG_DP_REPLICATE_SIZE", "replicas; default: processes / tp_size"),
    "tp_plan": ("ACCEL_TP_DDP_PLAN", '"auto", or a YAML or JSON file'),
    "prove": ("ACCEL_TP_DDP_PROVE", "auto, always or never: whether the plan is proved before a weight is touched"),
    "loss_parallel": (
        "ACCEL_TP_DDP_LOSS_PARALLEL",
        "auto, true or false: whether losses are taken without full logits",
    ),
    "sequence_parallel": (
        "ACCEL_TP_DDP_SEQUENCE_PARALLEL",
        "true or false: whether activations between a layer's blocks are spread over the sequence",
    ),
    "overlap": (
        "ACCEL_TP_DDP_OVERLAP",
        "auto, true or false: whether weight gradients are computed while input gradients are summed",
    ),
    "zero1": ("ACCEL_TP_DDP_ZERO1", "true or false: whether optimizer state is divided over the replicas"),
    "replica_check_steps": ("ACCEL_TP_DDP_REPLICA_CHECK_STEPS", "how often replicas are compared; 0: never"),
    "replica_drift": ("ACCEL_TP_DDP_REPLICA_DRIFT", "heal or raise"),
    "async_save": ("ACCEL_TP_DDP_ASYNC_SAVE", "true or false: whether save_state writes in the background"),
    "control_timeout": ("ACCEL_TP_DDP_CONTROL_TIMEOUT", "seconds that ranks wait for one another between steps"),
    "watch": ("ACCEL_TP_DDP_WATCH", "steps between two reports of tokens a second, MFU and memory; 0: none"),
    "peak_tflops": ("ACCEL_TP_DDP_PEAK_TFLOPS", "what MFU is a share of, where the GPU is not known"),
}
#: Frames above a script's own.
_NOT_THE_SCRIPT = (__file__, runpy.__file__, "<frozen runpy>", str(Path(__file__).parents[1] / "launch.py"))
_SWITCH = "ACCELERATE_USE_PARALLELISM_CONFIG"


def activate() -> TensorParallelDDPPlugin | None:
    """Give every `Accelerator` made from now on that names no `parallelism_config` this plugin.

    Its values come from the environment, as `accelerate launch` sets it. Returns what the accelerators will get, or
    None, and changes nothing, if the environment asks for neither tensor parallelism nor zero1 nor watch.

    Raises:
        ValueError: If the environment holds a value that the plugin does not take.
    """
    if os.environ.get(_SWITCH, "false").lower() != "true":
        return None
    plugin = TensorParallelDDPPlugin()
    if plugin.tp_size == 1 and not plugin.zero1 and not plugin.watch:
        return None
    # What Accelerate itself instantiates, where the launcher's YAML has a `parallelism_config`.
    accelerate.accelerator.ParallelismConfig = TensorParallelDDPPlugin
    if plugin.tp_size > 1:
        install_for_all(OVERRIDES, lambda state: (plugin,))
    return plugin


def _present_replicas(
    plugin: TensorParallelDDPPlugin, stock: Callable, state: PartialState, /, *args: Any, **kwargs: Any
) -> None:
    """`PartialState.__init__` starts the process group; whoever counts ranks from then on gets replicas."""
    stock(*args, **kwargs)
    override_trainers(TensorParallelDDPPlugin)  # of those that have been imported by now
    if current_view() is None and dist.is_initialized() and state.num_processes == dist.get_world_size() > 1:
        plugin.present_replicas(state.device.type).stay()
    view = current_view()
    if view is not None:
        view.reach_modules()


OVERRIDES = (
    Override(
        *("accelerate.state.PartialState", "__init__", _present_replicas, "accelerate 1.15, state.py:161"),
        "counts ranks, before there is an accelerator",
    ),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run a script or module as `__main__`, with its own arguments, after `activate`; or start ranks that do.

    What the script raises goes on as it is, and is printed from the script's first line on.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if asks_for_ranks(argv):
        return start_ranks(argv, list(_OPTIONS))
    options, module, script, args = _parse(argv)
    for name, value in options.items():
        os.environ[_OPTIONS[name][0]] = value
    if options.keys() & {"tp_size", "zero1", "watch"}:
        os.environ[_SWITCH] = "true"
    try:
        plugin = activate()
    except (ValueError, UpstreamError) as error:
        raise SystemExit(f"accel_tp_ddp.launch: {error}") from None
    if int(os.environ.get("RANK", "0")) == 0:
        nothing = "no tensor parallelism asked for by options or the environment; the script runs as it is"
        print(f"accel_tp_ddp.launch: {plugin or nothing}", flush=True)
    sys.excepthook = _print_from_the_script_on
    if module:
        sys.argv = [script, *args]
        sys.path[0:1] = [os.getcwd()]
        _check_module(script)
        runpy.run_module(script, run_name="__main__", alter_sys=True)
    else:
        sys.argv = [script, *args]
        sys.path[0:1] = [str(Path(script).resolve().parent)]
        runpy.run_path(script, run_name="__main__")
    if plugin is not None and dist.is_available() and dist.is_initialized():
        wait_for_save()
        barrier()  # a rank that leaves while others still talk makes them abort at exit
        dist.destroy_process_group()


def _print_from_the_script_on(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """As Python prints an error, without the frames that run the script; in one piece, as other ranks print too."""
    first = trace
    while first is not None and first.tb_frame.f_code.co_filename in _NOT_THE_SCRIPT:
        first = first.tb_next
    sys.stderr.write("".join(traceback.format_exception(kind, error, first if first is not None else trace)))
    sys.stderr.flush()


def _check_module(name: str) -> None:
    try:
        found = importlib.util.find_spec(name) is not None
    except ModuleNotFoundError as error:
        if not f"{name}.".startswith(f"{error.name}."):  # what its package imports
            raise
        found = False
    if not found:
        raise SystemExit(
            f"accel_tp_ddp.launch: there is no module {name!r} (from {os.getcwd()}). Install it, or correct its name."
        )


def _parse(argv: Sequence[str]) -> tuple[dict[str, str], bool, str, list[str]]:
    """Own options, whether a module is meant, its or the script's name, and the script's arguments, untouched."""
    parser = argparse.ArgumentParser(
        "python -m accel_tp_ddp.launch",
        description="Run a script under tensor parallelism inside DDP. Start it with accelerate launch or "
        "torchrun, or give accelerate launch's options here (--config_file, --num_processes, --cpu, ...).",
        allow_abbrev=False,
    )
    for name, (variable, text) in _OPTIONS.items():
        parser.add_argument(f"--{name}", help=f"{text} (environment: {variable})")
    parser.add_argument("-m", dest="module", action="store_true", help="what follows is a module, not a file")
    parser.add_argument("script", help="the script, or the module, to run")
    parser.add_argument("args", nargs=argparse.REMAINDER, help="its arguments")
    parsed = parser.parse_args(argv)
    if not parsed.module and not Path(parsed.script).is_file():
        parser.error(f"there is no file {parsed.script!r}. Give the path of a script, or `-m` and a module.")
    options = {name: value for name in _OPTIONS if (value := getattr(parsed, name)) is not None}
    return options, parsed.module, parsed.script, parsed.args


if __name__ == "__main__":
    main()
