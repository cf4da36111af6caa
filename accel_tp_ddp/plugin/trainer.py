"""What `transformers.Trainer` needs beyond Accelerate: where it saves, and the few places where it counts by itself.

Trainer makes its own `Accelerator`, and no argument of it reaches all the places below. An accelerator that tensor
parallelism hooks therefore replaces these methods of the class, once; a Trainer whose accelerator has no tensor
parallelism runs the stock ones. The table at the end names each place.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional

from ..checkpoint.export import export
from ..core.collectives import send_first_rank
from ..core.override import Override, attributes, install_for_all
from ..core.randomness import agree_on_randomness
from ..core.shard import holds_shards
from ..loss import fused_heads
from ..loss.deferred import DeferredLogits
from ..loss.heads import losses_only
from ..training.optimizer import full_optimizer_state
from . import vllm
from .ddp import left_to_plugin
from .placement import move_but_for, wait_for_prepare, waits_for
from .replica_view import ReplicaView, current_view

__all__ = [
    "OVERRIDES",
    "OVERRIDES_OF_ACCELERATORS",
    "OVERRIDES_OF_ARGUMENTS",
    "OVERRIDES_OF_LOSSES",
    "OVERRIDES_OF_MAIN",
    "OVERRIDES_OF_REWARDS",
    "OVERRIDES_OF_SETTINGS",
    "OVERRIDES_OF_SMOOTHERS",
    "override_trainers",
]


class Config(Protocol):
    """What is needed of the plugin."""

    device_mesh: DeviceMesh


def override_trainers(plugin_type: type[Any]) -> None:
    """Replace methods of the trainer classes that have been imported, for trainers with a plugin of this type."""

    def plugin_of(trainer: Any) -> tuple[Any] | None:
        plugin = getattr(getattr(trainer, "accelerator", None), "parallelism_config", None)
        return (plugin,) if isinstance(plugin, plugin_type) and plugin.tp_enabled else None

    def plugin_with_states_of(trainer: Any) -> tuple[Any] | None:
        plugin = getattr(getattr(trainer, "accelerator", None), "parallelism_config", None)
        divided = isinstance(plugin, plugin_type) and plugin.zero1
        return (plugin,) if divided else plugin_of(trainer)

    def view_of(owner: Any) -> tuple[ReplicaView] | None:
        view = current_view()
        return (view,) if view is not None else None

    install_for_all((*OVERRIDES, *OVERRIDES_OF_LOSSES, *OVERRIDES_OF_REWARDS, *vllm.OVERRIDES), plugin_of)
    install_for_all(OVERRIDES_OF_STATES, plugin_with_states_of)

    def config_of(trainer: Any) -> tuple[Any] | None:
        config = getattr(getattr(trainer, "args", None), "parallelism_config", None)
        return (config,) if isinstance(config, plugin_type) and config.tp_size > 1 else None

    install_for_all(OVERRIDES_OF_MAIN, view_of)
    install_for_all((*OVERRIDES_OF_SMOOTHERS, *fused_heads.OVERRIDES), lambda owner: ())
    install_for_all(OVERRIDES_OF_SETTINGS, config_of)
    install_for_all(OVERRIDES_OF_ARGUMENTS, lambda args: (plugin_type,))
    install_for_all(OVERRIDES_OF_ACCELERATORS, lambda trainer: (plugin_type,))


# ---- counting -------------------------------------------------------------------------------------------------------


def _get_tp_size(plugin: Config, stock: Callable, trainer: Any, /) -> int:
    """`get_tp_size` asks a model that transformers has sharded before the accelerator, which counts replicas."""
    return 1


def _post_init(plugin_type: type[Any], stock: Callable, args: Any, /) -> None:
    """`__post_init__` starts the process group, and configs of TRL count its ranks before there is an accelerator."""
    stock()
    plugin = args.parallelism_config
    if isinstance(plugin, plugin_type) and plugin.tp_size > 1 and current_view() is None:
        if dist.is_initialized() and args.world_size == dist.get_world_size() > 1:
            plugin.present_replicas(args.device.type)


# ---- the main process -----------------------------------------------------------------------------------------------


def _on_main(view: ReplicaView, stock: Callable, args: Any, /) -> bool:
    """`should_save`, `should_log` and `is_world_process_zero` take process 0 for one rank; it is a replica."""
    return stock() and (view.is_main or view.replica > 0)


def _main_process_first(
    view: ReplicaView, stock: Callable, args: Any, /, local: bool = True, desc: str = "work"
) -> AbstractContextManager[None]:
    """`main_process_first` lets all ranks of a single replica go at once."""
    if view.dp_size > 1:
        return stock(local, desc)
    state = args.distributed_state
    return state.local_main_process_first() if local else state.main_process_first()


def _build_accelerator_args(plugin: Config, stock: Callable, trainer: Any, /, **kwargs: Any) -> dict[str, Any]:
    """`_build_accelerator_args` always gives DDP settings, in which a user can say nothing of bucket views."""
    found = stock(**kwargs)
    for handler in found.get("kwargs_handlers", ()):
        if isinstance(handler, DistributedDataParallelKwargs):
            left_to_plugin(handler)
    return found


def _create_accelerator(plugin_type: type[Any], stock: Callable, trainer: Any, /) -> None:
    """After `create_accelerator_and_postprocess`, `use_liger_kernel` would put Liger's loss with the head inside in.

    That multiplies with the whole head. The loss of shards takes its place, as TRL's own does, by the same setting.
    """
    stock()
    plugin, args = trainer.accelerator.parallelism_config, trainer.args
    if isinstance(plugin, plugin_type) and plugin.tp_enabled and plugin.loss_parallel is not False:
        if getattr(args, "use_liger_kernel", False):
            args.liger_kernel_config = {"fused_linear_cross_entropy": False, **(args.liger_kernel_config or {})}


# ---- training -------------------------------------------------------------------------------------------------------


def _train(plugin: Config, stock: Callable, trainer: Any, /, *args: Any, **kwargs: Any) -> Any:
    """`evaluation_loop` marks the model as prepared, and training then continues without DDP (so it does upstream)."""
    trainer.model.__dict__.pop("_is_accelerate_prepared", None)
    return stock(*args, **kwargs)


def _move_model_to_device(
    plugin: Config, stock: Callable, trainer: Any, /, model: nn.Module, device: torch.device
) -> None:
    """`__init__` and `train` move a model to the GPU before it is prepared, all of it to each."""
    if holds_shards(model) or getattr(model, "hf_device_map", None) is not None:
        stock(model, device)
    else:
        wait_for_prepare(model, torch.device(device))


def _prepare_loss(plugin: Config, stock: Callable, trainer: Any, /, loss: Any, model: nn.Module) -> Any:
    """`prepare_loss` moves a loss to where its model is, which is yet to be moved."""
    prepared, device = stock(loss, model), waits_for(model)
    if device is not None:
        move_but_for(model, prepared, device)
    return prepared


def _hyperparameter_search(plugin: Config, stock: Callable, trainer: Any, /, *args: Any, **kwargs: Any) -> None:
    """`hyperparameter_search` starts trials on the main process alone, or in processes of its own."""
    raise NotImplementedError(
        f"Trainer.hyperparameter_search is not supported with tp_size={plugin.device_mesh['tp'].size()}: its trials "
        "know nothing of the ranks of a replica. Search with tp_size=1 on a smaller model, or start one run for each "
        "setting."
    )


def _compute_loss(
    plugin: Config,
    stock: Callable,
    trainer: Any,
    /,
    model: Any,
    inputs: Any,
    return_outputs: bool = False,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """`compute_loss` takes the model's own loss, or smooths it, and nobody sees logits that are not asked for."""
    if return_outputs or getattr(trainer, "compute_loss_func", None) is not None:
        return stock(model, inputs, return_outputs, *args, **kwargs)
    with losses_only():
        return stock(model, inputs, return_outputs, *args, **kwargs)


