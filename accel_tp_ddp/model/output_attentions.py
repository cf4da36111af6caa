"""Attention weights that a caller asks for (`output_attentions`): of all heads, as without tensor parallelism."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..core.collectives import gather_from_tp
from ..core.layout import Ranges
from ..core.wrappers import unwrap
from ..plans.plan import Plan
from ..styles.region import Region

__all__ = ["return_all_heads"]


def return_all_heads(model: nn.Module, plan: Plan, region: Region) -> None:
    """Let the forward of `model` return attention weights of all heads where it is asked for any.

    Only then: they are gathered when the forward ends, and their gradient goes back to the ranks that hold the heads.
    """
    taken = [(entry.site.parent, entry.style.input_ranges(entry.layouts)) for entry in plan.entries]
    outputs = {parent: ranges for parent, ranges in taken if ranges is not None}
    parents = {entry.site.parent: None for entry in plan.entries if entry.style.local_output}
    asked = _Asked(region, {parent: outputs.get(parent) for parent in parents if parent is not None})
    model.register_forward_pre_hook(asked.begin, with_kwargs=True)
    model.register_forward_hook(asked.end, always_call=True)


class _Asked:
    """One forward of the whole model. Attention weights are known by their object: layers may stay replicated."""

    def __init__(self, region: Region, modules: Mapping[nn.Module, tuple[Ranges, ...] | None]):
        self.region = region
        self.modules = dict(modules)
        self.hooks: list[RemovableHandle] = []
        self.local: dict[int, tuple[Tensor, tuple[Ranges, ...] | None]] = {}

    def begin(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        asked = kwargs.get("output_attentions")
        config = getattr(unwrap(model), "config", None)
        self.local.clear()
        if getattr(config, "output_attentions", False) if asked is None else asked:
            for module, ranges in self.modules.items():  # only then, as each hook takes the host's time
                self.hooks.append(module.register_forward_hook(_Note(self, ranges)))

    def end(self, model: nn.Module, args: Any, output: Any) -> Any:
        try:
            return self._all_heads(output) if self.local and output is not None else None
        finally:
            for hook in self.hooks:
                hook.remove()
            self.hooks.clear()
            self.local.clear()

    def _all_heads(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in self.local:
                return value
            heads = gather_from_tp(self.region.mesh, value, 1, [value.size(1)] * self.region.mesh.size())
            return _in_order(heads, self.local[id(value)][1])
        if isinstance(value, Mapping):
            for name in [name for name in value if "attentions" in name]:
                value[name] = self._all_heads(value[name])
            return value
        return type(value)(map(self._all_heads, value)) if type(value) in (tuple, list) else value

    def __getstate__(self) -> dict[str, Any]:
        return {"region": self.region, "modules": self.modules, "hooks": [], "local": {}}


def _in_order(attention: Tensor, ranges: tuple[Ranges, ...] | None) -> Tensor:
    """Heads `[batch, heads, ...]` that stand in the order of the ranks, as they stand in the unsharded model.

    Args:
        attention: Of all heads.
        ranges: For each rank the inputs of the output projection that it holds, which are those of its heads; None
            where every rank has heads that follow on those of the rank before.
    """
    features = max((stop for held in ranges or () for _, stop in held), default=0)
    width = features // attention.size(1)
    if not width:
        return attention
    spans = [span for held in ranges or () for span in held]
    order = torch.tensor([start // width for first, stop in spans for start in range(first, stop, width)])
    heads = torch.arange(attention.size(1))
    if len(order) != len(heads) or torch.equal(order, heads):
        return attention
    return attention.index_select(1, order.argsort().to(attention.device))


class _Note:
    """Forward hook of an attention module."""

    reads_input = False

    def __init__(self, asked: _Asked, ranges: tuple[Ranges, ...] | None):
        self.asked = asked
        self.ranges = ranges

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, (tuple, list)):
            weights = (part for part in output if isinstance(part, Tensor) and part.ndim == 4)
            self.asked.local.update({id(part): (part, self.ranges) for part in weights})
