"""Tensors that are read from a file no earlier than needed, and only as far as needed.

transformers converts checkpoints by stacking, concatenating, transposing and splitting what it has read. On a
`LazyTensor` these operations read nothing: they are remembered, and a part of their result is put together from just
those parts of the files that it consists of. Any other operation reads its operands in full and works on ordinary
tensors, so whatever a conversion does, its result is right; only what has to be read differs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..core.layout import Layout

__all__ = ["LazyTensor", "first_row", "own_part", "read_full"]

Box = tuple[tuple[int, int], ...]  # a half-open range of indices for each dimension
_PIECE = 1 << 24  # bytes read at a time, so that a part costs hardly more memory than it takes up in the end
aten = torch.ops.aten


class LazyTensor(torch.Tensor):
    """Stands for a tensor in a file, or for what was made of some of them; knows its shape and dtype."""

    node: _Node

    @staticmethod
    def __new__(cls, node: _Node) -> LazyTensor:
        self = torch.Tensor._make_wrapper_subclass(cls, node.shape, dtype=node.dtype, device=torch.device("cpu"))
        self.node = node
        return self

    @classmethod
    def of(cls, source: Any, shape: Sequence[int], dtype: torch.dtype) -> LazyTensor:
        """A tensor that `source[index]` reads; `source` is a slice of a safetensors file, or a tensor."""
        return cls(_Stored(source, tuple(shape), dtype))

    def read(self, box: Box | None = None, device: torch.device | str = "cpu") -> Tensor:
        """The part of the tensor in `box`, all of it by default, in storage of its own."""
        box = tuple((0, size) for size in self.shape) if box is None else box
        out = torch.empty([stop - start for start, stop in box], dtype=self.dtype, device=device)
        self.node.read_into(out, box)
        return out

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # mypy loses keyword names
        return f"LazyTensor({type(self.node).__name__}, {tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares no classmethod
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if (follow := _FOLLOWED.get(func)) is not None:
            result = follow(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        args, kwargs = tree_map(_read, (args, kwargs or {}))
        return func(*args, **kwargs)


def read_full(tensor: Tensor, device: torch.device | str) -> Tensor:
    """All of a tensor that may be a lazy one, on `device`."""
    return tensor.read(device=device) if isinstance(tensor, LazyTensor) else tensor.to(device)


def own_part(tensor: Tensor, layout: Layout, rank: int, device: torch.device | str) -> Tensor:
    """The part of a full tensor that `rank` holds under `layout`, on `device`, in storage of its own."""
    own, dim = layout.ranges[rank], layout.dim
    if not isinstance(tensor, LazyTensor):
        return torch.cat([tensor.narrow(dim, start, stop - start) for start, stop in own], dim).to(device)
    local = list(tensor.shape)
    local[dim] = layout.sizes[rank]
    out, taken = torch.empty(local, dtype=tensor.dtype, device=device), 0
    everything = tuple((0, size) for size in tensor.shape)
    for start, stop in own:
        tensor.node.read_into(out.narrow(dim, taken, stop - start), _with(everything, dim, (start, stop)))
        taken += stop - start
    return out


def first_row(tensor: Tensor, most: int) -> Tensor:
    """The first `most` elements of the first row: enough to tell one weight from another, cheap to read."""
    box = [(0, min(size, 1)) for size in tensor.shape[:-1]]
    box += [(0, min(size, most)) for size in tensor.shape[-1:]]
    if isinstance(tensor, LazyTensor):
        return tensor.read(tuple(box))
    return tensor[tuple(slice(*bounds) for bounds in box)]


class _Node:
    """How a lazy tensor comes about."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def read_into(self, out: Tensor, box: Box) -> None:
        """Fill `out`, whose shape is that of `box`, casting to its dtype as `Tensor.copy_` does."""
        raise NotImplementedError


