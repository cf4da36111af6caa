"""What PEFT puts around a sharded module, and how it follows: linear layers (`lora.py`), experts, embeddings, tokens.

Experts: PEFT computes with W + s B_e A_e for each expert e, with W `[experts, out, in]` (or transposed),
A `[r * experts, in]` and B `[out, r * experts]`. The factor that shares the dimension along which W is cut is cut
alike; each rank has a part of the gradient of the other, summed in one small all-reduce.

Embeddings: ids and vectors are replicated, so the adapters are whole and have their whole gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from ..region import ParallelForward, Region
from ..shard import Layout, shard_info
from .base import Site, Style
from .embedding import EmbeddingColwise, EmbeddingRowwise
from .experts import Experts
from .linear import ColwiseGatherOutput
from .lora import CutAdapter, OfParts, PartialAdapter, lora_style, parts_of
from .replicated import Replicate

__all__ = ["adapter_style", "can_follow"]


def can_follow(layer: nn.Module) -> bool:
    """Whether there is a way for this module of PEFT's to follow a sharded one inside it."""
    return _kind(layer) in _STYLES


def adapter_style(site: Site, base: Style, layouts: Mapping[str, Layout]) -> Style:
    """How the adapters of the layer at `site` follow the module inside, whose style and layouts these are.

    Raises:
        PlanError: If they cannot.
    """
    style = _STYLES[_kind(site.module)](site, base, layouts)
    for name, layout in style.layouts(site).items():
        param, size = site.module.get_parameter(name), max(stop for ranges in layout.ranges for _, stop in ranges)
        if param.shape[layout.dim] != size:
            raise site.error(
                f"`{site.parameter(name)}` of size {tuple(param.shape)} was made for a part of the module, which has "
                f"{size} elements in that dimension.",
                "PEFT took its size or values from a slice of the weight: load the model without sharded_loading.",
            )
    return style


def _kind(layer: nn.Module) -> str:
    """By name, as nothing here imports peft; the class itself, as one that is derived from it computes otherwise."""
    return f"{type(layer).__module__}.{type(layer).__qualname__}"


# --- experts ---------------------------------------------------------------------------------------------------------


def experts_lora_style(site: Site, base: Style, layouts: Mapping[str, Layout]) -> Style:
    if isinstance(base, Replicate):
        return Replicate()
    name = site.module.parameter_name
    if not isinstance(base, Experts) or name not in layouts or site.module.get_param().ndim != 3:
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
                    factor = factors[adapter].__dict__["forward"] if adapter in factors else None
                    if factor is not None and factor.partial_gradients:
                        sums.enter_context(factor.replacing(**factor.summed_parameters()))
            return call.inner(*args, **kwargs)

    def parts(self, site: Site) -> list[tuple[Site, Style]]:
        of_outputs = 1 if site.module._did_swap_in_out_features else 2  # the dimension of W [experts, ...]
        outputs = self.layout.dim == of_outputs
        of_a = PartialAdapter() if outputs else CutAdapter(Layout(1, self.layout.ranges))
        of_b = CutAdapter(Layout(0, self.layout.ranges)) if outputs else PartialAdapter()
        return [*parts_of(site, "lora_A", of_a), *parts_of(site, "lora_B", of_b)]


# --- embeddings ------------------------------------------------------------------------------------------------------


def embedding_lora_style(site: Site, base: Style, layouts: Mapping[str, Layout]) -> Style:
    if isinstance(base, Replicate):
        return Replicate()
    name = site.parameter("base_layer")
    if not isinstance(base, (EmbeddingRowwise, EmbeddingColwise)):
        raise site.error(
            f"the adapters of `{name}` cannot follow its style {type(base).__name__}.",
            "Use an embedding's style of this package, or set it to `replicate`.",
        )
    for adapter, variant in site.module.lora_variant.items():
        if type(variant).__name__ not in _EMBEDDING_VARIANTS:
            raise site.error(
                f"the adapter {adapter!r} of the embedding `{name}` is a {type(variant).__name__}, which needs the "
                "whole weight.",
                "Leave the embedding out of target_modules, use plain LoRA, or set it to `replicate`.",
            )
    return EmbeddingLora()


_EMBEDDING_VARIANTS = ("MiCAEmbeddingVariant",)


class EmbeddingLora(Style):
    """LoRA of an embedding of which each rank holds a part. Forward and backward: nothing."""

    def calls(self, site: Site) -> list[ParallelForward]:
        return []

    def apply(self, site: Site, region: Region) -> None:
        site.module.get_delta_weight = DeltaOfShard(site.module)
        site.module.unmerge = UnmergeShard(site.module)


class DeltaOfShard:
    """`get_delta_weight` for merging: this rank's part. An object, so that it is copied with its layer."""

    def __init__(self, layer: nn.Module):
        self.layer = layer

    def __call__(self, adapter: str) -> Tensor:
        delta = type(self.layer).get_delta_weight(self.layer, adapter)
        info = shard_info(self.layer.get_base_layer()._parameters["weight"])
        return delta if info is None else info.local_part(delta)


class UnmergeShard:
    """`unmerge`, which may come within a forward, where reading the weight of the module inside gives a whole one."""

    def __init__(self, layer: nn.Module):
        self.layer = layer

    def __call__(self) -> None:
        call = self.layer.get_base_layer().__dict__["forward"]
        call.idle = True
        try:
            type(self.layer).unmerge(self.layer)
        finally:
            call.idle = False


# --- trained tokens --------------------------------------------------------------------------------------------------


