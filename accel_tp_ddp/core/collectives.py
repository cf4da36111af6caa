"""Every compute collective of the package, each named with its forward and its backward.

| function          | forward                      | backward                             |
| ----------------- | ---------------------------- | ------------------------------------ |
| `copy_to_tp`      | identity                     | all-reduce (sum)                     |
| `reduce_from_tp`  | all-reduce (sum)             | identity                             |
| `gather_from_tp`  | all-gather along a dimension | keep this rank's slice               |
| `scatter_to_tp`   | keep this rank's slice       | all-gather along a dimension         |
| `gather_to_tp`    | all-gather along a dimension | reduce-scatter (sum) along it        |
| `split_from_tp`   | reduce-scatter (sum)         | all-gather along a dimension         |
| `..._meanwhile`   | as without                   | as without, beside other work        |
| `add_share`       | divide by the ranks          | identity                             |
| `gather_replicas` | all-gather of tensors        | all-reduce (sum), keep the own one   |

The pairs are Megatron-LM's f/g functions (arXiv:1909.08053, section 3): `copy_to_tp` opens a tensor-parallel region,
`reduce_from_tp` closes one. With the sequence sharded outside of regions `gather_to_tp` and `split_from_tp` do that
instead, the functions g-bar and g of arXiv:2205.05198, section 4.2.2. All take a one-dimensional mesh, the
tensor-parallel one but for `gather_replicas`, and change their input in place only where they are told that it is
`fresh`. `send_rank` and `send_first_rank`, of set-up
and between steps, do that too, and have no backward. Nor have `gather_parts` and `gather_whole` (full tensors),
`object_of_first_rank` (generated tokens), `on_any_rank` and `differ_over_ranks` (questions between steps).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.compiler import is_compiling
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _resolve_process_group

from .control import first_object
from .layout import Shared

try:
    from torch._C._autograd import CreationMeta, _set_creation_meta
except ImportError:  # it is torch's own, for meta tensors: another release may not have it
    _set_creation_meta = None  # type: ignore[assignment]

__all__ = [
    "ABSENT",
    "add_share",
    "copy_to_tp",
    "copy_to_tp_meanwhile",
    "differ_over_ranks",
    "exchange",
    "gather_from_tp",
    "gather_into",
    "gather_parts",
    "gather_replicas",
    "gather_to_tp",
    "gather_to_tp_meanwhile",
    "gather_whole",
    "object_of_first_rank",
    "on_any_rank",
    "reduce_from_tp",
    "scatter_to_tp",
    "send_first_rank",
    "send_rank",
    "start_gather_whole",
    "split_from_tp",
]

#: Stands for a number that a rank does not have; below every checksum and its negative. See `differ_over_ranks`.
ABSENT = -(1 << 62)
MaybeTensor = TypeVar("MaybeTensor", Tensor, Tensor | None)


def copy_to_tp(mesh: DeviceMesh, *tensors: Tensor, shared: Sequence[Shared | None] = ()) -> tuple[Tensor, ...]:
    """Open a tensor-parallel region: forward identity, backward one all-reduce over all of `tensors` together.

    The sum of the gradients is taken once, when every consumer of every copy has contributed, so modules that share
    an input share the collective, and small parameters with partial gradients ride along for free.

    Args:
        mesh: One-dimensional tensor-parallel mesh.
        tensors: Replicated tensors, any shapes. One that requires no gradient is returned as it is.
        shared: For each tensor None, or which pieces of it other ranks hold too. Only their gradients are summed, each
            over the ranks that hold it.
    """
    if not torch.is_grad_enabled():
        return tensors
    if len(tensors) == 1 and not shared:  # most calls
        (tensor,) = tensors
        return (_copy_one_to_tp(mesh, tensor),) if tensor.requires_grad else tensors
    wanted = [tensor.requires_grad for tensor in tensors]
    if not any(wanted):
        return tensors
    shared = tuple(shared) if shared else (None,) * len(tensors)
    if all(wanted):
        return _CopyToTP.apply(mesh, shared, None, *tensors)
    shared = tuple(pieces for pieces, want in zip(shared, wanted) if want)
    copies = iter(_CopyToTP.apply(mesh, shared, None, *(tensor for tensor, want in zip(tensors, wanted) if want)))
    return tuple(next(copies) if want else tensor for tensor, want in zip(tensors, wanted))


def copy_to_tp_meanwhile(
    mesh: DeviceMesh,
    tensors: Sequence[Tensor],
    shared: Sequence[Shared | None],
    others: Sequence[Tensor],
    meanwhile: Callable[[], Sequence[Tensor | None]],
) -> tuple[Tensor, ...]:
    """`copy_to_tp`, whose all-reduce is under way while gradients of other tensors are computed.

    It is waited for in the same node of the graph, so every rank starts what follows, such as DDP's buckets, after it.

    Args:
        mesh: One-dimensional tensor-parallel mesh.
        tensors: See `copy_to_tp`; all of them require a gradient.
        shared: See `copy_to_tp`, one for each of `tensors`.
        others: Tensors that pass, and whose gradients nobody else gives.
        meanwhile: Computes the gradients of `others`.

    Returns:
        Copies of `tensors`, then of `others`.
    """
    return _CopyToTP.apply(mesh, tuple(shared), meanwhile, *tensors, *others)


def reduce_from_tp(mesh: DeviceMesh, tensor: Tensor, fresh: bool = False) -> Tensor:
    """Close a tensor-parallel region: forward sums the ranks' partial `tensor`s, backward identity.

    Args:
        mesh: One-dimensional tensor-parallel mesh.
        tensor: This rank's term.
        fresh: Whether the operation that has made `tensor` does not need its value any more, nor anybody else, as with
            a matrix product's: it is then summed up in place, and is the result.
    """
    # A view's base would have to follow, and the compiler decides for itself what it does in place.
    own = fresh and not (tensor.is_leaf and tensor.requires_grad) and tensor._base is None and tensor.is_contiguous()
    if not own or is_compiling():
        return _ReduceFromTP.apply(mesh, tensor)
    _sum_in_place(mesh, tensor.detach())  # past autograd, as the backward is the identity
    return tensor


def gather_from_tp(mesh: DeviceMesh, tensor: Tensor, dim: int, sizes: Sequence[int]) -> Tensor:
    """Forward concatenates the ranks' slices along `dim`, backward keeps this rank's slice.

    Right where what follows is computed alike on all ranks, so that the incoming gradient is replicated.

    Args:
        mesh: One-dimensional tensor-parallel mesh.
        tensor: This rank's slice; every other dimension is equal on all ranks.
        dim: Dimension that is sharded.
        sizes: Length of each rank's slice along `dim`, in rank order; they may differ.
    """
    return _GatherFromTP.apply(mesh, tensor, dim, tuple(sizes))


def scatter_to_tp(mesh: DeviceMesh, tensor: Tensor, dim: int, sizes: Sequence[int]) -> Tensor:
    """Forward keeps this rank's slice of a replicated `tensor` along `dim`, backward joins the ranks' slices."""
    return _ScatterToTP.apply(mesh, tensor, dim, tuple(sizes))


def gather_to_tp(mesh: DeviceMesh, tensor: Tensor, dim: int, sizes: Sequence[int]) -> Tensor:
    """Open a region on a tensor of which each rank has a slice: forward joins the slices, backward reduce-scatter.

    Right where what follows gives each rank a term of the gradient, and the gradient is their sum.

    Args:
        mesh: One-dimensional tensor-parallel mesh.
        tensor: This rank's slice; every other dimension is equal on all ranks.
        dim: Dimension that is sharded.
        sizes: Length of each rank's slice along `dim`, in rank order; they may differ.
    """
    return _GatherToTP.apply(mesh, dim, tuple(sizes), None, tensor)[0]


def gather_to_tp_meanwhile(
    mesh: DeviceMesh,
    tensor: Tensor,
    dim: int,
    sizes: Sequence[int],
    others: Sequence[Tensor],
    meanwhile: Callable[[], Sequence[Tensor | None]],
    before: Callable[[], None],
) -> tuple[Tensor, ...]:
    """`gather_to_tp`, whose reduce-scatter is under way while gradients of `others` are computed.

    See `copy_to_tp_meanwhile`. `before` starts what collectives `meanwhile` waits for, on every rank.
    """
    return _GatherToTP.apply(mesh, dim, tuple(sizes), (before, meanwhile), tensor, *others)


def split_from_tp(mesh: DeviceMesh, tensor: Tensor, dim: int, sizes: Sequence[int]) -> Tensor:
    """Close a region: forward keeps this rank's slice of the sum of the ranks' tensors, backward joins the slices."""
    return _SplitFromTP.apply(mesh, tensor, dim, tuple(sizes))


def add_share(mesh: DeviceMesh, tensor: Tensor) -> Tensor:
    """A replicated term of a sum over the ranks, to be counted once: forward divides by their number.

    Backward identity: the sum's gradient is replicated, so each rank has the full gradient of `tensor` already.
    """
    return _Share.apply(mesh.size(), tensor)


def gather_replicas(mesh: DeviceMesh, tensor: Tensor) -> tuple[Tensor, ...]:
    """Each replica's `tensor`, of equal shape: forward all-gather, backward the sum of the gradients for the own one.

    What `torch.distributed.nn.all_gather` does, whose backward over gloo knows no group but the world (torch 2.13).

    Args:
        mesh: One-dimensional data-parallel mesh.
        tensor: This replica's.
    """
    return _GatherReplicas.apply(mesh, tensor)


def send_first_rank(mesh: DeviceMesh, tensor: Tensor) -> None:
    """Overwrite `tensor` with its values on the first rank of `mesh`, on every rank; of any device and type."""
    send_rank(mesh, tensor, 0)


@torch.no_grad()
def send_rank(mesh: DeviceMesh, tensor: Tensor, rank: int) -> None:
    """Overwrite `tensor` with its values on `rank` of `mesh`, on every rank; of any device and type."""
    group, own = mesh.get_group(), tensor.detach()
    sent = own.to(mesh.device_type).contiguous()  # a backend takes tensors of its own device only, and of some types
    dist.broadcast(sent.view(-1).view(torch.uint8), dist.get_global_rank(group, rank), group=group)
    if sent is not own:  # so `to` or `contiguous` has made a copy
        tensor.copy_(sent)


@torch.no_grad()
def exchange(
    mesh: DeviceMesh,
    outgoing: Sequence[Sequence[Tensor]],
    incoming: Sequence[Sequence[tuple[Sequence[int], torch.dtype]]],
) -> list[list[Tensor]]:
    """Send tensors of any shapes and types from every rank to every rank, by one all-to-all of their bytes.

    Args:
        mesh: One-dimensional tensor-parallel mesh.
        outgoing: For each rank, what it gets from this one.
        incoming: For each rank, shape and type of what this one gets from it.

    Returns:
        What came from each rank: views of one buffer.
    """
    sent = [[(tuple(tensor.shape), tensor.dtype) for tensor in tensors] for tensors in outgoing]
    send, places = _room(sent, mesh.device_type)
    for tensors, own in zip(outgoing, places):
        for tensor, place in zip(tensors, own):
            place.copy_(tensor)
    received, found = _room(incoming, mesh.device_type)
    dist.all_to_all_single(
        received, send, [_bytes(each) for each in incoming], [_bytes(each) for each in sent], group=mesh.get_group()
    )
    return found


def _room(
    wanted: Sequence[Sequence[tuple[Sequence[int], torch.dtype]]], device_type: str
) -> tuple[Tensor, list[list[Tensor]]]:
    """A buffer of bytes, and the tensors in it, each aligned."""
    buffer = torch.empty(sum(_bytes(each) for each in wanted), dtype=torch.uint8, device=device_type)
    views, start = [], 0
    for each in wanted:
        own = []
        for shape, dtype in each:
            size = prod(shape) * dtype.itemsize
            own.append(buffer[start : start + size].view(dtype).view(tuple(shape)))
            start += _aligned(size)
        views.append(own)
    return buffer, views


def _bytes(wanted: Sequence[tuple[Sequence[int], torch.dtype]]) -> int:
    return sum(_aligned(prod(shape) * dtype.itemsize) for shape, dtype in wanted)


def _aligned(size: int) -> int:
    return -(-size // 16) * 16


def object_of_first_rank(mesh: DeviceMesh, data: Any) -> Any:
    """What the first rank of `mesh` holds, on every rank: anything that can be pickled."""
    return first_object(data, mesh.get_group())


@torch.no_grad()
def differ_over_ranks(mesh: DeviceMesh, numbers: Tensor) -> list[bool]:
    """Which of `numbers` any two ranks of `mesh` have unlike; the host waits for the device once.

    Args:
        mesh: One-dimensional mesh.
        numbers: `[count]` integers on its device, as many on each rank, `ABSENT` where this rank has none to compare.
    """
    # max(n) and -max(-n) = min(n) differ if any two ranks do.
    bounds = torch.stack([numbers, torch.where(numbers == ABSENT, numbers, -numbers)])
    dist.all_reduce(bounds, dist.ReduceOp.MAX, group=mesh.get_group())
    return (bounds[0] != -bounds[1]).tolist()


@torch.no_grad()
def on_any_rank(mesh: DeviceMesh, flags: Sequence[bool]) -> list[bool]:
    """Which of `flags` are true on at least one rank of `mesh`; as many flags on each of them."""
    found = torch.tensor(flags, dtype=torch.uint8, device=mesh.device_type)
    dist.all_reduce(found, dist.ReduceOp.MAX, group=mesh.get_group())
    return [bool(flag) for flag in found.tolist()]


class _GatherReplicas(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mesh: DeviceMesh, tensor: Tensor):
        ctx.mesh = mesh
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(mesh.size())]
        dist.all_gather(parts, tensor.contiguous(), group=mesh.get_group())
        return tuple(parts)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads: Tensor):
        total = torch.stack(grads)
        dist.all_reduce(total, group=ctx.mesh.get_group())
        return None, total[ctx.mesh.get_local_rank()]


class _CopyToTP(torch.autograd.Function):
    """Of the first tensors, as many as `shared`, gradients are summed; those of the others `meanwhile` gives."""

    @staticmethod
    def forward(
        ctx,
        mesh: DeviceMesh,
        shared: tuple[Shared | None, ...],
        meanwhile: Callable[[], Sequence[Tensor | None]] | None,
        *tensors: Tensor,
    ):
        ctx.mesh, ctx.shared, ctx.meanwhile, ctx.leaf = mesh, shared, meanwhile, tensors[0].is_leaf
        ctx.set_materialize_grads(False)  # a copy that nobody used adds nothing to the collective
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx, *grads: Tensor | None):
        # Without the wrapper where there is nothing to refuse: it takes longer than the rest.
        return _sum_gradients_once(ctx, *grads) if torch.is_grad_enabled() else _sum_gradients(ctx, *grads)


def _copy_one_to_tp(mesh: DeviceMesh, tensor: Tensor) -> Tensor:
    """`_CopyToTP` of one tensor: a view and a hook on its node, in less of the host's time than a function takes."""
    if is_compiling() or _set_creation_meta is None:
        return _CopyToTP.apply(mesh, (None,), None, tensor)[0]
    copy = tensor.view_as(tensor)
    # So that it cannot be changed in place, as what a function returns: its node, and so the hook, would be gone.
    _set_creation_meta(copy, CreationMeta.IN_CUSTOM_FUNCTION)
    assert copy.grad_fn is not None, "gradients are on, and the tensor requires one"
    copy.grad_fn.register_prehook(partial(_sum_gradient, mesh))
    return copy


