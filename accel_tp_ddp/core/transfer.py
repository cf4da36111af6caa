"""What is sent beside training: over gloo connections of its own, so that nothing gets between the collectives."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

__all__ = ["Link", "mesh_ranks"]

#: What is sent is asked for before, so that nobody waits long; but a large part may take its time.
_TIMEOUT = timedelta(hours=1)
_outliving: list[Link] = []  # as gloo's threads may still want the interpreter when the last reference goes


def mesh_ranks(mesh: DeviceMesh) -> tuple[int, ...]:
    """The ranks of a mesh, by their numbers among all ranks."""
    return tuple(mesh.mesh.flatten().tolist())


class Link:
    """Connects some ranks. No process group that torch knows of: making one would involve all ranks, or their counts.

    Collective over `ranks`.

    Args:
        name: The same on all of them, and of no other link.
        ranks: Their numbers among all ranks.
    """

    def __init__(self, name: str, ranks: tuple[int, ...]):
        self._ranks = ranks
        store = dist.PrefixStore(name, dist.distributed_c10d._get_default_store())
        self._gloo = dist.ProcessGroupGloo(store, ranks.index(dist.get_rank()), len(ranks), timeout=_TIMEOUT)
        _outliving.append(self)

    def send(self, tensor: Tensor, to: int) -> None:
        """Send a contiguous CPU tensor to the rank `to`."""
        self._gloo.send([_as_bytes(tensor)], self._ranks.index(to), 0).wait()

    def receive(self, tensor: Tensor, source: int) -> None:
        """Fill a contiguous CPU tensor with what the rank `source` sends."""
        self._gloo.recv([_as_bytes(tensor)], self._ranks.index(source), 0).wait()


def _as_bytes(tensor: Tensor) -> Tensor:
    """So that it takes any data type."""
    return tensor.view(-1).view(torch.uint8)
