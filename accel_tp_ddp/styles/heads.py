"""Attention heads: a rank holds some, each in full, and the attention module is shown how many."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from .around import full_size, set_local_size
from .base import Site
from .conv1d import is_linear

__all__ = [
    "KEY_VALUE_COUNTS",
    "QUERY_COUNTS",
    "LocalHeadsConfig",
    "meets_a_neighbour",
    "show_local_heads",
    "verify_whole_heads",
]

# What attention modules call the head counts that they keep, and some of them view their activations by.
QUERY_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
KEY_VALUE_COUNTS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head", "n_head_kv")


class LocalHeadsConfig:
    """A model config as one attention module should see it: this rank's head counts, everything else unchanged."""

    def __init__(self, config: Any, tp_size: int):
        self.__dict__.update(_config=config, _tp_size=tp_size)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("_config", "_tp_size"):  # not yet there while being copied or unpickled
            raise AttributeError(name)
        value = getattr(self._config, name)
        heads = ("num_attention_heads", "num_key_value_heads")  # fewer than ranks are held by several ranks each
        return max(value // self._tp_size, 1) if name in heads else value

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._config, name, value)


def meets_a_neighbour(site: Site, features: int, side: Callable[[nn.Module], int]) -> bool:
    """Whether a linear layer beside this one has these features on its other `side`, and no heads are counted there.

    The features of an MLP stay between its layers, which cut them alike, whether they divide by the ranks or not.
    """
    if site.parent is None or not is_linear(site.module) or site.head_width() is not None:
        return False
    if any(hasattr(site.parent, name) for name in ("qk_head_dim", *QUERY_COUNTS, *KEY_VALUE_COUNTS)):
        return False
    layers = [getattr(child, "base_layer", child) for child in site.parent.children()]  # in case it holds adapters
    others = [layer for layer in layers if is_linear(layer) and layer is not site.module]
    return any(side(layer) % features == 0 for layer in others)


def verify_whole_heads(site: Site, features: int, side: str, repeats: bool = True) -> None:
    """Attention computes head by head, so a rank has to hold whole heads, of queries as of keys and values.

    Key/value heads that are fewer than the ranks may be held by several of them each, where the style `repeats` them.
    """
    width, counts = site.head_width(), site.head_counts()
    if width is None:
        width = getattr(site.parent, "qk_head_dim", None)  # latent attention: its projections have widths of their own
        counts = {name: count for name, count in counts.items() if name == "num_attention_heads"}
        if width is None:
            return
    elif features % width == 0:
        counts = {f"{features // width} heads in the {side} of {site.name}": features // width, **counts}
    repeats = repeats and site.key_value_heads is not None
    queries = counts.get("num_attention_heads")
    for what, count in counts.items():
        few = what == "num_key_value_heads" or (count < site.tp_size and count != queries)
        if count % site.tp_size and not (few and repeats and site.tp_size % count == 0):
            what = what.replace("_", " ").removeprefix("num ") if what in site.head_counts() else what
            raise site.error(
                f"`{site.parameter('weight')}` of size {tuple(site.weight.shape)} has heads of width {width}, and "
                f"{what} = {count} is not divisible by tp_size.",
                f"Choose a tp_size that divides {count}"
                + (f" or is a multiple of {count}." if few and repeats else ".")
                + " To leave attention unsharded, set its projections to `replicate`.",
            )


def show_local_heads(site: Site, sections: Sequence[int]) -> None:
    """Show this rank's head counts to the attention module around a projection, where it keeps any.

    One that shapes by them, as in `view(batch, -1, self.num_heads, self.head_dim)`, would take the sequence for the
    heads that are missing. An attribute is such a count if it is called so, holds the number of heads that this
    projection has just been cut out of, and the config, if it states that of queries or of keys and values, agrees.
    Other attributes are a matter of the plan: `local_sizes`.

    Args:
        site: The projection.
        sections: Its output features when it was unsharded, those of queries, keys and values each by themselves.
    """
    parent, width, tp_size = site.parent, site.head_width(), site.tp_size
    if parent is None or width is None:
        return
    queries, key_values = site.head_counts().get("num_attention_heads"), site.key_value_heads
    if key_values is not None:
        setattr(parent, "num_key_value_groups", queries // tp_size // max(key_values // tp_size, 1))
    else:
        key_values = site.head_counts().get("num_key_value_heads", queries)
    cut = {features // width for features in sections if features % width == 0}
    for names, stated in ((QUERY_COUNTS, queries), (KEY_VALUE_COUNTS, key_values)):
        for name in names:
            count = full_size(parent, name)
            if count in cut and stated in (None, count):
                set_local_size(parent, name, max(count // tp_size, 1))
