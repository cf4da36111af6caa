"""From a chunk of hidden states to this rank's logits, and from their gradient back to what gets one.

A projection is what an output layer computes, with the steps that a model takes between it and its loss. `begin` opens
a pass over the tokens, chunk by chunk, which adds up the gradients of the layer's parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..core.shard import mark_shard, shard_info
from ..styles.forward import ParallelForward

__all__ = ["Chain", "LinearProjection", "ModuleProjection", "Pass", "Projection"]

#: How many rows of a weight are added to at once, where a product is rounded before it is added up in float32.
_TILE = 8192

Pull = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Chain:
    """Steps between an output layer and a loss, in order: ("to", dtype), ("mul", x), ("div", x), ("tanh",).

    Each is taken in the type that it would be taken in, so that roundings are those of full logits.
    """

    steps: tuple[tuple, ...] = ()

    def then(self, *step: Any) -> Chain:
        return Chain((*self.steps, step))

    def __call__(self, logits: Tensor) -> Tensor:
        for kind, *value in self.steps:
            logits = _STEPS[kind](logits, *value)
        return logits

    @property
    def casts_only(self) -> bool:
        return all(kind == "to" for kind, *_ in self.steps)

    def pull_back(self, logits: Tensor) -> tuple[Tensor, Pull]:
        """The outcome, and what takes its gradient to that of `logits`."""
        if self.casts_only:
            dtype = logits.dtype
            return self(logits), lambda grad: grad.to(dtype)
        with torch.enable_grad():
            leaf = logits.detach().requires_grad_()
            outcome = self(leaf)
        return outcome.detach(), lambda grad: torch.autograd.grad(outcome, leaf, grad.to(outcome.dtype))[0]


_STEPS: dict[str, Callable[..., Tensor]] = {
    "to": lambda logits, dtype: logits.to(dtype),
    "mul": torch.mul,
    "div": torch.div,
    "tanh": torch.tanh,
}


class Pass(Protocol):
    """One pass over the tokens.

    Attributes:
        gives_away: Whether a chunk's logits may be changed in place, as nothing else knows them.
    """

    gives_away: bool

    def forward(self, hidden: Tensor, grads: bool) -> tuple[Tensor, Pull]:
        """This rank's logits of a chunk, and what takes their gradient, adds up those of the parameters, and gives
        that of the chunk: a term of a sum over the ranks.
        """
        ...

    def gradients(self) -> list[Tensor | None]:
        """What has been added up, for each of the projection's tensors; None for one that wants none."""
        ...


