"""Embeddings, sharded over the vocabulary or over the hidden dimension. Ids are replicated on every rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..core.collectives import gather_from_tp, reduce_from_tp
from ..core.layout import Layout
from .base import Site, Style, even_layout
from .forward import ParallelForward

__all__ = ["EmbeddingColwise", "EmbeddingHeads", "EmbeddingRowwise"]


class EmbeddingRowwise(Style):
    """Vocab-parallel: each rank holds a range of the vocabulary, which need not divide by the number of ranks.

        embed_tokens: embedding_rowwise  # weight [vocabulary / tp, hidden]

    Forward: masked lookup, all-reduce; backward: nothing.
    """

    accepts = (nn.Embedding,)
    uneven = True
    reads_full_outside = True
    adapters = frozenset({"embedding", "tokens"})

    def layouts(self, site: Site) -> dict[str, Layout]:
        module: Any = site.module
        return {"weight": even_layout(module.num_embeddings, 0, site.tp_size)}

    def verify(self, site: Site) -> None:
        super().verify(site)
        refuse_options(site, "max_norm", "scale_grad_by_freq", "sparse")

    def forward(self, call: ParallelForward, input: Tensor) -> Tensor:
        ((start, stop),) = call.shards["weight"].layout.ranges[call.mesh.get_local_rank()]
        elsewhere = (input < start) | (input >= stop)
        with local_padding_idx(call.module, start, stop):
            output = call.inner((input - start).masked_fill(elsewhere, 0))
        return reduce_from_tp(call.mesh, torch.masked_fill(output, elsewhere.unsqueeze(-1), 0), fresh=True)


class EmbeddingHeads(Style):
    """An embedding of one value for each attention head, such as of relative positions: each rank looks up its heads'.

        block.0.layer.0.SelfAttention.relative_attention_bias: embedding_heads  # weight [buckets, heads / tp]

    Forward and backward: nothing, as the attention scores that the values are added to are cut over the heads too.
    """

    accepts = (nn.Embedding,)

    def layouts(self, site: Site) -> dict[str, Layout]:
        module: Any = site.module
        return {"weight": even_layout(module.embedding_dim, 1, site.tp_size)}

    def verify(self, site: Site) -> None:
        super().verify(site)
        refuse_options(site, "max_norm", "sparse")


class EmbeddingColwise(EmbeddingHeads):
    """Each rank holds a slice of every vector, which need not divide by the number of ranks.

        embed_tokens: embedding_colwise  # weight [vocabulary, hidden / tp]

    Forward: all-gather; backward: slice.
    """

    uneven = True
    reads_full_outside = True
    adapters = frozenset({"embedding", "tokens"})

    def forward(self, call: ParallelForward, input: Tensor) -> Tensor:
        return gather_from_tp(call.mesh, call.inner(input), -1, call.shards["weight"].layout.sizes)


@contextmanager
def local_padding_idx(module: Any, start: int, stop: int) -> Iterator[None]:
    """Let the module see the padding row by its local number, or not at all where another rank holds it."""
    padding_idx = module.padding_idx
    if padding_idx is not None:
        module.padding_idx = padding_idx - start if start <= padding_idx < stop else None
    try:
        yield
    finally:
        module.padding_idx = padding_idx


def refuse_options(site: Site, *names: str) -> None:
    for name, param in site.module.named_parameters():
        if name != "weight":
            raise site.error(
                f"`{site.parameter(name)}` of size {tuple(param.shape)} is a further parameter of the embedding, "
                "which would see a part of the vectors on each rank.",
                "Set the style to `replicate`.",
            )
    for name in names:
        if getattr(site.module, name):
            raise site.error(
                f"`{site.parameter('weight')}` of size {tuple(site.weight.shape)} is an embedding with "
                f"{name}={getattr(site.module, name)}, which a shard cannot follow.",
                f"Build the embedding without {name}, or set the style to `replicate`.",
            )
