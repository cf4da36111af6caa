"""Norms and scaling of gradients of which each rank holds a part."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import reduce
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.amp import GradScaler
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from ..core.mesh import tensor_parallel_mesh
from ..core.override import Override, install
from ..core.shard import shard_info

__all__ = ["OVERRIDES", "agree_on_overflow", "clip_grad_norm_", "full_grad_norm", "grad_scaler"]


@torch.no_grad()
def full_grad_norm(
    parameters: Iterable[Tensor],
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """p-norm of the full gradient of `parameters`, as if it were one vector; the same bits on all ranks of a TP group.

    For finite p: (sum over shards of |g|^p, plus |g|^p of replicated parameters once)^(1/p); for infinity the maximum.
    A shard that several ranks hold counts once.

    Args:
        parameters: Localized parameters and others, in any mixture. Those without a gradient are passed over.
        norm_type: p, greater than 0; may be infinity.
        error_if_nonfinite: Raise if the norm is NaN or infinite.
        foreach: As in `torch.nn.utils.clip_grad_norm_`.

    Raises:
        ValueError: If `norm_type` is not greater than 0.
        RuntimeError: See `error_if_nonfinite`; on every rank.
    """
    norm_type = float(norm_type)
    if not norm_type > 0:
        raise ValueError(f"norm_type is {norm_type}; the norm of a sharded gradient needs one greater than 0, or inf.")
    with_grad = [(param, param.grad) for param in parameters if param.grad is not None]
    if not with_grad:
        return torch.tensor(0.0)
    replicated: list[Tensor] = []
    by_mesh: dict[DeviceMesh, list[Tensor]] = {}
    for param, grad in with_grad:
        info = shard_info(param)
        if info is not None and info.is_sharded:
            by_mesh.setdefault(info.mesh, []).extend(info.counted(grad))
        else:
            replicated.append(grad)
    device = with_grad[0][1].device
    dtype = reduce(torch.promote_types, (grad.dtype for _, grad in with_grad))
    total = _power(replicated, norm_type, foreach, device, dtype)
    for mesh, grads in by_mesh.items():
        part = _power(grads, norm_type, foreach, device, dtype)
        operation = dist.ReduceOp.MAX if math.isinf(norm_type) else dist.ReduceOp.SUM
        if mesh.get_local_rank() == 0:  # what is replicated is counted by the first rank, so that all see its value
            part = torch.maximum(part, total) if math.isinf(norm_type) else part + total
        dist.all_reduce(part, operation, group=mesh.get_group())
        total = part
    norm = total if math.isinf(norm_type) else total.pow(1.0 / norm_type)
    if error_if_nonfinite and not torch.isfinite(norm):
        raise RuntimeError(
            f"The total norm of order {norm_type} for gradients from `parameters` is {norm.item()}, so it cannot be "
            "clipped. Pass error_if_nonfinite=False to clip by it anyway."
        )
    return norm.to(dtype)


def _power(
    grads: list[Tensor], norm_type: float, foreach: bool | None, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Sum of |g|^p over `grads`, or the maximum of |g| for infinity, in single precision at least."""
    dtype = torch.promote_types(dtype, torch.float32)
    grads = [grad for grad in grads if grad.numel()]  # a rank may hold an empty part
    if not grads:
        return torch.zeros((), dtype=dtype, device=device)
    norm = torch.nn.utils.get_total_norm(grads, norm_type, error_if_nonfinite=False, foreach=foreach)
    norm = norm.to(device=device, dtype=dtype)
    return norm if math.isinf(norm_type) else norm.pow(norm_type)


def clip_grad_norm_(
    parameters: Iterable[Tensor] | Tensor,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_` by the norm of the full gradient. Collective over the tensor-parallel group.

    Returns:
        The norm before clipping, see `full_grad_norm`.
    """
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    norm = full_grad_norm(parameters, norm_type, error_if_nonfinite, foreach)
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm, foreach)
    return norm


def grad_scaler(mesh: DeviceMesh, device: str = "cuda", **kwargs: Any) -> GradScaler:
    """A `GradScaler` whose overflow check covers the full gradient: an inf on one rank skips the step on all of them.

    Args:
        mesh: The tensor-parallel mesh, or one with a dimension named `tp`.
        device: Device type of the gradients.
        kwargs: As for `torch.amp.GradScaler`: init_scale, growth_factor, backoff_factor, growth_interval, enabled.
    """
    scaler = GradScaler(device=device, **kwargs)
    agree_on_overflow(scaler, tensor_parallel_mesh(mesh))
    return scaler


def agree_on_overflow(scaler: GradScaler, mesh: DeviceMesh) -> None:
    """Let the overflow check of `scaler` cover the gradients of all ranks of `mesh`; it stays the object it was."""
    install(scaler, OVERRIDES, mesh)


@torch.no_grad()
def _unscale_grads_(
    mesh: DeviceMesh,
    stock: Callable[..., dict[torch.device, Tensor]],
    scaler: GradScaler,
    /,
    optimizer: Optimizer,
    inv_scale: Tensor,
    found_inf: Tensor,
    allow_fp16: bool,
) -> dict[torch.device, Tensor]:
    """`unscale_` and, for fused optimizers, `step` come here for a flag of each device: all become the ranks' maximum.

    One all-reduce, of -1 where there is no gradient: that is an error of all ranks, or of none.
    """
    flags = stock(optimizer, inv_scale, found_inf, allow_fp16)
    device = found_inf.device if found_inf.device.type == mesh.device_type else torch.device(mesh.device_type)
    if flags:
        found = torch.stack([flag.to(device).float().reshape(()) for flag in flags.values()]).max()
    else:
        found = torch.tensor(-1.0, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX, group=mesh.get_group())
    for flag in flags.values():
        flag.copy_(found)
    return flags if flags or found.item() < 0 else {found_inf.device: found_inf.copy_(found)}


#: For scalers of gradients that are sharded.
OVERRIDES = (
    Override(
        *(
            "torch.amp.grad_scaler.GradScaler",
            "_unscale_grads_",
            _unscale_grads_,
            "torch 2.13, amp/grad_scaler.py:246",
        ),
        "looks for an overflow in each rank's own shards, and one rank skips a step by itself",
    ),
)
