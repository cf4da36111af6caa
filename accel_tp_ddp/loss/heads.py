"""When a model's output layer defers its logits.

With loss_parallel=True in training, if the model is given labels. With "auto" while somebody has said that nobody
reads logits (`losses_only`): there are trainers whose own losses are known. Models that are compiled as
a whole never do; one whose layers Accelerate compiles does, and its output layer is not compiled.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..core.errors import PlanError
from ..core.wrappers import unwrap
from ..styles.base import Style
from ..styles.conv1d import TransposedLinear
from ..styles.forward import ParallelForward, call_behind
from ..styles.linear import ColwiseGatherOutput
from .deferred import Source, deferred
from .projection import Chain, LinearProjection, ModuleProjection, Projection
from .vocab_parallel import Vocabulary

__all__ = ["Mode", "check_head", "defer_logits", "losses_only"]

Mode = bool | Literal["auto"]

_depth = 0  # of `losses_only` blocks


@contextmanager
def losses_only() -> Iterator[None]:
    """Within the block nobody reads logits that models give, but for their losses."""
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1


def check_head(model: nn.Module, styles: dict[nn.Module, Style]) -> None:
    """Raise if there is no output layer of `model` that could defer its logits.

    Args:
        model: Not yet sharded.
        styles: Of its modules, as planned.
    """
    for _, head in _heads(model):
        if isinstance(styles.get(getattr(head, "base_layer", head)), ColwiseGatherOutput):
            return
    raise PlanError(
        f"loss_parallel=True: the plan spreads no output layer of this {type(model).__name__} over the ranks: of the "
        "modules that `get_output_embeddings` gives, none is `colwise_gather_output`. Plan that for it, or set "
        'loss_parallel to "auto" or False.'
    )


def defer_logits(model: nn.Module, mode: Mode) -> None:
    """Let the output layers of a sharded model defer their logits: with True in training, with "auto" if asked to."""
    if mode is False:
        return
    for owner, head in _heads(model):
        call = call_behind(head.__dict__.get("forward"))
        if call is not None and isinstance(call.style, ColwiseGatherOutput):
            _Deferral(head, call, mode).attach(owner, model)
            call.facts["loss_parallel"] = True  # for losses that read the weight, see `fused_heads`


def _heads(model: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """Each output layer, with the outermost model that has it by itself: one around that, such as PEFT's, asks it."""
    found: dict[nn.Module, nn.Module] = {}
    for module in model.modules():
        if hasattr(type(module), "get_output_embeddings"):
            head = module.get_output_embeddings()
            if isinstance(head, nn.Module):
                found.setdefault(head, module)
    return [(owner, head) for head, owner in found.items()]


class _Deferral:
    """Of one output layer."""

    def __init__(self, head: nn.Module, call: ParallelForward, mode: Mode):
        self.head = head
        self.call = call
        self.mode = mode
        self._running = 0  # forwards of the model that somebody calls
        self._sources: list[Source] = []

    def attach(self, owner: nn.Module, root: nn.Module) -> None:
        """Follow the forwards of the model that has the layer, and of that in which it is."""
        owner.register_forward_pre_hook(self._begin, with_kwargs=True)
        owner.register_forward_hook(self._end, always_call=True)
        if root is not owner:
            root.register_forward_pre_hook(self._begin_root)
            root.register_forward_hook(self._end_root, always_call=True)

    def _begin(self, owner: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        asked = any(kwargs.get(name) is not None for name in ("labels", "shift_labels"))
        wanted = _depth > 0 or (self.mode is True and owner.training and asked)
        wanted = wanted and not torch.compiler.is_compiling()
        self.call.defer = self._defer if wanted else None
        if wanted and (given := owner.get_output_embeddings()) is not self.head and unwrap(given) is self.head:
            for parent in owner.modules():  # compiled by itself, the head would compute what is to be deferred
                for name in [name for name, child in parent._modules.items() if child is given]:
                    parent._modules[name] = self.head

    def _end(self, owner: nn.Module, args: Any, output: Any) -> None:
        self.call.defer = None
        if not self._running:
            self._close()

    def _begin_root(self, root: nn.Module, args: Any) -> None:
        self._running += 1

    def _end_root(self, root: nn.Module, args: Any, output: Any) -> None:
        self._running = max(self._running - 1, 0)
        if not self._running:
            self._close()

    def _close(self) -> None:
        for source in self._sources:
            source.open = False
        self._sources.clear()

    def _defer(self, hidden: Tensor) -> Tensor | None:
        """Logits of hidden states in the region; None where the call is not as others are."""
        projection = self._projection(hidden)
        if projection is None:
            return None
        source = Source(Vocabulary(self.call.mesh, self.call.shards["weight"].layout.sizes), projection)
        self._sources.append(source)
        return deferred(source, Chain(), hidden)

    def _projection(self, hidden: Tensor) -> Projection | None:
        call, module = self.call, self.call.module
        plain = type(call) is ParallelForward and call.wrapped is None and not hasattr(module, "parametrizations")
        transposed = isinstance(module, TransposedLinear)
        if plain and (transposed or type(module).forward is nn.Linear.forward):
            weight, bias = call.held("weight"), module._parameters.get("bias")
            dtype = torch.result_type(hidden, weight)
            if torch.is_autocast_enabled(hidden.device.type) and dtype != torch.float64:
                dtype = torch.get_autocast_dtype(hidden.device.type)
            return LinearProjection(weight, bias, dtype, transposed)
        if call.extra_arguments:
            return None
        offered = {(partner, name): t for partner in call.partners for name, t in partner.offered.items()}
        return ModuleProjection(call, self.head, offered, hidden)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_running": 0, "_sources": []}
