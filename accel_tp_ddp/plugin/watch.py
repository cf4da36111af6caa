"""Where an accelerator that is watched tells what its training does: its trackers, Trainer's logs, the main process.

Which methods are replaced the tables at the end say; none is where the plugin's `watch` is 0.
"""

from __future__ import annotations

import atexit
import json
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.optim import Optimizer

from ..core.override import Override, install, install_for_all
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

    def peak(dtype: torch.dtype) -> float | None:
        return plugin.peak_tflops * 1e12 if plugin.peak_tflops else peak_of(accelerator.device, dtype)

    watch = Watch(plugin.watch, plugin.tp_size, accelerator.device.type, peak, (_CrossEntropy,))
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
    if watch is not None:
        watch.finish(together=False)


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


def _end_training(watch: Watch, stock: Callable, accelerator: Accelerator, /) -> None:
    # With tensor parallelism all ranks have to call this; without, a script may leave it to the main process.
    watch.finish(together=watch.tp_size > 1 or accelerator.num_processes == 1)
    stock()


def _log_of_trainer(
    watch: Watch, stock: Callable, trainer: Any, /, logs: dict[str, float], start_time: float | None = None
) -> None:
    if "loss" in logs:
        logs.update(watch.fresh())
    stock(logs, start_time)
    if "train_loss" in logs:  # of all of it, at its end
        watch.finish(together=True)


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
