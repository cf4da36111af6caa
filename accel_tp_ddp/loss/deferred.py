"""Logits that are not computed before somebody reads them, and never if all that is wanted of them is a loss.

`DeferredLogits` stands where a model has the output of its output layer. What models do between that and their loss
(casts, scales, soft-capping, slices of tokens, flattening) gives other deferred logits, and
`torch.nn.functional.cross_entropy` of those is computed from each rank's part of the vocabulary. Anything else
computes and gathers the full logits, with their gradient: right, and as dear as without all this.

That takes all ranks of a replica, so it is done within the model's forward only, which they run alike. Afterwards a
read is an error, on whatever rank it happens, and `full_tensor` is the way to say that every rank reads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from ..core.collectives import gather_parts
from ..core.gathered import ComputedWhenUsed
from .projection import Chain, Projection
from .vocab_parallel import Vocabulary, cross_entropy

__all__ = ["DeferredLogits", "Source", "deferred"]


@dataclass
class Source:
    """One call of an output layer.

    Attributes:
        vocabulary: Who has which logits.
        projection: What this rank computes.
        open: Whether the model's forward still runs.
    """

    vocabulary: Vocabulary
    projection: Projection
    open: bool = True


class DeferredLogits(ComputedWhenUsed):
    """The logits of an output layer whose vocabulary is spread over the ranks. See this module."""

    _source: Source
    _chain: Chain
    _hidden: Tensor
    _anchor: Tensor | None  # what DDP has made of them, whose backward is to run too

    @staticmethod
    def _of(source: Source, chain: Chain, hidden: Tensor) -> DeferredLogits:
        dtype = source.projection.dtype
        for kind, *value in chain.steps:
            dtype = value[0] if kind == "to" else dtype
        logits = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            DeferredLogits, (*hidden.shape[:-1], source.vocabulary.total), dtype=dtype, device=hidden.device
        )
        logits._source, logits._chain, logits._hidden, logits._full = source, chain, hidden, None
        logits._anchor = None
        return logits

    def full_tensor(self) -> Tensor:
        """The full logits, with their gradient. Collective: call it on every rank of the replica."""
        before, self._source.open = self._source.open, True
        try:
            with torch._C.DisableTorchFunctionSubclass():
                return self.clone()
        finally:
            self._source.open = before

    def _can_defer(self) -> bool:
        """Whether what follows may be computed from the hidden states.

        Not once they have been computed, as somebody may have changed them in place; nor if an autograd function of
        somebody's gave them, whose backward may do anything. That of DDP passes gradients on (`_DDPSink`).
        """
        with torch._C.DisableTorchFunctionSubclass():
            name = type(self.grad_fn).__name__
        if name == "_DDPSinkBackward":
            self._anchor = self
        return self._full is None and name in ("NoneType", "_DeferBackward", "_DDPSinkBackward")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # reads nothing, so that one rank may print it
        return (
            f"DeferredLogits({tuple(self.shape)}, {self.dtype}, not gathered: `full_tensor()` on every rank does it)"
        )

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        handler = _HANDLERS.get(func)
        if handler is not None and args and isinstance(args[0], DeferredLogits) and args[0]._can_defer():
            with torch.set_grad_enabled(torch.is_grad_enabled() and args[0].requires_grad):
                found = handler(*args, **kwargs)
            if found is not NotImplemented:
                return found
        if func in _LEAVES_TORCH:
            args = (args[0].full_values(), *args[1:])
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @torch.no_grad()
    def full_values(self) -> Tensor:
        if self._full is None:
            source = self._source
            if not source.open:
                raise RuntimeError(
                    f"these logits, of size {tuple(self.shape)}, were not computed: with loss_parallel the loss is "
                    "taken from each rank's part of the vocabulary, and to read them takes all ranks of the replica. "
                    "Call their `full_tensor()`, on every rank, or set loss_parallel=False for outputs with full "
                    "logits."
                )
            rows = self._hidden.detach().reshape(-1, self._hidden.shape[-1])
            tensors = source.projection.tensors
            own = source.projection.begin(tensors, [False] * len(tensors)).forward(rows, False)[0]
            parts = gather_parts(source.vocabulary.mesh, self._chain(own), -1, source.vocabulary.sizes)
            self._full = torch.cat(parts, -1).view(self.shape)
        return self._full


def deferred(source: Source, chain: Chain, hidden: Tensor, anchor: Tensor | None = None) -> DeferredLogits:
    """What `chain` makes of the logits of these hidden states `[..., width]`, which are in the region.

    Args:
        source: The output layer's call.
        chain: Steps since.
        hidden: Hidden states.
        anchor: A tensor whose backward is to run, without a gradient, when theirs does.
    """
    logits = _Defer.apply(source, chain, anchor, hidden, *source.projection.tensors)
    logits._hidden, logits._anchor = hidden, anchor
    return logits


class _Defer(torch.autograd.Function):
    """Forward computes nothing; backward takes the gradient of full logits to the hidden states and the layer."""

    @staticmethod
    def forward(
        ctx: Any, source: Source, chain: Chain, anchor: Tensor | None, hidden: Tensor, *tensors: Tensor
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.source, ctx.chain = source, chain
        ctx.save_for_backward(hidden, *tensors)
        return DeferredLogits._of(source, chain, hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> tuple:
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        hidden, *tensors = ctx.saved_tensors
        vocabulary = ctx.source.vocabulary
        rows = hidden.reshape(-1, hidden.shape[-1])
        own = vocabulary.sizes[vocabulary.mesh.get_local_rank()]
        grad = grad.narrow(-1, vocabulary.start, own).reshape(-1, own)
        layer = ctx.source.projection.begin(tensors, ctx.needs_input_grad[4:])
        of_hidden = torch.empty_like(rows, memory_format=torch.contiguous_format)
        for part in vocabulary.chunks(*rows.shape):
            logits, to_hidden = layer.forward(rows[part], True)
            of_hidden[part] = to_hidden(ctx.chain.pull_back(logits)[1](grad[part]))
        of_layer = (g if g is None else g.to(tensor.dtype) for g, tensor in zip(layer.gradients(), tensors))
        return None, None, None, of_hidden.view(hidden.shape), *of_layer


class _Anchored(torch.autograd.Function):
    """A loss whose backward lets that of an anchor run too, without a gradient."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, anchor: Tensor) -> Tensor:
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return grad, None


