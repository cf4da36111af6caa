"""Full tensors out of shards: the unsharded state dict and gradients, and ordinary checkpoints made of them."""

from __future__ import annotations

import inspect
import os
from types import MethodType
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from .shard import ShardInfo, shard_info
from .wrappers import unwrap

__all__ = ["full_gradients", "full_state_dict", "save_config", "save_full_checkpoints"]


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The unsharded state dict under the original names, on the CPU. Collective over the tensor-parallel group.

    Tied weights stay one tensor, as in `model.state_dict()`.

    Args:
        model: Bare model, or its DDP wrapper.
    """
    gather = _Gather()
    return {
        name: gather(value, value, shard_info(value)) if isinstance(value, Tensor) else value
        for name, value in unwrap(model).state_dict(keep_vars=True).items()
    }


def full_gradients(model: nn.Module) -> dict[str, Tensor]:
    """The unsharded gradient of each parameter that has one, by name, on the CPU. Collective as `full_state_dict`."""
    gather = _Gather()
    return {
        name: gather(param, param.grad, shard_info(param))
        for name, param in unwrap(model).named_parameters()
        if param.grad is not None
    }


class _Gather:
    """Joins each tensor once, however many names it has."""

    def __init__(self):
        self._seen: dict[int, Tensor] = {}

    def __call__(self, key: Tensor, local: Tensor, info: ShardInfo | None) -> Tensor:
        if id(key) not in self._seen:
            full = info.full_tensor(local) if info is not None else local.detach().clone()
            self._seen[id(key)] = full.cpu()
        return self._seen[id(key)]


def save_full_checkpoints(model: nn.Module) -> None:
    """Let `model.save_pretrained`, where there is one that takes a state dict, write the full weights."""
    method = getattr(type(model), "save_pretrained", None)
    if method is not None and "state_dict" in inspect.signature(method).parameters:
        model.save_pretrained = MethodType(_save_pretrained, model)


def _save_pretrained(
    self: nn.Module,
    save_directory: str | os.PathLike,
    is_main_process: bool = True,
    state_dict: dict[str, Tensor] | None = None,
    *args: Any,
    **kwargs: Any,
) -> None:
    """The model's own `save_pretrained`, with the full weights. Collective: call it on every rank."""
    stock = type(self).save_pretrained
    if state_dict is None:
        state_dict = full_state_dict_of_all(self, "save_pretrained")
        if not is_main_process or dist.get_rank() != 0:
            return
    stock(self, save_directory, is_main_process, state_dict, *args, **kwargs)


def full_state_dict_of_all(model: nn.Module, caller: str) -> dict[str, Tensor]:
    """`full_state_dict`, for callers that scripts often reach on the main process only.

    Raises:
        RuntimeError: If the other ranks do not come within the process group's timeout; it says what to change.
    """
    try:
        return full_state_dict(model)
    except RuntimeError as error:
        raise RuntimeError(
            f"`{caller}` could not gather the sharded weights. Every rank holds a part of them, so every rank has to "
            f"call it: take `{caller}` out of `if accelerator.is_main_process:`, and pass "
            "`is_main_process=accelerator.is_main_process` where it takes that."
        ) from error


def save_config(model: nn.Module, save_directory: str | os.PathLike) -> None:
    """Write the configs that a checkpoint needs for `from_pretrained`, where the model has them."""
    for name in ("config", "generation_config"):
        config = getattr(model, name, None)
        if hasattr(config, "save_pretrained"):
            config.save_pretrained(save_directory)
