"""Steps of all contenders in turn, and what follows from their times."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from .observe import Collective, Memory, MemoryOf, RecordCollectives, replay
from .sizes import Setting, Step

__all__ = ["Entrant", "Times", "enter", "interleave", "spread"]

STEPS_BEFORE = 3  # optimizer state, DDP's second set of buckets, and the step whose memory is taken


@dataclass
class Entrant:
    """A contender that was built and has taken its first steps, or the reason why it has not."""

    name: str
    step: Step | None = None
    bare: Callable[[], None] | None = None
    error: str = ""
    losses: list[float] = field(default_factory=list)
    memory: Memory | None = None
    collectives: list[Collective] = field(default_factory=list)
    seconds_to_build: float = 0.0

    def fail(self, error: str) -> None:
        self.error, self.step, self.bare = error, None, None


def enter(name: str, build: Callable[[Setting], Step], setting: Setting, control: dist.ProcessGroup) -> Entrant:
    """Build a contender on all ranks and watch its first steps. An error on any rank is its result on all."""
    entrant, error = Entrant(name), ""
    started = time.perf_counter()
    try:
        with MemoryOf() as memory:
            step = build(setting)
            losses = [step() for _ in range(STEPS_BEFORE - 1)]
            losses.append(memory.step(step))
        entrant.memory = memory.result()
        with RecordCollectives() as recorded:
            losses.append(step())
        entrant.step, entrant.collectives, entrant.bare = step, recorded.found, replay(recorded.found)
        entrant.losses = [float(loss) for loss in losses]
    except Exception as problem:  # whatever a contender raises is its line in the table
        error = _in_a_line(problem)
    agree(entrant, error, control)
    if entrant.step is not None:
        entrant.losses = _mean(entrant.losses, control)
        entrant.memory = Memory(*_largest([entrant.memory.held, entrant.memory.peak], control))
    entrant.seconds_to_build = time.perf_counter() - started
    gc.collect()
    return entrant


def agree(entrant: Entrant, error: str, control: dist.ProcessGroup) -> None:
    """Let an error on one rank be the entrant's end on all of them."""
    errors: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error, group=control)
    first = next((each for each in errors if each), "")
    if first:
        entrant.fail(first)


@dataclass
class Times:
    """Seconds by round of the slowest rank: steps, and the bare collectives of the same entrant."""

    steps: dict[str, list[float]]
    bare: dict[str, list[float]]


def interleave(entrants: Sequence[Entrant], rounds: int, budget: float, control: dist.ProcessGroup) -> Times:
    """Time one step and one replay of each entrant a round, in an order that shifts from round to round.

    Args:
        rounds: How many at most.
        budget: Seconds after which no further round is begun, as rank 0 sees it.
    """
    steps: dict[str, list[float]] = {entrant.name: [] for entrant in entrants}
    bare: dict[str, list[float]] = {entrant.name: [] for entrant in entrants}
    started = time.perf_counter()
    for index in range(-1, rounds):  # the first warms up
        if _any(index > 0 and dist.get_rank() == 0 and time.perf_counter() - started > budget, control):
            break
        running = [entrant for entrant in entrants if entrant.step is not None]
        shift = index % max(1, len(running))
        for entrant in running[shift:] + running[:shift]:
            times, error = [], ""
            try:
                times = [_seconds(entrant.step, control), _seconds(entrant.bare, control)]
            except Exception as problem:
                error = _in_a_line(problem)
            agree(entrant, error, control)
            if index >= 0 and not entrant.error:
                steps[entrant.name].append(times[0])
                bare[entrant.name].append(times[1])
        gc.collect()
    taken = [name for name in steps if all(e.name != name or e.step is not None for e in entrants)]
    return Times(
        {name: _largest(steps[name], control) for name in taken},
        {name: _largest(bare[name], control) for name in taken},
    )


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return lower, median, upper


def _seconds(run: Callable[[], Any], control: dist.ProcessGroup) -> float:
    dist.barrier(group=control)
    gc.disable()
    try:
        started = time.perf_counter()
        run()
        return time.perf_counter() - started
    finally:
        gc.enable()


def _largest(values: Sequence[float], control: dist.ProcessGroup) -> list[float]:
    largest = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=control)
    return largest.tolist()


def _mean(values: Sequence[float], control: dist.ProcessGroup) -> list[float]:
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total, group=control)
    return (total / dist.get_world_size()).tolist()


def _any(flag: bool, control: dist.ProcessGroup) -> bool:
    flags = torch.tensor([flag], dtype=torch.uint8)
    dist.all_reduce(flags, dist.ReduceOp.MAX, group=control)
    return bool(flags.item())


def _in_a_line(problem: BaseException) -> str:
    return f"{type(problem).__name__}: {' '.join(str(problem).split())}"[:300]
