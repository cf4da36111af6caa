"""The styles that a plan can name, and the registry that knows them by name."""

from __future__ import annotations

from torch import nn
from torch.distributed.tensor.parallel import ParallelStyle

from ..core.errors import PlanError, nearest
from .around import LocalHeads, LocalModules, LocalSizes, Requires, Together
from .base import Site, Style
from .conv1d import is_linear, output_dim
from .embedding import EmbeddingColwise, EmbeddingHeads, EmbeddingRowwise
from .experts import Experts, IdentityExpert, SharedBias
from .fused_qkv import GroupedQKVColwise
from .latent_attention import HeadParameters, LatentKeyValueDown, LocalParameters
from .linear import Colwise, ColwiseGatherOutput, Rowwise, RowwiseSplitInput
from .packed import PackedColwise, PackedQKVColwise, PackedRowwise
from .replicated import AllReduce, Replicate, ReplicatedDropout, ReplicatedWithGradAllReduce
from .spec import Spelled, build, parse
from .torch_style import TorchStyle

__all__ = [
    "Replicate",
    "Site",
    "Style",
    "get_style",
    "is_known",
    "register_style",
    "style_label",
    "style_names",
    "tied_partner",
]

_STYLES: dict[str, Style] = {
    "all_reduce": AllReduce(),
    "colwise": Colwise(),
    "colwise_gather_output": ColwiseGatherOutput(),
    "embedding_colwise": EmbeddingColwise(),
    "embedding_heads": EmbeddingHeads(),
    "embedding_rowwise": EmbeddingRowwise(),
    "head_parameters": HeadParameters(),
    "local_params": LocalParameters(),
    "mla_kv_a_proj": LatentKeyValueDown(),
    "moe_identity_expert": IdentityExpert(),
    "moe_tp_experts": Experts(),
    "packed_colwise": PackedColwise(),
    "packed_qkv_colwise": PackedQKVColwise(),
    "packed_rowwise": PackedRowwise(),
    "replicate": Replicate(),
    "replicated_dropout": ReplicatedDropout(),
    "replicated_with_grad_allreduce": ReplicatedWithGradAllReduce(),
    "rowwise": Rowwise(),
    "rowwise_split_input": RowwiseSplitInput(),
    "shared_bias": SharedBias(),
}
# Those that take arguments in parentheses; where a name stands above too, it may do without.
_WITH_ARGUMENTS: dict[str, type[Style]] = {
    "grouped_qkv_colwise": GroupedQKVColwise,
    "local_heads": LocalHeads,
    "local_modules": LocalModules,
    "local_sizes": LocalSizes,
    "packed_colwise": PackedColwise,
    "packed_rowwise": PackedRowwise,
    "requires": Requires,
}
_ALIASES = {"colwise_rep": "colwise_gather_output", "rowwise_rep": "rowwise_split_input"}
# Named by plans of transformers, and not understood yet.
_LATER = ("sequence_parallel",)


def register_style(name: str, style: Style | ParallelStyle) -> None:
    """Make `style` known to plans as `name`; a name that is known already is replaced.

    Args:
        name: What a plan says.
        style: A `Style`, or a `torch.distributed.tensor.parallel.ParallelStyle`, which runs on DTensors.

    Raises:
        ValueError: If `name` is not a non-empty string, or `style` is neither.
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"a style's name is a non-empty string, got {name!r}.")
    _STYLES[name] = as_style(style, name)


def as_style(value: Style | ParallelStyle, name: str) -> Style:
    if isinstance(value, Style):
        return value
    if isinstance(value, ParallelStyle):
        return TorchStyle(value)
    raise PlanError(
        f"tensor-parallel plan: the style of `{name}` is {value!r}, a {type(value).__name__}. "
        "Give a style's name, a Style, or a torch.distributed.tensor.parallel.ParallelStyle object."
    )


def get_style(value: str | Style | ParallelStyle, rule: str) -> Style:
    """The style that a plan's value stands for.

    Raises:
        PlanError: If there is no such style; the message names the nearest ones.
    """
    if not isinstance(value, str):
        return as_style(value, rule)
    name = _ALIASES.get(value, value)
    if name in _STYLES:
        return _STYLES[name]
    if name in _LATER:
        raise PlanError(
            f"tensor-parallel plan: the style `{value}` of `{rule}` is not supported yet. Set `{rule}` to `replicate`."
        )
    try:
        spelled = parse(value)
    except ValueError as error:
        raise PlanError(
            f"tensor-parallel plan: the style `{value}` of `{rule}` cannot be read: {error}. Write `style`, "
            "`style(argument, name=value)`, or several of them joined by ` + `."
        ) from error
    styles = [_one_style(part, value, rule) for part in spelled]
    return styles[0] if len(styles) == 1 else Together(styles)


def _one_style(part: Spelled, value: str, rule: str) -> Style:
    name = _ALIASES.get(part.name, part.name)
    if not part.called and name in _STYLES:
        return _STYLES[name]
    if name not in _WITH_ARGUMENTS:
        if name in _STYLES:
            raise PlanError(
                f"tensor-parallel plan: the style `{part.name}` of `{rule}: {value}` takes no arguments. Take the "
                "parentheses away."
            )
        raise PlanError(
            f"tensor-parallel plan: unknown style `{part.name}` for `{rule}`.{nearest(part.name, style_names())} "
            f"Allowed: {', '.join(style_names())}."
        )
    style = _WITH_ARGUMENTS[name]
    try:
        return build(style, part)
    except ValueError as error:
        raise PlanError(
            f"tensor-parallel plan: the arguments of `{part.name}` in `{rule}: {value}` are wrong: {error}. Write "
            f"`{style.usage}`."
        ) from error


def is_known(value: str | Style | ParallelStyle) -> bool:
    """Whether a plan's value is a style or meant to be one with arguments, and not a name that is unknown."""
    if not isinstance(value, str) or not value.isidentifier():
        return True
    return _ALIASES.get(value, value) in {*_STYLES, *_WITH_ARGUMENTS}


def style_names() -> list[str]:
    """Every name that a plan may use; some take arguments in parentheses."""
    return sorted({*_STYLES, *_ALIASES, *_WITH_ARGUMENTS})


def style_label(value: str | Style | ParallelStyle) -> str:
    """How a plan's value reads in messages and tables."""
    return value if isinstance(value, str) else type(value).__name__


def tied_partner(module: nn.Module, dim: int) -> str | None:
    """The style under which `module` can use a weight that its tied partner has cut along `dim`; None without one."""
    if isinstance(module, nn.Embedding):
        return ("embedding_rowwise", "embedding_colwise")[dim]
    if is_linear(module):
        return "colwise_gather_output" if dim == output_dim(module) else "rowwise_split_input"
    return None