def _sum_gradient(mesh: DeviceMesh, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None]:
    (grad,) = grads
    if grad is None:
        return (None,)
    return (_SumOnce.apply(mesh, grad) if torch.is_grad_enabled() else _all_reduce(mesh, grad),)


def _sum_gradients(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    sent = [laid_out(grad, shared) for grad, shared in zip(grads, ctx.shared)]
    others: Sequence[Tensor | None] = ()
    if ctx.meanwhile is None:
        summed = _all_reduce_together(ctx.mesh, sent, first_as_view=not ctx.leaf)
    else:
        finish = _start_together(ctx.mesh, sent, not ctx.leaf, _start_sum)
        others = ctx.meanwhile()
        summed = finish()
    return None, None, None, *(with_shared(*each) for each in zip(grads, summed, ctx.shared)), *others


_sum_gradients_once = torch.autograd.function.once_differentiable(_sum_gradients)


class _ReduceFromTP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mesh: DeviceMesh, tensor: Tensor):
        return _all_reduce(mesh, tensor)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return None, grad


class _SumOnce(_ReduceFromTP):
    """A sum of gradients, which cannot be differentiated again."""

    @staticmethod
    def backward(ctx, grad: Tensor):
        raise RuntimeError("trying to differentiate twice a sum of gradients over the tensor-parallel ranks")


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ranks: int, tensor: Tensor):
        return tensor / ranks

    @staticmethod
    def backward(ctx, grad: Tensor):
        return None, grad


