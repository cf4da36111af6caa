"""A full tensor of which every rank holds a part, that is joined when somebody computes with it, and not before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._pytree import tree_map_only

from .collectives import gather_parts
from .layout import Layout

__all__ = ["ComputedWhenUsed", "GatheredWhenUsed", "gathered_when_used"]


class ComputedWhenUsed(Tensor):
    """Stands for a tensor whose size, type and device are known, and whose values take a collective.

    They are computed when an operation wants them, below autograd: what is computed from them leads back to the
    function that has made this one, and so to its gradient.
    """

    _full: Tensor | None  # its values, once they are computed

    def full_values(self) -> Tensor:
        """Without a gradient. Collective at the first call."""
        raise NotImplementedError

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub has it as a method
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = tree_map_only(ComputedWhenUsed, lambda tensor: tensor.full_values(), (args, kwargs or {}))
        return func(*args, **kwargs)


class GatheredWhenUsed(ComputedWhenUsed):
    """Stands for the full tensor: its size, type and device are known, its values are gathered when an operation wants
    them, once. The gradient of the full tensor has to be the same on all ranks; this rank keeps its slice of it.

    Whoever knows how to compute with the parts takes `local` instead.
    """

    local: Tensor  # this rank's part, with its gradient
    spread: Layout  # how the ranks hold it
    mesh: DeviceMesh
    shared: bool  # whether code that knows how may compute with the parts
    _may_gather: Callable[[], bool]

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # joins nothing
        return f"GatheredWhenUsed({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @torch.no_grad()
    def full_values(self) -> Tensor:
        if self._full is None:
            if not self._may_gather():
                raise RuntimeError(
                    f"a sharded weight of full size {tuple(self.shape)} was read in a model's forward and is used "
                    "after it, where the other ranks may not be. Use it within the forward, or read it by "
                    "`full_state_dict`."
                )
            parts = gather_parts(self.mesh, self.local.detach(), self.spread.dim, self.spread.sizes)
            self._full = torch.cat(parts, self.spread.dim)
        return self._full


def gathered_when_used(
    mesh: DeviceMesh, local: Tensor, layout: Layout, may_gather: Callable[[], bool], shared: bool = False
) -> GatheredWhenUsed:
    """The full tensor. Its first use is collective over `mesh`.

    Args:
        mesh: One-dimensional tensor-parallel mesh.
        local: This rank's part, one unbroken range.
        layout: How the ranks hold it.
        may_gather: Whether all ranks do alike what this one does now; the first use is an error where they do not.
        shared: See `GatheredWhenUsed`.
    """
    full = _GatherLater.apply(mesh, local, layout)
    full.local, full.spread, full.mesh, full.shared, full._may_gather = local, layout, mesh, shared, may_gather
    return full


class _GatherLater(torch.autograd.Function):
    """Forward nothing; backward keep this rank's slice."""

    @staticmethod
    def forward(ctx: Any, mesh: DeviceMesh, local: Tensor, layout: Layout) -> Tensor:
        sizes, rank = layout.sizes, mesh.get_local_rank()
        ctx.dim, ctx.start, ctx.length = layout.dim, sum(sizes[:rank]), sizes[rank]
        shape = [*local.shape]
        shape[layout.dim] = sum(sizes)
        full = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            GatheredWhenUsed, shape, dtype=local.dtype, device=local.device
        )
        full._full = None
        return full

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return None, grad.narrow(ctx.dim, ctx.start, ctx.length).contiguous(), None
