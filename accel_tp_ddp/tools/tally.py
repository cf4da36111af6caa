"""What a step does on one rank: every operation, storage and collective, seen as it is dispatched."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..core.flops import flops
from ..core.override import attributes

__all__ = [
    *("Collective", "Copy", "Held", "Live", "Memory", "Point", "Tally", "Work"),
    *("collective_bytes", "collective_name", "rows_of"),
]


#: From which on glibc has each block from the system, and gives it back: its largest M_MMAP_THRESHOLD.
LARGE = 2**25


@dataclass(frozen=True)
class Memory:
    """Bytes of storages that are alive, by what they are for.

    Attributes:
        buffers: Of the model, and the batch.
        activations: Made in the forward: kept for the backward, held by whoever has the outputs, or temporary there.
        temporaries: Made in the backward, by clipping or in the optimizer's step, and no gradient of a parameter.
        buckets: What DDP reduces gradients in.
        logits: Of activations and temporaries, those as wide as the vocabulary or this rank's part of it.
    """

    parameters: int = 0
    buffers: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    temporaries: int = 0
    buckets: int = 0
    logits: int = 0

    @property
    def total(self) -> int:
        return sum(getattr(self, each.name) for each in fields(self))


@dataclass(frozen=True, order=True)
class Work:
    """Kernels of a step that are alike.

    Attributes:
        flops: Of a matrix product or attention.
        bytes: Read and written.
        fresh: Of the tensors that one of them makes, those of `LARGE` bytes or more.
    """

    phase: str
    dtype: str
    flops: int
    bytes: int
    fresh: int
    count: int


@dataclass(frozen=True)
class Collective:
    """Collectives of a step that are alike.

    Attributes:
        bytes: Of the largest tensor of one of them, on this rank.
        beside: What this rank does between the start of one and the wait for it.
    """

    kind: str
    dtype: str
    bytes: int
    group: str
    phase: str
    count: int
    beside: tuple[Work, ...] = ()


@dataclass(frozen=True)
class Copy:
    """Copies of a step that are alike: a `clone`, a `cast` to another type, a `copy` into another tensor, a `cat`."""

    kind: str
    dtype: str
    shape: tuple[int, ...]
    phase: str
    count: int

    @property
    def elements(self) -> int:
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Held:
    """Storages that are alive at the peak, and alike; `made`: the phase and the operation that made them."""

    part: str
    made: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    count: int


@dataclass(frozen=True)
class Point:
    """What is alive after an operation, by the fields of `Memory`, and what tells this operation from others."""

    phase: str
    made: str
    alike: int
    bytes: tuple[int, ...]


class Live:
    """The storages that are alive, and how many bytes they are by part."""

    def __init__(self, widths: frozenset[int] = frozenset()) -> None:
        self.widths = widths
        self.bytes: dict[str, int] = {each.name: 0 for each in fields(Memory)}
        self._parts: dict[int, tuple[str, int, str, str, tuple[int, ...]]] = {}
        self._references: dict[int, weakref.ref] = {}

    def see(self, tensor: Tensor, part: str, made: str) -> None:
        """Count the storage of `tensor`, unless it is known."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._parts:
            return
        size = storage.nbytes()
        if part in ("activations", "temporaries") and tensor.ndim > 1 and tensor.size(-1) in self.widths:
            part = "logits"
        self._parts[key] = (part, size, made, _short(tensor.dtype), tuple(tensor.shape))
        self.bytes[part] += size
        self._references[key] = weakref.ref(storage, lambda _: self._forget(key))

    def _forget(self, key: int) -> None:
        part, size, *_ = self._parts.pop(key)
        self._references.pop(key, None)
        self.bytes[part] -= size

    def name(self, tensor: Tensor | None, part: str) -> None:
        """Say what the storage of `tensor` is for."""
        if tensor is None:
            return
        key = tensor.untyped_storage()._cdata
        if key not in self._parts:
            self.see(tensor, part, "before")
            return
        before, size, made, dtype, shape = self._parts[key]
        self.bytes[before] -= size
        self.bytes[part] += size
        self._parts[key] = (part, size, made, dtype, shape)

    @property
    def total(self) -> int:
        return sum(self.bytes.values())

    def known(self) -> set[int]:
        return set(self._parts)

    def listed(self) -> tuple[Held, ...]:
        alike: Counter[tuple] = Counter()
        for part, size, made, dtype, shape in self._parts.values():
            alike[part, made, dtype, shape, size] += 1
        return tuple(sorted(rows_of(Held, alike), key=lambda row: -row.bytes * row.count))


