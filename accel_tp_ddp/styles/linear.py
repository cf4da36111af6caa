"""Linear layers: column-parallel and row-parallel.

Shapes: x is `[..., in_features]`, the weight `[out_features, in_features]` before and a part of it after sharding.
Column-parallel: Y = X [A1 A2]; row-parallel: Y = X1 B1 + X2 B2 (Megatron-LM, arXiv:1909.08053, section 3).
"""

from __future__ import annotations

from torch import Tensor, nn

from ..collectives import gather_from_tp, reduce_from_tp, split_to_tp
from ..region import ParallelForward, Region
from ..shard import Layout
from .base import Site, Style, even_layout

__all__ = ["Colwise", "ColwiseGatherOutput", "Rowwise", "RowwiseSplitInput"]


# What attention modules call the number of their heads.
_HEAD_COUNT_NAMES = ("num_heads", "num_attention_heads", "n_head", "n_heads", "num_key_value_heads", "num_kv_heads")
_HEAD_COUNT_NAMES += ("n_head_kv", "n_kv_heads")
_TOLD = "_tp_local_head_counts"


def has_bias(module: nn.Module) -> bool:
    return module._parameters.get("bias") is not None


class Colwise(Style):
    """Each rank computes a slice of the output. Forward: nothing; backward: all-reduce of the input's gradient."""

    accepts = (nn.Linear,)
    enters = True
    #: Whether the output leaves the module sharded, and so has to hold whole attention heads.
    whole_heads = True

    def layouts(self, site: Site) -> dict[str, Layout]:
        layout = self.output_layout(site)
        return {"weight": layout, "bias": layout} if has_bias(site.module) else {"weight": layout}

    def output_layout(self, site: Site) -> Layout:
        return even_layout(site.module.out_features, 0, site.tp_size)

    def verify(self, site: Site) -> None:
        if isinstance(site.module, nn.Linear) and self.whole_heads:
            verify_whole_heads(site, site.module.out_features, "output")
        super().verify(site)

    def apply(self, site: Site, region: Region) -> None:
        super().apply(site, region)
        if self.whole_heads:
            show_local_heads(site, site.module.out_features)

    def forward(self, call: ParallelForward, input: Tensor) -> Tensor:
        return call.inner(call.entered(input))


class ColwiseGatherOutput(Colwise):
    """Column-parallel with the full output on every rank. Forward: all-gather; backward: slice, then all-reduce.

    The output features need not divide by the number of ranks.
    """

    uneven = True
    shares_input = False
    whole_heads = False
    whole_outside = True

    def forward(self, call: ParallelForward, input: Tensor) -> Tensor:
        output = call.inner(call.entered(input))
        return gather_from_tp(call.mesh, output, -1, call.shards["weight"].layout.sizes)


class Rowwise(Style):
    """Each rank takes a slice of the input features. Forward: all-reduce of the output; backward: nothing.

    The bias is replicated and added once, after the sum.
    """

    accepts = (nn.Linear,)
    whole_heads = True

    def layouts(self, site: Site) -> dict[str, Layout]:
        return {"weight": self.input_layout(site)}

    def input_layout(self, site: Site) -> Layout:
        return even_layout(site.module.in_features, 1, site.tp_size)

    def verify(self, site: Site) -> None:
        if isinstance(site.module, nn.Linear) and self.whole_heads:
            verify_whole_heads(site, site.module.in_features, "input")
        super().verify(site)

    def forward(self, call: ParallelForward, input: Tensor) -> Tensor:
        call.region.leave()
        bias = call.module._parameters["bias"]
        if bias is None:
            return reduce_from_tp(call.mesh, call.inner(input))
        with call.replacing(bias=None):
            output = reduce_from_tp(call.mesh, call.inner(input))
        return output + bias.to(output.dtype)  # as autocast would have cast it


class RowwiseSplitInput(Rowwise):
    """Row-parallel of a replicated input. Forward: slice, then all-reduce; backward: all-gather.

    The input features need not divide by the number of ranks.
    """

    uneven = True
    whole_heads = False

    def forward(self, call: ParallelForward, input: Tensor) -> Tensor:
        return super().forward(call, split_to_tp(call.mesh, input, -1, call.shards["weight"].layout.sizes))


def show_local_heads(site: Site, features: int) -> None:
    """Tell the attention module around a column-parallel projection how many heads it has on this rank.

    A module that keeps a head count and shapes by it, as in `view(batch, -1, self.num_heads, self.head_dim)`, would
    take the sequence for the heads that are missing.
    """
    width = site.head_width()
    if width is None or features % width:
        return
    told = site.parent.__dict__.setdefault(_TOLD, set())  # each count once: half of one may equal another
    for name in _HEAD_COUNT_NAMES:
        count = getattr(site.parent, name, None)
        if name not in told and isinstance(count, int) and count == features // width and count % site.tp_size == 0:
            setattr(site.parent, name, count // site.tp_size)
            told.add(name)


def verify_whole_heads(site: Site, features: int, side: str) -> None:
    """Attention computes head by head, so a rank has to hold whole heads, of queries as of keys and values."""
    width = site.head_width()
    if width is None or features % width:
        return
    counts = {f"{features // width} heads in the {side} of {site.name}": features // width, **site.head_counts()}
    for what, count in counts.items():
        if count % site.tp_size:
            weight = site.module.weight
            few = what == "num_key_value_heads" or count < site.tp_size
            raise site.error(
                f"`{site.parameter('weight')}` of size {tuple(weight.shape)} has heads of width {width}, and "
                f"{what.replace('_', ' ').removeprefix('num ')} = {count} is not divisible by tp_size.",
                f"Choose a tp_size that divides {count}"
                + (" (fewer key/value heads than ranks is not supported yet)." if few else ".")
                + " To leave attention unsharded, set its projections to `replicate`.",
            )
