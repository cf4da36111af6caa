"""The registry of styles: what a plan calls a style, and the class, or any callable, that makes it.

A style becomes known by a line here, or by `register_style`. Arguments in parentheses are those of its `__init__`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

from torch import nn
from torch.distributed.tensor.parallel import ParallelStyle

from ..core.errors import PlanError, nearest
from .around import LocalHeads, LocalModules, LocalSizes, Requires, Together
from .base import Style
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

__all__ = ["get_style", "is_known", "register_style", "style_label", "style_names", "tied_partner"]

_STYLES: dict[str, Callable[..., Style] | None] = {
    "all_reduce": AllReduce,
    "colwise": Colwise,
    "colwise_gather_output": ColwiseGatherOutput,
    "colwise_rep": ColwiseGatherOutput,
    "embedding_colwise": EmbeddingColwise,
    "embedding_heads": EmbeddingHeads,
    "embedding_rowwise": EmbeddingRowwise,
    "grouped_qkv_colwise": GroupedQKVColwise,
    "head_parameters": HeadParameters,
    "local_heads": LocalHeads,
    "local_modules": LocalModules,
    "local_params": LocalParameters,
    "local_sizes": LocalSizes,
    "mla_kv_a_proj": LatentKeyValueDown,
    "moe_identity_expert": IdentityExpert,
    "moe_tp_experts": Experts,
    "packed_colwise": PackedColwise,
    "packed_qkv_colwise": PackedQKVColwise,
    "packed_rowwise": PackedRowwise,
    "replicate": Replicate,
    "replicated_dropout": ReplicatedDropout,
    "replicated_with_grad_allreduce": ReplicatedWithGradAllReduce,
    "requires": Requires,
    "rowwise": Rowwise,
    "rowwise_rep": RowwiseSplitInput,
    "rowwise_split_input": RowwiseSplitInput,
    "sequence_parallel": None,  # named by plans of transformers, and not supported yet
    "shared_bias": SharedBias,
}


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
    known = as_style(style, name)
    _STYLES[name] = lambda: known


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
    try:
        spelled = [Spelled(value)] if value in _STYLES else parse(value)
    except ValueError as error:
        raise PlanError(
            f"tensor-parallel plan: the style `{value}` of `{rule}` cannot be read: {error}. Write `style`, "
            "`style(argument, name=value)`, or several of them joined by ` + `."
        ) from error
    styles = [_one_style(part, value, rule) for part in spelled]
    return styles[0] if len(styles) == 1 else Together(styles)


def _one_style(part: Spelled, value: str, rule: str) -> Style:
    if part.name not in _STYLES:
        raise PlanError(
            f"tensor-parallel plan: unknown style `{part.name}` for `{rule}`.{nearest(part.name, style_names())} "
            f"Allowed: {', '.join(style_names())}."
        )
    factory = _STYLES[part.name]
    if factory is None:
        raise PlanError(
            f"tensor-parallel plan: the style `{value}` of `{rule}` is not supported yet. Set `{rule}` to "
            "`replicate`. The plugin's sequence_parallel=True divides the sequence without it."
        )
    if part.called and not inspect.signature(factory).parameters:
        raise PlanError(
            f"tensor-parallel plan: the style `{part.name}` of `{rule}: {value}` takes no arguments. Take the "
            "parentheses away."
        )
    try:
        return build(factory, part.args, part.kwargs) if part.called else _without_arguments(factory)
    except ValueError as error:
        raise PlanError(
            f"tensor-parallel plan: the arguments of `{part.name}` in `{rule}: {value}` are wrong: {error}. Write "
            f"`{getattr(factory, 'usage', part.name)}`."
        ) from error


@functools.cache
def _without_arguments(factory: Callable[..., Style]) -> Style:
    """A style is stateless, so one object serves every rule."""
    return build(factory)


def is_known(value: str | Style | ParallelStyle) -> bool:
    """Whether a plan's value is a style or meant to be one with arguments, and not a name that is unknown."""
    return not isinstance(value, str) or not value.isidentifier() or _STYLES.get(value) is not None


def style_names() -> list[str]:
    """Every name that a plan may use; some take arguments in parentheses."""
    return sorted(name for name, factory in _STYLES.items() if factory is not None)


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
