"""What `transformers.Trainer` needs beyond Accelerate: where it counts processes, and where it saves and loads.

Trainer makes its own `Accelerator`, and no argument of it reaches all the places below. An accelerator that tensor
parallelism hooks therefore replaces these methods of the class, once; a Trainer whose accelerator has no tensor
parallelism runs the stock ones. Each mend names the place in transformers 5.23, or TRL 1.16, that it answers.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, Protocol

from accelerate.utils import recursively_apply
from torch.distributed.device_mesh import DeviceMesh

from .collectives import gather_replicas
from .export import export
from .optimizer import full_optimizer_state

__all__ = ["mend_trainer"]

_STOCK = "_accel_tp_ddp_stock"


class Sizes(Protocol):
    """What the mends need of the plugin."""

    tp_size: int
    dp_replicate_size: int
    device_mesh: DeviceMesh


def mend_trainer(plugin_type: type) -> None:
    """Replace methods of the trainer classes that have been imported, for trainers with a plugin of this type."""
    for (module, name), mends in _MENDS.items():
        trainer_class = getattr(sys.modules.get(module), name, None)
        if trainer_class is None or _STOCK in vars(trainer_class):
            continue
        stock = {method: getattr(trainer_class, method) for method in mends if hasattr(trainer_class, method)}
        setattr(trainer_class, _STOCK, stock)
        for method, original in stock.items():
            setattr(trainer_class, method, _mended(original, mends[method], plugin_type))


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


def _evaluation_loop(stock: Callable, trainer: Any, plugin: Sizes, *args: Any, **kwargs: Any) -> Any:
    """`Seq2SeqTrainer` gathers by `gather`, which keeps what fills up the last batch, and the copies of peers."""
    if trainer.gather_function == trainer.accelerator.gather:
        trainer.gather_function = _gather_over_replicas(plugin)
    return stock(*args, **kwargs)


def _gather_over_replicas(plugin: Sizes) -> Callable:
    return functools.partial(recursively_apply, functools.partial(gather_replicas, plugin.device_mesh["dp_replicate"]))


@contextmanager
def _replicas_as_processes(trainer: Any, plugin: Sizes, **changed: Any) -> Iterator[None]:
    """Let the trainer's arguments count replicas where they count processes, and have these values."""
    args = trainer.args
    view = copy.copy(args)
    view.__class__ = _view_type(type(args))
    replicas = (plugin.dp_replicate_size, plugin.device_mesh.get_local_rank("dp_replicate"))
    view.__dict__.update(changed, _replicas=replicas)
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


def _hyperparameter_search(stock: Callable, trainer: Any, plugin: Sizes, *args: Any, **kwargs: Any) -> None:
    """`hyperparameter_search` starts trials on the main process alone, or in processes of its own."""
    raise NotImplementedError(
        f"Trainer.hyperparameter_search is not supported with tp_size={plugin.tp_size}: its trials know nothing of "
        "the ranks of a replica. Search with tp_size=1 on a smaller model, or start one run for each setting."
    )


# ---- saving and loading ---------------------------------------------------------------------------------------------


def _save_model(
    stock: Callable, trainer: Any, plugin: Sizes, output_dir: str | None = None, *args: Any, **kwargs: Any
) -> None:
    """`save_model` calls `_save` on every rank; in older transformers (5.20), on the main process alone."""
    saved = []

    def save(*args: Any, **kwargs: Any) -> None:
        saved.append(True)
        type(trainer)._save(trainer, *args, **kwargs)

    trainer._save = save
    try:
        stock(output_dir, *args, **kwargs)
    finally:
        del trainer._save
    if not saved:
        trainer._save(output_dir or trainer.args.output_dir)


def _save(
    stock: Callable, trainer: Any, plugin: Sizes, output_dir: str | None = None, state_dict: dict | None = None
) -> None:
    """`_save` returns early on all but the main process, which then has its own shards only."""
    if state_dict is not None:
        return stock(output_dir, state_dict=state_dict)

    def write(state: dict[str, Any]) -> None:
        stock(output_dir, state_dict=state)

    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    export(model, "Trainer.save_model", write, output_dir or trainer.args.output_dir)


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


# ---- GRPO of TRL ----------------------------------------------------------------------------------------------------


def _get_train_dataloader(stock: Callable, trainer: Any, plugin: Sizes) -> Any:
    """GRPO's `get_train_dataloader` deals out prompts for as many completions as all processes together would make.

    Raises:
        ValueError: If the completions of one prompt do not fit a generation batch of the replicas.
    """
    args = trainer.args
    size = args.per_device_train_batch_size * plugin.dp_replicate_size * args.steps_per_generation
    if size % trainer.num_generations:
        raise ValueError(
            f"num_generations={trainer.num_generations} does not divide the {size} completions of a generation batch: "
            f"per_device_train_batch_size={args.per_device_train_batch_size} x {plugin.dp_replicate_size} replicas x "
            f"steps_per_generation={args.steps_per_generation}, with tp_size={plugin.tp_size}. Change one of them."
        )
    with _replicas_as_processes(trainer, plugin, generation_batch_size=size):
        return stock()


def _among_replicas(stock: Callable, trainer: Any, plugin: Sizes, *args: Any, **kwargs: Any) -> Any:
    """`_generate_and_score_completions` and `_compute_loss` compare the completions of a prompt, wherever they are.

    They gather from all processes, count these and find their own place among them; let those be the replicas.
    """
    module = sys.modules[_GRPO[0]]
    objects = functools.partial(gather_replicas, plugin.device_mesh["dp_replicate"])
    names = {"gather": _gather_over_replicas(plugin), "gather_object": objects}
    accelerator, saved = trainer.accelerator, {name: getattr(module, name) for name in names}
    trainer.accelerator = _AmongReplicas(accelerator, plugin, names["gather"])
    vars(module).update(names)
    try:
        return stock(*args, **kwargs)
    finally:
        trainer.accelerator = accelerator
        vars(module).update(saved)


class _AmongReplicas:
    """An accelerator that counts replicas where it counts processes."""

    def __init__(self, accelerator: Any, plugin: Sizes, gather: Callable):
        self._accelerator = accelerator
        self.num_processes = plugin.dp_replicate_size
        self.process_index = plugin.device_mesh.get_local_rank("dp_replicate")
        self.gather = gather

    def __getattr__(self, name: str) -> Any:
        return getattr(self._accelerator, name)


_GRPO = ("trl.trainer.grpo_trainer", "GRPOTrainer")
_MENDS: dict[tuple[str, str], dict[str, Callable]] = {
    ("transformers.trainer", "Trainer"): {
        "_get_dataloader": _get_dataloader,
        "_get_num_items_in_batch": _get_num_items_in_batch,
        "_track_num_input_tokens": _track_num_input_tokens,
        "store_flos": _store_flos,
        "evaluation_loop": _evaluation_loop,
        "train": _train,
        "hyperparameter_search": _hyperparameter_search,
        "save_model": _save_model,
        "_save": _save,
        "_save_optimizer_and_scheduler": _save_optimizer_and_scheduler,
        "_save_rng_state": _save_rng_state,
        "_load_rng_state": _load_rng_state,
    },
    _GRPO: {
        "get_train_dataloader": _get_train_dataloader,
        "_generate_and_score_completions": _among_replicas,
        "_compute_loss": _among_replicas,
    },
}
