"""The rules of a plan: where they come from, and which modules and parameters of a model they mean."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from torch import nn
from torch.distributed.tensor.parallel import ParallelStyle

from ..core.errors import PlanError, nearest
from ..styles.base import Style

__all__ = ["PlanLike", "load_plan", "own_plan", "shipped_plans"]

PlanLike = str | os.PathLike | Mapping[str, str | Style | ParallelStyle]
_SHIPPED = Path(__file__).parent / "data"


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


def shipped_plans(model: nn.Module) -> list[dict[str, Any]]:
    """This package's own rules for the architecture, by names in `model`: data in `plans/<model_type>.yaml`.

    A model type without such a file has that of the type which the model's class was written for.

    A model may be made of models, as one for images and text is: each has a config of its own, and the plan that this
    package ships for it. First the plan of the whole, then those of its parts, the outer before the inner.
    """
    plans = []
    for name, part in _parts(model):
        config = getattr(part, "config", None)
        rules = next(filter(None, map(_read_shipped, _model_types(part, config))), None)
        if rules:
            plans.append(_inside(name, _where_it_holds(rules, config)))
    return plans


def _model_types(part: nn.Module, config: Any) -> list[str]:
    """The config's own model type, and that of the class: transformers runs some models with the code of another."""
    kinds = (config, getattr(type(part), "config_class", None))
    return [kind.model_type for kind in kinds if isinstance(getattr(kind, "model_type", None), str)]


def own_plan(model: nn.Module) -> dict[str, Any]:
    """The model's own plan, by names in `model`.

    A model of transformers has taken over those of the models right inside it; what is in a list, or in a module that
    is no such model, is found here.
    """
    parts = dict(_parts(model))
    rules: dict[str, Any] = {}
    for name, part in parts.items():
        if not name or name.rpartition(".")[0] not in parts or not _is_model(model) and "." not in name:
            rules |= _inside(name, getattr(part, "tp_plan", None) or {})
    return rules


def _parts(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """`model`, under the name "", and the models of transformers inside it, the outer before the inner."""
    return [("", model), *((name, part) for name, part in model.named_modules() if name and _is_model(part))]


def _is_model(module: nn.Module) -> bool:
    return hasattr(type(module), "base_model_prefix")


def _inside(name: str, rules: Mapping[str, Any]) -> dict[str, Any]:
    """The rules of a part as rules of the whole."""
    return {f"{name}.{rule}" if name else rule: style for rule, style in rules.items()}


def _where_it_holds(rules: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """The rules for this config: those under `if FIELD:` only where it is set, in the place of others they repeat."""
    result = {rule: style for rule, style in rules.items() if not isinstance(style, Mapping)}
    for condition, further in rules.items():
        if isinstance(further, Mapping) and getattr(config, condition.removeprefix("if "), None):
            result |= further
    return result


@cache
def _read_shipped(model_type: str) -> dict[str, Any]:
    path = _SHIPPED / f"{model_type}.yaml"
    return dict(_read_plan_file(path)) if path.is_file() else {}