class _Stored(_Node):
    def __init__(self, source: Any, shape: tuple[int, ...], dtype: torch.dtype):
        self.source, self.shape, self.dtype = source, shape, dtype

    def read_into(self, out: Tensor, box: Box) -> None:
        if not box:
            out.copy_(self.source[...])
            return
        (first, last), rest = box[0], box[1:]
        row = self.dtype.itemsize * math.prod(stop - start for start, stop in rest)
        step = max(_PIECE // max(row, 1), 1)
        others = tuple(slice(*bounds) for bounds in rest)
        for start in range(first, last, step):
            stop = min(start + step, last)
            piece = self.source[(slice(start, stop),) + others]
            out.narrow(0, start - first, stop - start).copy_(piece)


class _Cast(_Node):
    def __init__(self, child: _Node, dtype: torch.dtype):
        self.child, self.shape, self.dtype = child, child.shape, dtype

    def read_into(self, out: Tensor, box: Box) -> None:
        if out.dtype == self.dtype:
            self.child.read_into(out, box)
        else:  # rounded twice, as it would be by two casts
            rounded = torch.empty(out.shape, dtype=self.dtype)
            self.child.read_into(rounded, box)
            out.copy_(rounded)


class _Cat(_Node):
    def __init__(self, children: list[_Node], dim: int):
        self.children, self.dim, self.dtype = children, dim, children[0].dtype
        size = sum(child.shape[dim] for child in children)
        self.shape = _with(children[0].shape, dim, size)

    def read_into(self, out: Tensor, box: Box) -> None:
        first, last = box[self.dim]
        offset = 0
        for child in self.children:
            size = child.shape[self.dim]
            start, stop = max(first, offset), min(last, offset + size)
            if start < stop:
                part = out.narrow(self.dim, start - first, stop - start)
                child.read_into(part, _with(box, self.dim, (start - offset, stop - offset)))
            offset += size


class _Stack(_Node):
    def __init__(self, children: list[_Node], dim: int):
        self.children, self.dim, self.dtype = children, dim, children[0].dtype
        self.shape = _inserted(children[0].shape, dim, len(children))

    def read_into(self, out: Tensor, box: Box) -> None:
        first, last = box[self.dim]
        for index in range(first, last):
            self.children[index].read_into(out.select(self.dim, index - first), _without(box, self.dim))


class _Permute(_Node):
    def __init__(self, child: _Node, dims: Sequence[int]):
        self.child, self.dims, self.dtype = child, tuple(dims), child.dtype
        self.shape = tuple(child.shape[dim] for dim in dims)

    def read_into(self, out: Tensor, box: Box) -> None:
        back = sorted(range(len(self.dims)), key=self.dims.__getitem__)
        self.child.read_into(out.permute(back), tuple(box[place] for place in back))


class _Narrow(_Node):
    def __init__(self, child: _Node, dim: int, start: int, stop: int):
        self.child, self.dim, self.start, self.dtype = child, dim, start, child.dtype
        self.shape = _with(child.shape, dim, stop - start)

    def read_into(self, out: Tensor, box: Box) -> None:
        start, stop = box[self.dim]
        self.child.read_into(out, _with(box, self.dim, (start + self.start, stop + self.start)))


class _Select(_Node):
    """One index of a dimension, which is dropped: also a dimension of size one that is squeezed."""

    def __init__(self, child: _Node, dim: int, index: int):
        self.child, self.dim, self.index, self.dtype = child, dim, index, child.dtype
        self.shape = _without(child.shape, dim)

    def read_into(self, out: Tensor, box: Box) -> None:
        self.child.read_into(out.unsqueeze(self.dim), _inserted(box, self.dim, (self.index, self.index + 1)))


class _Merge(_Node):
    """Two neighbouring dimensions as one."""

    def __init__(self, child: _Node, dim: int):
        self.child, self.dim, self.dtype = child, dim, child.dtype
        self.inner = child.shape[dim + 1]
        self.shape = _without(_with(child.shape, dim, child.shape[dim] * self.inner), dim + 1)

    def read_into(self, out: Tensor, box: Box) -> None:
        first, last = box[self.dim]
        start = first
        while start < last:  # what is left of a row, whole rows, the beginning of a row
            row, column = divmod(start, self.inner)
            rows = 1 if column else max((last - start) // self.inner, 1)
            columns = min(self.inner - column, last - start)
            part = out.narrow(self.dim, start - first, rows * columns).unflatten(self.dim, (rows, columns))
            self.child.read_into(
                part, _inserted(_with(box, self.dim, (column, column + columns)), self.dim, (row, row + rows))
            )
            start += rows * columns


class _Part(_Node):
    """A dimension as two, the second of size `inner`. Of a part of that, too, whole rows are read, some at a time."""

    def __init__(self, child: _Node, dim: int, inner: int):
        self.child, self.dim, self.inner, self.dtype = child, dim, inner, child.dtype
        self.shape = _inserted(_with(child.shape, dim, inner), dim, child.shape[dim] // inner)

    def read_into(self, out: Tensor, box: Box) -> None:
        (first, last), (start, stop) = box[self.dim], box[self.dim + 1]
        others = _without(_without(box, self.dim), self.dim)
        row = out.element_size() * self.inner * math.prod(upper - lower for lower, upper in others)
        step = max(_PIECE // max(row, 1), 1)
        for row in range(first, last, step):
            rows = min(step, last - row)
            bounds = _inserted(others, self.dim, (row * self.inner, (row + rows) * self.inner))
            piece = torch.empty([upper - lower for lower, upper in bounds], dtype=out.dtype)
            self.child.read_into(piece, bounds)
            piece = piece.unflatten(self.dim, (rows, self.inner)).narrow(self.dim + 1, start, stop - start)
            out.narrow(self.dim, row - first, rows).copy_(piece)


# What is followed, by the operation that torch's own functions come down to. `NotImplemented`: read after all.


def _alias(x: LazyTensor, **options: Any) -> LazyTensor:
    return LazyTensor(x.node)


def _to(x: LazyTensor, *, dtype: torch.dtype | None = None, device: Any = None, **options: Any) -> Any:
    if device is not None and torch.device(device).type != "cpu":
        return NotImplemented
    return LazyTensor(x.node if dtype in (None, x.dtype) else _Cast(x.node, dtype))


def _cat(tensors: list[Tensor], dim: int = 0) -> Any:
    return _joined(_Cat, tensors, dim, 0)


def _stack(tensors: list[Tensor], dim: int = 0) -> Any:
    return _joined(_Stack, tensors, dim, 1)


def _joined(kind: type[_Cat | _Stack], tensors: list[Tensor], dim: int, added: int) -> Any:
    first = tensors[0]
    lazy = [x for x in tensors if isinstance(x, LazyTensor) and x.dtype == first.dtype and x.ndim == first.ndim]
    if len(lazy) < len(tensors) or first.ndim + added == 0:
        return NotImplemented
    dim %= first.ndim + added
    ignored = () if added else (dim,)
    if any(a != b for x in tensors for i, (a, b) in enumerate(zip(x.shape, first.shape)) if i not in ignored):
        return NotImplemented  # torch's own error says it best
    return LazyTensor(kind([x.node for x in lazy], dim))


def _transpose(x: LazyTensor, dim0: int, dim1: int) -> LazyTensor:
    dims = list(range(x.ndim))
    dims[dim0], dims[dim1] = dims[dim1], dims[dim0]
    return LazyTensor(_Permute(x.node, dims))


def _permute(x: LazyTensor, dims: Sequence[int]) -> LazyTensor:
    return LazyTensor(_Permute(x.node, [dim % x.ndim for dim in dims]))


def _matrix_transpose(x: LazyTensor) -> Any:
    return _transpose(x, 0, 1) if x.ndim == 2 else NotImplemented


def _slice(x: LazyTensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Any:
    if step != 1:
        return NotImplemented
    dim %= x.ndim
    start, stop, _ = slice(start, end).indices(x.shape[dim])
    return LazyTensor(_Narrow(x.node, dim, start, max(start, stop)))


def _split(x: LazyTensor, size: int, dim: int = 0) -> list[LazyTensor]:
    dim %= x.ndim
    total = x.shape[dim]
    return [_slice(x, dim, start, min(start + size, total)) for start in range(0, total, size)]


def _split_with_sizes(x: LazyTensor, sizes: Sequence[int], dim: int = 0) -> Any:
    if sum(sizes) != x.shape[dim]:
        return NotImplemented
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    return [_slice(x, dim, start, start + size) for start, size in zip(starts, sizes)]


def _select(x: LazyTensor, dim: int, index: int) -> LazyTensor:
    dim %= x.ndim
    return LazyTensor(_Select(x.node, dim, index % x.shape[dim]))


def _squeeze(x: LazyTensor, dim: int) -> Any:
    if x.ndim == 0 or x.shape[dim] != 1:
        return _alias(x)
    return _select(x, dim, 0)


def _unsqueeze(x: LazyTensor, dim: int) -> LazyTensor:
    return LazyTensor(_Stack([x.node], dim % (x.ndim + 1)))


def _view(x: LazyTensor, shape: Sequence[int]) -> Any:
    if x.numel() == 0:
        return NotImplemented
    shape = [size if size != -1 else x.numel() // -math.prod(shape) for size in shape]
    node, dim = x.node, 0
    for old, new in _groups(x.shape, shape):
        if old != new:
            for _ in old[1:]:
                node = _Merge(node, dim)
            if not old:
                node = _Stack([node], dim)
            if not new:
                node = _Select(node, dim, 0)
            for place in range(1, len(new)):
                node = _Part(node, dim + place - 1, math.prod(new[place:]))
        dim += len(new)
    return LazyTensor(node)


def _groups(old: Sequence[int], new: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """The fewest dimensions of two shapes at a time that make up the same elements."""
    old, new = list(old), list(new)
    while old or new:
        taken, given = [old.pop(0)] if old else [], [new.pop(0)] if new else []
        while math.prod(taken) != math.prod(given):
            shorter, rest = (taken, old) if math.prod(taken) < math.prod(given) else (given, new)
            shorter.append(rest.pop(0))
        yield taken, given


_FOLLOWED: dict[Any, Callable[..., Any]] = {
    aten._to_copy.default: _to,
    aten.alias.default: _alias,
    aten.cat.default: _cat,
    aten.clone.default: _alias,
    aten.detach.default: _alias,
    aten.permute.default: _permute,
    aten.select.int: _select,
    aten.slice.Tensor: _slice,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split_with_sizes,
    aten.squeeze.dim: _squeeze,
    aten.stack.default: _stack,
    aten.t.default: _matrix_transpose,
    aten.transpose.int: _transpose,
    aten.unsqueeze.default: _unsqueeze,
    aten.view.default: _view,
}


def _read(value: Any) -> Any:
    return value.read() if isinstance(value, LazyTensor) else value


def _with(values: tuple, place: int, value: Any) -> tuple:
    return (*values[:place], value, *values[place + 1 :])


def _without(values: tuple, place: int) -> tuple:
    return (*values[:place], *values[place + 1 :])


def _inserted(values: tuple, place: int, value: Any) -> tuple:
    return (*values[:place], value, *values[place:])
