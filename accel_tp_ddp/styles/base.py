"""What a style is: how it lays out a module's parameters, and what it does around the module's forward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..core.errors import PlanError
from ..core.layout import Layout, Ranges, chunk_ranges
from ..core.shard import ShardInfo, mark_shard, remember_shards
from .direct_reads import read_full
from .forward import ParallelForward, call_behind
from .region import Region

__all__ = ["HEAD_WIDTH_NAMES", "Site", "Style"]

# What attention modules call the width of one head.
HEAD_WIDTH_NAMES = ("head_dim", "head_size", "attention_head_size", "key_value_proj_dim")


@dataclass(frozen=True)
class Site:
    """A place in a model where a style is applied.

    Attributes:
        name: Full module name.
        module: The module.
        parent: The module that holds it; None at the root.
        config: The nearest model config (the parent's, else the model's); None without one.
        tp_size: Number of tensor-parallel ranks.
        style: The style's name, for messages.
        bare: Styles of the module's own parameters that the plan names one by one, by parameter name.
        key_value_heads: Number of key/value heads of the unsharded parent, where it is an attention module that states
            its groups of queries.
    """

    name: str
    module: nn.Module
    parent: nn.Module | None
    config: Any
    tp_size: int
    style: str
    bare: Mapping[str, Style] = field(default_factory=dict)
    key_value_heads: int | None = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "key_value_heads", self._key_value_heads())  # the parent's counts are changed later

    def parameter(self, name: str) -> str:
        return f"{self.name}.{name}" if self.name else name

    def held(self, name: str) -> nn.Parameter:
        """The module's own parameter of this name."""
        param = self.module._parameters[name]
        assert param is not None, self.parameter(name)
        return param

    @property
    def weight(self) -> Any:
        """What the module shows as its weight."""
        return self.module.weight

    def error(self, problem: str, fix: str) -> PlanError:
        return PlanError(
            f"tensor-parallel plan: `{self.name}: {self.style}` with tp_size={self.tp_size}: {problem} {fix}"
        )

    def head_width(self) -> int | None:
        """Width of one attention head where the parent is an attention module, else None."""
        for name in HEAD_WIDTH_NAMES:
            width = getattr(self.parent, name, None)
            if isinstance(width, int) and width > 0:
                return width
        return None

    def _key_value_heads(self) -> int | None:
        groups = getattr(self.parent, "num_key_value_groups", None)
        heads = self.head_counts().get("num_attention_heads")
        if not isinstance(groups, int) or heads is None or groups < 1 or heads % groups:
            return None
        return heads // groups

    def ranks_per_head(self, features: int) -> int:
        """How many ranks hold each head of a projection with `features` outputs: more than one of few key/value heads.

        The parent is shown how many queries are left to each head, so it has to say so in num_key_value_groups.
        """
        heads = self.key_value_heads
        if heads is None or heads >= self.tp_size or self.tp_size % heads or features % heads:
            return 1
        widths = {self.head_width(), getattr(self.parent, "v_head_dim", None)}
        return self.tp_size // heads if features // heads in widths else 1

    def bare_layouts(self) -> dict[str, Layout]:
        """The layouts of the module's bare parameters that their rules shard."""
        layouts = {name: style.bare_layout(self, name) for name, style in self.bare.items()}
        return {name: layout for name, layout in layouts.items() if layout is not None}

    def head_counts(self) -> dict[str, int]:
        """The attention head counts that the config states."""
        names = ("num_attention_heads", "num_key_value_heads")
        return {name: count for name in names if isinstance(count := _read(self.config, name), int)}


