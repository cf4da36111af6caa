"""Methods of a model that have to know that its weights are sharded."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ..checkpoint.export import export, leave_it, takes_state_dict
from ..core.marked import mark_state_dict
from ..core.override import Override, attributes, install
from ..core.shard import elements_elsewhere, shard_info
from ..core.slices import RESIZING
from .generation import generate
from .initialization import init_weights, reset_parameters
from .peft_methods import OVERRIDES as PEFT_OVERRIDES

__all__ = ["INITIALIZING", "OVERRIDES", "SAVING", "install_methods", "install_saving"]


def install_methods(model: nn.Module, mesh: DeviceMesh, adapted: Sequence[nn.Module]) -> None:
    """Let the methods of a sharded model, and of the `PeftModel`s in it, take that into account."""
    install_saving(model)
    for owner in (model, *(each.get_base_model() for each in adapted)):
        install(owner, (RESIZING,))
    for each in adapted:
        install(each, PEFT_OVERRIDES)
    install(model, (GENERATING,), mesh)
    for module in model.modules():
        install(module, INITIALIZING, mesh)


def install_saving(model: nn.Module) -> None:
    """Let `save_pretrained` of every module in `model`, where it takes a state dict, write the full weights.

    An encoder in a model of embeddings, a language model in a multimodal one, what an adapter is put on: what holds
    them saves them by their own method. And let no state dict be written to a file that has this rank's shards.
    """
    for module in model.modules():
        if takes_state_dict(module):
            install(module, SAVING)
        mark_state_dict(module)


def save_pretrained(
    stock: Callable,
    model: nn.Module,
    /,
    save_directory: str | os.PathLike,
    is_main_process: bool = True,
    state_dict: dict[str, Tensor] | None = None,
    *args: Any,
    **kwargs: Any,
) -> None:
    """The model's own `save_pretrained`, with the full weights. Collective: call it on every rank."""
    if kwargs.get("distributed_checkpoint"):
        raise ValueError(
            "save_pretrained(distributed_checkpoint=True) knows only models that transformers has sharded. Leave "
            "it out for an ordinary checkpoint, or save by accelerator.save_state to resume from."
        )

    def write(state: dict[str, Any]) -> None:
        with _full_parameters(model):
            stock(save_directory, is_main_process, state, *args, **kwargs)

    if state_dict is not None:
        write(state_dict)
    else:
        export(model, "save_pretrained", write if is_main_process else leave_it, save_directory)


def _full_parameters(model: nn.Module) -> AbstractContextManager[None]:
    """Let `model.get_parameter`, which some conversions ask for a shape, give one with the unsharded shape."""
    return attributes(model, get_parameter=partial(_full_parameter, model))


def _full_parameter(model: nn.Module, name: str) -> nn.Parameter:
    param = type(model).get_parameter(model, name)
    info = shard_info(param)
    if info is None or not info.is_sharded:
        return param
    return nn.Parameter(torch.empty(info.global_shape, dtype=param.dtype, device="meta"), requires_grad=False)


def num_parameters(
    stock: Callable, model: nn.Module, /, only_trainable: bool = False, exclude_embeddings: bool = False
) -> int:
    """The model's own `num_parameters`, of the unsharded model: it goes into checkpoints and FLOP counts."""
    count = stock(only_trainable, exclude_embeddings)
    left_out: set[int] = set()
    if exclude_embeddings:
        left_out = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for param in model.parameters():
        if id(param) not in left_out and (param.requires_grad or not only_trainable):
            count += elements_elsewhere(param)
    return count


def _row(name: str, function: Callable[..., Any], place: str, reason: str) -> Override:
    return Override(
        "transformers.modeling_utils.PreTrainedModel", name, function, f"transformers 5.23, {place}", reason
    )


SAVING = (
    _row("save_pretrained", save_pretrained, "modeling_utils.py:3310", "writes this rank's shards"),
    _row("num_parameters", num_parameters, "modeling_utils.py:914", "counts this rank's shards"),
)
GENERATING = Override(
    "transformers.generation.utils.GenerationMixin",
    "generate",
    generate,
    "transformers 5.23, generation/utils.py:2581",
    "draws other tokens on each rank, and stops by its own clock",
    counts=False,  # it is public: whoever calls it would know
)
INITIALIZING = (
    _row("_init_weights", init_weights, "modeling_utils.py:2294", "draws each rank's part by itself"),
    Override(
        *("torch.nn.Linear", "reset_parameters", reset_parameters, "torch 2.13, each module's own"),
        "draws each rank's part by itself, at the scale of a part",
        counts=False,
    ),
)

OVERRIDES = (*SAVING, RESIZING, GENERATING, *INITIALIZING)
