"""Attention: parameters of one element a head, multi-head latent attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..core.collectives import copy_to_tp
from ..core.layout import Layout, chunk_ranges
from .base import Site, Style
from .forward import ParallelForward

__all__ = ["HeadParameters", "LatentKeyValueDown", "LocalParameters"]


class LocalParameters(Style):
    """Lets a module compute with this rank's part of its bare parameters, such as one attention sink for each head.

        layers.*.self_attn: local_params
        layers.*.self_attn.sinks: colwise  # how each is cut, its own rule says: [heads / tp]

    Forward and backward: nothing, as the module's activations are cut likewise. Beside a style of the module's weight:
    `colwise_gather_output + local_params`, for an output layer that scales its logits by a parameter.
    """

    takes_parameters = True

    def allows_uneven(self, site: Site) -> bool:
        return bool(site.bare) and all(style.uneven for style in site.bare.values())

    def layouts(self, site: Site) -> dict[str, Layout]:
        return site.bare_layouts()


class HeadParameters(Style):
    """Parameters with a row for each head, in a module that computes head by head, such as a norm of queries or keys.

        layers.*.self_attn.q_norm: head_parameters  # weight [heads / tp, width]

    Forward and backward: nothing; where ranks share a key/value head, the sum of its gradients rides on the all-reduce
    of the projections.
    """

    def layouts(self, site: Site) -> dict[str, Layout]:
        params = site.module._parameters.items()
        return {name: self._rows(site, len(param)) for name, param in params if param is not None}

    @staticmethod
    def _rows(site: Site, heads: int) -> Layout:
        copies = site.tp_size // heads if heads == site.key_value_heads and heads < site.tp_size else 1
        parts = chunk_ranges(heads, site.tp_size // copies)
        return Layout(0, tuple(part for part in parts for _ in range(copies)))

    def verify(self, site: Site) -> None:
        counts = site.head_counts()
        for name, param in site.module._parameters.items():
            if param is not None and (param.ndim == 0 or len(param) not in counts.values()):
                stated = ", ".join(f"{key}={count}" for key, count in counts.items()) or "none"
                raise site.error(
                    f"`{site.parameter(name)}` of size {tuple(param.shape)} has no row for each head; the config "
                    f"states: {stated}.",
                    "Use `replicated_with_grad_allreduce` for what all heads share.",
                )
        super().verify(site)

    def forward(self, call: ParallelForward, *args, **kwargs):
        return call.inner_with_sums(*args, **kwargs)


class LatentKeyValueDown(Style):
    """The replicated down-projection of keys and values in multi-head latent attention (arXiv:2405.04434).

        layers.*.self_attn.kv_a_proj_with_mqa: mla_kv_a_proj  # nothing is sharded

    The last columns of its output are the rotary key that all heads share. They go to each rank's heads directly, so
    their gradient is partial. Forward: nothing; backward: all-reduce of those columns. The columns before them enter
    the region at the column-parallel up-projection, which sums their gradient.
    """

    accepts = (nn.Linear,)
    adapters = frozenset({"linear"})

    def verify(self, site: Site) -> None:
        super().verify(site)
        columns = self._shared_columns(site)
        if not isinstance(columns, int) or not 0 <= columns < site.module.out_features:
            raise site.error(
                f"`{site.parameter('weight')}` of size {tuple(site.weight.shape)} has columns that all heads "
                f"share, and neither the module around it nor its config says how many (qk_rope_head_dim={columns}).",
                "Set the style to `replicate`, and those of the projections after it.",
            )

    def facts(self, site: Site) -> dict[str, Any]:
        return {"shared_columns": self._shared_columns(site)}

    def forward(self, call: ParallelForward, input: Tensor) -> Tensor:
        output = call.inner(input)
        shared = call.facts["shared_columns"]
        if not shared:  # an attention without rotary positions
            return output
        latent, rotary = output.split([output.size(-1) - shared, shared], -1)
        return torch.cat([latent, *copy_to_tp(call.mesh, rotary)], -1)

    @staticmethod
    def _shared_columns(site: Site) -> int | None:
        columns = getattr(site.parent, "qk_rope_head_dim", None)
        return getattr(site.config, "qk_rope_head_dim", None) if columns is None else columns