class _GatherFromTP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mesh: DeviceMesh, tensor: Tensor, dim: int, sizes: tuple[int, ...]):
        ctx.mesh, ctx.dim, ctx.sizes = mesh, dim, sizes
        return gather_whole(mesh, tensor, dim, sizes)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return None, _own_slice(ctx.mesh, grad, ctx.dim, ctx.sizes), None, None


class _ScatterToTP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mesh: DeviceMesh, tensor: Tensor, dim: int, sizes: tuple[int, ...]):
        ctx.mesh, ctx.dim, ctx.sizes = mesh, dim, sizes
        return _own_slice(mesh, tensor, dim, sizes)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return None, gather_whole(ctx.mesh, grad, ctx.dim, ctx.sizes), None, None


class _GatherToTP(torch.autograd.Function):
    """The reduce-scatter is for the first tensor; gradients of the others `meanwhile` gives."""

    @staticmethod
    def forward(
        ctx,
        mesh: DeviceMesh,
        dim: int,
        sizes: tuple[int, ...],
        meanwhile: tuple[Callable[[], None], Callable[[], Sequence[Tensor | None]]] | None,
        tensor: Tensor,
        *others: Tensor,
    ):
        ctx.mesh, ctx.dim, ctx.sizes, ctx.meanwhile = mesh, dim, sizes, meanwhile
        ctx.set_materialize_grads(False)
        return gather_whole(mesh, tensor, dim, sizes), *(other.view_as(other) for other in others)

    @staticmethod
    def backward(ctx, *grads: Tensor | None):
        return _scatter_gradient_once(ctx, *grads) if torch.is_grad_enabled() else _scatter_gradient(ctx, *grads)


