"""How one parameter is laid out over the tensor-parallel ranks, and the cutting and joining that follows from it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import prod
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Shard

Ranges = tuple[tuple[int, int], ...]

__all__ = [
    "Layout",
    "Piece",
    "ShardInfo",
    "Shared",
    "chunk_ranges",
    "elements_elsewhere",
    "mark_whole",
    "packed_ranges",
    "remember_everywhere",
    "remember_shards",
    "remembered_shards",
    "restore_shards",
    "shard_info",
]

_REMEMBERED = "_tp_shards"


class Piece(NamedTuple):
    """A range that several ranks hold, as one of them does.

    Attributes:
        index: Its number among the repeated ranges of the layout.
        offset: Where it begins if all of those are laid one after the other.
        start: Where it begins in the rank's own part.
        length: How long it is.
    """

    index: int
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
    """One dimension of a tensor, dealt out to the ranks.

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


@dataclass(frozen=True)
class ShardInfo:
    """What a localized parameter is a part of. Read it from `param.tp_shard`.

    Attributes:
        mesh: One-dimensional tensor-parallel mesh.
        placements: The DTensor placements on `mesh`. A packed weight shows the dimension it is cut along; `layout`
            has the exact ranges.
        global_shape: Shape of the unsharded parameter.
        layout: The dimension and index ranges of every rank; None where the parameter is replicated.
    """

    mesh: DeviceMesh
    placements: tuple[Placement, ...]
    global_shape: torch.Size
    layout: Layout | None

    @classmethod
    def sharded(cls, mesh: DeviceMesh, global_shape: torch.Size, layout: Layout) -> ShardInfo:
        return cls(mesh, (Shard(layout.dim),), torch.Size(global_shape), layout)

    @property
    def is_sharded(self) -> bool:
        return self.layout is not None

    @property
    def is_repeated(self) -> bool:
        """Whether some ranks hold the same, so that each of them has only a part of its gradient."""
        return self.layout is not None and bool(self.layout.repeated)

    @property
    def shared(self) -> Shared:
        """What other ranks hold too of this rank's part."""
        total = sum(stop - start for start, stop in self.layout.repeated)
        return Shared(self.layout.dim, total, self.layout.pieces(self.mesh.get_local_rank()))

    def counted(self, local: Tensor) -> list[Tensor]:
        """The slices of this rank's `local` part that it counts where all parts are counted together."""
        if not self.layout.repeated:
            return [local]
        own = self.layout.counted(self.mesh.get_local_rank())
        return [local.narrow(self.layout.dim, start, stop - start) for start, stop in own]

    def local_part(self, full: Tensor) -> Tensor:
        """This rank's part of `full` (shape `global_shape`), in storage of its own."""
        if self.layout is None:
            return full.detach().clone()
        dim, own = self.layout.dim, self.layout.ranges[self.mesh.get_local_rank()]
        return torch.cat([full.detach().narrow(dim, start, stop - start) for start, stop in own], dim)

    def cut_if_full(self, value: Any) -> Any:
        """This rank's part of a tensor of shape `global_shape`; anything else as it is."""
        full = isinstance(value, Tensor) and self.is_sharded and value.shape == self.global_shape
        return self.local_part(value) if full else value

    def full_tensor(self, local: Tensor) -> Tensor:
        """The unsharded tensor, from every rank's `local` part. Collective over the tensor-parallel group."""
        local = local.detach()
        if self.layout is None:
            return local.clone()
        dim, sizes = self.layout.dim, self.layout.sizes
        longest = max(sizes)
        padded_shape = list(local.shape)
        padded_shape[dim] = longest
        padded = local.new_zeros(padded_shape)
        padded.narrow(dim, 0, local.size(dim)).copy_(local)
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=self.mesh.get_group())
        full = local.new_empty(self.global_shape)
        for rank, (part, ranges) in enumerate(zip(parts, self.layout.ranges)):
            taken = 0
            if not self.layout.holds_first(rank):
                continue
            for start, stop in ranges:
                full.narrow(dim, start, stop - start).copy_(part.narrow(dim, taken, stop - start))
                taken += stop - start
        return full

    def collect(self, local: Tensor, ask: Callable[[], None]) -> Tensor:
        """The unsharded tensor on the CPU, on one rank; each other rank of the group calls `send_part` to it.

        Takes the memory of the result and of one rank's part.

        Args:
            local: This rank's part.
            ask: Called when there is room for all parts, to have them sent.
        """
        local, dim, own = local.detach(), self.layout.dim, self.mesh.get_local_rank()
        full = torch.empty(self.global_shape, dtype=local.dtype)
        shapes = [(*self.global_shape[:dim], size, *self.global_shape[dim + 1 :]) for size in self.layout.sizes]
        sent = [rank for rank in range(len(shapes)) if self._is_sent(rank)]
        room = local.new_empty(max((prod(shapes[rank]) for rank in sent if rank != own), default=0))
        ask()
        for rank in sent:
            part = local if rank == own else room[: prod(shapes[rank])].view(shapes[rank])
            if rank != own:
                dist.recv(_as_bytes(part), src=self._global_rank(rank), group=self.mesh.get_group())
            taken = 0
            for start, stop in self.layout.ranges[rank]:
                full.narrow(dim, start, stop - start).copy_(part.narrow(dim, taken, stop - start))
                taken += stop - start
        return full

    def send_part(self, local: Tensor, to: int) -> None:
        """Take part in `collect` on the rank `to` (its number in the whole world)."""
        if self._is_sent(self.mesh.get_local_rank()):
            dist.send(_as_bytes(local.detach().contiguous()), dst=to, group=self.mesh.get_group())

    def _is_sent(self, rank: int) -> bool:
        return self.layout.sizes[rank] > 0 and self.layout.holds_first(rank) and self.global_shape.numel() > 0

    def _global_rank(self, rank: int) -> int:
        return int(self.mesh.mesh.flatten()[rank])


