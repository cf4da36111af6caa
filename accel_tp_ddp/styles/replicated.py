"""Modules with replicated parameters: every rank holds all of them."""

from __future__ import annotations

from torch import Tensor, nn

from ..core.collectives import reduce_from_tp
from .base import Site, Style
from .forward import ParallelForward
from .region import Region

__all__ = ["AllReduce", "LocalDropout", "Replicate", "ReplicatedDropout", "ReplicatedWithGradAllReduce"]


class Replicate(Style):
    """Leaves the module as it is: replicated input, weights and output.

        score: replicate  # nothing is sharded

    Forward and backward: nothing.
    """

    leaves_alone = True

    def bare_layout(self, site: Site, name: str) -> None:
        return None

    def apply(self, site: Site, region: Region) -> None:
        pass


class ReplicatedWithGradAllReduce(Style):
    """Replicated parameters on sharded activations, such as a norm over each head's queries.

        layers.*.self_attn.q_norm: replicated_with_grad_allreduce  # nothing is sharded

    Each rank's gradient covers its own heads only. The sum is taken in the graph, so it happens once for every
    backward and never for what was accumulated before. Forward: nothing; backward: all-reduce of the parameters'
    gradients, which rides on that of column-parallel modules beside this one.
    """

    partial_gradients = True

    def forward(self, call: ParallelForward, *args, **kwargs):
        return call.inner_with_sums(*args, **kwargs)


class AllReduce(Style):
    """Sums the module's partial output over the ranks.

        layers.*.mlp: all_reduce  # of row-parallel layers that do not sum up themselves; nothing is sharded

    Forward: all-reduce; backward: nothing.
    """

    def forward(self, call: ParallelForward, *args, **kwargs):
        return reduce_from_tp(call.mesh, call.inner(*args, **kwargs))


class LocalDropout(Style):
    """Dropout inside a region: each rank draws for its part of a sharded tensor.

    Where adapters are, it is called outside of any region, so it says by itself which random stream it means.
    """

    accepts = (nn.modules.dropout._DropoutNd,)
    sharded = True

    def forward(self, call: ParallelForward, input: Tensor) -> Tensor:
        stream = call.region.stream
        if stream is None or not call.module.training:
            return call.inner(input)
        with stream.inside() if self.sharded else stream.outside():
            return call.inner(input)


class ReplicatedDropout(LocalDropout):
    """Dropout of a replicated tensor: one mask for all ranks, also between column- and row-parallel modules.

        encoder.layer.*.attention.self.pos_dropout: replicated_dropout  # nothing is sharded

    Such as of what all heads share, after the attention's input has entered its projections. Forward and backward:
    nothing.
    """

    sharded = False
