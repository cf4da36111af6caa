"""Weight gradients of column-parallel layers, computed while their input's gradient is summed over the ranks.

Autograd computes both in one node, and the sum starts when the last of the layers that share an input has run. Here a
layer gives the input's gradient at once; the weights' are computed in the node that sums, between its start and the
wait for it, as in Megatron-LM (`LinearWithGradAccumulationAndAsyncCommunication`), and for modules that share an input
by their last one's input gradient. Values are those of autograd, to the bit: the same products of the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import linear

__all__ = ["Again", "Beside", "CanWait", "Waiting", "linear_with"]


class CanWait(Protocol):
    """A layer whose weight gradient may be computed later."""

    followers: list[Any]

    @property
    def can_wait(self) -> bool: ...

    def held(self, name: str) -> Tensor: ...


AnyLayer = TypeVar("AnyLayer", bound=CanWait)


class Again:
    """The input of layers that is not kept: gathered once more in the backward, from this rank's slice.

    Begun by the first of them, so that it is under way while their input gradients are computed, and at the latest by
    `ensure`, before it is waited for.

    Args:
        own: The slice.
        gather: Begins the all-gather of a slice, and returns what waits for it.
    """

    def __init__(self, own: Tensor, gather: Callable[[Tensor], Callable[[], Tensor]]):
        self.own = own.detach()
        self.gather = gather
        self._finish: Callable[[], Tensor] | None = None

    def begin(self, own: Tensor) -> None:
        if self._finish is None:
            self._finish = self.gather(own)

    def ensure(self) -> None:
        """Begin it where no layer of this rank has; one with a hook is given another tensor than on other ranks."""
        self.begin(self.own)

    def input(self) -> Tensor:
        """Waited for."""
        assert self._finish is not None, "it was ensured"
        finish, self._finish = self._finish, None
        return finish()


class Waiting:
    """A weight gradient that is computed later."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype
        self.factors: tuple[Tensor, Tensor | None] | None = None

    def gradient(self, whole: Tensor | None = None) -> Tensor | None:
        """Computed now, of what the layer's backward has left; None if that was not run.

        Args:
            whole: The input, where it was gathered once more.
        """
        factors, self.factors = self.factors, None
        if factors is None:
            return None
        grad, input = factors
        input = whole if input is None else input
        assert input is not None, "either is given"
        return _product(grad, input.to(grad.dtype)).to(self.dtype)


class Beside(Generic[AnyLayer]):
    """The layers of one region whose weight gradients are computed beside its sum.

    Their weights pass the node that sums, which so has their gradients to give.
    """

    def __init__(self, layers: Sequence[AnyLayer]):
        self.layers = layers
        self.again: Again | None = None  # what gives their input, where it is not kept
        self.weights = [layer.held("weight") for layer in layers]
        self._waiting = [Waiting(weight.dtype) for weight in self.weights]

    def gradients(self) -> list[Tensor | None]:
        whole = self.again.input() if self.again is not None else None
        return [waiting.gradient(whole) for waiting in self._waiting]

    def passed(self, weights: Sequence[Tensor]) -> dict[AnyLayer, tuple[Waiting, Tensor]]:
        """For each layer what its weight gradient waits in, and its weight behind that node."""
        return dict(zip(self.layers, zip(self._waiting, weights)))


def linear_with(
    waiting: Waiting | None, again: Again | None, input: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """`torch.nn.functional.linear`, whose weight's gradient is left to `waiting`, if that is given.

    The layer keeps as many tensors for its backward with and without, as checkpointing counts them.

    Args:
        waiting: Where the gradient is left to.
        again: Gives `input` in the backward, where it is not to be kept.
    """
    if torch.is_autocast_enabled(device := input.device.type):
        dtype = torch.get_autocast_dtype(device)
        input, weight = _cast(input, dtype), _cast(weight, dtype)
        bias = None if bias is None else _cast(bias, dtype)
    return _Linear.apply(waiting, again, input, weight, bias)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """As autocast does, which leaves float64 alone."""
    return tensor if tensor.dtype is torch.float64 else tensor.to(dtype)


def _product(grad: Tensor, input: Tensor) -> Tensor:
    return grad.reshape(-1, grad.shape[-1]).t() @ input.reshape(-1, input.shape[-1])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, waiting: Waiting | None, again: Again | None, input: Tensor, weight: Tensor, bias: Tensor | None):
        ctx.waiting, ctx.again = waiting, again
        kept = input if again is None else again.own
        # As torch: what a gradient takes that is wanted, and so no input of frozen weights.
        ctx.save_for_backward(kept if ctx.needs_input_grad[3] else None, weight if ctx.needs_input_grad[2] else None)
        output = linear(input, weight, bias)
        # No view, as it is with a bias, which could not be changed in place when it comes from a function.
        return torch.ops.aten._unsafe_view.default(output, output.shape) if output._is_view() else output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        input, weight = ctx.saved_tensors
        if ctx.again is not None and ctx.needs_input_grad[3]:
            ctx.again.begin(input)
            input = None
        of_input = grad @ weight if ctx.needs_input_grad[2] else None
        of_weight = None
        if ctx.needs_input_grad[3]:
            if ctx.waiting is None:
                of_weight = _product(grad, input)
            else:
                ctx.waiting.factors = grad, input
        of_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[4] else None
        return None, None, of_input, of_weight, of_bias
