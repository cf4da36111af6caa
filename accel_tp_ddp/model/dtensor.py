"""DTensor parameters to local ones, and back for the duration of a forward.

A module that computes on DTensors keeps its parameters as plain local `nn.Parameter`s, whose names, order and identity
never change. A pre-hook on the module that owns them puts DTensors made from them in their place, a hook that always
runs takes them out again, so it also holds for exceptions and for recomputation under activation checkpointing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate

from ..core.layout import Layout, Ranges
from ..core.shard import ShardInfo, mark_shard, remember_shards, restore_shards, shard_info

__all__ = ["localize_with_map"]


def localize_with_map(
    model: nn.Module, keep: Mapping[str, nn.Parameter] | None = None
) -> dict[nn.Parameter, nn.Parameter]:
    """Localize in place, and tell which local parameter took the place of which DTensor, for optimizers made earlier.

    Args:
        model: Module to change in place.
        keep: Plain parameters by name that were there before the model was parallelized; where given, the local
            shard goes into that very object.

    Returns:
        Old parameter to new one, for each parameter that was a DTensor.
    """
    owners = [
        (name, module, {key: param for key, param in module._parameters.items() if isinstance(param, DTensor)})
        for name, module in model.named_modules()
    ]
    for name, _, params in owners:  # all of them, before any is changed
        for key, param in params.items():
            _check_placements(f"{name}.{key}" if name else key, param)

    keep = keep or {}
    mapping: dict[nn.Parameter, nn.Parameter] = {}
    by_kept: dict[int, nn.Parameter] = {}
    for name, module, params in owners:
        for key, param in params.items():
            full_name = f"{name}.{key}" if name else key
            if param not in mapping:
                kept = keep.get(full_name)
                if kept is not None and id(kept) in by_kept:
                    mapping[param] = by_kept[id(kept)]  # tied weights that were distributed one by one
                    _check_tied(full_name, mapping[param], param)
                else:
                    mapping[param] = _local_parameter(param, kept)
                    if kept is not None:
                        by_kept[id(kept)] = mapping[param]
            module._parameters[key] = mapping[param]
        if params:
            shards = {key: info for key, param in params.items() if (info := shard_info(mapping[param])) is not None}
            remember_shards(module, shards)
            hook = _ReconstructHook(shards)
            module.register_forward_pre_hook(hook.reconstruct, prepend=True)
            module.register_forward_hook(hook.localize, always_call=True)
    return mapping


class _ReconstructHook:
    """The two hooks of one module. Holds no process group and no tensor, so the module can be copied and pickled."""

    def __init__(self, shards: dict[str, ShardInfo]):
        self.shards = shards
        self.strides = {key: torch.empty(info.global_shape, device="meta").stride() for key, info in shards.items()}
        self._locals: list[dict[str, Any]] = []

    def reconstruct(self, module: nn.Module, args: Any) -> None:
        params: dict[str, Any] = module._parameters
        local = {key: params[key] for key in self.shards if not isinstance(params[key], DTensor)}
        self._locals.append(local)
        for key, param in local.items():
            info = self.shards[key]
            if shard_info(param) is None:
                restore_shards(module)
            params[key] = DTensor.from_local(
                param,
                info.mesh,
                info.placements,
                run_check=False,
                shape=info.global_shape,
                stride=self.strides[key],
            )

    def localize(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._locals:
            module._parameters.update(self._locals.pop())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_locals": []}


def _local_parameter(param: Any, kept: nn.Parameter | None) -> nn.Parameter:
    info = shard_info_of_dtensor(param)
    local = param.detach().to_local().contiguous()
    if kept is None:
        result = nn.Parameter(local, requires_grad=param.requires_grad)
    else:
        result, result.data = kept, local
    if param.grad is not None:
        grad = param.grad.redistribute(placements=param.placements) if isinstance(param.grad, DTensor) else param.grad
        result.grad = grad.to_local() if isinstance(grad, DTensor) else info.local_part(grad)
    mark_shard(result, info)
    return result


def shard_info_of_dtensor(tensor: DTensor) -> ShardInfo:
    """The layout of a DTensor on a one-dimensional mesh; exact for every placement that cuts one dimension."""
    placement: Any  # replicated, or one of several kinds of shards
    (placement,) = tensor.placements
    shape, mesh = tensor.shape, tensor.device_mesh
    if isinstance(placement, Replicate):
        return ShardInfo(mesh, tensor.placements, shape, None)
    dim = placement.dim % len(shape)
    # Cut the indices as the placement cuts the tensor: also right for strided (packed) shards.
    index_shape = [1] * len(shape)
    index_shape[dim] = shape[dim]
    indices = torch.arange(shape[dim]).view(index_shape)
    pieces, _ = placement._split_tensor(indices, mesh.size(), with_padding=False, contiguous=True)
    return ShardInfo(
        mesh, tensor.placements, shape, Layout(dim, tuple(_as_ranges(p.flatten().tolist()) for p in pieces))
    )


def _as_ranges(indices: list[int]) -> Ranges:
    ranges: list[tuple[int, int]] = []
    for index in indices:
        if ranges and ranges[-1][1] == index:
            ranges[-1] = (ranges[-1][0], index + 1)
        else:
            ranges.append((index, index + 1))
    return tuple(ranges) or ((0, 0),)


def _check_placements(name: str, param: DTensor) -> None:
    if param.device_mesh.ndim != 1 or any(placement.is_partial() for placement in param.placements):
        raise ValueError(
            f"`{name}` is a DTensor of size {tuple(param.shape)} on {param.device_mesh} with placements "
            f"{param.placements}; a tensor-parallel parameter lies on the one-dimensional `tp` mesh, sharded or "
            'replicated. Parallelize the model with `accelerator.torch_device_mesh["tp"]`, and without FSDP.'
        )


def _check_tied(name: str, kept: nn.Parameter, param: DTensor) -> None:
    if shard_info(kept).layout != shard_info_of_dtensor(param).layout:
        raise ValueError(
            f"`{name}` of size {tuple(param.shape)} is tied to another weight that is sharded differently "
            f"({shard_info(kept).placements} against {param.placements}). Give both modules styles that cut the same "
            "dimension."
        )
