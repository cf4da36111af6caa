"""What `transformers.Trainer` needs beyond Accelerate: where it counts processes, and where it saves and loads.

Trainer makes its own `Accelerator`, and no argument of it reaches all the places below. An accelerator that tensor
parallelism hooks therefore replaces these methods of the class, once; a Trainer whose accelerator has no tensor
parallelism runs the stock ones. The table at the end names each place.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any, Protocol

from accelerate.utils import recursively_apply
from torch.distributed.device_mesh import DeviceMesh

from ..checkpoint.export import export
from ..core.collectives import gather_replicas
from ..core.override import Override, attributes, install_for_all, overridden
from ..training.optimizer import full_optimizer_state

__all__ = ["OVERRIDES", "override_trainers"]


class Sizes(Protocol):
    """What is needed of the plugin."""

    tp_size: int
    dp_replicate_size: int
    device_mesh: DeviceMesh


def override_trainers(plugin_type: type[Any]) -> None:
    """Replace methods of the trainer classes that have been imported, for trainers with a plugin of this type."""

    def context_of(trainer: Any) -> tuple[Sizes] | None:
        plugin = getattr(getattr(trainer, "accelerator", None), "parallelism_config", None)
        return (plugin,) if isinstance(plugin, plugin_type) and plugin.tp_size > 1 else None

    install_for_all(OVERRIDES, context_of)


# ---- counting -------------------------------------------------------------------------------------------------------


def _get_dataloader(plugin: Sizes, stock: Callable, trainer: Any, /, *args: Any, **kwargs: Any) -> Any:
    """`_get_dataloader`: worker seeds, and `BatchRebalanceSampler`, go by process, so peers got different batches."""
    with _replicas_as_processes(trainer, plugin):
        return stock(*args, **kwargs)


def _get_num_items_in_batch(plugin: Sizes, stock: Callable, trainer: Any, /, *args: Any, **kwargs: Any) -> Any:
    """`_get_num_items_in_batch` divides by `tp_size` also what it has not summed over the processes."""
    if trainer.args.average_tokens_across_devices:
        return stock(*args, **kwargs)
    with attributes(trainer, get_tp_size=lambda: 1):
        return stock(*args, **kwargs)


def _track_num_input_tokens(plugin: Sizes, stock: Callable, trainer: Any, /, *args: Any, **kwargs: Any) -> None:
    """`_track_num_input_tokens` sums over all processes: each token once for every rank of its replica."""
    before = trainer.state.num_input_tokens_seen
    stock(*args, **kwargs)
    trainer.state.num_input_tokens_seen = before + (trainer.state.num_input_tokens_seen - before) // plugin.tp_size


def _store_flos(plugin: Sizes, stock: Callable, trainer: Any, /) -> None:
    """`store_flos` sums over all processes, each of which has counted the whole model's."""
    trainer.current_flos /= plugin.tp_size
    stock()


def _evaluation_loop(plugin: Sizes, stock: Callable, trainer: Any, /, *args: Any, **kwargs: Any) -> Any:
    """`Seq2SeqTrainer` gathers by `gather`, which keeps what fills up the last batch, and the copies of peers."""
    if trainer.gather_function == trainer.accelerator.gather:
        trainer.gather_function = _gather_over_replicas(plugin)
    return stock(*args, **kwargs)


def _gather_over_replicas(plugin: Sizes) -> Callable:
    return functools.partial(recursively_apply, functools.partial(gather_replicas, plugin.device_mesh["dp_replicate"]))


def _replicas_as_processes(trainer: Any, plugin: Sizes, **changed: Any) -> AbstractContextManager[None]:
    """Let the trainer's arguments count replicas where they count processes, and have these values."""
    view = copy.copy(trainer.args)
    view.__class__ = _view_type(trainer.args.__class__)
    replicas = (plugin.dp_replicate_size, plugin.device_mesh.get_local_rank("dp_replicate"))
    view.__dict__.update(changed, _replicas=replicas)
    return attributes(trainer, args=view)


@functools.cache
def _view_type(base: type) -> type:
    counted = {
        "world_size": property(lambda self: self._replicas[0]),
        "process_index": property(lambda self: self._replicas[1]),
    }
    return type(base.__name__, (base,), counted)


# ---- training -------------------------------------------------------------------------------------------------------


def _train(plugin: Sizes, stock: Callable, trainer: Any, /, *args: Any, **kwargs: Any) -> Any:
    """`evaluation_loop` marks the model as prepared, and training then continues without DDP (so it does upstream)."""
    trainer.model.__dict__.pop("_is_accelerate_prepared", None)
    return stock(*args, **kwargs)


def _hyperparameter_search(plugin: Sizes, stock: Callable, trainer: Any, /, *args: Any, **kwargs: Any) -> None:
    """`hyperparameter_search` starts trials on the main process alone, or in processes of its own."""
    raise NotImplementedError(
        f"Trainer.hyperparameter_search is not supported with tp_size={plugin.tp_size}: its trials know nothing of "
        "the ranks of a replica. Search with tp_size=1 on a smaller model, or start one run for each setting."
    )


# ---- saving and loading ---------------------------------------------------------------------------------------------


def _save_model(
    plugin: Sizes, stock: Callable, trainer: Any, /, output_dir: str | None = None, *args: Any, **kwargs: Any
) -> None:
    """`save_model` calls `_save` on every rank; in older transformers (5.20), on the main process alone."""
    saved, save = [], trainer._save

    def save_and_tell(*args: Any, **kwargs: Any) -> None:
        saved.append(True)
        save(*args, **kwargs)

    with attributes(trainer, _save=save_and_tell):
        stock(output_dir, *args, **kwargs)
    if not saved:
        save(output_dir or trainer.args.output_dir)