def trained_tokens_style(site: Site, base: Style, layouts: Mapping[str, Layout]) -> Style:
    if isinstance(base, Replicate):
        return Replicate()
    inside = site.module.get_base_layer()
    if not isinstance(base, (EmbeddingRowwise, EmbeddingColwise, ColwiseGatherOutput)) or not all(
        layout.contiguous for layout in layouts.values()
    ):
        raise site.error(
            f"the trained tokens of `{site.parameter('base_layer')}` cannot follow its style {type(base).__name__}.",
            "Use an embedding's style (of a head: `colwise_gather_output`), or set it to `replicate`.",
        )
    if inside._parameters.get("bias") is not None:
        raise site.error(
            f"`{site.parameter('base_layer')}` has a bias, which PEFT leaves out where tokens are trained.",
            "Leave it out of trainable_token_indices, or set it to `replicate`.",
        )
    if inside._parameters["weight"].is_meta:
        raise site.error(
            f"`{site.parameter('base_layer')}` was loaded in slices, so that PEFT cannot have read the rows of "
            "trainable_token_indices from the whole weight.",
            "Load the model without sharded_loading.",
        )
    return TrainedTokens()


class TrainedTokens(Style):
    """A few rows of a sharded embedding, or of the head tied to it, that are trained; every rank holds all of these.

    Forward: the rows in the place of what the module gives for these tokens; backward: nothing.
    """

    def calls(self, site: Site) -> list[ParallelForward]:
        return []

    def apply(self, site: Site, region: Region) -> None:
        layer = site.module
        for name in ("forward_adapters", "merge", "unmerge", "get_merged_weights"):
            setattr(layer, name, OnShards(layer, name))


class OnShards:
    """A method of PEFT's layer of trained tokens, on this rank's part of the weight."""

    def __init__(self, layer: nn.Module, name: str):
        self.layer = layer
        self.name = name

    def __call__(self, *args, **kwargs):
        return _ON_SHARDS[self.name](self.layer, *args, **kwargs)


def _forward_tokens(layer: nn.Module, x: Tensor, active_adapters: list[str], *args, **kwargs) -> Tensor:
    if layer.disable_adapters or not active_adapters or layer.merged:
        return type(layer).forward_adapters(layer, x, active_adapters, *args, **kwargs)
    layer._check_overlapping_tokens(active_adapters)
    base = layer.base_layer
    result = base(x)
    for adapter in active_adapters:
        rows = layer.trainable_tokens_delta[adapter].to(base._parameters["weight"])
        index = torch.tensor(layer.token_indices[adapter], device=rows.device)
        if isinstance(base, nn.Embedding):
            hits = x.unsqueeze(-1) == index
            scale = layer._get_embed_scale()
            own = rows[hits.int().argmax(-1)]  # the first one's, where there is none
            own = own if scale is None else own * scale.to(own.dtype)
            if base.padding_idx is not None:  # has no gradient
                own = torch.where((x == base.padding_idx).unsqueeze(-1), own.detach(), own)
            result = torch.where(hits.any(-1, keepdim=True), own.to(result.dtype), result)
        else:
            result = result.index_copy(-1, index, nn.functional.linear(x, rows).to(result.dtype))
    return result


def _merged(layer: nn.Module, rows_of: Mapping[str, Tensor], adapters: list[str], weight: Tensor) -> Tensor:
    """`weight`, whole or this rank's part of it, with `rows_of` the adapters in the place of its own."""
    info = shard_info(layer.get_base_layer()._parameters["weight"])
    if info is None or not info.is_sharded or weight.shape == info.global_shape:
        start, stop, columns = 0, weight.size(0), slice(None)
    else:
        ((first, last),) = info.layout.ranges[info.mesh.get_local_rank()]
        rows_are_cut = info.layout.dim == 0
        start, stop = (first, last) if rows_are_cut else (0, weight.size(0))
        columns = slice(None) if rows_are_cut else slice(first, last)
    for adapter in adapters:
        index = torch.tensor(layer.token_indices[adapter], device=weight.device)
        own = (index >= start) & (index < stop)
        weight = weight.index_copy(0, index[own] - start, rows_of[adapter].to(weight)[own, columns])
    return weight


def _merge_tokens(layer: nn.Module, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
    from peft.tuners.tuners_utils import check_adapters_to_merge

    adapters = check_adapters_to_merge(layer, adapter_names)
    if adapters:
        layer._check_overlapping_tokens(adapters)
        for adapter in adapters:
            if safe_merge and not torch.isfinite(layer.trainable_tokens_delta[adapter]).all():
                raise ValueError(f"the rows of the adapter {adapter!r} are not finite, so they are not merged.")
        weight = layer.base_layer._parameters["weight"]
        weight.data = _merged(layer, layer.trainable_tokens_delta, adapters, weight.data)
        layer.merged_adapters.extend(adapters)


def _unmerge_tokens(layer: nn.Module) -> None:
    weight = layer.base_layer._parameters["weight"]
    adapters, layer.merged_adapters = layer.merged_adapters[::-1], []
    weight.data = _merged(layer, layer.trainable_tokens_original, adapters, weight.data)


def _merged_weights(layer: nn.Module, active_adapters: list[str]) -> Tensor:
    return _merged(layer, layer.trainable_tokens_delta, active_adapters, layer.base_layer.weight)


_ON_SHARDS: dict[str, Callable] = {
    "forward_adapters": _forward_tokens,
    "merge": _merge_tokens,
    "unmerge": _unmerge_tokens,
    "get_merged_weights": _merged_weights,
}


_STYLES: dict[str, Callable[[Site, Style, Mapping[str, Layout]], Style]] = {
    "peft.tuners.lora.layer.Linear": lora_style,
    "peft.tuners.lora.layer.ParamWrapper": experts_lora_style,
    "peft.tuners.lora.layer.Embedding": embedding_lora_style,
    "peft.tuners.trainable_tokens.layer.TrainableTokensLayer": trained_tokens_style,
}
