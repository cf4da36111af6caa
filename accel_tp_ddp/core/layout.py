"""How one tensor dimension is divided over the tensor-parallel ranks: index ranges, uneven, packed or repeated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

__all__ = ["Layout", "Piece", "Shared", "chunk_ranges", "packed_ranges"]

Ranges = tuple[tuple[int, int], ...]


class Piece(NamedTuple):
    """A range that several ranks hold, as one of them does.

    Attributes:
        number: Its number among the repeated ranges of the layout.
        offset: Where it begins if all of those are laid one after the other.
        start: Where it begins in the rank's own part.
        length: How long it is.
    """

    number: int
    offset: int
    start: int
    length: int


class Shared(NamedTuple):
    """Which pieces of a local tensor other ranks hold too.

    Attributes:
        dim: The dimension that is cut.
        total: Length of all repeated ranges together.
        pieces: Those that this rank holds.
    """

    dim: int
    total: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Layout:
    """One dimension of a tensor, divided over the ranks.

    Attributes:
        dim: Tensor dimension that is cut (non-negative).
        ranges: For each rank the half-open index ranges that it holds along `dim`, in the order it holds them.
    """

    dim: int
    ranges: tuple[Ranges, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Length of each rank's part along `dim`."""
        return tuple(sum(stop - start for start, stop in ranges) for ranges in self.ranges)

    @property
    def contiguous(self) -> bool:
        """Whether each rank holds one unbroken range."""
        return all(len(ranges) == 1 for ranges in self.ranges)

    @cached_property
    def in_order(self) -> bool:
        """Whether the ranks' parts, one after the other, are the whole dimension."""
        spans = [span for ranges in self.ranges for span in ranges if span[0] < span[1]]
        return all(before[1] == after[0] for before, after in zip([(0, 0), *spans], spans))

    @cached_property
    def parts(self) -> tuple[Ranges, ...]:
        """The different parts that are not empty, in rank order: fewer than ranks where several hold the same one."""
        return tuple(dict.fromkeys(held for held, size in zip(self.ranges, self.sizes) if size))

    @cached_property
    def repeated(self) -> tuple[tuple[int, int], ...]:
        """The ranges that several ranks hold, such as key/value heads that are fewer than the ranks, in order."""
        held = Counter(span for ranges in self.ranges for span in set(ranges) if span[0] < span[1])
        return tuple(sorted(span for span, ranks in held.items() if ranks > 1))

    def holds_first(self, rank: int, span: tuple[int, int] | None = None) -> bool:
        """Whether no lower rank holds the same: what is counted once is counted there.

        Args:
            rank: A rank.
            span: One of the ranges that it holds; all of them together by default.
        """
        if span is None:
            return self.ranges.index(self.ranges[rank]) == rank
        return not any(span in ranges for ranges in self.ranges[:rank])

    def pieces(self, rank: int) -> tuple[Piece, ...]:
        """What `rank` holds together with other ranks."""
        offsets = dict(zip(self.repeated, accumulate((stop - start for start, stop in self.repeated), initial=0)))
        pieces, taken = [], 0
        for span in self.ranges[rank]:
            if span in offsets:
                pieces.append(Piece(self.repeated.index(span), offsets[span], taken, span[1] - span[0]))
            taken += span[1] - span[0]
        return tuple(pieces)

    def counted(self, rank: int) -> tuple[tuple[int, int], ...]:
        """Half-open ranges of `rank`'s own part that no lower rank holds."""
        own, taken = [], 0
        for start, stop in self.ranges[rank]:
            if (start, stop) not in self.repeated or self.holds_first(rank, (start, stop)):
                own.append((taken, taken + stop - start))
            taken += stop - start
        return tuple(own)


def chunk_ranges(size: int, parts: int) -> tuple[Ranges, ...]:
    """Cut `size` as `torch.chunk` and DTensor's `Shard` do: equal parts, a shorter last one, then empty ones."""
    step = -(-size // parts)
    return tuple(((min(rank * step, size), min((rank + 1) * step, size)),) for rank in range(parts))


def packed_ranges(sections: Sequence[int], parts: int, copies: Sequence[int] = ()) -> tuple[Ranges, ...]:
    """Cut each of several sections that are packed along one dimension (gate and up; q, k and v) by itself.

    A rank then holds its part of the first section, its part of the second, and so on.

    Args:
        sections: Length of each.
        parts: Number of ranks.
        copies: For each section, how many ranks next to each other hold the same part of it; one by default.
    """
    per_rank: list[list[tuple[int, int]]] = [[] for _ in range(parts)]
    offset = 0
    for section, alike in zip(sections, copies or [1] * len(sections)):
        chunks = chunk_ranges(section, parts // alike)
        for rank in range(parts):
            ((start, stop),) = chunks[rank // alike]
            per_rank[rank].append((offset + start, offset + stop))
        offset += section
    return tuple(tuple(ranges) for ranges in per_rank)
