"""LoRA of a sharded embedding."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ...core.layout import Layout
from ...core.shard import shard_info
from ..base import Site, Style
from ..embedding import EmbeddingColwise, EmbeddingRowwise
from ..forward import ParallelForward
from ..region import Region
from ..replicated import Replicate

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
