"""LoRA layers: y = W x + s B A x, with W [out, in] sharded, A [r, in] and B [out, r].

The style of the base layer runs around the base layer and its adapters together, so that they share its collectives:

| base          | A                          | B                          | forward and backward       |
| ------------- | -------------------------- | -------------------------- | -------------------------- |
| column-wise   | replicated, grad. partial  | cut over `out`, as W       | as without adapters        |
| row-wise      | cut over `in`, as W        | replicated, grad. partial  | as without adapters        |

Column-wise: rank k computes W_k x + s B_k (A x), and the gradients of x and A are sums over the ranks. Row-wise: the
sum over the ranks of W_k x_k + s B (A_k x_k) is y, so one all-reduce serves both terms, and the gradient of B is a sum
over the ranks. The partial gradients ride on the all-reduce of the input's gradient that the column-parallel modules
beside them make in any case, so adapters add no collective.

DoRA (arXiv:2402.09353): y = m / |W + s B A| * (W x + s B A x) with m [out] and the norm of each row [out], through
which no gradient goes. m is cut where B is cut, and its gradient is partial where B's is. A column-parallel rank holds
full rows, and so their norms; row-parallel ones sum up the squares of their parts, one small all-reduce a forward.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ...core.collectives import reduce_from_tp
from ...core.layout import Layout
from ..base import Site, Style
from ..conv1d import output_dim
from ..forward import ParallelForward, call_behind
from ..region import Region
from ..replicated import LocalDropout, ReplicatedDropout, ReplicatedWithGradAllReduce

__all__ = ["CutAdapter", "OfParts", "PartialAdapter", "lora_style", "parts_of"]

# Those of PEFT's variants of LoRA that compute nothing but rows of W, A and B with a shard, DoRA's norm apart.
_VARIANTS = ("ALoraLinearVariant", "DoraLinearVariant", "MiCALinearVariant")


def lora_style(site: Site, base: Style, layouts: Mapping[str, Layout]) -> Style:
    """How the adapters of the LoRA layer at `site` follow their base layer.

    Args:
        site: The LoRA layer.
        base: Style of its base layer.
        layouts: Layout of the base layer's sharded parameters.

    Raises:
        PlanError: If the adapters cannot follow that style, or are of a variant that computes otherwise.
    """
    if base.leaves_alone:
        return ReplicatedLora()
    name = site.parameter("base_layer")
    if "linear" not in base.adapters:
        raise site.error(
            f"the adapters of `{name}` cannot follow its style {type(base).__name__}.",
            "Use a column-wise or row-wise style of this package, set it to `replicate`, or leave the module out of "
            "target_modules.",
        )
    if "weight" not in layouts:
        return EnclosedLora()
    for adapter, variant in site.module.lora_variant.items():
        if type(variant).__name__ not in _VARIANTS:
            raise site.error(
                f"the adapter {adapter!r} of `{name}` is a {type(variant).__name__}, which needs the full weight or "
                "its input.",
                "Use plain LoRA, DoRA, aLoRA or MiCA, or set the module to `replicate`.",
            )
    inside: Any = site.module.base_layer
    return ShardedLora(layouts["weight"], outputs=layouts["weight"].dim == output_dim(inside))


class ReplicatedLora(Style):
    """A LoRA layer around a replicated module: the adapters are replicated too."""

    def apply(self, site: Site, region: Region) -> None:
        for dropout in dropouts(site.module):
            ReplicatedDropout().install(dropout, region, {})


class EnclosedLora(ReplicatedLora):
    """A LoRA layer around a replicated module whose style works on what comes out: it takes the adapters' part too."""

    def apply(self, site: Site, region: Region) -> None:
        super().apply(site, region)
        LayerForward(site.module).install_on(site.module)


class OfParts(Style):
    """Follows a module by styles of its submodules."""

    def parts(self, site: Site) -> list[tuple[Site, Style]]:
        raise NotImplementedError

    def layouts(self, site: Site) -> dict[str, Layout]:
        return {
            f"{part.name.removeprefix(site.name).lstrip('.')}.{key}": layout
            for part, style in self.parts(site)
            for key, layout in style.layouts(part).items()
        }

    def apply(self, site: Site, region: Region) -> None:
        for part, style in self.parts(site):
            style.apply(part, region)


class ShardedLora(OfParts):
    """The adapters of a base layer whose weight lies as `layout` says.

    Args:
        layout: Of the base layer's weight.
        outputs: Whether it is cut along its output features, and not along its input features.
    """

    def __init__(self, layout: Layout, outputs: bool):
        self.outputs = outputs
        self.of_a, self.of_b = Layout(1, layout.ranges), Layout(0, layout.ranges)

    def apply(self, site: Site, region: Region) -> None:
        super().apply(site, region)
        for magnitude in site.module.lora_magnitude_vector.values():
            magnitude.get_lora_weight = product
            if not self.outputs:
                magnitude.get_weight_norm = WeightNorm(region.mesh, magnitude.fan_in_fan_out)
        of_input = ReplicatedDropout() if self.outputs else LocalDropout()
        for dropout in dropouts(site.module):
            of_input.install(dropout, region, {})
        LayerForward(site.module).install_on(site.module)

    def calls(self, site: Site) -> list[ParallelForward]:
        return [call for part, style in self.parts(site) for call in style.calls(part)] + super().calls(site)

    def parts(self, site: Site) -> list[tuple[Site, Style]]:
        of_a = PartialAdapter() if self.outputs else CutAdapter(self.of_a)
        of_b = CutAdapter(self.of_b) if self.outputs else PartialAdapter()
        styles = {"lora_A": of_a, "lora_B": of_b, "lora_magnitude_vector": of_b}
        return [part for key, style in styles.items() for part in parts_of(site, key, style)]


