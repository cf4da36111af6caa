"""A process group that stands for that of GPUs: gloo under another name, which takes tensors and no objects."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any
from unittest import mock

import torch.distributed as dist

from .ranks import COLLECTIVE_TIMEOUT

DEVICE = "stands_for_nccl"
PAIRS = ("send", "recv", "isend", "irecv")  # of which NCCL makes a communicator for each pair of ranks
_numbers = itertools.count()


def _create(store: Any, rank: int, size: int, timeout: timedelta) -> Any:
    return dist.ProcessGroupGloo(store, rank, size, timeout=timeout)


@contextmanager
def on_device_groups(backend: str = DEVICE, timeout: timedelta = COLLECTIVE_TIMEOUT) -> Iterator[None]:
    """Within the block, on all ranks of a test, the default group and those made like it are a device's."""
    if DEVICE not in dist.Backend.backend_list:
        dist.Backend.register_backend(DEVICE, _create, devices=["cpu"])
    stock = dist.distributed_c10d._object_to_tensor

    def refusing(obj: Any, device: Any, group: Any, *options: Any) -> Any:
        if dist.get_backend(group) != "gloo":
            raise TypeError(f"an object for the device's group: {obj!r:.200}")
        return stock(obj, device, group, *options)

    def no_pairs(*args: Any, **kwargs: Any) -> Any:
        raise TypeError("a message between two ranks over the device's group")

    _start(backend, timeout)
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(dist.distributed_c10d, "_object_to_tensor", refusing))
        for name in PAIRS:
            stack.enter_context(mock.patch.object(dist, name, no_pairs))
        yield  # where it raises, the ranks are discarded
    _start("gloo", COLLECTIVE_TIMEOUT)


def _start(backend: str, timeout: timedelta) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    dist.barrier()
    dist.destroy_process_group()
    store = dist.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), is_master=False, timeout=COLLECTIVE_TIMEOUT)
    mine = dist.PrefixStore(f"{backend} {next(_numbers)}", store)
    dist.init_process_group(backend, store=mine, rank=rank, world_size=size, timeout=timeout)