def _scatter_gradient(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    others: Sequence[Tensor | None] = ()
    if ctx.meanwhile is None:
        scattered = None if grad is None else _reduce_scatter(ctx.mesh, grad, ctx.dim, ctx.sizes)
    else:
        before, meanwhile = ctx.meanwhile
        before()
        finish = None if grad is None else _start_reduce_scatter(ctx.mesh, grad, ctx.dim, ctx.sizes, True)
        others = meanwhile()
        scattered = None if finish is None else finish()
    return None, None, None, None, scattered, *others


_scatter_gradient_once = torch.autograd.function.once_differentiable(_scatter_gradient)


class _SplitFromTP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mesh: DeviceMesh, tensor: Tensor, dim: int, sizes: tuple[int, ...]):
        ctx.mesh, ctx.dim, ctx.sizes = mesh, dim, sizes
        return _reduce_scatter(mesh, tensor, dim, sizes)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return None, gather_whole(ctx.mesh, grad, ctx.dim, ctx.sizes), None, None


def laid_out(tensor: MaybeTensor, shared: Shared | None) -> MaybeTensor:
    """The pieces of `tensor` that other ranks hold too, among all such pieces.

    Those that this rank does not hold stay zero, so one sum over all ranks is a sum for each piece.
    """
    if tensor is None or shared is None:
        return tensor
    shape = list(tensor.shape)
    shape[shared.dim] = shared.total
    everyone = tensor.new_zeros(shape)
    for piece in shared.pieces:
        own = tensor.narrow(shared.dim, piece.start, piece.length)
        everyone.narrow(shared.dim, piece.offset, piece.length).copy_(own)
    return everyone


