"""Where an accelerator that is watched tells what its training does: its trackers, Trainer's logs, the main process.

Which methods are replaced the tables at the end say; none is where the plugin's `watch` is 0.
"""

from __future__ import annotations

import atexit
import json
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.optim import Optimizer

from ..core.override import Override, attributes, install, install_for_all
from ..loss.vocab_parallel import _CrossEntropy
from ..training.watch import Watch

__all__ = ["OVERRIDES", "OVERRIDES_OF_LOGS", "hook_watch"]

_watches: weakref.WeakKeyDictionary[Accelerator, Watch] = weakref.WeakKeyDictionary()


class Settings(Protocol):
    """What is needed of the plugin."""

    tp_size: int
    watch: int
    peak_tflops: float | None


def hook_watch(accelerator: Accelerator, plugin: Settings) -> None:
    """Count what is trained with `accelerator`, beside whatever else the plugin has replaced."""

    device = accelerator.device

    def peak(dtype: torch.dtype) -> float | None:  # which holds no accelerator: `_watches` would never let it go
        return plugin.peak_tflops * 1e12 if plugin.peak_tflops else peak_of(device, dtype)

    watch = Watch(plugin.watch, plugin.tp_size, device.type, peak, (_CrossEntropy,))
    _watches[accelerator] = watch
    install(accelerator, OVERRIDES, watch)

    def watch_of(trainer: Any) -> tuple[Watch] | None:
        found = _watches.get(getattr(trainer, "accelerator", None))
        return None if found is None else (found,)

    install_for_all(OVERRIDES_OF_LOGS, watch_of)
    atexit.register(_at_exit, weakref.ref(watch))


def _at_exit(known: weakref.ref[Watch]) -> None:
    """The last resort, of a script that ends its training by ending."""
    watch = known()
    if watch is not None and watch.is_main:  # others have nothing to print, and may not reach the store any more
        failed = getattr(sys, "last_value", None) is not None  # others are to know at once
        watch.finish(together=False, wait=not failed)


def peak_of(device: torch.device, dtype: torch.dtype) -> float | None:
    """Operations a second of a GPU that `cards.json` knows by its name; None of others, and of types not in it."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    data = Path(__file__).parents[1] / "tools" / "estimate" / "cards.json"
    cards = json.loads(data.read_text(encoding="utf-8"))["cards"].values()
    card = next((card for card in cards if name in card["devices"]), None)
    if card is None:
        return None
    if dtype in (torch.bfloat16, torch.float16):
        return card["bf16_tflops"] * 1e12
    exactly = torch.get_float32_matmul_precision() == "highest"  # or it runs in TF32
    return card["fp32_tflops"] * 1e12 if dtype == torch.float32 and exactly else None


def _prepare_model(
    watch: Watch,
    stock: Callable,
    accelerator: Accelerator,
    /,
    model: nn.Module,
    device_placement: bool | None = None,
    evaluation_mode: bool = False,
) -> nn.Module:
    prepared = stock(model, device_placement=device_placement, evaluation_mode=evaluation_mode)
    if not evaluation_mode:
        watch.follow(prepared)
    return prepared


def _prepare_optimizer(
    watch: Watch, stock: Callable, accelerator: Accelerator, /, optimizer: Optimizer, device_placement: Any = None
) -> Optimizer:
    prepared = bare = stock(optimizer, device_placement=device_placement)
    while isinstance(bare, AcceleratedOptimizer):
        bare = bare.optimizer
    if not any(getattr(hook, "watch", None) is watch for hook in bare._optimizer_step_post_hooks.values()):
        bare.register_step_post_hook(_Stepped(watch))
    return prepared


class _Stepped:
    def __init__(self, watch: Watch):
        self.watch = watch

    def __call__(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.watch.step()


@contextmanager
def _join_uneven_inputs(
    watch: Watch, stock: Callable, accelerator: Accelerator, /, joinables: list[Any], even_batches: bool | None = None
) -> Iterator[Any]:
    with watch.without_others(), stock(joinables, even_batches) as joined:
        yield joined


def _log(watch: Watch, stock: Callable, accelerator: Accelerator, /, *args: Any, **kwargs: Any) -> None:
    values, *others = args or (kwargs.pop("values"),)
    stock({**values, **watch.fresh()}, *others, **kwargs)
    given = {**dict(zip(("step", "log_kwargs"), others)), **kwargs}
    if given.get("step") is not None:  # or else nothing can be added to the row that was written
        watch.belongs(_adding_to_step(weakref.ref(accelerator), given["step"], given.get("log_kwargs") or {}))


def _adding_to_step(
    known: weakref.ref[Accelerator], step: int, options: Mapping[str, Mapping[str, Any]]
) -> Callable[[dict[str, float]], None]:
    """How to let trackers have more values of a step; not those on all ranks, which may have to be called together."""

    def put(values: dict[str, float]) -> None:
        accelerator = known()
        for tracker in accelerator.trackers if accelerator is not None else ():
            if tracker.main_process_only:
                tracker.log(values, step=step, **options.get(tracker.name, {}))

    return put


def _end_training(watch: Watch, stock: Callable, accelerator: Accelerator, /) -> None:
    # With tensor parallelism all ranks have to call this; without, a script may leave it to the main process.
    watch.finish(together=watch.tp_size > 1 or accelerator.num_processes == 1)
    watch.flush()
    stock()


def _log_of_trainer(
    watch: Watch, stock: Callable, trainer: Any, /, logs: dict[str, float], start_time: float | None = None
) -> None:
    is_step = "loss" in logs
    is_end = {"train_loss", "train_runtime"} <= logs.keys()  # of all of it, at its end; a script may log one of them
    if is_step:
        logs.update(watch.fresh())
    stock(logs, start_time)
    if is_step:
        watch.belongs(_adding_to_last_row(trainer))
    if is_end:
        watch.finish(together=True)
        watch.flush()


def _adding_to_last_row(trainer: Any) -> Callable[[dict[str, float]], None]:
    """How to let Trainer's latest row have more values, in its history and for the trackers of `report_to`.

    Other callbacks are left alone: they may talk to those of other ranks, whose rows may get their values later.
    """
    row, step, epoch = trainer.state.log_history[-1], trainer.state.global_step, trainer.state.epoch

    def put(values: dict[str, float]) -> None:
        row.update(values)
        with attributes(trainer.state, global_step=step, epoch=epoch):
            for callback in trainer.callback_handler.callbacks:
                if type(callback).__module__.startswith("transformers.integrations."):
                    callback.on_log(
                        *(trainer.args, trainer.state, trainer.control), model=trainer.model, logs=dict(values)
                    )

    return put


def _row(name: str, function: Callable[..., Any], line: int, reason: str) -> Override:
    place = f"accelerate 1.15, accelerator.py:{line}"
    return Override("accelerate.Accelerator", name, function, place, reason, counts=False)


#: With `watch`, after all others.
OVERRIDES = (
    _row("prepare_model", _prepare_model, 1770, "counts no tokens"),
    _row("prepare_optimizer", _prepare_optimizer, 2744, "counts no steps"),
    _row("join_uneven_inputs", _join_uneven_inputs, 1300, "lets replicas report at different steps"),
    _row("log", _log, 3398, "logs what the script gives it alone"),
    _row("end_training", _end_training, 3429, "sums nothing up"),
)

#: For trainers whose accelerator is watched.
OVERRIDES_OF_LOGS = (
    Override(
        *("transformers.trainer.Trainer", "log", _log_of_trainer, "transformers 5.23, trainer.py:4181"),
        "logs what Trainer counts alone",
        counts=False,
    ),
)
