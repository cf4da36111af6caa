"""Mixture of experts: every rank holds a slice of every expert, and all of the router.

Shapes: gate_up is `[experts, 2 * width, hidden]`, down `[experts, hidden, width]`, or both transposed.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from torch import Tensor

from ..core.collectives import add_share, copy_to_tp, reduce_from_tp
from ..core.layout import Layout
from ..training.decisions import note_decisions, watch_decisions
from .base import Site, Style
from .forward import ParallelForward
from .region import Region

__all__ = ["Experts", "IdentityExpert", "SharedBias"]

_ROW_BYTES = 16


class Experts(Style):
    """The module that holds all experts as bare stacked parameters, each cut as its own rule says.

        layers.*.mlp.experts: moe_tp_experts
        layers.*.mlp.experts.gate_up_proj: packed_colwise  # [experts, gate / tp + up / tp, hidden]
        layers.*.mlp.experts.down_proj: rowwise            # [experts, hidden, width / tp]

    Forward: all-reduce of the output; backward: one all-reduce of the gradients of the hidden states and the routing
    weights. The router, and a loss of its own, see replicated tensors only. The indices that it gives are compared
    over the ranks now and then, see `training/decisions`.
    """

    takes_parameters = True
    adapters = frozenset({"experts"})
    uneven = True

    def layouts(self, site: Site) -> dict[str, Layout]:
        return site.bare_layouts()

    def verify(self, site: Site) -> None:
        super().verify(site)
        cut = self.layouts(site)
        for name, param in site.module.named_parameters():
            if name not in cut and not isinstance(site.bare.get(name), SharedBias):
                raise site.error(
                    f"`{site.parameter(name)}` of size {tuple(param.shape)} is not sharded, so that every rank would "
                    "add all of what it contributes to the experts' output.",
                    "Name a style for it that shards it (for a bias that is added to the output: `shared_bias`), or "
                    f"set `{site.name}` and all of its parameters to `replicate`.",
                )
            if name in cut and cut[name].dim == 0:
                raise site.error(
                    f"the style of `{site.parameter(name)}` of size {tuple(param.shape)} would cut dimension 0, which "
                    "counts the experts.",
                    "Use `rowwise` for the last dimension.",
                )
        if not cut:
            raise site.error("no parameter of the module is sharded.", "Set the style to `replicate`.")
        self._verify_cuts(site, cut)
        self._verify_gates(site, cut)
        self._verify_alignment(site, cut)

    @staticmethod
    def _verify_cuts(site: Site, cut: dict[str, Layout]) -> None:
        """What a rank holds of one parameter has to meet what it holds of another, also where parts are unlike."""
        shares = {name: [Fraction(size, sum(layout.sizes)) for size in layout.sizes] for name, layout in cut.items()}
        first, wanted = next(iter(shares.items()))
        for name, share in shares.items():
            if share != wanted:
                sizes = {each: tuple(site.module._parameters[each].shape) for each in (first, name)}
                raise site.error(
                    f"`{site.parameter(first)}` of size {sizes[first]} and `{site.parameter(name)}` of size "
                    f"{sizes[name]} are not divisible by tp_size, and their parts would not fit each other.",
                    "Choose a tp_size that divides the experts' width, or set the experts to `replicate`.",
                )

    @staticmethod
    def _verify_gates(site: Site, cut: dict[str, Layout]) -> None:
        """A rank's gate has to meet its up; whether they are stored one after the other, transformers' module says."""
        packed = getattr(site.module, "is_concatenated", None)
        for name, layout in cut.items():
            if packed is not None and "gate_up" in name and layout.contiguous == packed:
                stored = "one after the other" if packed else "in turns"
                raise site.error(
                    f"`{site.parameter(name)}` of size {tuple(site.module._parameters[name].shape)} holds gate and up "
                    f"{stored}, and its style cuts it otherwise.",
                    f"Use {'`packed_colwise` or `packed_rowwise`' if packed else '`colwise` or `rowwise`'}.",
                )

    @staticmethod
    def _verify_alignment(site: Site, cut: dict[str, Layout]) -> None:
        """torch's grouped matrix product, transformers' default for experts, takes rows of whole 16 bytes only."""
        if getattr(site.config, "_experts_implementation", None) != "grouped_mm":
            return
        for name, layout in cut.items():
            param = site.module._parameters[name]
            held = next((size for size in layout.sizes if size * param.element_size() % _ROW_BYTES), 0)
            if param.ndim == 3 and held and param.shape[layout.dim] * param.element_size() % _ROW_BYTES == 0:
                raise site.error(
                    f"`{site.parameter(name)}` of size {tuple(param.shape)} leaves a rank {held} of "
                    f"dimension {layout.dim}, {held * param.element_size()} bytes; the experts' grouped_mm takes "
                    f"multiples of {_ROW_BYTES}.",
                    'Choose a smaller tp_size, or load the model with experts_implementation="batched_mm" or "eager".',
                )

    def facts(self, site: Site) -> dict[str, Any]:
        return {"shared": [name for name, style in site.bare.items() if isinstance(style, SharedBias)]}

    def apply(self, site: Site, region: Region) -> None:
        super().apply(site, region)
        watch_decisions(site.module)

    def forward(self, call: ParallelForward, *args, **kwargs):
        note_decisions(call.module, *args, *kwargs.values())
        tensors = [value for value in (*args, *kwargs.values()) if _is_floating(value)]
        copies = dict(zip(map(id, tensors), copy_to_tp(call.mesh, *tensors)))
        args = tuple(copies.get(id(value), value) for value in args)
        kwargs = {name: copies.get(id(value), value) for name, value in kwargs.items()}
        shares = {name: add_share(call.mesh, call.held(name)) for name in call.facts["shared"]}
        call.region.open(call.module.training)
        with call.replacing(**shares):
            output = call.inner(*args, **kwargs)
        call.region.leave()
        return reduce_from_tp(call.mesh, output)


class SharedBias(Style):
    """A replicated bias of a module whose output is summed over the ranks, such as of the experts' down-projection.

        layers.*.mlp.experts.down_proj_bias: shared_bias  # counted once, see `add_share`; nothing is sharded

    Forward: divides by the number of ranks; backward: nothing.
    """

    def bare_layout(self, site: Site, name: str) -> None:
        return None

    def verify(self, site: Site) -> None:
        raise site.error("the style is for a bare parameter of an experts module.", "Name another style.")


class IdentityExpert(Style):
    """An expert that returns its input: as the experts' outputs are summed over the ranks, each gives a part of it.

        layers.*.mlp.experts.identity_expert: moe_identity_expert  # nothing is sharded

    Forward and backward: divides by the number of ranks, as the experts sum their inputs' gradients too.
    """

    def forward(self, call: ParallelForward, *args, **kwargs):
        return call.inner(*args, **kwargs) / call.mesh.size()


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
