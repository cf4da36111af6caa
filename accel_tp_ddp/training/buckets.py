"""Tensors that are sent together: in buckets, so that the copy that is sent stays small."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..core.collectives import send_rank

__all__ = ["BUCKET_BYTES", "buckets", "buckets_of", "send_bucket"]

T = TypeVar("T")
BUCKET_BYTES = 25 << 20  # as DDP's


def buckets(tensors: Iterable[Tensor], most: int | None = None) -> Iterator[list[Tensor]]:
    """See `buckets_of`."""
    return buckets_of(tensors, lambda tensor: tensor, most)


def buckets_of(parts: Iterable[T], tensor_of: Callable[[T], Tensor], most: int | None = None) -> Iterator[list[T]]:
    """What is sent together: of one data type, and no more than `most` bytes unless it is a single tensor.

    A large tensor is a bucket by itself, and takes no memory for a copy.

    Args:
        parts: What is or has a tensor each.
        tensor_of: Gives that.
        most: In bytes; None: `BUCKET_BYTES`.
    """
    most = BUCKET_BYTES if most is None else most
    filling: dict[torch.dtype, tuple[int, list[T]]] = {}
    for part in parts:
        tensor = tensor_of(part)
        size, bucket = filling.get(tensor.dtype, (0, []))
        if tensor.nbytes >= most:
            yield [part]
            continue
        if size + tensor.nbytes > most:
            yield bucket
            size, bucket = 0, []
        filling[tensor.dtype] = size + tensor.nbytes, [*bucket, part]
    yield from (bucket for _, bucket in filling.values())


@torch.no_grad()
def send_bucket(mesh: DeviceMesh, tensors: list[Tensor], rank: int = 0) -> None:
    """Overwrite tensors of one data type with their values on `rank` of `mesh`, on every rank, by one collective."""
    if len(tensors) == 1:
        send_rank(mesh, tensors[0], rank)
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    send_rank(mesh, flat, rank)
    if mesh.get_local_rank() != rank:
        parts = flat.split([tensor.numel() for tensor in tensors])
        torch._foreach_copy_(tensors, [part.view_as(tensor) for part, tensor in zip(parts, tensors)])
