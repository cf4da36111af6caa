"""What Accelerate's data loaders need so that the ranks of one replica get one batch, and replicas different ones."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard, SeedableRandomSampler, get_sampler
from accelerate.utils import initialize_tensors
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler

from ..core.collectives import send_first_rank
from ..core.override import attributes
from ..core.randomness import agree_on_randomness

__all__ = ["serve_replicas"]


def serve_replicas(loader: DataLoader, mesh: DeviceMesh) -> DataLoader:
    """Complete a data loader that Accelerate has prepared for replicas, which it takes for processes.

    A shuffle has to be the same on all ranks of a replica also where it owes its seed to the rank, and only the main
    process fetches what is dispatched.

    Args:
        loader: As Accelerate has prepared it.
        mesh: `("dp_replicate", "tp")`.
    """
    if isinstance(loader, DataLoaderDispatcher):
        if mesh.get_local_rank("dp_replicate") == 0 and mesh.get_local_rank("tp") > 0:
            _leave_fetching_to_main(loader, mesh.get_local_rank("tp"))
    elif not isinstance(loader.dataset, IterableDataset):
        _agree_on_order(loader, mesh)
    return loader


def _leave_fetching_to_main(loader: DataLoaderDispatcher, rank: int) -> None:
    """Let a peer of the main process take what that fetches, as the ranks of other replicas do.

    The dispatcher takes all ranks of the first replica for the main process.
    """
    stock, replicas = loader._fetch_batches, loader.state
    another = SimpleNamespace(num_processes=replicas.num_processes, process_index=rank, device=replicas.device)

    def fetch_batches(iterator: Any) -> tuple:
        with attributes(loader, state=another):
            batch, batch_info = stock(iterator)
        return batch if batch_info[0] is None else initialize_tensors(batch_info[0]), batch_info

    loader._fetch_batches = fetch_batches


def _sampler_of(loader: DataLoader) -> Any:
    """The sampler under all batch samplers: also where `skip_first_batches` has put one around them."""
    batches = loader.batch_sampler
    while (inner := getattr(batches, "batch_sampler", None)) is not None:
        batches = inner
    return getattr(batches, "sampler", None) or get_sampler(loader)


def _agree_on_order(loader: DataLoaderShard, mesh: DeviceMesh) -> None:
    sampler = _sampler_of(loader)
    if isinstance(sampler, SeedableRandomSampler):
        seed = torch.tensor(sampler.initial_seed, dtype=torch.int64)
        send_first_rank(mesh["tp"], seed)
        sampler.initial_seed = int(seed)
    elif loader.synchronized_generator is None and not isinstance(sampler, SequentialSampler):
        # Accelerate shares a random state only where there are replicas, and only that of a sampler's own generator.
        loader.begin = _AgreeAndBegin(loader, mesh["tp"])


class _AgreeAndBegin:
    """A loader's own `begin`, called before its sampler draws, on one random state in each replica."""

    def __init__(self, loader: DataLoaderShard, mesh: DeviceMesh):
        self.loader = loader
        self.mesh = mesh

    def __call__(self) -> None:
        agree_on_randomness(self.mesh)
        type(self.loader).begin(self.loader)