def parts_of(site: Site, key: str, style: Style) -> list[tuple[Site, Style]]:
    """The modules of a layer's adapters that are kept under `key`, one for each adapter, with `style`."""
    return [
        (Site(site.parameter(f"{key}.{adapter}"), module, site.module, None, site.tp_size, site.style), style)
        for adapter, module in getattr(site.module, key).items()
    ]


class CutAdapter(Style):
    """A factor, or DoRA's magnitude, that shares the dimension along which the base weight is cut."""

    def __init__(self, layout: Layout):
        self.layout = layout

    def layouts(self, site: Site) -> dict[str, Layout]:
        cut = {"weight": self.layout}
        if self.layout.dim == 0 and site.module._parameters.get("bias") is not None:
            cut["bias"] = self.layout
        return cut

    def forward(self, call: ParallelForward, *args, **kwargs) -> Tensor:
        held, own = call.module._parameters["weight"].shape, self.layout.sizes[call.mesh.get_local_rank()]
        if held[self.layout.dim] != own:
            raise ValueError(
                f"an adapter's weight has the size {tuple(held)}, and not {own} in dimension {self.layout.dim} "
                "as this rank's part. Something has put a full one in its place, as hotswap_adapter does: use "
                "`load_adapter`, which takes this rank's part."
            )
        return call.inner_with_sums(*args, **kwargs)  # where several ranks hold the same key/value head


class PartialAdapter(ReplicatedWithGradAllReduce):
    """The other factor: replicated, with a gradient that is a sum over the ranks.

    A bias (lora_bias=True, row-wise) is one term of what the ranks sum up, so each adds its share.
    """

    def forward(self, call: ParallelForward, *args, **kwargs) -> Tensor:
        params = call.summed_parameters()
        bias = params.get("bias", call.module._parameters.get("bias"))
        if bias is not None:
            params["bias"] = bias / call.mesh.size()
        return call.inner_with(params, *args, **kwargs)


@torch.no_grad()
def product(lora_A: nn.Module, lora_B: nn.Module, adapter_name: str | None = None) -> Tensor:
    """B A, in the place of DoRA's own, which calls the factors: a call takes the gradients' sum for itself."""
    return lora_B.weight @ lora_A.weight


class WeightNorm:
    """Norms of the rows of W + s B A where each rank holds some columns, in the place of DoRA's own.

    Forward: all-reduce of the sums of squares; no gradient goes through. Merging calls it too.
    """

    def __init__(self, mesh: DeviceMesh, transposed: bool):
        self.mesh = mesh
        self.transposed = transposed

    @torch.no_grad()
    def __call__(self, weight: Tensor, lora_weight: Tensor, scaling: float, adapter_name: str | None = None) -> Tensor:
        weight = (weight.T if self.transposed else weight) + scaling * lora_weight
        single = torch.promote_types(weight.dtype, torch.float32)
        squares = torch.linalg.vector_norm(weight, dim=1, dtype=single).square()
        return reduce_from_tp(self.mesh, squares).sqrt().to(weight.dtype)


def dropouts(layer: nn.Module) -> list[nn.Module]:
    return [module for module in layer.lora_dropout.values() if isinstance(module, nn.modules.dropout._DropoutNd)]


class LayerForward(ParallelForward):
    """Stands in for the forward of a LoRA layer and runs it under the style of the base layer.

    Parameters are those of the base layer, whose own call stands back meanwhile. Should the adapters be merged and
    unloaded, the base layer is left, and runs by itself as if there had never been any.
    """

    def __init__(self, layer: Any):
        base = call_behind(layer.base_layer.forward)
        assert base is not None, "the style of the base layer is applied first"
        self.base_call = base
        super().__init__(layer.base_layer, base.style, base.region, base.shards, base.facts)
        self.layer = layer
        self.wrapped = layer.__dict__.get("forward")
        self.fresh = False
        self._rest: tuple = ((), {})

    def __call__(self, x: Tensor, *args, **kwargs):
        self._rest = (args, kwargs)
        try:
            return super().__call__(x)
        finally:
            self._rest = ((), {})

    @property
    def extra_arguments(self) -> bool:
        return any(self._rest)

    def inner(self, x: Tensor):
        args, kwargs = self._rest
        self.base_call.idle = True
        try:
            if self.wrapped is not None:
                return self.wrapped(x, *args, **kwargs)
            return type(self.layer).forward(self.layer, x, *args, **kwargs)
        finally:
            self.base_call.idle = False

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "_rest": ((), {})}
