"""Fused projections in which every key/value head has its queries, its key and its value next to each other."""

from __future__ import annotations

from typing import Any

from torch import Tensor, cat

from ..core.collectives import copy_to_tp, gather_from_tp
from ..core.layout import Layout, chunk_ranges
from .around import full_size, set_local_size
from .base import Site, Style
from .conv1d import out_features
from .forward import ParallelForward
from .linear import Colwise

__all__ = ["GroupedQKVColwise"]


def ranks_that_share(queries: int, keys: int, width: int, tp_size: int) -> int | None:
    """How many ranks share each key/value head of a fused projection; None if the heads cannot be divided evenly.

    Args:
        queries: Number of query heads.
        keys: Number of key/value heads.
        width: Features of each head; those of a shared key and value are divided among the ranks that share it.
        tp_size: Number of ranks.
    """
    if keys % tp_size == 0:
        return 1
    sharing, rest = divmod(tp_size, keys)
    return None if rest or queries // keys % sharing or width % sharing else sharing


def join_shared_keys(call: ParallelForward, output: Tensor, width: int, sharing: int) -> Tensor:
    """The outputs of a fused projection with the full key and value that this rank shares with others.

    Forward: all-gather of keys and values; backward: all-reduce of their gradients.

    Args:
        call: The projection's forward.
        output: This rank's queries, then its part of the key, then its part of the value.
        width: Features of the full key.
        sharing: How many ranks share it.
    """
    part = width // sharing
    query, parts = output.split([output.size(-1) - 2 * part, 2 * part], -1)
    (parts,) = copy_to_tp(call.mesh, gather_from_tp(call.mesh, parts, -1, [2 * part] * call.mesh.size()))
    parts = parts.unflatten(-1, (-1, sharing, 2, part)).select(-4, call.mesh.get_local_rank() // sharing)
    return cat([query, parts.transpose(-3, -2).flatten(-3)], -1)


class GroupedQKVColwise(Colwise):
    """Column-parallel for outputs that are, for one key/value head after the other, its queries, its key, its value.

        h.*.attn.query_key_value: grouped_qkv_colwise(num_heads, num_kv_heads)  # weight [(q + k + v) / tp, inputs]

    Named are the attributes of the attention module that hold these numbers; without the second each head has a key
    and a value of its own. The attention module is shown this rank's numbers.

    Where key/value heads are fewer than the ranks, some ranks share one: each holds some of its queries, and an equal
    part of the columns of its key and value. Those, few, are gathered. Forward: nothing, or all-gather of keys and
    values; backward: all-reduce of the input's gradient, and of those of gathered keys and values.
    """

    usage = "grouped_qkv_colwise(attribute of query heads[, attribute of key/value heads])"

    def __init__(self, heads: str, key_value_heads: str = ""):
        self.heads = heads
        self.key_value_heads = key_value_heads or heads

    def verify(self, site: Site) -> None:
        if isinstance(site.module, self.accepts):
            self._verify_heads(site)
        Style.verify(self, site)

    def _verify_heads(self, site: Site) -> None:
        queries, keys, width = self._heads(site)
        what = f"`{site.parameter('weight')}` of size {tuple(site.weight.shape)}"
        if keys < 1 or queries % keys or out_features(site.module) % (queries + 2 * keys):
            raise site.error(
                f"{what} does not hold {queries} queries ({self.heads}) with {keys} keys and values "
                f"({self.key_value_heads}), all of one width.",
                "Name the attributes of the attention module that hold these numbers.",
            )
        if ranks_that_share(queries, keys, width, site.tp_size) is None:
            raise site.error(
                f"{what} holds {keys} groups of {queries // keys} queries, a key and a value of width {width}, which "
                "the ranks cannot share out evenly.",
                f"Choose a tp_size that divides {keys}, or a multiple of {keys} that divides {queries}; or set the "
                "projections of this attention to `replicate`.",
            )

    def _heads(self, site: Site) -> tuple[int, int, int]:
        """Number of queries and of keys, and the features of each."""
        counts = []
        for name in (self.heads, self.key_value_heads):
            count = full_size(site.parent, name)
            if not isinstance(count, int):
                raise site.error(
                    f"`{name}` of the {type(site.parent).__name__} around it is {count!r} and no number of heads.",
                    f"Write `{self.usage}`.",
                )
            counts.append(count)
        queries, keys = counts
        return queries, keys, out_features(site.module) // max(queries + 2 * keys, 1)

    def sections(self, site: Site) -> list[int]:
        queries, keys, width = self._heads(site)
        return [queries * width, keys * width, keys * width]

    def output_layout(self, site: Site) -> Layout:
        (queries, keys, width), tp_size = self._heads(site), site.tp_size
        if keys % tp_size == 0:
            return Layout(0, chunk_ranges(out_features(site.module), tp_size))
        sharing, group = tp_size // keys, queries // keys + 2
        sizes = (queries // keys * width, width, width)  # of a group's queries, its key, its value
        ranges = []
        for rank in range(tp_size):
            start, part = rank // sharing * group * width, rank % sharing
            own = []
            for size in sizes:
                own.append((start + part * size // sharing, start + (part + 1) * size // sharing))
                start += size
            ranges.append(tuple(own))
        return Layout(0, tuple(ranges))

    def handed_out(self, site: Site) -> Layout:
        """With the whole of a key and value that ranks share."""
        layout, (queries, keys, width), tp_size = self.output_layout(site), self._heads(site), site.tp_size
        if keys % tp_size == 0:
            return layout
        sharing, group = tp_size // keys, queries // keys + 2
        shared = [((rank // sharing + 1) * group - 2) * width for rank in range(tp_size)]
        return Layout(0, tuple((own[0], (start, start + 2 * width)) for own, start in zip(layout.ranges, shared)))

    def show_sizes(self, site: Site) -> None:
        super().show_sizes(site)
        queries, keys, _ = self._heads(site)
        assert site.parent is not None, "it has just told the number of heads"
        set_local_size(site.parent, self.heads, queries // site.tp_size)
        set_local_size(site.parent, self.key_value_heads, max(keys // site.tp_size, 1))

    def facts(self, site: Site) -> dict[str, Any]:
        queries, keys, width = self._heads(site)
        return {"width": width, "sharing": ranks_that_share(queries, keys, width, site.tp_size)}

    def forward(self, call: ParallelForward, input: Tensor) -> Tensor:
        output = super().forward(call, input)
        return output if call.facts["sharing"] == 1 else join_shared_keys(call, output, **call.facts)
