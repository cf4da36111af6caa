"""The pictures of `plan --plot` and `estimate --plot`: stacked bars, drawn by matplotlib where it is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..core.errors import BadInputError
from .estimate.cards import GIB
from .tree import Node, readable

__all__ = ["by_kind", "check_plot", "draw_estimate", "draw_plan"]

#: Of the kinds of modules in a plan; a class belongs to the first whose words its name has.
_KINDS = {
    "norms": ("norm",),
    "embedding": ("embed",),
    "attention": ("attention", "attn"),
    "MLP, experts": ("mlp", "expert", "moe", "feedforward", "ffn", "router", "gate"),
}
_HEAD, _OTHER = "head", "other"


def check_plot(path: str) -> None:
    """Raise unless a picture can be drawn and written there, before anything is computed for it.

    Raises:
        BadInputError: If matplotlib is missing, the name is no PNG's or the folder does not exist.
    """
    if Path(path).suffix.lower() != ".png":
        raise BadInputError(f"--plot is {path}; give a file that ends with .png.")
    if not Path(path).parent.is_dir():
        raise BadInputError(f"--plot is {path}, and there is no folder {Path(path).parent}. Make it, or name another.")
    if importlib.util.find_spec("matplotlib") is None:
        raise BadInputError("--plot needs matplotlib. Run `pip install matplotlib`, or leave --plot out.")


def by_kind(tree: Node) -> dict[str, dict[str, int]]:
    """The first rank's bytes by kind of module, `sharded` and `replicated`, told by the names of classes."""
    found = {kind: {"sharded": 0, "replicated": 0} for kind in ("embedding", *_KINDS, _HEAD, _OTHER)}
    for path, param in _with_path(tree, ()):
        found[_kind(path)]["replicated" if param["replicated"] else "sharded"] += param["bytes"]
    return {kind: sizes for kind, sizes in found.items() if sum(sizes.values())}


def _with_path(node: Node, around: tuple[Node, ...]) -> Iterator[tuple[tuple[Node, ...], Node]]:
    path = (*around, node)
    for param in node["parameters"]:
        yield path, param
    for child in node["children"]:
        yield from _with_path(child, path)


def _kind(path: Sequence[Node]) -> str:
    """Of the module that holds a parameter, else of the nearest one around it."""
    for node in reversed(path):
        name = node["kind"].lower()
        for kind, words in _KINDS.items():
            if any(word in name for word in words):
                return kind
    if len(path) == 2:  # a layer of the whole model's own, beside its base model
        return _HEAD
    return _OTHER


def draw_plan(result: Mapping[str, Any], path: str) -> None:
    """A bar for each kind of module: what a rank holds sharded, and what replicated."""
    kinds = by_kind(result["tree"])
    whole = result["totals"]["ranks"][0]["bytes"]
    figure, axis = _figure(len(kinds))
    left = [0.0] * len(kinds)
    for name, color in (("sharded", "#4c78a8"), ("replicated", "#e45756")):
        sizes = [part[name] / GIB for part in kinds.values()]
        axis.barh(list(kinds), sizes, left=left, color=color, label=name)
        left = [before + size for before, size in zip(left, sizes)]
    for row, (size, part) in enumerate(zip(left, kinds.values())):
        share = part["replicated"] / max(sum(part.values()), 1)
        told = readable(size * GIB) + (f", {share:.0%} replicated" if share > 0.005 else "")
        _write_beside(axis, told, size, row)
    axis.set_xlim(0, max(left) * 1.35)
    axis.invert_yaxis()
    axis.set_xlabel(f"GiB on the first of {result['tp_size']} ranks, {whole / GIB:.2f} in all")
    axis.set_title(f"{result['model']} at tp {result['tp_size']}: weights by kind of module")
    axis.legend(loc="lower right", frameon=False)
    _write(figure, path)


def draw_estimate(answer: Mapping[str, Any], path: str) -> None:
    """A bar for each layout, by what memory is for, with what a GPU has as a line."""
    rows, limit = answer["layouts"], answer["request"]["memory"] / GIB
    labels = [f"{row['tp']} x {row['dp']}" for row in rows]
    if "seconds" in rows[0]:
        labels = [f"{label}\n{row['tokens_per_second']:,.0f} tokens/s" for label, row in zip(labels, rows)]
    figure, axis = _figure(len(rows))
    left = [0.0] * len(rows)
    colors = ("#4c78a8", "#72b7b2", "#54a24b", "#f58518", "#e45756", "#b279a2")
    for name, color in zip(rows[0]["parts"], colors):
        sizes = [row["parts"][name] / GIB for row in rows]
        axis.barh(labels, sizes, left=left, color=color, label=name)
        left = [before + size for before, size in zip(left, sizes)]
    needed = [row["needed"] / GIB for row in rows]
    beside = [whole - size for whole, size in zip(needed, left)]
    axis.barh(labels, beside, left=left, color="#d3d3d3", label="driver, allocator")
    axis.axvline(limit, color="black", linestyle="--", linewidth=1.2)
    for row, size in enumerate(needed):
        _write_beside(axis, f"{size:.1f}", size, row)
    axis.set_xlim(0, max(*needed, limit) * 1.12)
    has = answer["request"]["card"] or "a GPU"
    axis.set_xlabel(f"GiB a rank at the peak; dashed: the {limit:.1f} GiB of {has}")
    axis.invert_yaxis()
    request = answer["request"]
    batch = f"{request['micro_batch']} x {request['seq_len']} tokens a replica, {request['precision']}"
    axis.set_title(f"{answer['model']}, tp x dp of {request['gpus']}: {batch}", fontsize=10)
    axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1.02), frameon=False)
    _write(figure, path)


def _figure(bars: int) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(8.5, 1.6 + 0.5 * bars))


def _write_beside(axis: Any, told: str, size: float, row: int) -> None:
    paper = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}  # also over the line
    axis.annotate(told, (size, row), xytext=(5, 0), textcoords="offset points", va="center", fontsize=9, bbox=paper)


def _write(figure: Any, path: str) -> None:
    import matplotlib.pyplot as plt

    for side in ("top", "right"):
        figure.axes[0].spines[side].set_visible(False)
    try:
        figure.savefig(path, dpi=100, bbox_inches="tight")
    except OSError as error:
        raise BadInputError(f"--plot {path} cannot be written: {error.strerror}. Name another file.") from error
    finally:
        plt.close(figure)