def _as_bytes(tensor: Tensor) -> Tensor:
    """So that every backend takes it, whatever its data type."""
    return tensor.view(-1).view(torch.uint8)


def shard_info(param: nn.Parameter) -> ShardInfo | None:
    """`param.tp_shard`, or None for a parameter that no plan has touched."""
    return getattr(param, "tp_shard", None)


def elements_elsewhere(param: nn.Parameter) -> int:
    """How many elements of the unsharded parameter this rank does not hold."""
    info = shard_info(param)
    return info.global_shape.numel() - param.numel() if info is not None else 0


def remember_shards(module: nn.Module, shards: dict[str, ShardInfo]) -> None:
    """Keep the shards of a module's parameters on the module too: `copy.deepcopy` drops a parameter's attributes.

    From then on `load_state_dict` takes full tensors as well as this rank's parts of them.
    """
    if not shards:
        return
    known = module.__dict__.setdefault(_REMEMBERED, {})
    if not known:
        module.register_load_state_dict_pre_hook(_cut_full_tensors)
    known.update(shards)


def remember_everywhere(model: nn.Module) -> None:
    """Let every module that holds a sharded parameter remember it, not only the one that computes with it.

    BERT's prediction head keeps a second name for the bias of the layer inside it, and loads it under that name too.
    """
    for module in model.modules():
        known = remembered_shards(module)
        held = {name: shard_info(param) for name, param in module._parameters.items() if param is not None}
        remember_shards(module, {name: info for name, info in held.items() if info is not None and name not in known})


def _cut_full_tensors(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """Load-state-dict pre-hook. `state_dict` is torch's own shallow copy of what was passed."""
    for name, info in remembered_shards(module).items():
        if prefix + name in state_dict:
            state_dict[prefix + name] = info.cut_if_full(state_dict[prefix + name])


def remembered_shards(module: nn.Module) -> dict[str, ShardInfo]:
    """The shards of the module's own parameters by name; empty for one that no plan has touched."""
    return module.__dict__.get(_REMEMBERED, {})


def restore_shards(model: nn.Module) -> None:
    """Give the parameters of a copied model their `tp_shard` back."""
    for module in model.modules():
        for name, info in remembered_shards(module).items():
            param = module._parameters.get(name)
            if param is not None and shard_info(param) is None:
                param.tp_shard = info


def mark_whole(model: nn.Module) -> None:
    """Let every parameter answer to `tp_shard`: None for those that no rank holds a mere part of."""
    for param in model.parameters():
        if shard_info(param) is None:
            param.tp_shard = None
