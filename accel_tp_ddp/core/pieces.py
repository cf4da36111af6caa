"""A range of the elements of a parameter or of a shard of one: what a replica keeps of an optimizer's state."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Size, Tensor

from .shard import ShardInfo

__all__ = ["Box", "FlatShard"]

#: Replicas get multiples of this many elements, where it is little beside what they get: kernels want aligned memory.
_ALIGNED = 64
_LITTLE = 64


@dataclass(frozen=True)
class Box:
    """A part of a tensor that is a box of the full one too.

    Attributes:
        offset: Where it begins in the full tensor.
        view: Its elements.
        counts: Whether no lower tensor-parallel rank holds it too.
    """

    offset: Size
    view: Tensor
    counts: bool


@dataclass(frozen=True)
class FlatShard:
    """The elements `start` to `stop` of a parameter, in the order in which they lie in memory.

    Attributes:
        shape: The parameter's, on this rank.
        start: The first element.
        stop: The first one that is not part of it.
        info: Of what this rank's parameter is a part; None if it is all.
    """

    shape: Size
    start: int
    stop: int
    info: ShardInfo | None

    is_sharded = True

    @staticmethod
    def step(count: int, replicas: int) -> int:
        """How many of `count` elements each replica has; the last ones may have fewer, or none."""
        step = -(-count // replicas)
        return -(-step // _ALIGNED) * _ALIGNED if step >= _ALIGNED * _LITTLE else step

    @classmethod
    def of_replica(cls, param: Tensor, replica: int, replicas: int, info: ShardInfo | None) -> FlatShard:
        """What the replica of number `replica` has."""
        count = param.numel()
        step = cls.step(count, replicas)
        return cls(param.shape, min(replica * step, count), min((replica + 1) * step, count), info)

    @property
    def local_shape(self) -> Size:
        return Size([self.stop - self.start])

    @property
    def global_shape(self) -> Size:
        """Of the unsharded parameter."""
        return Size(self.info.global_shape) if self.info is not None else self.shape

    def cut(self, local: Tensor) -> Tensor:
        """Its elements of a tensor of the shape `shape`: a view where that can be."""
        return local.reshape(-1)[self.start : self.stop]

    def cut_if_full(self, value: Any) -> Any:
        """Its elements of a tensor of the parameter's shape, full or of this rank; anything else as it is."""
        if not isinstance(value, Tensor) or value.dim() == 0:
            return value
        local = value if self.info is None else self.info.cut_if_full(value)
        return self.cut(local.detach()).clone() if local.shape == self.shape else value

    def boxes(self, elements: Tensor) -> Iterator[Box]:
        """Its `elements` as boxes of the full tensor."""
        if self.start == self.stop:
            return
        taken = 0
        for offset, sizes in _boxes(self.shape, self.start, self.stop):
            view = elements[taken : taken + prod(sizes)].view(sizes)
            taken += prod(sizes)
            if self.info is None or self.info.layout is None:
                yield Box(Size(offset), view, True)
            else:
                yield from self._in_full(self.info, offset, view)

    @staticmethod
    def _in_full(info: ShardInfo, offset: Sequence[int], view: Tensor) -> Iterator[Box]:
        """A box of this rank's part, for each range of the full tensor that it is in."""
        layout = info.layout
        assert layout is not None, "only a shard has ranges"
        dim, rank, taken = layout.dim, info.mesh.get_local_rank(), 0
        first, last = offset[dim], offset[dim] + view.shape[dim]
        for start, stop in layout.ranges[rank]:
            low, high = max(first, taken), min(last, taken + stop - start)
            if low < high:
                place = Size((*offset[:dim], start + low - taken, *offset[dim + 1 :]))
                counts = (start, stop) not in layout.repeated or layout.holds_first(rank, (start, stop))
                yield Box(place, view.narrow(dim, low - first, high - low), counts)
            taken += stop - start


def _boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Offsets and sizes of the boxes that the elements `start` to `stop` fill, in order; at most two a dimension."""
    if len(shape) <= 1:
        yield ((start,), (stop - start,)) if shape else ((), ())
        return
    row = prod(shape[1:])
    first, last = -(-start // row), stop // row  # the rows that are complete
    if start < first * row:
        end = min(stop, first * row)
        yield from _in_row(shape, first - 1, start - (first - 1) * row, end - (first - 1) * row)
    if first < last:
        yield (first, *[0] * (len(shape) - 1)), (last - first, *shape[1:])
    if first <= last and last * row < stop:
        yield from _in_row(shape, last, 0, stop - last * row)


def _in_row(
    shape: Sequence[int], row: int, start: int, stop: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    for offset, sizes in _boxes(shape[1:], start, stop):
        yield (row, *offset), (1, *sizes)
