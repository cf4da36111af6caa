"""How PEFT's layers follow the sharded module that they are put around: one file here for each file of styles.

Which styles a kind of layer can follow, the styles say: `Style.adapters`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from ...core.layout import Layout
from ..base import Site, Style
from .embedding import embedding_lora_style
from .experts import experts_lora_style
from .lora import lora_style
from .tokens import trained_tokens_style

__all__ = ["adapter_style", "can_follow"]

_STYLES: dict[str, Callable[[Site, Style, Mapping[str, Layout]], Style]] = {
    "peft.tuners.lora.layer.Linear": lora_style,
    "peft.tuners.lora.layer.ParamWrapper": experts_lora_style,
    "peft.tuners.lora.layer.Embedding": embedding_lora_style,
    "peft.tuners.trainable_tokens.layer.TrainableTokensLayer": trained_tokens_style,
}


def can_follow(layer: nn.Module) -> bool:
    """Whether there is a way for this module of PEFT's to follow a sharded one inside it."""
    return _kind(layer) in _STYLES


def adapter_style(site: Site, base: Style, layouts: Mapping[str, Layout]) -> Style:
    """How the adapters of the layer at `site` follow the module inside, whose style and layouts these are.

    Raises:
        PlanError: If they cannot.
    """
    style = _STYLES[_kind(site.module)](site, base, layouts)
    for name, layout in style.layouts(site).items():
        param, size = site.module.get_parameter(name), max(stop for ranges in layout.ranges for _, stop in ranges)
        if param.shape[layout.dim] != size:
            raise site.error(
                f"`{site.parameter(name)}` of size {tuple(param.shape)} was made for a part of the module, which has "
                f"{size} elements in that dimension.",
                "PEFT took its size or values from a slice of the weight: load the model without sharded_loading.",
            )
    return style


def _kind(layer: nn.Module) -> str:
    """By name, as nothing here imports peft; the class itself, as one that is derived from it computes otherwise."""
    return f"{type(layer).__module__}.{type(layer).__qualname__}"
