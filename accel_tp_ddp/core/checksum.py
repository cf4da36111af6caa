"""A number made of the bits of a tensor, by which ranks compare what is to be equal without sending it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["by_device", "can_be_summed", "checksum", "checksums"]

_PIECE = 1 << 20
_WORD = 4  # bytes


def checksum(tensor: Tensor) -> Tensor:
    """An integer made of the bits of `tensor`, on its device: equal for equal bits, hardly ever for others.

    Args:
        tensor: A strided one, of any data type, offset and strides; what counts are its elements in their order.
    """
    bits = tensor.detach().resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8)
    words = bits.numel() % _WORD == 0
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    start = 0
    for piece in bits.split(_PIECE * (_WORD if words else 1)):  # the sums need eight bytes an element
        if words:
            # A view of larger elements has to begin at a multiple of their size.
            piece = (piece.clone() if piece.storage_offset() % _WORD else piece).view(torch.int32)
        position = torch.arange(start, start + piece.numel(), device=bits.device)
        total += (piece.to(torch.int64) * (2 * position + 1)).sum()  # odd, so that a change of one bit shows
        start += piece.numel()
    return total % (1 << 61)  # small enough for its negative to be exact


def checksums(tensors: Sequence[Tensor]) -> list[int]:
    """The checksum of each on the host, which waits for a device once."""
    order, stacks = by_device([checksum(tensor) for tensor in tensors])
    found = [total for stack in stacks for total in stack.tolist()]
    return [total for _, total in sorted(zip(order, found))]


def by_device(numbers: Sequence[Tensor]) -> tuple[list[int], list[Tensor]]:
    """Scalars as one tensor a device, to be sent or fetched together; and which of `numbers` these are in turn."""
    order = sorted(range(len(numbers)), key=lambda index: numbers[index].device.type)
    devices = dict.fromkeys(numbers[index].device for index in order)
    return order, [torch.stack([numbers[index] for index in order if numbers[index].device == own]) for own in devices]


def can_be_summed(tensor: Tensor) -> bool:
    """Whether `tensor` has bits of its own in an order: it is neither sparse nor nested, nor without data."""
    return tensor.layout == torch.strided and not tensor.is_nested and not tensor.is_meta