class _Sent:
    """A collective, and the work beside it, both as the keys of rows."""

    def __init__(self, *what: Any):
        self.what, self.beside = what, Counter[tuple]()


class Tally(TorchDispatchMode):
    """Sees every operation.

    Attributes:
        listed_at: Number of the operation after which what is alive is listed.
        collectives: What has been sent; see `following`.
        pointed: Whether what is alive is noted after each operation that does not depend on how DDP makes its buckets.
        points: Those.
    """

    def __init__(self, memory: Live, part: str, groups: Mapping[str, dist.ProcessGroup]):
        super().__init__()
        self.memory, self.part, self.phase = memory, part, ""
        self._sent: list[_Sent] = []
        self._under_way: dict[int, tuple[dist.Work, _Sent]] = {}
        self.copies: Counter[tuple] = Counter()
        self.kernels: Counter[str] = Counter()
        self.peak, self.peak_at, self.peak_number, self._highest = dict(memory.bytes), "", -1, memory.total
        self.work: Counter[tuple] = Counter()
        self.points: list[Point] = []
        self.pointed = False
        self.listed_at: int | None = None
        self.held: tuple[Held, ...] = ()
        self.kept = self.excess = self.with_excess = 0
        self._number = 0
        self._follows = False
        self._groups = {tuple(dist.get_process_group_ranks(group)): name for name, group in groups.items()}

    def enter(self, phase: str, part: str) -> None:
        self.phase, self.part = phase, part

    @property
    def collectives(self) -> tuple[Collective, ...]:
        alike = Counter((sent.what, tuple(rows_of(Work, sent.beside))) for sent in self._sent)
        rows = sorted((*sent, count, beside) for (sent, beside), count in alike.items())
        return tuple(Collective(*row) for row in rows)

    @contextmanager
    def following(self) -> Iterator[None]:
        """Note what runs beside collectives of the fake process group: until they are waited for."""

        try:
            from torch._C._distributed_c10d import FakeWork
        except ImportError:  # torch's own: another release may not have it, and then nothing is known to be beside
            yield
            return

        def wait(work: dist.Work, *args: Any, **kwargs: Any) -> bool:
            self._under_way.pop(id(work), None)
            return True  # as does the fake group's own

        self._follows = True
        with attributes(FakeWork, wait=wait):
            yield
        self._follows = False

    def see_gradients(self, params: list[nn.Parameter]) -> None:
        """Find gradients that keep more alive than the gradients that share it, as those in DDP's buckets do."""
        own: dict[int, list[int]] = {}
        held: dict[int, int] = {}
        for param in params:
            if param.grad is not None:
                storage = param.grad.untyped_storage()
                held[storage._cdata] = storage.nbytes()
                own.setdefault(storage._cdata, []).append(param.grad.nbytes)
        larger = [key for key in held if held[key] > sum(own[key])]
        self.excess = sum(held[key] - sum(own[key]) for key in larger)
        self.with_excess = sum(len(own[key]) for key in larger)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        result = _run_fake(func, args, kwargs or {})
        sends = func.namespace in ("c10d", "_c10d_functional")
        if sends:
            self._collective(func, args, result)
        elif _runs(func):
            self.kernels[self.phase] += 1
            self._copy(func, args, result)
            self._work(func, args, kwargs or {}, result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.memory.see(tensor, self.part, f"{self.phase} {func._schema.name.split('::')[1]}")
        total = self.memory.total
        if total > self._highest:
            self._highest, self.peak, self.peak_number = total, dict(self.memory.bytes), self._number
            self.peak_at = f"{self.phase}: {func._schema.name.split('::')[1]}"
        if self._number == self.listed_at:
            self.held = self.memory.listed()
        if self.pointed and not sends:
            made = func._schema.name.split("::")[1]
            lists = any(isinstance(arg, list) and arg and isinstance(arg[0], Tensor) for arg in args)
            # A list is of all parameters, as many as there are layers.
            shapes = (
                () if lists else tuple(tuple(t.shape) for t in tree_leaves((args, result)) if isinstance(t, Tensor))
            )
            alike = hash((self.phase, made, shapes))
            self.points.append(Point(self.phase, made, alike, tuple(self.memory.bytes.values())))
        self._number += 1
        return result

    def _work(self, func: Any, args: tuple, kwargs: Mapping[str, Any], result: Any) -> None:
        schema = func._schema
        given = _tensors((args, kwargs))
        # What changes its arguments gives them as results again, or, on lists of tensors, none.
        changed = _tensors([value for argument, value in zip(schema.arguments, args) if _is_written(argument)])
        made = [] if changed else _tensors(result)
        read = sum(tensor.nbytes for tensor in given)
        if schema.name.split("::")[1] in _OVERWRITES:
            read -= sum(tensor.nbytes for tensor in changed)
        moved = read + sum(tensor.nbytes for tensor in changed or made)
        fresh = sum(tensor.nbytes for tensor in made if tensor.nbytes >= LARGE)
        dtype = _short((given or made)[0].dtype) if given or made else ""
        row = self.phase, dtype, flops(func, args, kwargs, result, skips_masked=True), moved, fresh
        self.work[row] += 1
        for _, sent in self._under_way.values():
            sent.beside[row] += 1

    def _collective(self, func: Any, args: tuple, result: Any) -> None:
        name = func._schema.name.split("::")[1]
        if name == "wait_tensor":
            return
        tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        largest = max(tensors, key=lambda tensor: tensor.nbytes)
        # A list of outputs is as much as one large output.
        lists = [arg for arg in args if isinstance(arg, list)]
        size = max([sum(leaf.nbytes for leaf in tree_leaves(each)) for each in lists] or [largest.nbytes])
        sent = _Sent(collective_name(name), _short(largest.dtype), size, self._group(args), self.phase)
        self._sent.append(sent)
        for leaf in tree_leaves(result) if self._follows else ():
            if isinstance(leaf, torch.ScriptObject) and str(leaf._type()).endswith(".Work"):
                work = dist.Work.unbox(leaf)  # the object that whoever waits has, too
                self._under_way[id(work)] = work, sent

    def _group(self, args: tuple) -> str:
        for arg in args:
            if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()):
                ranks = dist.get_process_group_ranks(dist.ProcessGroup.unbox(arg))
                return self._groups.get(tuple(ranks), "world")
        return "world"

    def _copy(self, func: Any, args: tuple, result: Any) -> None:
        name = func._schema.name
        if name == "aten::clone":
            kind = "clone"
        elif name == "aten::_to_copy":
            kind = "cast" if args[0].dtype != result.dtype else "clone"
        elif name == "aten::copy_":
            kind = "copy"
        elif name == "aten::cat":
            kind = "cat"
        else:
            return
        self.copies[kind, _short(result.dtype), tuple(result.shape), self.phase] += 1


