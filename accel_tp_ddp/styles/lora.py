"""LoRA layers: y = W x + s B A x, with W [out, in] sharded, A [r, in] and B [out, r].

The style of the base layer runs around the base layer and its adapters together, so that they share its collectives:

| base          | A                          | B                          | forward and backward       |
| ------------- | -------------------------- | -------------------------- | -------------------------- |
| column-wise   | whole, gradient partial    | cut over `out`, as W       | as without adapters        |
| row-wise      | cut over `in`, as W        | whole, gradient partial    | as without adapters        |

Column-wise: rank k computes W_k x + s B_k (A x), and the gradients of x and A are sums over the ranks. Row-wise: the
sum over the ranks of W_k x_k + s B (A_k x_k) is y, so one all-reduce serves both terms, and the gradient of B is a sum
over the ranks. The partial gradients ride on the all-reduce of the input's gradient that the column-parallel modules
beside them make in any case, so adapters add no collective.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from ..region import ParallelForward, Region
from ..shard import Layout
from .base import Site, Style
from .kinds import output_dim
from .linear import Colwise, Rowwise
from .replicated import Replicate, ReplicatedWithGradAllReduce

__all__ = ["LayerForward", "lora_style"]


def lora_style(site: Site, base: Style, layouts: Mapping[str, Layout]) -> Style:
    """How the adapters of the LoRA layer at `site` follow their base layer.

    Args:
        site: The LoRA layer.
        base: Style of its base layer.
        layouts: Layout of the base layer's sharded parameters.

    Raises:
        PlanError: If the adapters cannot follow that style, or are of a variant that computes otherwise.
    """
    if isinstance(base, Replicate):
        return WholeLora()
    name = site.parameter("base_layer")
    if not isinstance(base, (Colwise, Rowwise)) or "weight" not in layouts:
        raise site.error(
            f"the adapters of `{name}` cannot follow its style {type(base).__name__}.",
            "Use a column-wise or row-wise style of this package, set it to `replicate`, or leave the module out of "
            "target_modules.",
        )
    for adapter, variant in site.module.lora_variant.items():
        raise site.error(
            f"the adapter {adapter!r} of `{name}` is a {type(variant).__name__} (DoRA and the like), which needs the "
            "whole weight or its input.",
            "Use plain LoRA (use_dora=False and no other variant), or set the module to `replicate`.",
        )
    layout = layouts["weight"]
    return ShardedLora(replace(layout, dim=0 if layout.dim == output_dim(site.module.base_layer) else 1))


class WholeLora(Style):
    """A LoRA layer around a replicated module: the adapters are replicated too."""

    def calls(self, site: Site) -> list[ParallelForward]:
        return []

    def apply(self, site: Site, region: Region) -> None:
        for dropout in dropouts(site.module):
            Dropout(sharded=False).install(dropout, region, {})


class ShardedLora(Style):
    """The adapters of a base layer whose weight, written `[out, in]`, lies as `layout` says."""

    def __init__(self, layout: Layout):
        self.layout = layout

    def layouts(self, site: Site) -> dict[str, Layout]:
        return {
            f"{part.name.removeprefix(site.name).lstrip('.')}.{key}": layout
            for part, style in self._parts(site)
            for key, layout in style.layouts(part).items()
        }

    def apply(self, site: Site, region: Region) -> None:
        for part, style in self._parts(site):
            style.apply(part, region)
        for dropout in dropouts(site.module):
            Dropout(sharded=self.layout.dim == 1).install(dropout, region, {})
        LayerForward(site.module).install_on(site.module)

    def calls(self, site: Site) -> list[ParallelForward]:
        return [call for part, style in self._parts(site) for call in style.calls(part)] + super().calls(site)

    def _parts(self, site: Site) -> list[tuple[Site, Style]]:
        parts = []
        for key, cut in (("lora_A", self.layout.dim == 1), ("lora_B", self.layout.dim == 0)):
            for adapter, module in getattr(site.module, key).items():
                name = site.parameter(f"{key}.{adapter}")
                style = CutAdapter(self.layout) if cut else PartialAdapter()
                parts.append((Site(name, module, site.module, None, site.tp_size, site.style), style))
        return parts


class CutAdapter(Style):
    """The factor that shares the dimension along which the base weight is cut."""

    accepts = (nn.Linear,)

    def __init__(self, layout: Layout):
        self.layout = layout

    def layouts(self, site: Site) -> dict[str, Layout]:
        cut = {"weight": self.layout}
        if self.layout.dim == 0 and site.module._parameters.get("bias") is not None:
            cut["bias"] = self.layout
        return cut

    def forward(self, call: ParallelForward, input: Tensor) -> Tensor:
        return call.inner_with_sums(input)  # where several ranks hold the same key/value head


class PartialAdapter(ReplicatedWithGradAllReduce):
    """The other factor: replicated, with a gradient that is a sum over the ranks.

    A bias (lora_bias=True, row-wise) is one term of what the ranks sum up, so each adds its share.
    """

    accepts = (nn.Linear,)

    def forward(self, call: ParallelForward, input: Tensor) -> Tensor:
        params = call.summed_parameters()
        bias = params.get("bias", call.module._parameters.get("bias"))
        if bias is not None:
            params["bias"] = bias / call.mesh.size()
        with call.replacing(**params):
            return call.inner(input)


class Dropout(Style):
    """Dropout of an adapter's input: one mask for all ranks where it is replicated, one a rank where it is sharded."""

    def __init__(self, sharded: bool):
        self.sharded = sharded

    def forward(self, call: ParallelForward, input: Tensor) -> Tensor:
        stream = call.region.stream
        if stream is None or not call.module.training:
            return call.inner(input)
        with stream.inside() if self.sharded else stream.outside():
            return call.inner(input)


def dropouts(layer: nn.Module) -> list[nn.Module]:
    return [module for module in layer.lora_dropout.values() if isinstance(module, nn.modules.dropout._DropoutNd)]


class LayerForward(ParallelForward):
    """Stands in for the forward of a LoRA layer and runs it under the style of the base layer.

    Parameters are those of the base layer, whose own call stands back meanwhile. Should the adapters be merged and
    unloaded, the base layer is left, and runs by itself as if there had never been any.
    """

    def __init__(self, layer: nn.Module):
        self.base_call: ParallelForward = layer.base_layer.__dict__["forward"]
        base = self.base_call
        super().__init__(layer.base_layer, base.style, base.region, base.shards, base.facts)
        self.layer = layer
        self._inner = layer.__dict__.get("forward")
        self._rest: tuple = ((), {})

    def __call__(self, x: Tensor, *args, **kwargs):
        self._rest = (args, kwargs)
        self.base_call.idle = True
        try:
            return super().__call__(x)
        finally:
            self._rest = ((), {})
            self.base_call.idle = False

    def inner(self, x: Tensor):
        args, kwargs = self._rest
        if self._inner is not None:
            return self._inner(x, *args, **kwargs)
        return type(self.layer).forward(self.layer, x, *args, **kwargs)

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "_rest": ((), {})}
