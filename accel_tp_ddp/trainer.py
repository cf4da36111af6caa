"""What `transformers.Trainer` needs beyond Accelerate: where it counts processes, and where it saves and loads.

Trainer makes its own `Accelerator`, and no argument of it reaches all the places below. The first accelerator that
tensor parallelism hooks therefore replaces these methods of the class, once; a Trainer whose accelerator has no
tensor parallelism runs the stock ones. Each mend names the place in transformers 5.23 that it answers.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, Protocol

from torch.distributed.device_mesh import DeviceMesh

from .export import full_state_dict_of_all
from .optimizer import full_optimizer_state

__all__ = ["mend_trainer"]

_STOCK = "_accel_tp_ddp_stock"


class Sizes(Protocol):
    """What the mends need of the plugin."""

    tp_size: int
    dp_replicate_size: int
    device_mesh: DeviceMesh


def mend_trainer(plugin_type: type) -> None:
    """Replace methods of `transformers.Trainer`, if it has been imported, for trainers with a plugin of this type."""
    module = sys.modules.get("transformers.trainer")
    if module is None or hasattr(module.Trainer, _STOCK):
        return
    stock = {name: getattr(module.Trainer, name) for name in _MENDS if hasattr(module.Trainer, name)}
    setattr(module.Trainer, _STOCK, stock)
    for name, method in stock.items():
        setattr(module.Trainer, name, _mended(method, _MENDS[name], plugin_type))


def _mended(stock: Callable, mend: Callable, plugin_type: type) -> Callable:
    @functools.wraps(stock)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        plugin = getattr(getattr(self, "accelerator", None), "parallelism_config", None)
        if not isinstance(plugin, plugin_type) or plugin.tp_size == 1:
            return stock(self, *args, **kwargs)
        return mend(functools.partial(stock, self), self, plugin, *args, **kwargs)

    return method


# ---- counting -------------------------------------------------------------------------------------------------------


def _get_dataloader(stock: Callable, trainer: Any, plugin: Sizes, *args: Any, **kwargs: Any) -> Any:
    """`_get_dataloader`: worker seeds, and `BatchRebalanceSampler`, go by process, so peers got different batches."""
    with _replicas_as_processes(trainer, plugin):
        return stock(*args, **kwargs)


def _get_num_items_in_batch(stock: Callable, trainer: Any, plugin: Sizes, *args: Any, **kwargs: Any) -> Any:
    """`_get_num_items_in_batch` divides by `tp_size` also what it has not summed over the processes."""
    items = stock(*args, **kwargs)
    if items is None or trainer.args.average_tokens_across_devices:
        return items
    return items * plugin.tp_size


def _track_num_input_tokens(stock: Callable, trainer: Any, plugin: Sizes, *args: Any, **kwargs: Any) -> None:
    """`_track_num_input_tokens` sums over all processes: each token once for every rank of its replica."""
    before = trainer.state.num_input_tokens_seen
    stock(*args, **kwargs)
    trainer.state.num_input_tokens_seen = before + (trainer.state.num_input_tokens_seen - before) // plugin.tp_size


def _store_flos(stock: Callable, trainer: Any, plugin: Sizes) -> None:
    """`store_flos` sums over all processes, each of which has counted the whole model's."""
    trainer.current_flos /= plugin.tp_size
    stock()


@contextmanager
def _replicas_as_processes(trainer: Any, plugin: Sizes) -> Iterator[None]:
    """Let the trainer's arguments count replicas where they count processes."""
    args = trainer.args
    view = copy.copy(args)
    view.__class__ = _view_type(type(args))
    view.__dict__["_replicas"] = (plugin.dp_replicate_size, plugin.device_mesh.get_local_rank("dp_replicate"))
    trainer.args = view
    try:
        yield
    finally:
        trainer.args = args


@functools.cache
def _view_type(base: type) -> type:
    counted = {
        "world_size": property(lambda self: self._replicas[0]),
        "process_index": property(lambda self: self._replicas[1]),
    }
    return type(base.__name__, (base,), counted)


# ---- training -------------------------------------------------------------------------------------------------------


def _train(stock: Callable, trainer: Any, plugin: Sizes, *args: Any, **kwargs: Any) -> Any:
    """`evaluation_loop` marks the model as prepared, and training then goes on without DDP (so it does upstream)."""
    trainer.model.__dict__.pop("_is_accelerate_prepared", None)
    return stock(*args, **kwargs)


# ---- saving and loading ---------------------------------------------------------------------------------------------


def _save(
    stock: Callable, trainer: Any, plugin: Sizes, output_dir: str | None = None, state_dict: dict | None = None
) -> None:
    """`_save` returns early on all but the main process, which then has its own shards only."""
    if state_dict is None:
        state_dict = full_state_dict_of_all(trainer.accelerator.unwrap_model(trainer.model), "Trainer._save")
    stock(output_dir, state_dict=state_dict)


def _save_optimizer_and_scheduler(stock: Callable, trainer: Any, plugin: Sizes, output_dir: str) -> None:
    """`_save_optimizer_and_scheduler` writes the main process's state: make that the unsharded one."""
    optimizer = trainer.optimizer
    state = full_optimizer_state(optimizer, keep=trainer.args.should_save)
    trainer.optimizer = SimpleNamespace(state_dict=lambda: state)
    try:
        stock(output_dir)
    finally:
        trainer.optimizer = optimizer


def _save_rng_state(stock: Callable, trainer: Any, plugin: Sizes, output_dir: str) -> None:
    """`_save_rng_state` writes a file for each process; the ranks of a replica share one random state."""
    if plugin.device_mesh.get_local_rank("tp") == 0:
        with _replicas_as_processes(trainer, plugin):
            stock(output_dir)


def _load_rng_state(stock: Callable, trainer: Any, plugin: Sizes, checkpoint: str | None) -> None:
    """`_load_rng_state` reads a file for each process; see `_save_rng_state`."""
    with _replicas_as_processes(trainer, plugin):
        stock(checkpoint)


_MENDS: dict[str, Callable] = {
    "_get_dataloader": _get_dataloader,
    "_get_num_items_in_batch": _get_num_items_in_batch,
    "_track_num_input_tokens": _track_num_input_tokens,
    "store_flos": _store_flos,
    "train": _train,
    "_save": _save,
    "_save_optimizer_and_scheduler": _save_optimizer_and_scheduler,
    "_save_rng_state": _save_rng_state,
    "_load_rng_state": _load_rng_state,
}
