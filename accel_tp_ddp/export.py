"""Full tensors out of shards: the unsharded state dict and gradients, and ordinary checkpoints made of them."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from . import meeting
from .meeting import missing_peers
from .shard import ShardInfo, restore_shards, shard_info
from .slices import refuse_slices
from .wrappers import unwrap

__all__ = [
    "full_gradients",
    "full_state_dict",
    "full_state_dict_of_all",
    "full_tensors",
    "meet_peers",
    "save_config",
    "save_full_checkpoints",
]


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The unsharded state dict under the original names, on the CPU. Collective over the tensor-parallel group.

    Tied weights stay one tensor, as in `model.state_dict()`.

    Args:
        model: Bare model, or its DDP wrapper.
    """
    model = unwrap(model)
    refuse_slices(model, "full_state_dict")
    restore_shards(model)
    return full_tensors(model.state_dict(keep_vars=True))


def full_tensors(state: Mapping[str, Any]) -> dict[str, Any]:
    """The unsharded tensors of a state dict that was taken with `keep_vars=True`, on the CPU. Collective."""
    gather = _Gather()
    return {
        name: gather(value, value, shard_info(value)) if isinstance(value, Tensor) else value
        for name, value in state.items()
    }


def full_gradients(model: nn.Module) -> dict[str, Tensor]:
    """The unsharded gradient of each parameter that has one, by name, on the CPU. Collective as `full_state_dict`."""
    model, gather = unwrap(model), _Gather()
    restore_shards(model)
    return {
        name: gather(param, param.grad, shard_info(param))
        for name, param in model.named_parameters()
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
        model.save_pretrained = _SavePretrained(model)
        model.num_parameters = _NumParameters(model)


class _SavePretrained:
    """The model's own `save_pretrained`, with the full weights. Collective: call it on every rank.

    An object and no bound function, so that it is copied and pickled together with its model.
    """

    def __init__(self, model: nn.Module):
        self.model = model

    def __call__(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        stock = type(self.model).save_pretrained
        if state_dict is None:
            state_dict = full_state_dict_of_all(self.model, "save_pretrained")
            if not is_main_process or dist.get_rank() != 0:
                return
        stock(self.model, save_directory, is_main_process, state_dict, *args, **kwargs)


class _NumParameters:
    """The model's own `num_parameters`, of the unsharded model: it goes into checkpoints and FLOP counts."""

    def __init__(self, model: nn.Module):
        self.model = model

    def __call__(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        count = type(self.model).num_parameters(self.model, only_trainable, exclude_embeddings)
        left_out: set[int] = set()
        if exclude_embeddings:
            left_out = {id(m.weight) for m in self.model.modules() if isinstance(m, nn.Embedding)}
        for param in self.model.parameters():
            info = shard_info(param)
            if info is not None and id(param) not in left_out and (param.requires_grad or not only_trainable):
                count += info.global_shape.numel() - param.numel()
        return count


def full_state_dict_of_all(model: nn.Module, caller: str) -> dict[str, Tensor]:
    """`full_state_dict`, for callers that a script may have left to the main process alone; see `meet_peers`."""
    meet_peers(model, caller)
    return full_state_dict(model)


def meet_peers(model: nn.Module, caller: str) -> None:
    """Let the ranks of a replica meet, before a collective that a script may have left to the main process alone.

    Raises:
        RuntimeError: On the main process, if the peers of its replica do not come; it says what to change.
    """
    model = unwrap(model)
    restore_shards(model)
    groups = {info.mesh.get_group() for param in model.parameters() if (info := shard_info(param)) is not None}
    for group in sorted(groups, key=lambda group: group.group_name):  # the same order on all ranks
        _meet_main_process(group, caller)


def _meet_main_process(group: dist.ProcessGroup, caller: str) -> None:
    ranks = dist.get_process_group_ranks(group)
    missing = missing_peers(f"{caller}/{group.group_name}", len(ranks) - 1) if 0 in ranks else 0
    if missing:
        raise RuntimeError(
            f"`{caller}` was called on the main process, but {missing} of its {len(ranks) - 1} tensor-parallel peers "
            f"did not come within {meeting.PEERS_TIMEOUT:.0f} s. Each of them holds a part of the weights, so every "
            "rank has to call it: take it out of `if accelerator.is_main_process:`, and pass "
            "`is_main_process=accelerator.is_main_process` where it takes that."
        )


def save_config(model: nn.Module, save_directory: str | os.PathLike) -> None:
    """Write the configs that a checkpoint needs for `from_pretrained`, where the model has them."""
    for name in ("config", "generation_config"):
        config = getattr(model, name, None)
        if hasattr(config, "save_pretrained"):
            config.save_pretrained(save_directory)
