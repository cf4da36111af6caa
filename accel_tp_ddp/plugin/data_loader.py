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
from ..core.randomness import agree_on_randomness

__all__ = ["serve_replicas"]


def serve_replicas(loader: DataLoader, mesh: DeviceMesh) -> DataLoader:
    """Complete a data loader that Accelerate has prepared with the mesh `("dp_replicate", "tp")`.

    Accelerate itself deals a map-style dataset out to replicas. What is left: its dispatcher knows no replicas, and a
    shuffle has to be the same on all ranks of a replica also where it owes its seed to the rank.
    """
    if isinstance(loader, DataLoaderDispatcher):
        _dispatch_to_replicas(loader, mesh)
    elif not isinstance(loader.dataset, IterableDataset):
        _agree_on_order(loader, mesh)
    return loader


def _dispatch_to_replicas(loader: DataLoaderDispatcher, mesh: DeviceMesh) -> None:
    """Let the dispatcher fetch and slice for as many processes as there are replicas.

    The main process fetches, as before; each rank takes its replica's slice.
    """
    rank, device = loader.state.process_index, loader.state.device
    replicas, replica = mesh["dp_replicate"].size(), mesh.get_local_rank("dp_replicate")
    fetching = SimpleNamespace(num_processes=replicas, process_index=rank, device=device)
    slicing = SimpleNamespace(num_processes=replicas, process_index=replica, device=device)
    stock = loader._fetch_batches

    def fetch_batches(iterator: Any) -> tuple:
        loader.state = fetching
        try:
            batch, batch_info = stock(iterator)
        finally:
            loader.state = slicing
        if rank != 0 and replica == 0 and batch_info[0] is not None:
            batch = initialize_tensors(batch_info[0])  # the dispatcher takes the first replica for the main process
        return batch, batch_info

    loader.submesh_tp = None  # its own way of serving tensor-parallel ranks knows a single replica
    loader.state = slicing
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