def with_shared(tensor: MaybeTensor, everyone: MaybeTensor, shared: Shared | None) -> MaybeTensor:
    """A copy of `tensor` with its shared pieces taken from what `laid_out` has made and the ranks have summed."""
    if tensor is None or shared is None:
        return everyone
    result = tensor.clone()
    for piece in shared.pieces:
        own = everyone.narrow(shared.dim, piece.offset, piece.length)
        result.narrow(shared.dim, piece.start, piece.length).copy_(own)
    return result


def _all_reduce(mesh: DeviceMesh, tensor: Tensor) -> Tensor:
    # A copy, because an autograd engine may hand the same tensor to several consumers.
    result = tensor.clone(memory_format=torch.contiguous_format)
    _sum_in_place(mesh, result)
    return result


def _sum_in_place(mesh: DeviceMesh, tensor: Tensor) -> None:
    """`dist.all_reduce`, asked of the group itself where that can be, in half of the host's time."""
    if is_compiling() or tensor.is_complex():  # the compiler does not know the group's method, nor that the complex
        dist.all_reduce(tensor, group=mesh.get_group())
        return
    # `mesh.get_group()`, in a quarter of the time.
    group = _resolve_process_group(mesh._dim_group_names[0])
    work = group.allreduce([tensor], _SUM)
    if work is not None:  # some backends have waited themselves
        work.wait()