# --- what is done to logits without computing them -------------------------------------------------------------------


def _then(logits: DeferredLogits, *step: Any) -> DeferredLogits:
    return deferred(logits._source, logits._chain.then(*step), logits._hidden, logits._anchor)


def _reshaped(logits: DeferredLogits, hidden: Tensor) -> DeferredLogits:
    return deferred(logits._source, logits._chain, hidden, logits._anchor)


def _cast(dtype: torch.dtype) -> Callable[..., Any]:
    return lambda logits: logits if logits.dtype == dtype else _then(logits, "to", dtype)


def _to(logits: DeferredLogits, *args: Any, **kwargs: Any) -> Any:
    if kwargs.pop("copy", False):
        return NotImplemented
    device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
    if device is not None and torch.empty(0, device=device).device != logits.device:
        return NotImplemented
    return logits if dtype is None else _cast(dtype)(logits)


def _by_number(step: str) -> Callable[..., Any]:
    def scaled(logits: DeferredLogits, number: Any, **kwargs: Any) -> Any:
        if kwargs or isinstance(number, bool) or not isinstance(number, (int, float)):
            return NotImplemented
        return _then(logits, step, number)

    return scaled


def _tanh(logits: DeferredLogits, **kwargs: Any) -> Any:
    return NotImplemented if kwargs else _then(logits, "tanh")


def _as_they_are(logits: DeferredLogits, **kwargs: Any) -> Any:
    return logits


def _clone(logits: DeferredLogits, **kwargs: Any) -> Any:
    return _reshaped(logits, logits._hidden)


def _view(logits: DeferredLogits, *shape: Any) -> Any:
    sizes = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], (tuple, list, torch.Size)) else shape
    if not sizes or not all(isinstance(size, int) for size in sizes) or sizes[-1] != logits.shape[-1]:
        return NotImplemented
    return _reshaped(logits, logits._hidden.reshape(*sizes[:-1], logits._hidden.shape[-1]))


def _flatten(logits: DeferredLogits, start_dim: int = 0, end_dim: int = -1) -> Any:
    if end_dim % logits.ndim == logits.ndim - 1:
        return NotImplemented
    return _reshaped(logits, logits._hidden.flatten(start_dim, end_dim))


def _getitem(logits: DeferredLogits, index: Any) -> Any:
    """Of tokens; an index that reaches the vocabulary wants the logits themselves."""
    parts = index if isinstance(index, tuple) else (index,)
    taken = 0
    for part in parts:
        if part is None or part is ...:
            continue
        if isinstance(part, Tensor) and not isinstance(part, DeferredLogits):
            taken += part.ndim if part.dtype in (torch.bool, torch.uint8) else 1
        elif isinstance(part, (int, slice)) and not isinstance(part, bool):
            taken += 1
        else:
            return NotImplemented
    to_the_end = any(part is ... for part in parts[:-1]) or taken >= logits.ndim
    if to_the_end and not (isinstance(parts[-1], slice) and parts[-1] == slice(None)):
        return NotImplemented
    return _reshaped(logits, logits._hidden[index])


def _cross_entropy(
    logits: DeferredLogits,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    by_index = isinstance(target, Tensor) and target.ndim == 1 and target.dtype == torch.long and logits.ndim == 2
    plain = weight is None and size_average is None and reduce is None and reduction in ("mean", "sum", "none")
    if not by_index or not plain or len(target) != len(logits):
        return NotImplemented
    source = logits._source
    loss = cross_entropy(
        *(source.vocabulary, source.projection, logits._hidden, target, logits._chain),
        *(ignore_index, reduction, label_smoothing),
    )
    if logits._anchor is not None and loss.requires_grad:
        loss = _Anchored.apply(loss, logits._anchor)
    in_single = torch.is_autocast_enabled(logits.device.type)  # where cross-entropy is computed in float32
    return loss.to(torch.promote_types(logits.dtype, torch.float32) if in_single else logits.dtype)


_HANDLERS: dict[Callable, Callable[..., Any]] = {
    Tensor.float: _cast(torch.float32),
    Tensor.double: _cast(torch.float64),
    Tensor.bfloat16: _cast(torch.bfloat16),
    Tensor.half: _cast(torch.float16),
    Tensor.to: _to,
    **dict.fromkeys((Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.mul), _by_number("mul")),
    **dict.fromkeys((Tensor.div, Tensor.__truediv__, torch.div, Tensor.true_divide), _by_number("div")),
    **dict.fromkeys((Tensor.tanh, torch.tanh), _tanh),
    Tensor.contiguous: _as_they_are,
    **dict.fromkeys((Tensor.clone, torch.clone), _clone),
    **dict.fromkeys((Tensor.view, Tensor.reshape, torch.reshape), _view),
    **dict.fromkeys((Tensor.flatten, torch.flatten), _flatten),
    Tensor.__getitem__: _getitem,
    functional.cross_entropy: _cross_entropy,
}
#: Which read the memory of a tensor, and are no operation.
_LEAVES_TORCH = (Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.data_ptr)