def _save(
    plugin: Sizes, stock: Callable, trainer: Any, /, output_dir: str | None = None, state_dict: dict | None = None
) -> None:
    """`_save` returns early on all but the main process, which then has its own shards only."""
    if state_dict is not None:
        return stock(output_dir, state_dict=state_dict)

    def write(state: dict[str, Any]) -> None:
        stock(output_dir, state_dict=state)

    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    export(model, "Trainer.save_model", write, output_dir or trainer.args.output_dir)


def _save_optimizer_and_scheduler(plugin: Sizes, stock: Callable, trainer: Any, /, output_dir: str) -> None:
    """`_save_optimizer_and_scheduler` writes the main process's state: make that the unsharded one."""
    state = full_optimizer_state(trainer.optimizer, keep=trainer.args.should_save)
    with attributes(trainer, optimizer=SimpleNamespace(state_dict=lambda: state)):
        stock(output_dir)


def _save_rng_state(plugin: Sizes, stock: Callable, trainer: Any, /, output_dir: str) -> None:
    """`_save_rng_state` writes a file for each process; the ranks of a replica share one random state."""
    if plugin.device_mesh.get_local_rank("tp") == 0:
        with _replicas_as_processes(trainer, plugin):
            stock(output_dir)


def _load_rng_state(plugin: Sizes, stock: Callable, trainer: Any, /, checkpoint: str | None) -> None:
    """`_load_rng_state` reads a file for each process; see `_save_rng_state`."""
    with _replicas_as_processes(trainer, plugin):
        stock(checkpoint)


# ---- GRPO of TRL ----------------------------------------------------------------------------------------------------


def _get_train_dataloader(plugin: Sizes, stock: Callable, trainer: Any, /) -> Any:
    """GRPO's `get_train_dataloader` distributes prompts for as many completions as all processes together would make.

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


def _among_replicas(plugin: Sizes, stock: Callable, trainer: Any, /, *args: Any, **kwargs: Any) -> Any:
    """`_generate_and_score_completions` and `_compute_loss` compare the completions of a prompt, wherever they are.

    They gather from all processes, count these and find their own place among them; let those be the replicas.
    """
    view = _AmongReplicas(trainer.accelerator, plugin, _gather_over_replicas(plugin))
    with attributes(trainer, accelerator=view), overridden(OVERRIDES_AMONG_REPLICAS, plugin):
        return stock(*args, **kwargs)


def _gather(plugin: Sizes, stock: Callable, /, tensor: Any) -> Any:
    return _gather_over_replicas(plugin)(tensor)


def _gather_object(plugin: Sizes, stock: Callable, /, object: Any) -> Any:
    return gather_replicas(plugin.device_mesh["dp_replicate"], object)


class _AmongReplicas:
    """An accelerator that counts replicas where it counts processes."""

    def __init__(self, accelerator: Any, plugin: Sizes, gather: Callable):
        self._accelerator = accelerator
        self.num_processes = plugin.dp_replicate_size
        self.process_index = plugin.device_mesh.get_local_rank("dp_replicate")
        self.gather = gather

    def __getattr__(self, name: str) -> Any:
        return getattr(self._accelerator, name)


def _trainer(name: str, function: Callable[..., Any], line: int, reason: str) -> Override:
    return Override("transformers.trainer.Trainer", name, function, f"transformers 5.23, trainer.py:{line}", reason)


def _grpo(name: str, function: Callable[..., Any], line: int, reason: str, owner: str = ".GRPOTrainer") -> Override:
    place = f"trl 1.16, trainer/grpo_trainer.py:{line}"
    return Override(f"trl.trainer.grpo_trainer{owner}", name, function, place, reason)


OVERRIDES = (
    _trainer("_get_dataloader", _get_dataloader, 1007, "seeds workers and rebalances batches by process"),
    _trainer("_get_num_items_in_batch", _get_num_items_in_batch, 2298, "divides by tp_size what it has not summed"),
    _trainer("_track_num_input_tokens", _track_num_input_tokens, 2709, "counts each token once for every rank"),
    _trainer("store_flos", _store_flos, 4205, "sums the full model's FLOPs over all ranks"),
    _trainer("evaluation_loop", _evaluation_loop, 2896, "gathers the copies of peers, and what fills up the batch"),
    _trainer("train", _train, 1450, "takes a model that was only evaluated for one that is wrapped in DDP"),
    _trainer("hyperparameter_search", _hyperparameter_search, 4502, "starts trials on the main process alone"),
    _trainer("save_model", _save_model, 4077, "in older releases (5.20) calls _save on the main process alone"),
    _trainer("_save", _save, 4131, "writes the main process's shards"),
    _trainer("_save_optimizer_and_scheduler", _save_optimizer_and_scheduler, 3513, "writes the main process's state"),
    _trainer("_save_rng_state", _save_rng_state, 3462, "writes a file for each process, not for each replica"),
    _trainer("_load_rng_state", _load_rng_state, 3841, "reads a file for each process, not for each replica"),
    _grpo("get_train_dataloader", _get_train_dataloader, 1258, "distributes prompts by process"),
    _grpo("_generate_and_score_completions", _among_replicas, 2324, "compares completions of all processes"),
    _grpo("_compute_loss", _among_replicas, 3020, "compares completions of all processes"),
)

#: While one of GRPO's methods compares completions.
OVERRIDES_AMONG_REPLICAS = (
    _grpo("gather", _gather, 38, "takes the copies of peers", owner=""),
    _grpo("gather_object", _gather_object, 38, "takes the objects of all ranks", owner=""),
)