def _start_sum(mesh: DeviceMesh, tensor: Tensor) -> dist.Work | None:
    """Start to sum `tensor` over the ranks in place, beside what is computed until the result is waited for."""
    if tensor.is_complex():
        return dist.all_reduce(tensor, group=mesh.get_group(), async_op=True)
    return _resolve_process_group(mesh._dim_group_names[0]).allreduce([tensor], _SUM_MEANWHILE)


def _sum_options(meanwhile: bool) -> dist.AllreduceOptions:
    options = dist.AllreduceOptions()
    options.asyncOp = meanwhile  # if not, NCCL takes the stream that computes, as for `dist.all_reduce`
    return options


_SUM, _SUM_MEANWHILE = _sum_options(False), _sum_options(True)


def _all_reduce_together(
    mesh: DeviceMesh, tensors: Sequence[Tensor | None], first_as_view: bool
) -> list[Tensor | None]:
    """One all-reduce per data type, whatever the number of tensors; `None` stays `None`.

    A part of the common buffer would keep all of it in memory until `zero_grad`, as a parameter's gradient. So results
    are copies, but for the first where `first_as_view` says that it is activations' gradient, which is soon gone.
    """
    return _start_together(mesh, tensors, first_as_view, _sum_in_place)()


def _start_together(
    mesh: DeviceMesh,
    tensors: Sequence[Tensor | None],
    first_as_view: bool,
    start: Callable[[DeviceMesh, Tensor], dist.Work | None],
) -> Callable[[], list[Tensor | None]]:
    """`_all_reduce_together`, begun by `start`; what is returned waits for it and gives the results."""
    results: list[Tensor | None] = list(tensors)
    by_dtype: dict[torch.dtype, list[tuple[int, Tensor]]] = {}
    for index, tensor in enumerate(tensors):
        if tensor is not None:
            by_dtype.setdefault(tensor.dtype, []).append((index, tensor))
    started: list[tuple[list[tuple[int, Tensor]], Tensor, dist.Work | None]] = []
    for alike in by_dtype.values():
        # A copy, because an autograd engine may hand the same tensor to several consumers.
        single = alike[0][1].clone(memory_format=torch.contiguous_format) if len(alike) == 1 else None
        flat = torch.cat([own.reshape(-1) for _, own in alike]) if single is None else single
        started.append((alike, flat, start(mesh, flat)))

    def finish() -> list[Tensor | None]:
        for alike, flat, work in started:
            if work is not None:
                work.wait()
            if len(alike) == 1:
                results[alike[0][0]] = flat
                continue
            for (index, own), part in zip(alike, flat.split([own.numel() for _, own in alike])):
                kept = part if first_as_view and index == 0 else part.clone()
                results[index] = kept.view(own.shape)
        return results

    return finish


def gather_parts(mesh: DeviceMesh, tensor: Tensor, dim: int, sizes: Sequence[int]) -> list[Tensor]:
    """The slices of all ranks, as long as `sizes` says along `dim`, by one all-gather: views of one buffer."""
    # Collectives want equal shapes: pad to the longest slice, and leave the padding out again.
    tensor = _padded(tensor, dim, max(sizes))
    buffer = _one_after_another(mesh, tensor).view(len(sizes), *tensor.shape)
    return [part.narrow(dim, 0, size) for part, size in zip(buffer, sizes)]