def _read(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except RuntimeError:  # transformers' configs raise it for what may be another value in each layer
        return None


class Style:
    """How a module is run in parallel. Subclass it, and `register_style` an instance under a name for plans.

    A style is stateless: one instance serves every module of every model. What others have to know of it, it declares
    in the attributes below; a new style takes no change elsewhere.

        class ChannelScale(Style):  # each rank scales the channels that it holds: no collective
            def layouts(self, site):
                return {"weight": even_layout(len(site.module.weight), 0, site.tp_size)}

        register_style("channel_scale", ChannelScale())  # in a plan: `blocks.*.mixer.scale: channel_scale`
    """

    #: Module types that the style can take.
    accepts: tuple[type, ...] = (nn.Module,)
    #: Whether the dimension that is cut may leave ranks with parts of different length.
    uneven: bool = False
    #: Whether the module opens a tensor-parallel region on its input; its forward takes `call.entered(input)`.
    enters: bool = False
    #: Whether it leaves that region open: its output is this rank's part, of its attention heads where there are any.
    local_output: bool = False
    #: Whether the module's replicated parameters get only a part of their gradient on each rank.
    partial_gradients: bool = False
    #: Whether code outside the module that reads its sharded parameters means them full, as its output is full.
    reads_full_outside: bool = False
    #: Whether the module may have bare parameters that the plan names one by one.
    takes_parameters: bool = False
    #: Whether the module is left as it is: replicated input, parameters and output.
    leaves_alone: bool = False
    #: Whether the module computes on DTensors, and cuts its parameters by itself.
    runs_on_dtensors: bool = False
    #: Which of `styles/peft` can follow the module where it is sharded: "linear", "embedding", "experts", "tokens".
    adapters: frozenset[str] = frozenset()

    def layouts(self, site: Site) -> dict[str, Layout]:
        """The layout of each parameter that is sharded, by its name in the module; others stay replicated."""
        return {}

    def bare_layout(self, site: Site, name: str) -> Layout | None:
        """The layout of a bare parameter of `site.module` under this style; None where it stays replicated."""
        raise site.error(
            f"`{site.parameter(name)}` of size {tuple(site.held(name).shape)} is a bare parameter, the "
            "style takes modules.",
            "Name another style, or `replicate`.",
        )

    def input_ranges(self, layouts: Mapping[str, Layout]) -> tuple[Ranges, ...] | None:
        """Of the module's input features, those that each rank takes; None where each takes all of them."""
        return None

    def allows_uneven(self, site: Site) -> bool:
        """Whether ranks may get parts of different length at `site`; a part is never empty."""
        return self.uneven

    def facts(self, site: Site) -> dict[str, Any]:
        """What `forward` has to know about the site; it finds it in `call.facts`."""
        return {}

    def forward(self, call: ParallelForward, *args, **kwargs):
        """Run `call.inner(*args, **kwargs)`, the module's own forward, on this rank's part of the parameters."""
        return call.inner(*args, **kwargs)

    def verify(self, site: Site) -> None:
        """Raise `PlanError` if the style cannot be applied at `site`. Touches nothing, communicates nothing."""
        if not isinstance(site.module, self.accepts):
            kinds = " or ".join(map(_spelled, self.accepts))
            raise site.error(
                f"the module is a {type(site.module).__name__}, the style takes {kinds}.",
                "Name another style, or `replicate`.",
            )
        for name, layout in self.layouts(site).items():
            self._verify_parameter(site, name, layout)

    def _verify_parameter(self, site: Site, name: str, layout: Layout) -> None:
        param = site.held(name)
        size = f"`{site.parameter(name)}` of size {tuple(param.shape)}"
        if not (param.is_floating_point() or param.is_complex()):
            raise site.error(
                f"{size} has dtype {param.dtype}.", "Quantized weights cannot be sharded; load it unquantized."
            )
        known = max(stop for ranges in layout.ranges for _, stop in ranges)
        if is_traceable_wrapper_subclass(param) or param.ndim <= layout.dim or param.shape[layout.dim] != known:
            raise site.error(
                f"{size}, a {type(param).__name__}, is not a plain tensor with {known} elements in dimension "
                f"{layout.dim}, as the module says.",
                "Quantized or packed weights cannot be sharded; load it unquantized.",
            )
        even = len(set(layout.sizes)) == 1
        if self.allows_uneven(site):
            if min(layout.sizes) == 0:
                raise site.error(
                    f"{size} leaves ranks without a part of dimension {layout.dim}.",
                    "Use a smaller tp_size, or `replicate`.",
                )
        elif not even:
            raise site.error(
                f"dimension {layout.dim} of {size} is not divisible by tp_size.",
                "Choose a tp_size that divides it, or set the style to `replicate`.",
            )

    def show_sizes(self, site: Site) -> None:
        """Let modules know which counts of theirs are a rank's, as `apply` does. Shards nothing."""

    def apply(self, site: Site, region: Region) -> None:
        """Shard the module's parameters in place (each keeps its identity) and install the style's forward."""
        shards = {}
        for name, layout in self.layouts(site).items():
            param = site.held(name)
            tied = getattr(param, "tp_shard", None)  # another module has cut it already
            assert tied is None or tied.layout == layout, "the plan was to verify that tied weights agree"
            shards[name] = tied or ShardInfo.sharded(region.mesh, param.shape, layout)
            shard_in_place(param, shards[name])
        self.install(site.module, region, shards, self.facts(site))

    def calls(self, site: Site) -> list[ParallelForward]:
        """What `apply` has installed at `site`, the outermost first."""
        found, forward = [], site.module.__dict__.get("forward")
        while (call := call_behind(forward)) is not None:
            found.append(call)
            forward = call.wrapped
        return found

    def install(
        self,
        module: nn.Module,
        region: Region,
        shards: dict[str, ShardInfo],
        facts: dict[str, Any] | None = None,
    ) -> None:
        """Put the style's forward in the place of the module's."""
        remember_shards(module, shards)
        call = ParallelForward(module, self, region, shards, facts)
        call.install_on(module)
        if self.reads_full_outside:
            read_full(module, call)


def _spelled(kind: type) -> str:
    return getattr(kind, "spelled", f"{kind.__module__.partition('.modules.')[0]}.{kind.__name__}")


def shard_in_place(param: nn.Parameter, info: ShardInfo) -> None:
    """Give `param` its local data and its `tp_shard`. The object stays, and with it optimizers, ties and hooks."""
    if getattr(param, "tp_shard", None) is info:
        return
    grad, param.grad = param.grad, None
    param.data = info.local_part(param.data)
    if grad is not None:
        param.grad = info.local_part(grad)
    mark_shard(param, info)


def even_layout(size: int, dim: int, tp_size: int) -> Layout:
    return Layout(dim, chunk_ranges(size, tp_size))
