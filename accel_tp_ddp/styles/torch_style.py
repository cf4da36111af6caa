"""`torch.distributed.tensor.parallel` styles in a plan: they run on DTensors, their parameters are localized."""

from __future__ import annotations

from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from .base import Site, Style, even_layout
from .conv1d import in_features, out_features
from .heads import verify_whole_heads
from .region import Region

__all__ = ["TorchStyle"]


class TorchStyle(Style):
    """Wraps a torch `ParallelStyle` object. It leaves DTensor parameters, which are localized with the whole model.

    tp_plan={"lm_head": ColwiseParallel(output_layouts=Replicate())}  # what is sharded, and sent, torch says
    """

    runs_on_dtensors = True

    def __init__(self, style: ParallelStyle):
        self.style = style

    def verify(self, site: Site) -> None:
        if not isinstance(self.style, (ColwiseParallel, RowwiseParallel)):
            return
        if not isinstance(site.module, (nn.Linear, nn.Embedding)):
            raise site.error(
                f"the module is a {type(site.module).__name__}, the style takes torch.nn.Linear or "
                "torch.nn.Embedding.",
                "Name another style, or `replicate`.",
            )
        # Colwise cuts a linear layer's outputs and an embedding's vectors, rowwise the other dimension.
        linear, colwise = isinstance(site.module, nn.Linear), isinstance(self.style, ColwiseParallel)
        sharded = self.style.output_layouts[0] if colwise else self.style.input_layouts[0]
        if linear and sharded.is_shard(-1):
            verify_whole_heads(site, (out_features if colwise else in_features)(site.module), "weight", False)
        dim = int(colwise != linear)
        self._verify_parameter(site, "weight", even_layout(site.module.weight.shape[dim], dim, site.tp_size))

    def apply(self, site: Site, region: Region) -> None:
        parallelize_module(site.module, region.mesh, self.style)
