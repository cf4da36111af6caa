"""The rules of a plan: where they come from, and which modules and parameters of a model they mean."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import nn
from torch.distributed.tensor.parallel import ParallelStyle

from ..core.errors import PlanError, nearest
from ..styles.base import Style
from .peft import unwrapped

__all__ = ["InferredPlan", "PlanLike", "inside", "load_plan", "own_plan", "parts_of"]

PlanLike = str | os.PathLike | Mapping[str, str | Style | ParallelStyle]


class InferredPlan(dict[str, str]):
    """Rules that were inferred from what a model computes: they are all there are for it."""


def load_plan(plan: PlanLike) -> dict[str, Any]:
    """The user's own rules: none for `"auto"`, a mapping as it is, a file read.

    Raises:
        PlanError: If the file is missing or malformed, or the rules are not a mapping of names to styles.
    """
    if isinstance(plan, Mapping):
        rules, where = plan, "the mapping"
    elif isinstance(plan, (str, os.PathLike)):
        if plan == "auto":
            return {}
        rules, where = _read_plan_file(Path(plan)), f"the file {os.fspath(plan)}"
    else:
        raise PlanError(
            f'tensor-parallel plan: got a {type(plan).__name__}. Give "auto", a mapping of names to styles, or the '
            "path of a YAML or JSON file."
        )
    for name, value in rules.items():
        if not isinstance(name, str) or not isinstance(value, (str, Style, ParallelStyle)):
            raise PlanError(
                f"tensor-parallel plan: {where} has the entry {name!r}: {value!r}. "
                "An entry maps a module or parameter name to a style, such as `model.layers.*.mlp.up_proj: colwise`."
            )
    return dict(rules)


def _read_plan_file(path: Path) -> Mapping[str, Any]:
    if not os.path.isfile(path):  # also where the name is too long to be one
        raise PlanError(
            f"tensor-parallel plan: there is no file {path} (from {Path.cwd()})."
            f'{nearest(str(path), _siblings(path))} Give "auto", or the path of a YAML or JSON file that every rank '
            "can read."
        )
    try:
        text = path.read_text(encoding="utf-8")
        rules = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise PlanError(
            f"tensor-parallel plan: {path} cannot be read as {'JSON' if path.suffix == '.json' else 'YAML'}: {error}. "
            "Write one `name: style` per line."
        ) from error
    if not isinstance(rules, Mapping):
        raise PlanError(
            f"tensor-parallel plan: {path} holds a {type(rules).__name__}, not a mapping. Write one "
            "`name: style` per line."
        )
    return rules


def _siblings(path: Path) -> Iterable[str]:
    return [str(other) for other in path.parent.iterdir() if other.is_file()] if os.path.isdir(path.parent) else []


def own_plan(model: nn.Module) -> dict[str, Any]:
    """The model's own plan, by names in `model`.

    A model of transformers has taken over those of the models right inside it; what is in a list, or in a module that
    is no such model, is found here.
    """
    parts = dict(parts_of(model))
    rules: dict[str, Any] = {}
    for name, part in parts.items():
        if not name or name.rpartition(".")[0] not in parts or not _is_model(model) and "." not in name:
            rules |= inside(name, getattr(part, "tp_plan", None) or {})
    # Since 5.23 at the latest, transformers itself adds this to a plan that does not name the input embedding.
    embeddings = [name for name, part in parts.items() if _has_unnamed_embedding(part)]
    added = [inside(name, {"embed_tokens": "embedding_rowwise"}) for name in embeddings]
    return {rule: style for each in (*added, rules) for rule, style in each.items()}


def _has_unnamed_embedding(part: nn.Module) -> bool:
    """Whether the plan of a base model is that of its config, and not one that was set on it, and names none."""
    plan, embedding = getattr(part, "tp_plan", None) or {}, part._modules.get("embed_tokens")
    stated = getattr(getattr(part, "config", None), "base_model_tp_plan", None)
    if not stated or not stated.items() <= plan.items() or getattr(part, "base_model", None) is not part:
        return False
    return embedding is not None and isinstance(unwrapped(embedding), nn.Embedding) and "embed_tokens" not in plan


def parts_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """`model`, under the name "", and the models of transformers inside it, the outer before the inner."""
    return [("", model), *((name, part) for name, part in model.named_modules() if name and _is_model(part))]


def _is_model(module: nn.Module) -> bool:
    return hasattr(type(module), "base_model_prefix")


def inside(name: str, rules: Mapping[str, Any]) -> dict[str, Any]:
    """The rules of a part as rules of the outer model."""
    return {f"{name}.{rule}" if name else rule: style for rule, style in rules.items()}
