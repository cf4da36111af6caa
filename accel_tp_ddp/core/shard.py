"""How one parameter is laid out over the tensor-parallel ranks, and the cutting and joining that follows from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Shard

from .collectives import gather_parts, gather_whole
from .layout import Layout, Shared
from .transfer import Link, mesh_ranks

__all__ = [
    "check_mesh",
    "has_dtensor_parameters",
    "ShardInfo",
    "elements_elsewhere",
    "full_shape",
    "holds_shards",
    "mark_shard",
    "remember_everywhere",
    "remember_shards",
    "remembered_shards",
    "restore_shards",
    "shard_info",
]

_REMEMBERED = "_tp_shards"


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
    def local_shapes(self) -> list[tuple[int, ...]]:
        """The shape of each rank's part, in rank order."""
        if self.layout is None:
            return [tuple(self.global_shape)] * self.mesh.size()
        dim = self.layout.dim
        return [(*self.global_shape[:dim], size, *self.global_shape[dim + 1 :]) for size in self.layout.sizes]

    @property
    def is_repeated(self) -> bool:
        """Whether some ranks hold the same, so that each of them has only a part of its gradient."""
        return self.layout is not None and bool(self.layout.repeated)

    @property
    def shared(self) -> Shared:
        """What other ranks hold too of this rank's part."""
        layout = self.layout
        assert layout is not None, "only a shard has parts in common"
        total = sum(stop - start for start, stop in layout.repeated)
        return Shared(layout.dim, total, layout.pieces(self.mesh.get_local_rank()))

    def counted(self, local: Tensor) -> list[Tensor]:
        """The slices of this rank's `local` part that it counts where all parts are counted together."""
        if not self.layout.repeated:
            return [local]
        own = self.layout.counted(self.mesh.get_local_rank())
        return [local.narrow(self.layout.dim, start, stop - start) for start, stop in own]

    def local_part(self, full: Tensor) -> Tensor:
        """This rank's part of `full` (shape `global_shape`), in storage of its own."""
        return self.part_of(full, self.mesh.get_local_rank())

    def part_of(self, full: Tensor, rank: int) -> Tensor:
        """The part that `rank` holds of `full`, in storage of its own."""
        if self.layout is None:
            return full.detach().clone()
        dim, own = self.layout.dim, self.layout.ranges[rank]
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
        if self.layout.in_order:
            return gather_whole(self.mesh, local, self.layout.dim, self.layout.sizes)
        parts = gather_parts(self.mesh, local, self.layout.dim, self.layout.sizes)
        return self.joined({rank: part for rank, part in enumerate(parts) if self.layout.holds_first(rank)}, local)

    def joined(self, parts: Mapping[int, Tensor], like: Tensor) -> Tensor:
        """The unsharded tensor, from the parts of all ranks that are `senders`, and of the type of `like`."""
        full = like.new_empty(self.global_shape)
        for rank, part in parts.items():
            self._fill(full, part, rank)
        return full

    @property
    def senders(self) -> list[int]:
        """The ranks whose parts together are the unsharded tensor; of those that hold the same, the first."""
        return [rank for rank in range(self.mesh.size()) if self._is_sent(rank)]

    def collect(self, local: Tensor, ask: Callable[[], Link]) -> Tensor:
        """The unsharded tensor on the CPU, on one rank; each other rank of the group calls `send_part` to it.

        Takes the memory of the result and of one rank's part.

        Args:
            local: This rank's part.
            ask: Called when there is room for all parts, to have them sent; how they come.
        """
        local, shapes, own = local.detach(), self.local_shapes, self.mesh.get_local_rank()
        full = torch.empty(self.global_shape, dtype=local.dtype)
        sent = self.senders
        longest = max((prod(shapes[rank]) for rank in sent if rank != own), default=0)
        room = torch.empty(longest, dtype=local.dtype)
        link = ask()
        for rank in sent:
            part = local if rank == own else room[: prod(shapes[rank])].view(shapes[rank])
            if rank != own:
                link.receive(part, mesh_ranks(self.mesh)[rank])
            self._fill(full, part, rank)
        return full

    def _fill(self, full: Tensor, part: Tensor, rank: int) -> None:
        """Copy what `rank` holds to where it belongs."""
        dim, taken = self.layout.dim, 0
        for start, stop in self.layout.ranges[rank]:
            full.narrow(dim, start, stop - start).copy_(part.narrow(dim, taken, stop - start))
            taken += stop - start

    def send_part(self, local: Tensor, to: int, link: Link) -> None:
        """Take part in `collect` on the rank `to` (its number among all ranks). `local` is on the CPU."""
        if self._is_sent(self.mesh.get_local_rank()):
            link.send(local.detach().contiguous(), to)

    def _is_sent(self, rank: int) -> bool:
        return self.layout.sizes[rank] > 0 and self.layout.holds_first(rank) and self.global_shape.numel() > 0


def shard_info(param: Tensor) -> ShardInfo | None:
    """`param.tp_shard`, or None for a parameter that no plan has touched."""
    return getattr(param, "tp_shard", None)


def mark_shard(param: Tensor, info: ShardInfo | None) -> None:
    """Let `param` answer to `tp_shard`; None: every rank holds all of it."""
    setattr(param, "tp_shard", info)


def full_shape(param: nn.Parameter) -> torch.Size:
    """The shape of the unsharded parameter."""
    info = shard_info(param)
    return torch.Size(info.global_shape) if info is not None else param.shape


def elements_elsewhere(param: nn.Parameter) -> int:
    """How many elements of the unsharded parameter this rank does not hold."""
    return full_shape(param).numel() - param.numel()


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
    Every parameter answers to `tp_shard` then: None for those of which every rank holds all.
    """
    for module in model.modules():
        known = remembered_shards(module)
        held = {name: shard_info(param) for name, param in module._parameters.items() if param is not None}
        remember_shards(module, {name: info for name, info in held.items() if info is not None and name not in known})
    for param in model.parameters():
        mark_shard(param, shard_info(param))


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
                mark_shard(param, info)


def holds_shards(model: nn.Module) -> bool:
    """Whether `model` has been sharded: some of its parameters say of what they are a part."""
    restore_shards(model)
    return any(shard_info(param) is not None for param in model.parameters())


def has_dtensor_parameters(model: nn.Module) -> bool:
    return any(isinstance(param, DTensor) for param in model.parameters())


def check_mesh(model: nn.Module, mesh: DeviceMesh) -> None:
    """Raise unless what is sharded of `model` already is sharded over the ranks of `mesh`.

    Raises:
        ValueError: With the first parameter that is not, its ranks, and those of `mesh`.
    """
    wanted = dist.get_process_group_ranks(mesh.get_group())
    for name, param in model.named_parameters():
        own = param.device_mesh if isinstance(param, DTensor) else getattr(shard_info(param), "mesh", None)
        if own is None or own.ndim != 1:
            continue  # `localize` has its own word for meshes of several dimensions
        ranks = dist.get_process_group_ranks(own.get_group())
        if ranks != wanted:
            raise ValueError(
                f"`{name}` of size {tuple(param.shape)} is sharded over {len(ranks)} ranks {ranks} of another mesh, "
                f"but tp_size={mesh.size()} and the `tp` mesh has the ranks {wanted} here. Parallelize the model with "
                '`accelerator.torch_device_mesh["tp"]`, or pass it unsharded.'
            )