def _smooth(
    stock: Callable,
    smoother: Any,
    /,
    model_output: Any,
    labels: Tensor,
    shift_labels: bool = False,
    num_items_in_batch: Any = None,
) -> Tensor:
    """`LabelSmoother` takes the log of a softmax of full logits; what it computes is a smoothed cross-entropy."""
    logits = model_output["logits"] if isinstance(model_output, dict) else model_output[0]
    if not isinstance(logits, DeferredLogits):
        return stock(model_output, labels, shift_labels, num_items_in_batch)
    if shift_labels:
        logits, labels = logits[..., :-1, :], labels[..., 1:]
    logits, labels = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    single = logits.to(torch.promote_types(logits.dtype, torch.float32))
    options = {"ignore_index": smoother.ignore_index, "label_smoothing": smoother.epsilon}
    if num_items_in_batch is None:
        return functional.cross_entropy(single, labels, **options)
    if torch.is_tensor(num_items_in_batch):
        num_items_in_batch = num_items_in_batch.to(logits.device)
    return functional.cross_entropy(single, labels, reduction="sum", **options) / num_items_in_batch


# ---- saving and loading ---------------------------------------------------------------------------------------------


def _save_model(
    plugin: Config, stock: Callable, trainer: Any, /, output_dir: str | None = None, *args: Any, **kwargs: Any
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
    plugin: Config, stock: Callable, trainer: Any, /, output_dir: str | None = None, state_dict: dict | None = None
) -> None:
    """`_save` returns early on all but the main process, which then has its own shards only."""
    if state_dict is not None:
        return stock(output_dir, state_dict=state_dict)

    def write(state: dict[str, Any]) -> None:
        stock(output_dir, state_dict=state)

    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    export(model, "Trainer.save_model", write, output_dir or trainer.args.output_dir)