class Projection(Protocol):
    """What an output layer computes.

    Attributes:
        tensors: What it computes with and may want gradients, beside the hidden states.
        dtype: Of the logits.
    """

    @property
    def tensors(self) -> tuple[Tensor, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def begin(self, tensors: Sequence[Tensor], wanted: Sequence[bool]) -> Pass: ...


class LinearProjection:
    """`hidden @ weight.T + bias`, computed by hand, so that gradients are added up in place.

    Args:
        weight: This rank's rows `[vocabulary / tp, hidden]`, or columns where it is `transposed`.
        bias: This rank's part, or None.
        dtype: Of the product; that of autocast, where that is on.
        transposed: Whether the weight is `[hidden, vocabulary / tp]`.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, transposed: bool = False):
        self.tensors: tuple[Tensor, ...] = (weight,) if bias is None else (weight, bias)
        self.dtype = dtype
        self.transposed = transposed

    def begin(self, tensors: Sequence[Tensor], wanted: Sequence[bool]) -> Pass:
        return _LinearPass(self, tensors, wanted)


class _LinearPass:
    gives_away = True

    def __init__(self, projection: LinearProjection, tensors: Sequence[Tensor], wanted: Sequence[bool]):
        dtype = projection.dtype
        self.tensors, self.transposed = tensors, projection.transposed
        # The product's own types; autocast casts a weight once a forward, too.
        self.weight, *bias = (tensor.detach().to(dtype) for tensor in tensors)
        if self.transposed:
            self.weight = self.weight.t()
        self.bias = bias[0] if bias else None
        # Rounding each chunk's product to half precision before it is added up biases the sum: TRL's kernels
        # (trl/kernels/chunked_logprob.py, `_addmm_fp32`) have measured it.
        self.sum_dtype = torch.promote_types(dtype, torch.float32)
        self.sums: list[Tensor | None] = [None] * len(tensors)
        self.wanted = wanted

    def forward(self, hidden: Tensor, grads: bool) -> tuple[Tensor, Pull]:
        hidden = hidden.to(self.weight.dtype)
        logits = nn.functional.linear(hidden, self.weight, self.bias)

        def pull(grad: Tensor) -> Tensor:
            if self.wanted[0]:
                self._add_weight(grad, hidden)
            if len(self.tensors) > 1 and self.wanted[1]:
                own = grad.sum(0, dtype=self.sum_dtype)
                self.sums[1] = own if self.sums[1] is None else self.sums[1].add_(own)
            return grad @ self.weight

        return logits, pull

    def _add_weight(self, grad: Tensor, hidden: Tensor) -> None:
        total = self.sums[0]
        if total is None:
            total = self.sums[0] = hidden.new_zeros(self.weight.shape, dtype=self.sum_dtype)
        if total.dtype == grad.dtype:
            total.addmm_(grad.t(), hidden)
            return
        for start in range(0, len(total), _TILE):
            part = slice(start, start + _TILE)
            total[part] += grad[:, part].t() @ hidden

    def gradients(self) -> list[Tensor | None]:
        weight = self.sums[0]
        return [weight.t() if weight is not None and self.transposed else weight, *self.sums[1:]]


class ModuleProjection:
    """Whatever the module of a column-parallel layer computes: adapters, a forward that somebody has put in its place.

    The layer runs once a chunk, and autograd takes the gradient back through that chunk at once.

    Args:
        call: What runs the layer.
        layer: The module whose parameters it computes with.
        offered: Copies of parameters with partial gradients, which the opening of the region has made; by the call
            that takes them, and name.
        hidden: Hidden states, for the type of what comes out. Autocast will be as it is now.
    """

    def __init__(
        self,
        call: ParallelForward,
        layer: nn.Module,
        offered: dict[tuple[Any, str], Tensor],
        hidden: Tensor,
    ):
        self.call = call
        self.places = [
            (module, name)
            for module in layer.modules()
            for name, param in module._parameters.items()
            if param is not None and param.requires_grad
        ]
        taken = {id(partner.held(name)) for partner, name in offered}
        self.places = [(m, n) for m, n in self.places if id(m._parameters[n]) not in taken]
        self.offers = list(offered)
        self.tensors = (*(module.get_parameter(name) for module, name in self.places), *offered.values())
        kind = hidden.device.type
        self.autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        with torch.no_grad():
            self.dtype = self.run(self.tensors, hidden.reshape(-1, hidden.shape[-1])[:0]).dtype

    def run(self, tensors: Sequence[Tensor], hidden: Tensor) -> Tensor:
        kind, dtype, enabled = self.autocast
        own, offered = tensors[: len(self.places)], tensors[len(self.places) :]
        for (partner, name), tensor in zip(self.offers, offered):
            partner.offered[name] = tensor
        try:
            with _holding(self.places, own), torch.autocast(kind, dtype, enabled=enabled, cache_enabled=False):
                return self.call.inner(hidden)
        finally:
            for partner, name in self.offers:
                partner.offered.pop(name, None)

    def begin(self, tensors: Sequence[Tensor], wanted: Sequence[bool]) -> Pass:
        return _ModulePass(self, tensors, wanted)


class _ModulePass:
    gives_away = False

    def __init__(self, projection: ModuleProjection, tensors: Sequence[Tensor], wanted: Sequence[bool]):
        self.run = projection.run
        # Leaves of their own: hooks that somebody has put on the parameters are for the sum, and not for each chunk.
        self.leaves = [tensor.detach().requires_grad_(want) for tensor, want in zip(tensors, wanted)]
        for leaf, tensor in zip(self.leaves, tensors):
            mark_shard(leaf, shard_info(tensor))
        self.sums: list[Tensor | None] = [None] * len(tensors)

    def forward(self, hidden: Tensor, grads: bool) -> tuple[Tensor, Pull]:
        chunk = hidden.detach().requires_grad_(grads)
        with torch.set_grad_enabled(grads):
            logits = self.run(self.leaves, chunk)

        def pull(grad: Tensor) -> Tensor:
            wanted = [index for index, leaf in enumerate(self.leaves) if leaf.requires_grad]
            leaves = [self.leaves[index] for index in wanted]
            of_chunk, *found = torch.autograd.grad(logits, [chunk, *leaves], grad, allow_unused=True)
            for index, own in zip(wanted, found):
                if own is not None:
                    total = self.sums[index]
                    single = torch.promote_types(own.dtype, torch.float32)
                    self.sums[index] = own.to(single) if total is None else total.add_(own)
            return of_chunk

        return logits.detach(), pull

    def gradients(self) -> list[Tensor | None]:
        return self.sums


@contextmanager
def _holding(places: Sequence[tuple[nn.Module, str]], tensors: Sequence[Tensor]) -> Iterator[None]:
    """Let modules compute with these tensors in the places of parameters."""
    before = [module._parameters[name] for module, name in places]
    try:
        for (module, name), tensor in zip(places, tensors):
            module._parameters[name] = tensor  # type: ignore[assignment]
        yield
    finally:
        for (module, name), param in zip(places, before):
            module._parameters[name] = param
