"""The styles that a plan can name, and the registry that knows them by name."""

from __future__ import annotations

from torch import nn
from torch.distributed.tensor.parallel import ParallelStyle

from ..errors import PlanError, nearest
from .attention import LatentKeyValueDown, LocalParameters
from .base import Site, Style
from .embedding import EmbeddingColwise, EmbeddingRowwise
from .experts import Experts, IdentityExpert, SharedBias
from .linear import Colwise, ColwiseGatherOutput, Rowwise, RowwiseSplitInput
from .packed import PackedColwise, PackedQKVColwise, PackedRowwise
from .replicated import AllReduce, Replicate, ReplicatedWithGradAllReduce
from .torch_style import TorchStyle

__all__ = [
    "Replicate",
    "Site",
    "is_known",
    "Style",
    "get_style",
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
    "embedding_rowwise": EmbeddingRowwise(),
    "local_params": LocalParameters(),
    "mla_kv_a_proj": LatentKeyValueDown(),
    "moe_identity_expert": IdentityExpert(),
    "moe_tp_experts": Experts(),
    "packed_colwise": PackedColwise(),
    "packed_qkv_colwise": PackedQKVColwise(),
    "packed_rowwise": PackedRowwise(),
    "replicate": Replicate(),
    "replicated_with_grad_allreduce": ReplicatedWithGradAllReduce(),
    "rowwise": Rowwise(),
    "rowwise_split_input": RowwiseSplitInput(),
    "shared_bias": SharedBias(),
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
    raise PlanError(
        f"tensor-parallel plan: unknown style `{value}` for `{rule}`.{nearest(value, style_names())} "
        f"Allowed: {', '.join(style_names())}."
    )


def is_known(value: str | Style | ParallelStyle) -> bool:
    """Whether a plan's value is a style, and not the name of one that is unknown or still to come."""
    return not isinstance(value, str) or _ALIASES.get(value, value) in _STYLES


def style_names() -> list[str]:
    """Every name that a plan may use."""
    return sorted([*_STYLES, *_ALIASES])


def style_label(value: str | Style | ParallelStyle) -> str:
    """How a plan's value reads in messages and tables."""
    return value if isinstance(value, str) else type(value).__name__


def tied_partner(module: nn.Module, dim: int) -> str | None:
    """The style under which `module` can use a weight that its tied partner has cut along `dim`; None without one."""
    if isinstance(module, nn.Embedding):
        return ("embedding_rowwise", "embedding_colwise")[dim]
    if isinstance(module, nn.Linear):
        return ("colwise_gather_output", "rowwise_split_input")[dim]
    return None
