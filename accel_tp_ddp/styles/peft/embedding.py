"""LoRA of a sharded embedding: y = E[x] + s B A[x].

Ids and vectors are replicated, so the adapters are replicated too, and have their full gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from ...core.layout import Layout
from ...core.shard import shard_info
from ..base import Site, Style
from ..forward import call_behind
from ..region import Region

__all__ = ["embedding_lora_style"]

# Those of PEFT's variants of an embedding's LoRA that need no more of the weight than a shard.
_VARIANTS = ("MiCAEmbeddingVariant",)


def embedding_lora_style(site: Site, base: Style, layouts: Mapping[str, Layout]) -> Style:
    if base.leaves_alone:
        return base
    name = site.parameter("base_layer")
    if "embedding" not in base.adapters:
        raise site.error(
            f"the adapters of `{name}` cannot follow its style {type(base).__name__}.",
            "Use an embedding's style of this package, or set it to `replicate`.",
        )
    for adapter, variant in site.module.lora_variant.items():
        if type(variant).__name__ not in _VARIANTS:
            raise site.error(
                f"the adapter {adapter!r} of the embedding `{name}` is a {type(variant).__name__}, which needs the "
                "full weight.",
                "Leave the embedding out of target_modules, use plain LoRA, or set it to `replicate`.",
            )
    return EmbeddingLora()


class EmbeddingLora(Style):
    """LoRA of an embedding of which each rank holds a part. Forward and backward: nothing."""

    def apply(self, site: Site, region: Region) -> None:
        layer: Any = site.module
        layer.get_delta_weight, layer.unmerge = partial(delta_of_shard, layer), partial(unmerge_shard, layer)


def delta_of_shard(layer: Any, adapter: str) -> Tensor:
    """`get_delta_weight` for merging: this rank's part."""
    delta = type(layer).get_delta_weight(layer, adapter)
    info = shard_info(layer.get_base_layer()._parameters["weight"])
    return delta if info is None else info.local_part(delta)


def unmerge_shard(layer: Any) -> None:
    """`unmerge`, which may come within a forward, where reading the weight of the module inside gives the full one."""
    call = call_behind(layer.get_base_layer().forward)
    assert call is not None, "only where the base layer is sharded"
    call.idle = True
    try:
        type(layer).unmerge(layer)
    finally:
        call.idle = False
