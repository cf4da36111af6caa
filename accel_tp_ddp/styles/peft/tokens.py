"""Trained rows of a sharded embedding, or of the head that is tied to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...core.layout import Layout
from ...core.shard import shard_info
from ..base import Site, Style
from ..region import Region

__all__ = ["trained_tokens_style"]


def trained_tokens_style(site: Site, base: Style, layouts: Mapping[str, Layout]) -> Style:
    if base.leaves_alone:
        return base
    inside = site.module.get_base_layer()
    if "tokens" not in base.adapters or not all(layout.contiguous for layout in layouts.values()):
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
            "trainable_token_indices from the full weight.",
            "Load the model without sharded_loading.",
        )
    return TrainedTokens()


class TrainedTokens(Style):
    """A few rows of a sharded embedding, or of the head tied to it, that are trained; every rank holds all of these.

    Forward: the rows in the place of what the module gives for these tokens; backward: nothing.
    """

    def apply(self, site: Site, region: Region) -> None:
        for name, method in _ON_SHARDS.items():
            setattr(site.module, name, partial(method, site.module))


def _forward_tokens(layer: Any, x: Tensor, active_adapters: list[str], *args, **kwargs) -> Tensor:
    if layer.disable_adapters or not active_adapters or layer.merged:
        return type(layer).forward_adapters(layer, x, active_adapters, *args, **kwargs)
    layer._check_overlapping_tokens(active_adapters)
    base = layer.base_layer
    result = base(x)
    for adapter in active_adapters:
        rows = layer.trainable_tokens_delta[adapter].to(base._parameters["weight"])
        index = _token_index(layer, adapter, rows.device)
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


def _token_index(layer: Any, adapter: str, device: torch.device) -> Tensor:
    """The adapter's tokens as a tensor, made once: to send a list to a device, the host waits for it."""
    tokens = layer.token_indices[adapter]
    if torch.compiler.is_compiling():  # a constant of the graph
        return torch.tensor(tokens, device=device)
    known = layer.__dict__.setdefault("_tp_token_indices", {})
    told, index = known.get(adapter, (None, None))
    if told != tokens or index.device != device:
        with torch.inference_mode(False):  # or no training forward could keep it for its backward
            index = torch.tensor(tokens, device=device)
        if type(index) is Tensor:  # and not a fake one
            known[adapter] = list(tokens), index
    return index


def _merged(layer: Any, rows_of: Mapping[str, Tensor], adapters: list[str], weight: Tensor) -> Tensor:
    """`weight`, full or this rank's part of it, with `rows_of` the adapters in the place of its own."""
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


def _merge_tokens(layer: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
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


def _unmerge_tokens(layer: Any) -> None:
    weight = layer.base_layer._parameters["weight"]
    adapters, layer.merged_adapters = layer.merged_adapters[::-1], []
    weight.data = _merged(layer, layer.trainable_tokens_original, adapters, weight.data)


def _merged_weights(layer: Any, active_adapters: list[str]) -> Tensor:
    return _merged(layer, layer.trainable_tokens_delta, active_adapters, layer.base_layer.weight)


# Methods of PEFT's layer of trained tokens, on this rank's part of the weight.
_ON_SHARDS: dict[str, Callable] = {
    "forward_adapters": _forward_tokens,
    "merge": _merge_tokens,
    "unmerge": _unmerge_tokens,
    "get_merged_weights": _merged_weights,
}
