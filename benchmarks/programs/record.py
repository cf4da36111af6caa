"""Run a program and write down what it does, on every rank: `record.py [-m] PROGRAM ARGS`, below a launcher.

Losses are those that reach `Accelerator.backward`; learning rates and gradient norms are read as an optimizer steps;
`Trainer.log`, `Accelerator.log`, `Accelerator.print` and the program's own logger are overheard. What is written
afterwards is looked at in the files themselves.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import runpy
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers.trainer
import transformers.utils
from accelerate import Accelerator, DistributedType
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.overrides import TorchFunctionMode

from benchmarks.programs.run import DOUBLE, FOLDER

Record = dict[str, list[Any]]


def main() -> None:
    rank, folder = int(os.environ.get("RANK", "0")), Path(os.environ[FOLDER])
    record = overhear()
    module = sys.argv[1] == "-m"
    sys.argv = sys.argv[2:] if module else sys.argv[1:]
    # What programs of earlier releases ask for, and is no more.
    vars(transformers.utils).setdefault("send_example_telemetry", lambda *args, **kwargs: None)
    if not hasattr(DistributedType, "TPU"):
        DistributedType.TPU = DistributedType.XLA
    sys.path[0:1] = [os.getcwd()] if module else [str(Path(sys.argv[0]).resolve().parent), os.getcwd()]
    double = os.environ.get(DOUBLE)
    if double:
        torch.set_default_dtype(torch.float64)
    try:
        with Double() if double else nullcontext():
            if module:
                runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        (folder / f"rank{rank}.json").write_text(json.dumps(record, default=_plain))


class Double(TorchFunctionMode):
    """In its body, what asks for single precision gets double.

    Differences that are rounding all but vanish then; those that are mistakes stay.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        kwargs = {name: torch.float64 if arg is torch.float32 else arg for name, arg in (kwargs or {}).items()}
        return (torch.Tensor.double if func is torch.Tensor.float else func)(*args, **kwargs)


def overhear() -> Record:
    """From now on, write down what programs do."""
    record: Record = {name: [] for name in ("losses", "rates", "norms", "logs", "prints", "messages", "tracked")}
    backward, say, track, log = (
        Accelerator.backward,
        Accelerator.print,
        Accelerator.log,
        transformers.trainer.Trainer.log,
    )

    def on_backward(self: Any, loss: Any, *args: Any, **kwargs: Any) -> Any:
        if dist.is_initialized() and not record["losses"]:
            # For good: or plain DDP may hang at the end, as torch 2.13 frees it with its reducer, whose threads it
            # then joins under the interpreter lock.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(dist.group.WORLD))
        record["losses"].append(loss.detach().float().mean().item())
        return backward(self, loss, *args, **kwargs)

    def on_print(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.is_local_main_process:
            record["prints"].append(" ".join(map(str, args)))
        return say(self, *args, **kwargs)

    def on_track(self: Any, values: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        record["tracked"].append(dict(values))
        return track(self, values, *args, **kwargs)

    def on_log(self: Any, logs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        record["logs"].append(dict(logs))
        return log(self, logs, *args, **kwargs)

    def on_step(optimizer: torch.optim.Optimizer, *args: Any) -> None:
        record["rates"].append([group["lr"] for group in optimizer.param_groups])
        record["norms"].append(_norm([p for group in optimizer.param_groups for p in group["params"]]))

    class Listener(logging.Handler):
        def emit(self, message: logging.LogRecord) -> None:
            record["messages"].append(message.getMessage())

    Accelerator.backward, Accelerator.print, Accelerator.log = on_backward, on_print, on_track  # type: ignore[method-assign]
    transformers.trainer.Trainer.log = on_log  # type: ignore[method-assign]
    register_optimizer_step_pre_hook(on_step)
    # Not at the root: `logging.basicConfig`, which sets the level, does nothing where that has a handler already.
    logging.getLogger("__main__").addHandler(Listener())
    return record


def _norm(parameters: list[torch.Tensor]) -> float:
    """Of the full gradient, clipped or not as the optimizer gets it."""
    if any(hasattr(parameter, "tp_shard") for parameter in parameters):
        from accel_tp_ddp.training.gradients import full_grad_norm

        return full_grad_norm(parameters).item()
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return torch.nn.utils.get_total_norm(gradients).item()


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)


if __name__ == "__main__":
    main()
