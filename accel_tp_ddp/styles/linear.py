"""Linear layers: column-parallel and row-parallel.

Shapes: x is `[..., in_features]`, the weight `[out_features, in_features]` before and a part of it after sharding.
Column-parallel: Y = X [A1 A2]; row-parallel: Y = X1 B1 + X2 B2 (Megatron-LM, arXiv:1909.08053, section 3).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor, nn

from ..collectives import gather_from_tp, reduce_from_tp, split_to_tp
from ..region import ParallelForward, Region
from ..shard import Layout, chunk_ranges
from .base import Site, Style, even_layout
from .kinds import (
    LINEAR,
    in_features,
    input_dim,
    is_linear,
    out_features,
    output_dim,
    show_local_outputs,
    without_bias,
)
from .local import show_local_size

__all__ = ["Colwise", "ColwiseGatherOutput", "Rowwise", "RowwiseSplitInput"]


def has_bias(module: nn.Module) -> bool:
    return module._parameters.get("bias") is not None


def bare_output_dim(param: nn.Parameter) -> int:
    """The dimension of the outputs in a bare parameter, laid out as the weight of a linear layer: the last but one."""
    return max(param.ndim - 2, 0)


class Colwise(Style):
    """Each rank computes a slice of the output. Forward: nothing; backward: all-reduce of the input's gradient."""

    accepts = LINEAR
    enters = True
    #: Whether the output leaves the module sharded, and so has to hold whole attention heads.
    whole_heads = True
    #: Whether several ranks may hold the same key/value head where there are more ranks than heads.
    repeats_heads = True

    def layouts(self, site: Site) -> dict[str, Layout]:
        layout = self.output_layout(site)
        weight = {"weight": replace(layout, dim=output_dim(site.module))}
        return {**weight, "bias": layout} if has_bias(site.module) else weight

    def output_layout(self, site: Site) -> Layout:
        """How the outputs are dealt out, along the only dimension of the bias."""
        features = out_features(site.module)
        copies = site.ranks_per_head(features) if self.repeats_heads else 1
        (parts,) = zip(*chunk_ranges(features, site.tp_size // copies))
        return Layout(0, tuple((part,) for part in parts for _ in range(copies)))

    def bare_layout(self, site: Site, name: str) -> Layout:
        """Rows of a matrix or of a stack of matrices; the elements of a vector, such as one for each head."""
        param = site.module._parameters[name]
        dim = bare_output_dim(param)
        return even_layout(param.shape[dim], dim, site.tp_size)

    def allows_uneven(self, site: Site) -> bool:
        return self.uneven or meets_a_neighbour(site, out_features(site.module), in_features)

    def verify(self, site: Site) -> None:
        if is_linear(site.module) and self.whole_heads:
            verify_whole_heads(site, out_features(site.module), "output", self.repeats_heads)
        super().verify(site)

    def apply(self, site: Site, region: Region) -> None:
        sizes = self.output_layout(site).sizes
        super().apply(site, region)
        show_local_outputs(site.module, sizes[region.mesh.get_local_rank()])
        if self.whole_heads:
            show_local_heads(site)

    def forward(self, call: ParallelForward, input: Tensor) -> Tensor:
        return call.inner_with_sums(call.entered(input))


class ColwiseGatherOutput(Colwise):
    """Column-parallel with the full output on every rank. Forward: all-gather; backward: slice, then all-reduce.

    The output features need not divide by the number of ranks.
    """

    uneven = True
    shares_input = False
    whole_heads = False
    whole_outside = True
    repeats_heads = False

    def forward(self, call: ParallelForward, input: Tensor) -> Tensor:
        output = call.inner(call.entered(input))
        return gather_from_tp(call.mesh, output, -1, call.shards["weight"].layout.sizes)


class Rowwise(Style):
    """Each rank takes a slice of the input features. Forward: all-reduce of the output; backward: nothing.

    The bias is replicated and added once, after the sum.
    """

    accepts = LINEAR
    whole_heads = True

    def layouts(self, site: Site) -> dict[str, Layout]:
        return {"weight": replace(self.input_layout(site), dim=input_dim(site.module))}

    def input_layout(self, site: Site) -> Layout:
        """How the inputs are dealt out, along the last dimension of torch's weight."""
        return even_layout(in_features(site.module), 1, site.tp_size)

    def bare_layout(self, site: Site, name: str) -> Layout:
        """The last dimension: inputs of a stack of matrices, or outputs of transposed ones and their biases."""
        param = site.module._parameters[name]
        return even_layout(param.shape[-1], param.ndim - 1, site.tp_size)

    def allows_uneven(self, site: Site) -> bool:
        return self.uneven or meets_a_neighbour(site, in_features(site.module), out_features)

    def verify(self, site: Site) -> None:
        if is_linear(site.module) and self.whole_heads:
            verify_whole_heads(site, in_features(site.module), "input")
        super().verify(site)

    def forward(self, call: ParallelForward, input: Tensor) -> Tensor:
        call.region.leave()
        bias = call.module._parameters["bias"]
        if bias is None:
            return reduce_from_tp(call.mesh, call.inner(input))
        with without_bias(call):
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


def meets_a_neighbour(site: Site, features: int, side: Callable[[nn.Module], int]) -> bool:
    """Whether a linear layer beside this one has these features on its other `side`, and no heads are counted there.

    The features of an MLP stay between its layers, which cut them alike, whether they divide by the ranks or not.
    """
    if site.parent is None or not is_linear(site.module) or site.head_width() is not None:
        return False
    if any(hasattr(site.parent, name) for name in ("qk_head_dim", *_QUERY_COUNTS, *_KEY_VALUE_COUNTS)):
        return False
    layers = [getattr(child, "base_layer", child) for child in site.parent.children()]  # in case it holds adapters
    others = [layer for layer in layers if is_linear(layer) and layer is not site.module]
    return any(side(layer) % features == 0 for layer in others)


def verify_whole_heads(site: Site, features: int, side: str, repeats: bool = True) -> None:
    """Attention computes head by head, so a rank has to hold whole heads, of queries as of keys and values.

    Key/value heads that are fewer than the ranks may be held by several of them each, where the style `repeats` them.
    """
    width, counts = site.head_width(), site.head_counts()
    if width is None:
        width = getattr(site.parent, "qk_head_dim", None)  # latent attention: its projections have widths of their own
        counts = {name: count for name, count in counts.items() if name == "num_attention_heads"}
        if width is None:
            return
    elif features % width == 0:
        counts = {f"{features // width} heads in the {side} of {site.name}": features // width, **counts}
    repeats = repeats and site.key_value_heads is not None
    queries = counts.get("num_attention_heads")
    for what, count in counts.items():
        few = what == "num_key_value_heads" or (count < site.tp_size and count != queries)
        if count % site.tp_size and not (few and repeats and site.tp_size % count == 0):
            weight = site.module.weight
            what = what.replace("_", " ").removeprefix("num ") if what in site.head_counts() else what
            raise site.error(
                f"`{site.parameter('weight')}` of size {tuple(weight.shape)} has heads of width {width}, and "
                f"{what} = {count} is not divisible by tp_size.",
                f"Choose a tp_size that divides {count}"
                + (f" or is a multiple of {count}." if few and repeats else ".")
                + " To leave attention unsharded, set its projections to `replicate`.",
            )


# What attention modules call the head counts that they keep, and some of them view their activations by.
_QUERY_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
_KEY_VALUE_COUNTS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head", "n_head_kv")


def show_local_heads(site: Site) -> None:
    """Show this rank's head counts to the attention module around a projection, where it keeps any.

    One that shapes by them, as in `view(batch, -1, self.num_heads, self.head_dim)`, would take the sequence for the
    heads that are missing. Without a config that states the counts, they are known by the projection's size.
    """
    parent, width = site.parent, site.head_width()
    if parent is None or width is None:
        return
    queries, key_values = site.head_counts().get("num_attention_heads"), site.key_value_heads
    if queries is None:
        features = out_features(site.module)
        counts = [((*_QUERY_COUNTS, *_KEY_VALUE_COUNTS), features // width)] if features % width == 0 else []
    elif key_values is None:
        counts = [
            (_QUERY_COUNTS, queries),
            (_KEY_VALUE_COUNTS, site.head_counts().get("num_key_value_heads", queries)),
        ]
    else:
        parent.num_key_value_groups = queries // site.tp_size // max(key_values // site.tp_size, 1)
        counts = [(_QUERY_COUNTS, queries), (_KEY_VALUE_COUNTS, key_values)]
    for names, count in counts:
        for name in names:
            if getattr(parent, name, None) == count:
                show_local_size(parent, name, max(count // site.tp_size, 1))
