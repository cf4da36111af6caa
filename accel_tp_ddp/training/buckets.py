"""Tensors that are sent together: in buckets, so that the copy that is sent stays small."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["BUCKET_BYTES", "buckets", "buckets_of"]

T = TypeVar("T")
BUCKET_BYTES = 25 << 20  # as DDP's


def buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """See `buckets_of`."""
    return buckets_of(tensors, lambda tensor: tensor)


def buckets_of(parts: Iterable[T], tensor_of: Callable[[T], Tensor]) -> Iterator[list[T]]:
    """What is sent together: of one data type, and no more than `BUCKET_BYTES` unless it is a single tensor.

    A large tensor is a bucket by itself, and takes no memory for a copy.
    """
    filling: dict[torch.dtype, tuple[int, list[T]]] = {}
    for part in parts:
        tensor = tensor_of(part)
        size, bucket = filling.get(tensor.dtype, (0, []))
        if tensor.nbytes >= BUCKET_BYTES:
            yield [part]
            continue
        if size + tensor.nbytes > BUCKET_BYTES:
            yield bucket
            size, bucket = 0, []
        filling[tensor.dtype] = size + tensor.nbytes, [*bucket, part]
    yield from (bucket for _, bucket in filling.values())