def _padded(tensor: Tensor, dim: int, length: int) -> Tensor:
    if tensor.size(dim) == length:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = length
    padded = tensor.new_empty(shape)
    padded.narrow(dim, 0, tensor.size(dim)).copy_(tensor)
    return padded


def start_gather_whole(mesh: DeviceMesh, tensor: Tensor, dim: int, sizes: Sequence[int]) -> Callable[[], Tensor]:
    """`gather_whole`, begun; what is returned waits for it and gives the whole."""
    own = _padded(tensor, dim, max(sizes)).contiguous()
    buffer = own.new_empty((len(sizes), *own.shape))
    work = gather_into(buffer.view(-1), own.view(-1), mesh.get_group(), async_op=True)

    def finish() -> Tensor:
        if work is not None:
            work.wait()
        return torch.cat([part.narrow(dim, 0, size) for part, size in zip(buffer, sizes)], dim)

    return finish


def gather_whole(mesh: DeviceMesh, tensor: Tensor, dim: int, sizes: Sequence[int]) -> Tensor:
    """The slices of all ranks joined along `dim`, by one all-gather and at most one copy."""
    if prod(tensor.shape[: dim % tensor.dim()]) == 1 and len(set(sizes)) == 1:
        return _one_after_another(mesh, tensor, dim)
    return torch.cat(gather_parts(mesh, tensor, dim, sizes), dim)


def _one_after_another(mesh: DeviceMesh, tensor: Tensor, dim: int = 0) -> Tensor:
    """Equal slices of all ranks, joined along the first dimension (of more than one element), without a copy."""
    shape = list(tensor.shape)
    shape[dim] *= mesh.size()
    joined = tensor.new_empty(shape)  # no view, which could not be changed in place
    gather_into(joined.view(-1), tensor.contiguous().view(-1), mesh.get_group())
    return joined


def _reduce_scatter(mesh: DeviceMesh, tensor: Tensor, dim: int, sizes: tuple[int, ...]) -> Tensor:
    """This rank's slice along `dim` of the sum over the ranks, by one reduce-scatter."""
    return _start_reduce_scatter(mesh, tensor, dim, sizes, False)()


def _start_reduce_scatter(
    mesh: DeviceMesh, tensor: Tensor, dim: int, sizes: tuple[int, ...], meanwhile: bool
) -> Callable[[], Tensor]:
    """`_reduce_scatter`, begun; what is returned waits for it, if `meanwhile` more is done, and gives the slice."""
    longest, shape = max(sizes), list(tensor.shape)
    shape[dim] = longest
    if len(set(sizes)) > 1:  # equal shapes are wanted: pad to the longest slice
        parts = tensor.new_zeros((len(sizes), *shape))
        for part, own in zip(parts, tensor.split(sizes, dim)):
            part.narrow(dim, 0, own.size(dim)).copy_(own)
    elif prod(tensor.shape[: dim % tensor.dim()]) == 1:
        parts = tensor.contiguous()  # one after another as they are
    else:
        parts = torch.stack(tensor.split(sizes, dim))
    result = tensor.new_empty(shape)
    # Which is the name since torch 2.13.
    scatter = dist.reduce_scatter_single if hasattr(dist, "reduce_scatter_single") else dist.reduce_scatter_tensor
    work = scatter(result.view(-1), parts.view(-1), group=mesh.get_group(), async_op=meanwhile)
    own_size = sizes[mesh.get_local_rank()]

    def finish() -> Tensor:
        if work is not None:
            work.wait()
        # No view of what is padded, which could not be changed in place.
        return result if own_size == longest else result.narrow(dim, 0, own_size).clone()

    return finish


def gather_into(joined: Tensor, own: Tensor, group: dist.ProcessGroup, async_op: bool = False) -> dist.Work | None:
    """Fill `joined` with the `own` elements of all ranks of a group, one after another; both are contiguous."""
    # The name from torch 2.13 on; the one before warns there.
    gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
    return gather(joined, own, group=group, async_op=async_op)


def _own_slice(mesh: DeviceMesh, tensor: Tensor, dim: int, sizes: tuple[int, ...]) -> Tensor:
    rank = mesh.get_local_rank()
    return tensor.narrow(dim, sum(sizes[:rank]), sizes[rank]).contiguous()
