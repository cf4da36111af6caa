"""What one step does, counted and not timed: its collectives, and the memory that it holds."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Collective", "Memory", "MemoryOf", "RecordCollectives", "replay"]

T = TypeVar("T")

#: By the start of torch's own names, without underscores: `c10d.allreduce_`, `_c10d_functional.all_reduce`, ...
KINDS = {
    "allreduce": "all-reduce",
    "allgather": "all-gather",
    "reducescatter": "reduce-scatter",
    "broadcast": "broadcast",
    "reduce": "reduce",
    "alltoall": "all-to-all",
    "sharddimalltoall": "all-to-all",
}
NAMESPACES = ("c10d", "_c10d_functional", "_c10d_functional_autograd", "_dtensor")
NOT_COLLECTIVES = ("_wrap_tensor_autograd", "barrier", "monitored_barrier_", "wait_tensor")


@dataclass(frozen=True)
class Collective:
    """One collective of this rank. `numel` is the whole tensor's: gathered, or not scattered yet."""

    kind: str
    dtype: torch.dtype
    numel: int
    group: dist.ProcessGroup = field(repr=False)

    @property
    def bytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(dist.get_process_group_ranks(self.group))


class RecordCollectives(TorchDispatchMode):
    """Lists the collectives that are started while active, those of DDP's reducer and of DTensor too."""

    def __init__(self):
        super().__init__()
        self.found: list[Collective] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented  # it comes back with local tensors
        result = func(*args, **(kwargs or {}))
        namespace, _, name = func._schema.name.partition("::")
        if namespace in NAMESPACES and name not in NOT_COLLECTIVES:
            self._note(name, args, result)
        return result

    def _note(self, name: str, args: tuple, result: Any) -> None:
        plain = name.replace("_", "")
        kind = next((KINDS[start] for start in sorted(KINDS, key=len, reverse=True) if plain.startswith(start)), None)
        group = _group_of(args)
        tensors = [leaf for leaf in tree_leaves((args, result)) if isinstance(leaf, Tensor)]
        if kind is None or group is None or not tensors:
            raise NotImplementedError(f"the collective {name}{args} is not known to benchmarks.peers")
        # The larger side is the whole tensor; a list of parts is one side as well.
        sides = [sum(leaf.numel() for leaf in tree_leaves(arg) if isinstance(leaf, Tensor)) for arg in (*args, result)]
        self.found.append(Collective(kind, tensors[0].dtype, max(sides), group))


def _group_of(args: tuple) -> dist.ProcessGroup | None:
    for arg in args:
        if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()):
            return dist.ProcessGroup.unbox(arg)
    names = [arg for arg in args if isinstance(arg, str)]  # the last one; a reduction is named before it
    return dist.distributed_c10d._resolve_process_group(names[-1]) if names else None


def replay(collectives: list[Collective]) -> Callable[[], None]:
    """The same collectives over the same groups in the same order, each waited for, with nothing between them."""
    calls: list[Callable[[], Any]] = []
    for each in collectives:
        whole = torch.zeros(each.numel, dtype=each.dtype)
        own = torch.zeros(each.numel // each.group.size(), dtype=each.dtype)
        calls.append(_call(each, whole, own))

    def run() -> None:
        for call in calls:
            call()

    return run


def _call(each: Collective, whole: Tensor, own: Tensor) -> Callable[[], Any]:
    group, first = each.group, each.ranks[0]
    if each.kind == "all-reduce":
        return lambda: dist.all_reduce(whole, group=group)
    if each.kind == "all-gather":
        return lambda: dist.all_gather_into_tensor(whole[: own.numel() * group.size()], own, group=group)
    if each.kind == "reduce-scatter":
        return lambda: dist.reduce_scatter_tensor(own, whole[: own.numel() * group.size()], group=group)
    if each.kind == "broadcast":
        return lambda: dist.broadcast(whole, first, group=group)
    if each.kind == "reduce":
        return lambda: dist.reduce(whole, first, group=group)
    if each.kind == "all-to-all":
        return lambda: dist.all_to_all_single(torch.empty_like(whole), whole, group=group)
    raise NotImplementedError(f"no replay of {each.kind}")


@contextmanager
def _mute() -> Iterator[None]:
    """The profiler reports its start and stop on stderr, past Python."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


@dataclass(frozen=True)
class Memory:
    """Bytes of torch's CPU allocator that were allocated since a contender was begun and not freed yet."""

    held: int  # before a step: weights, optimizer state, buckets
    peak: int  # during it: gradients, activations, what a collective or a kernel allocates


class MemoryOf:
    """Follows every allocation of torch's in this thread while active, C++ ones (DDP's buckets) too, exactly.

    Resident memory would be what the process had before, what the allocator keeps, and chance. Not seen: scratch
    memory of libraries (oneDNN, gloo), and files that stay mapped.
    """

    MARK = "benchmarks.peers: the step"

    def __enter__(self) -> MemoryOf:
        gc.collect()
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        with _mute():
            self._profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        with _mute():
            self._profile.__exit__(*error)

    def step(self, step: Callable[[], T]) -> T:
        """The step whose memory is asked for; after others, so that all that lasts is there."""
        gc.collect()
        with record_function(self.MARK):
            return step()

    def result(self) -> Memory:
        events = self._profile.profiler.kineto_results.events()
        (begin, end) = next((e.start_ns(), e.end_ns()) for e in events if e.name() == self.MARK)
        changes = sorted((e.start_ns(), index, e.nbytes()) for index, e in enumerate(events) if e.name() == "[memory]")
        now = held = peak = 0
        for when, _, size in changes:
            if when > end:
                break
            now += size
            if when < begin:
                held = peak = now
            peak = max(peak, now)
        return Memory(held, peak)