def rows_of(kind: Callable[..., Any], counted: Counter[tuple]) -> list[Any]:
    """The `kind` of each key, which has its fields but for the last, the count."""
    return [kind(*key, count) for key, count in sorted(counted.items())]


def collective_bytes(rows: Iterable[Collective], group: str) -> int:
    """What the collectives of a group carry, all of them: see `Collective.bytes`."""
    return sum(row.bytes * row.count for row in rows if row.group == group)


def _run_fake(func: Any, args: tuple, kwargs: Mapping[str, Any]) -> Any:
    if func._schema.name == "aten::_grouped_mm" and args[0].dtype != torch.bfloat16:
        # The kernels take float32; torch's shapes of them are for bfloat16 only.
        low = [arg.to(torch.bfloat16) if isinstance(arg, Tensor) and arg.is_floating_point() else arg for arg in args]
        return func(*low, **kwargs).to(args[0].dtype)
    return func(*args, **kwargs)


def collective_name(operation: str) -> str:
    """The function of `torch.distributed` for one of its operations: `all_reduce` for `allreduce_`."""
    name = operation.strip("_")
    return _FUNCTIONS.get(name, name)


_FUNCTIONS = {
    **{"allreduce": "all_reduce", "allreduce_coalesced": "all_reduce_coalesced", "allgather": "all_gather"},
    **{"allgather_base": "all_gather_into_tensor", "reduce_scatter_base": "reduce_scatter_tensor"},
}


def _runs(func: Any) -> bool:
    """Whether an operation has a kernel that does something: it is no view, and does not merely allocate."""
    return not func.is_view and func._schema.name.split("::")[1] not in _IDLE


_IDLE = {
    "device",
    "detach",
    "empty",
    "empty_like",
    "new_empty",
    "empty_strided",
    "new_empty_strided",
    "_unsafe_view",
    "alias",
}


_OVERWRITES = {"copy_", "fill_", "zero_", "_foreach_copy_", "_foreach_zero_"}


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