def _save_optimizer_and_scheduler(plugin: Config, stock: Callable, trainer: Any, /, output_dir: str) -> None:
    """`_save_optimizer_and_scheduler` writes the main process's state: make that the unsharded one."""
    state = full_optimizer_state(trainer.optimizer, keep=trainer.args.should_save)
    with attributes(trainer, optimizer=SimpleNamespace(state_dict=lambda: state)):
        stock(output_dir)


def _save_rng_state(plugin: Config, stock: Callable, trainer: Any, /, output_dir: str) -> None:
    """`_save_rng_state` writes a file for each process, whose ranks share one random state."""
    if plugin.device_mesh.get_local_rank("tp") == 0:
        stock(output_dir)


def _load_rng_state(plugin: Config, stock: Callable, trainer: Any, /, checkpoint: str | None) -> None:
    """`_load_rng_state` gives each rank what the writer of its replica's file knew of that rank's GPU: nothing.

    Only the stream of the writer's own GPU has been drawn from, by its process; that is the replica's.
    """
    stock(checkpoint)
    if checkpoint is not None:
        agree_on_randomness(plugin.device_mesh["tp"])


# ---- RL in TRL ------------------------------------------------------------------------------------------------------


def _calculate_rewards(plugin: Config, stock: Callable, trainer: Any, /, *args: Any, **kwargs: Any) -> Any:
    """`_calculate_rewards` asks reward functions, or a judge elsewhere, who may say something else to a peer."""
    rewards = stock(*args, **kwargs)
    send_first_rank(plugin.device_mesh["tp"], rewards)
    return rewards


def _trainer(name: str, function: Callable[..., Any], line: int, reason: str, **options: Any) -> Override:
    place = f"transformers 5.23, trainer.py:{line}"
    return Override("transformers.trainer.Trainer", name, function, place, reason, **options)


