"""A step of many layers from steps of few: everything that it takes grows by the same with each layer of a kind.

Memory is told operation by operation. Before a layer is added and after, a step runs the same operations up to where
the layer is in, and from there on: what is alive after one of those grows by what the layer leaves there, layer after
layer. In between, it lies between what it is in the first and in the last layer. So the peak of the full step is the
largest of the operations of the shallow one, each extended, and not the extended peak: with few layers the peak may be
elsewhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import groupby
from typing import Any, TypeVar

from ..simulate import Trace
from ..tally import Collective, Memory, Point, Work

__all__ = ["Extended", "extended"]

_NAMES = [each.name for each in fields(Memory)]
_Row = TypeVar("_Row", Work, Collective)


@dataclass(frozen=True)
class Extended:
    """The step of all layers. Counts of rows that are alike may be negative, as they are differences; sums are right.

    Attributes:
        peak: Memory at the step's peak.
        peak_at: The phase and the operation of the peak.
        resting: Memory between two steps.
    """

    peak: Memory
    peak_at: str
    resting: Memory
    work: tuple[Work, ...]
    collectives: tuple[Collective, ...]


def extended(least: Trace, deeper: Sequence[tuple[Trace, int]]) -> Extended:
    """The step with each of the `deeper` ones' additional layer so many times."""
    peak, at = _peak(least, deeper)
    resting = _along(_sizes(least.resting), [(_sizes(trace.resting), times) for trace, times in deeper])
    return Extended(
        peak=Memory(*peak),
        peak_at=at,
        resting=Memory(*resting),
        work=_rows(least.work, [(trace.work, times) for trace, times in deeper]),
        collectives=_rows(least.collectives, [(trace.collectives, times) for trace, times in deeper]),
    )


def _sizes(memory: Memory) -> tuple[int, ...]:
    return tuple(getattr(memory, name) for name in _NAMES)


def _along(least: Sequence[int], deeper: Iterable[tuple[Sequence[int], int]]) -> list[int]:
    result = list(least)
    for values, times in deeper:
        for index, before in enumerate(least):
            result[index] += times * (values[index] - before)
    return result


def _rows(least: Iterable[_Row], deeper: Iterable[tuple[Iterable[_Row], int]]) -> tuple[_Row, ...]:
    few: Counter[Any] = _counted(least)
    total: Counter[Any] = Counter(few)
    for rows, times in deeper:
        many: Counter[Any] = _counted(rows)
        for row in {*few, *many}:
            total[row] += times * (many[row] - few[row])
    return tuple(replace(row, count=count) for row, count in total.items() if count)


def _counted(rows: Iterable[_Row]) -> Counter[Any]:
    return Counter({replace(row, count=0): row.count for row in rows})


def _peak(least: Trace, deeper: Sequence[tuple[Trace, int]]) -> tuple[list[int], str]:
    phases = _by_phase(least.points)
    others = [(_by_phase(trace.points), times) for trace, times in deeper]
    best, at = _along(_sizes(least.resting), [(_sizes(trace.resting), times) for trace, times in deeper]), "at rest"
    for phase, points in phases.items():
        pairs = [(_Aligned(points, of.get(phase, [])), times) for of, times in others]
        for index, point in enumerate(points):
            for from_start in (True, False):
                rows = [(aligned.at(index, from_start).bytes, times) for aligned, times in pairs]
                total = _along(point.bytes, rows)
                if sum(total) > sum(best):
                    best, at = total, f"{phase}: {point.made}"
    return best, at


def _by_phase(points: Iterable[Point]) -> dict[str, list[Point]]:
    return {phase: list(some) for phase, some in groupby(points, lambda point: point.phase)}


class _Aligned:
    """Which operation of a deeper step is which of the shallow one."""

    def __init__(self, few: Sequence[Point], many: Sequence[Point]):
        self.few, self.many = few, many
        self.first = _common([p.alike for p in few], [p.alike for p in many])
        self.last = _common([p.alike for p in few[::-1]], [p.alike for p in many[::-1]])

    def at(self, index: int, from_start: bool) -> Point:
        """The operation with this number, counted from the start or from the end, as far as that goes."""
        back = len(self.few) - index
        if index < self.first and (from_start or back > self.last):
            return self.many[index]
        if back <= self.last:
            return self.many[-back]
        return self.few[index]  # an operation that only the shallow step has: nothing to extend


def _common(one: Sequence[Hashable], other: Sequence[Hashable]) -> int:
    count = 0
    for a, b in zip(one, other):
        if a != b:
            break
        count += 1
    return count
