"""LoRA of a stack of experts' weights.

PEFT computes with W + s B_e A_e for each expert e, with W `[experts, out, in]` (or transposed), A `[r * experts, in]`
and B `[out, r * experts]`:

| W is cut over | A                          | B                          | backward, besides that of the experts   |
| ------------- | -------------------------- | -------------------------- | --------------------------------------- |
| `out`         | replicated, grad. partial  | cut over `out`, as W       | one small all-reduce of the gradient of A |
| `in`          | cut over `in`, as W        | replicated, grad. partial  | one small all-reduce of the gradient of B |
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack

from ...core.layout import Layout
from ..base import Site, Style
from ..forward import ParallelForward, call_behind
from ..region import Region
from .lora import CutAdapter, OfParts, PartialAdapter, parts_of

__all__ = ["experts_lora_style"]


def experts_lora_style(site: Site, base: Style, layouts: Mapping[str, Layout]) -> Style:
    if base.leaves_alone:
        return base
    name = site.module.parameter_name
    if "experts" not in base.adapters or name not in layouts or site.module.get_param().ndim != 3:
        raise site.error(
            f"the adapters of the parameter `{site.parameter(f'base_layer.{name}')}` (target_parameters) cannot "
            f"follow its style {type(base).__name__}.",
            "Experts under `moe_tp_experts` can have some; use target_modules for other layers, or set the module to "
            "`replicate`.",
        )
    return ExpertsLora(layouts[name])


class ExpertsLora(OfParts):
    """LoRA of a stack of experts' weights, of which each rank holds the part that `layout` says."""

    def __init__(self, layout: Layout):
        self.layout = layout

    def apply(self, site: Site, region: Region) -> None:
        super().apply(site, region)
        self.install(site.module, region, {})

    def forward(self, call: ParallelForward, *args, **kwargs):
        """PEFT multiplies the factors by itself and calls none, so their sums are put in their places."""
        with ExitStack() as sums:
            for adapter in call.module.active_adapters:
                for factors in (call.module.lora_A, call.module.lora_B):
                    factor = call_behind(factors[adapter].forward) if adapter in factors else None
                    if factor is not None and factor.partial_gradients:
                        sums.enter_context(factor.replacing(**factor.summed_parameters()))
            return call.inner(*args, **kwargs)

    def parts(self, site: Site) -> list[tuple[Site, Style]]:
        of_outputs = 1 if site.module._did_swap_in_out_features else 2  # the dimension of W [experts, ...]
        outputs = self.layout.dim == of_outputs
        of_a = PartialAdapter() if outputs else CutAdapter(Layout(1, self.layout.ranges))
        of_b = CutAdapter(Layout(0, self.layout.ranges)) if outputs else PartialAdapter()
        return [*parts_of(site, "lora_A", of_a), *parts_of(site, "lora_B", of_b)]
