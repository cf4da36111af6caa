"""The ranks of a tensor-parallel group compute on the same batch, or say at once that they do not."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ..core.checksum import by_device, can_be_summed, checksum, checksums
from ..core.collectives import differ_over_ranks
from ..core.control import gather_objects

__all__ = ["watch_batches"]


def watch_batches(model: nn.Module, mesh: DeviceMesh, every: int) -> None:
    """Compare what goes into `model` over the ranks of `mesh`: the first input and then every `every`-th.

    It stands at the model and not at the data loader, so it sees every way in which a batch may come about.

    Args:
        model: The bare, parallelized model.
        mesh: Tensor-parallel mesh.
        every: Forwards between two comparisons; 0: never, not the first one either.
    """
    if every:
        model.register_forward_pre_hook(_BatchWatch(mesh, every), with_kwargs=True)


class _BatchWatch:
    def __init__(self, mesh: DeviceMesh, every: int):
        self.mesh = mesh
        self.every = every
        self._forwards = 0

    @torch.compiler.disable
    def __call__(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._forwards += 1
        if (self._forwards - 1) % self.every == 0:
            self.compare({**{f"argument {index}": arg for index, arg in enumerate(args)}, **kwargs})

    def compare(self, inputs: Mapping[str, Any]) -> None:
        """Raise on every rank of the group unless all have the same tensors.

        Raises:
            ValueError: With the ranks, keys and shapes that differ.
        """
        named = dict(_named_tensors(inputs))
        group = self.mesh.get_group()
        if self._alike(named):
            return
        sums = checksums(list(named.values()))
        own = {
            key: (tuple(tensor.shape), str(tensor.dtype), total) for (key, tensor), total in zip(named.items(), sums)
        }
        ranks = dist.get_process_group_ranks(group)
        seen = gather_objects(own, group)
        first = seen[0]
        for rank, other in zip(ranks[1:], seen[1:]):
            differing = [key for key in {**first, **other} if first.get(key) != other.get(key)]
            if differing:
                rows = "; ".join(
                    f"`{key}`: {_show(first.get(key))} on rank {ranks[0]}, {_show(other.get(key))} on rank {rank}"
                    for key in differing[:5]
                )
                raise ValueError(
                    f"the ranks {ranks} hold one model replica together and need the same batch, but forward number "
                    f"{self._forwards} got different data: {rows}. Prepare the data loader with the accelerator, seed "
                    "what shuffles or augments alike on all ranks, and select data by "
                    "`accelerator.process_index`, not by the RANK of the environment or of the process group."
                )

    def _alike(self, named: Mapping[str, Tensor]) -> bool:
        """Whether one number made of all that is compared is the same on all ranks."""
        rows = repr([(key, tuple(tensor.shape), tensor.dtype) for key, tensor in named.items()])
        number = int.from_bytes(hashlib.blake2b(rows.encode(), digest_size=7).digest(), "big")
        _, sums = by_device([checksum(tensor) for tensor in named.values()])
        own = torch.full((), number, dtype=torch.int64, device=self.mesh.device_type)
        for same_device in sums:
            own += checksum(same_device).to(own.device)
        return not any(differ_over_ranks(self.mesh, own.view(1)))


def _named_tensors(inputs: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(inputs, Tensor):
        if inputs.numel() and can_be_summed(inputs):
            yield prefix, inputs
    elif isinstance(inputs, Mapping):
        for key, value in inputs.items():
            yield from _named_tensors(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(inputs, (list, tuple)):
        for index, value in enumerate(inputs):
            yield from _named_tensors(value, f"{prefix}[{index}]")


def _show(entry: tuple | None) -> str:
    if entry is None:
        return "absent"
    shape, dtype, number = entry
    return f"{list(shape)} {dtype.removeprefix('torch.')} (checksum {number:x})"
