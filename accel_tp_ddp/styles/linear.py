"""Linear layers: column-parallel and row-parallel.

Shapes: x is `[..., in_features]`, the weight `[out_features, in_features]` before and a part of it after sharding.
Column-parallel: Y = X [A1 A2]; row-parallel: Y = X1 B1 + X2 B2 (Megatron-LM, arXiv:1909.08053, section 3).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from ..core.collectives import gather_from_tp, reduce_from_tp, scatter_to_tp
from ..core.layout import Layout, Ranges, chunk_ranges
from .base import Site, Style, even_layout
from .conv1d import LINEAR, in_features, input_dim, no_bias, out_features, output_dim, show_local_outputs
from .forward import ParallelForward
from .heads import meets_a_neighbour, show_local_heads, verify_whole_heads
from .region import Region

__all__ = ["Colwise", "ColwiseGatherOutput", "Rowwise", "RowwiseSplitInput"]


def bare_output_dim(param: nn.Parameter) -> int:
    """The dimension of the outputs in a bare parameter, laid out as the weight of a linear layer: the last but one."""
    return max(param.ndim - 2, 0)


class Colwise(Style):
    """Each rank computes a slice of the output.

        layers.*.self_attn.q_proj: colwise  # weight [outputs / tp, inputs], bias [outputs / tp]

    Where there are more ranks than key/value heads, several ranks hold the same head. Forward: nothing; backward:
    all-reduce of the input's gradient.
    """

    accepts = LINEAR
    enters = True
    local_output = True
    adapters = frozenset({"linear"})

    def layouts(self, site: Site) -> dict[str, Layout]:
        layout = self.output_layout(site)
        weight = {"weight": replace(layout, dim=output_dim(site.module))}
        return weight if site.module._parameters.get("bias") is None else {**weight, "bias": layout}

    def output_layout(self, site: Site) -> Layout:
        """How the outputs are divided over the ranks, along the only dimension of the bias."""
        features = out_features(site.module)
        copies = site.ranks_per_head(features) if self.local_output else 1
        (parts,) = zip(*chunk_ranges(features, site.tp_size // copies))
        return Layout(0, tuple((part,) for part in parts for _ in range(copies)))

    def handed_out(self, site: Site) -> Layout:
        """Which of the outputs the module's forward gives on each rank: those that the rank holds the rows of."""
        return self.output_layout(site)

    def sections(self, site: Site) -> list[int]:
        """Output features of each of the projections that the layer holds, such as queries, keys and values."""
        return [out_features(site.module)]

    def bare_layout(self, site: Site, name: str) -> Layout:
        """Rows of a matrix or of a stack of matrices; the elements of a vector, such as one for each head."""
        param = site.held(name)
        dim = bare_output_dim(param)
        return even_layout(param.shape[dim], dim, site.tp_size)

    def allows_uneven(self, site: Site) -> bool:
        return self.uneven or meets_a_neighbour(site, out_features(site.module), in_features)

    def verify(self, site: Site) -> None:
        if isinstance(site.module, self.accepts) and self.local_output:
            verify_whole_heads(site, out_features(site.module), "output")
        super().verify(site)

    def apply(self, site: Site, region: Region) -> None:
        sizes = self.output_layout(site).sizes
        super().apply(site, region)
        self.show_sizes(site)
        show_local_outputs(site.module, sizes[region.mesh.get_local_rank()])

    def show_sizes(self, site: Site) -> None:
        if self.local_output:
            show_local_heads(site, self.sections(site))

    def forward(self, call: ParallelForward, input: Tensor) -> Tensor:
        input = call.entered(input)
        if not call.partial_gradients and (output := call.opening_product(input)) is not None:
            return output
        return call.inner_with_sums(input)


class ColwiseGatherOutput(Colwise):
    """Column-parallel with the full output on every rank. The features need not divide by the number of ranks.

        lm_head: colwise_gather_output  # weight [vocabulary / tp, hidden]

    Forward: all-gather; backward: slice, then all-reduce of the input's gradient.
    """

    uneven = True
    local_output = False
    reads_full_outside = True
    adapters = frozenset({"linear", "tokens"})

    def forward(self, call: ParallelForward, input: Tensor) -> Tensor:
        entered = call.entered(input)
        later = call.defer(entered) if call.defer is not None else None
        if later is not None:
            return later
        output = call.opening_product(entered)
        output = call.inner(entered) if output is None else output
        return gather_from_tp(call.mesh, output, -1, call.shards["weight"].layout.sizes)


class Rowwise(Style):
    """Each rank takes a slice of the input features. The bias is replicated and added once, after the sum.

        layers.*.self_attn.o_proj: rowwise  # weight [outputs, inputs / tp]

    Forward: all-reduce of the output; backward: nothing.
    """

    accepts = LINEAR
    adapters = frozenset({"linear"})
    #: Whether the input is this rank's part already, of whole attention heads where there are any.
    local_input = True

    def layouts(self, site: Site) -> dict[str, Layout]:
        return {"weight": replace(self.input_layout(site), dim=input_dim(site.module))}

    def input_layout(self, site: Site) -> Layout:
        """How the inputs are divided over the ranks, along the last dimension of torch's weight."""
        return even_layout(in_features(site.module), 1, site.tp_size)

    def bare_layout(self, site: Site, name: str) -> Layout:
        """The last dimension: inputs of a stack of matrices, or outputs of transposed ones and their biases."""
        param = site.module._parameters[name]
        return even_layout(param.shape[-1], param.ndim - 1, site.tp_size)

    def input_ranges(self, layouts: Mapping[str, Layout]) -> tuple[Ranges, ...]:
        return layouts["weight"].ranges

    def allows_uneven(self, site: Site) -> bool:
        return self.uneven or meets_a_neighbour(site, in_features(site.module), out_features)

    def verify(self, site: Site) -> None:
        if isinstance(site.module, self.accepts) and self.local_input:
            verify_whole_heads(site, in_features(site.module), "input")
        super().verify(site)

    def forward(self, call: ParallelForward, input: Tensor) -> Tensor:
        call.region.leave()
        bias: Tensor | None = call.module._parameters["bias"]
        output = call.product(input, with_bias=False)
        if output is None:
            output = call.inner(input) if bias is None else call.inner_with({"bias": no_bias(call)}, input)
        if call.region.spread is not None:
            output = call.region.spread.split(output)
            bias = call.offered.pop("bias", bias)  # of which each rank sees the gradient of its slice
        else:
            output = reduce_from_tp(call.region.mesh, output, call.fresh)
        return output if bias is None else output + bias.to(output.dtype)  # as autocast would have cast it


class RowwiseSplitInput(Rowwise):
    """Row-parallel of a replicated input, whose features need not divide by the number of ranks.

        layers.*.mixer.out_proj: rowwise_split_input  # weight [outputs, inputs / tp]

    Forward: slice of the input, then all-reduce; backward: all-gather of its gradient.
    """

    uneven = True
    local_input = False

    def forward(self, call: ParallelForward, input: Tensor) -> Tensor:
        return super().forward(call, scatter_to_tp(call.mesh, input, -1, call.shards["weight"].layout.sizes))
