"""Weight gradients of column-parallel layers, computed while their input's gradient is summed over the ranks.

Autograd computes both in one node, and the sum starts when the last of the layers that share an input has run. Here a
layer gives the input's gradient at once; the weights' are computed in the node that sums, between its start and the
wait for it, as in Megatron-LM (`LinearWithGradAccumulationAndAsyncCommunication`), and for modules that share an input
by their last one's input gradient. Values are those of autograd, to the bit: the same products of the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import linear

__all__ = ["Beside", "Waiting", "linear_with"]


class Layer(Protocol):
    """A column-parallel layer, as its `ParallelForward` knows it."""

    followers: list[Any]

    @property
    def can_wait(self) -> bool: ...

    def held(self, name: str) -> Tensor: ...


AnyLayer = TypeVar("AnyLayer", bound=Layer)


class Waiting:
    """A weight gradient that is computed later."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype
        self.factors: tuple[Tensor, Tensor] | None = None

    def gradient(self) -> Tensor | None:
        """Computed now, of what the layer's backward has left; None if that was not run."""
        factors, self.factors = self.factors, None
        return None if factors is None else _product(*factors).to(self.dtype)


class Beside(Generic[AnyLayer]):
    """The layers of one region whose weight gradients are computed beside its sum.

    Their weights pass the node that sums, which so has their gradients to give.
    """

    def __init__(self, layers: Sequence[AnyLayer]):
        self.layers = layers
        self.weights = [layer.held("weight") for layer in layers]
        self._waiting = [Waiting(weight.dtype) for weight in self.weights]

    def gradients(self) -> list[Tensor | None]:
        return [waiting.gradient() for waiting in self._waiting]

    def passed(self, weights: Sequence[Tensor]) -> dict[AnyLayer, tuple[Waiting, Tensor]]:
        """For each layer what its weight gradient waits in, and its weight behind that node."""
        return dict(zip(self.layers, zip(self._waiting, weights)))


def linear_with(waiting: Waiting | None, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`torch.nn.functional.linear`, whose weight's gradient is left to `waiting`, if that is given.

    The layer keeps the same tensors for its backward in both cases, as checkpointing counts them.
    """
    if torch.is_autocast_enabled(device := input.device.type):
        dtype = torch.get_autocast_dtype(device)
        input, weight = input.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    return _Linear.apply(waiting, input, weight, bias)


def _product(grad: Tensor, input: Tensor) -> Tensor:
    return grad.reshape(-1, grad.shape[-1]).t() @ input.reshape(-1, input.shape[-1])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, waiting: Waiting | None, input: Tensor, weight: Tensor, bias: Tensor | None):
        ctx.waiting = waiting
        ctx.save_for_backward(input, weight)
        return linear(input, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        input, weight = ctx.saved_tensors
        of_input = grad @ weight if ctx.needs_input_grad[1] else None
        of_weight = None
        if ctx.needs_input_grad[2]:
            if ctx.waiting is None:
                of_weight = _product(grad, input)
            else:
                ctx.waiting.factors = grad, input
        of_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[3] else None
        return None, of_input, of_weight, of_bias