def _arguments(name: str, function: Callable[..., Any], line: int, reason: str) -> Override:
    place = f"transformers 5.23, training_args.py:{line}"
    return Override("transformers.training_args.TrainingArguments", name, function, place, reason)


_ON_MAIN = "in older releases (5.20) calls _save on the main process alone"
_STATE = ("_save_optimizer_and_scheduler", _save_optimizer_and_scheduler, 3513, "writes the main process's state")

#: For trainers whose accelerator has the plugin.
OVERRIDES = (
    _trainer("get_tp_size", _get_tp_size, 2591, "asks the model before the accelerator"),
    _trainer("compute_loss", _compute_loss, 2114, "gathers logits for a loss alone", counts=False),
    _trainer("train", _train, 1450, "takes a model that was only evaluated for one that is wrapped in DDP"),
    _trainer("_move_model_to_device", _move_model_to_device, 4750, "puts all of the model on each GPU", counts=False),
    _trainer(
        *("hyperparameter_search", _hyperparameter_search, 4502, "starts trials on the main process alone"),
        counts=False,
    ),
    _trainer("save_model", _save_model, 4077, _ON_MAIN, needs=("_save",)),
    _trainer("_save", _save, 4131, "writes the main process's shards"),
    _trainer("_save_rng_state", _save_rng_state, 3462, "lets the ranks of a replica write one file", counts=False),
    _trainer("_load_rng_state", _load_rng_state, 3841, "gives peers states of GPUs that nobody drew from"),
)

#: For trainers that are about to make their accelerator.
OVERRIDES_OF_SETTINGS = (
    _trainer(
        *("_build_accelerator_args", _build_accelerator_args, 741, "gives DDP settings where the user gave none"),
        counts=False,
    ),
)

#: For all trainers, of which it is not known yet whether their accelerator will have the plugin.
OVERRIDES_OF_ACCELERATORS = (
    _trainer(
        *("create_accelerator_and_postprocess", _create_accelerator, 806, "lets Liger read the whole head"),
        counts=False,
    ),
)

#: For trainers whose accelerator has the plugin, or with it zero1 alone.
OVERRIDES_OF_STATES = (_trainer(*_STATE, needs=("optimizer",)),)

#: For all label smoothers: those of a plugin's trainers may meet deferred logits.
OVERRIDES_OF_SMOOTHERS = (
    Override(
        *("transformers.trainer_pt_utils.LabelSmoother", "__call__", _smooth),
        *("transformers 5.23, trainer_pt_utils.py:448", "needs full logits"),
        counts=False,
    ),
)

#: For trainers whose completions are judged.
OVERRIDES_OF_REWARDS = tuple(
    Override(
        *(f"trl.trainer.{name}_trainer.{name.upper()}Trainer", "_calculate_rewards", _calculate_rewards),
        *(f"trl 1.16, trainer/{name}_trainer.py:{line}", "lets each rank of a replica judge by itself"),
        counts=False,
    )
    for name, line in (("grpo", 1579), ("rloo", 1148))
)

#: For trainers of sentence-transformers.
OVERRIDES_OF_LOSSES = (
    Override(
        *("sentence_transformers.base.trainer.BaseTrainer", "prepare_loss", _prepare_loss),
        *("sentence_transformers 6.2, base/trainer.py:454", "moves a loss to where its model waits for `prepare`"),
        counts=False,
    ),
)

#: While replicas present themselves as processes.
OVERRIDES_OF_MAIN = (
    _trainer("is_world_process_zero", _on_main, 4739, "is true on all ranks of the first replica"),
    _arguments("should_save", _on_main, 2053, "is true on all ranks of the first replica"),
    _arguments("should_log", _on_main, 2040, "is true on all ranks of the first replica"),
    _arguments("main_process_first", _main_process_first, 2103, "waits for nobody with one replica"),
)

#: For arguments with the plugin.
OVERRIDES_OF_ARGUMENTS = (
    _arguments("__post_init__", _post_init, 1522, "is followed by counting, before there is an accelerator"),
)
