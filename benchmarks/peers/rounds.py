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
        world = dist.get_world_size()
        entrant.losses = [total / world for total in _over_ranks(entrant.losses, dist.ReduceOp.SUM, control)]
        most = _over_ranks([entrant.memory.held, entrant.memory.peak], dist.ReduceOp.MAX, control)
        entrant.memory = Memory(*map(int, most))
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
    """Seconds by round: steps, and the bare collectives of the same entrant.

    Those on the clock are of the slowest rank. Those of the processors are of all ranks together, with gloo's threads:
    they hardly change with what else runs on the machine, and where ranks outnumber cores they are what a step takes.
    """

    steps: dict[str, list[float]]
    bare: dict[str, list[float]]
    steps_cpu: dict[str, list[float]]
    bare_cpu: dict[str, list[float]]


def interleave(entrants: Sequence[Entrant], rounds: int, budget: float, control: dist.ProcessGroup) -> Times:
    """Time one step and one replay of each entrant a round, in an order that shifts from round to round.

    Args:
        rounds: How many at most.
        budget: Seconds after which no further round is begun, as rank 0 sees it.
    """
    found: dict[str, list[tuple[float, ...]]] = {entrant.name: [] for entrant in entrants}
    started = time.perf_counter()
    for index in range(-1, rounds):  # the first warms up
        if _any(index > 0 and dist.get_rank() == 0 and time.perf_counter() - started > budget, control):
            break
        running = [entrant for entrant in entrants if entrant.step is not None]
        shift = index % max(1, len(running))
        for entrant in running[shift:] + running[:shift]:
            times: tuple[float, ...] = ()
            error = ""
            try:
                times = _seconds(entrant.step, control) + _seconds(entrant.bare, control)
            except Exception as problem:
                error = _in_a_line(problem)
            agree(entrant, error, control)
            if index >= 0 and not entrant.error:
                found[entrant.name].append(times)
        gc.collect()
    taken = [entrant.name for entrant in entrants if entrant.step is not None]
    columns = {name: [list(column) for column in zip(*found[name])] for name in taken}
    return Times(
        steps={name: _over_ranks(columns[name][0], dist.ReduceOp.MAX, control) for name in taken},
        bare={name: _over_ranks(columns[name][2], dist.ReduceOp.MAX, control) for name in taken},
        steps_cpu={name: _over_ranks(columns[name][1], dist.ReduceOp.SUM, control) for name in taken},
        bare_cpu={name: _over_ranks(columns[name][3], dist.ReduceOp.SUM, control) for name in taken},
    )


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return lower, median, upper


def _seconds(run: Callable[[], Any], control: dist.ProcessGroup) -> tuple[float, float]:
    """On the clock, and of this process on its processors."""
    dist.barrier(group=control)
    gc.disable()
    try:
        started, used = time.perf_counter(), time.process_time()
        run()
        return time.perf_counter() - started, time.process_time() - used
    finally:
        gc.enable()


def _over_ranks(values: Sequence[float], how: dist.ReduceOp.RedOpType, control: dist.ProcessGroup) -> list[float]:
    found = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(found, how, group=control)
    return found.tolist()


def _any(flag: bool, control: dist.ProcessGroup) -> bool:
    flags = torch.tensor([flag], dtype=torch.uint8)
    dist.all_reduce(flags, dist.ReduceOp.MAX, group=control)
    return bool(flags.item())


def _in_a_line(problem: BaseException) -> str:
    return f"{type(problem).__name__}: {' '.join(str(problem).split())}"[:300]
