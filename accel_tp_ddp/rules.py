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

from .adapters import Wrappings
from .errors import PlanError, nearest
from .styles import Style
from .styles.kinds import LINEAR

__all__ = ["Names", "PlanLike", "load_plan", "own_plan", "shipped_plans", "wildcards"]

PlanLike = str | os.PathLike | Mapping[str, str | Style | ParallelStyle]
_SHIPPED = Path(__file__).parent / "plans"


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
    # Since 5.23 at the latest, transformers itself adds this to a plan that does not name the input embedding.
    embeddings = [name for name, part in parts.items() if _has_unnamed_embedding(part)]
    added = [_inside(name, {"embed_tokens": "embedding_rowwise"}) for name in embeddings]
    return {rule: style for each in (*added, rules) for rule, style in each.items()}


def _has_unnamed_embedding(part: nn.Module) -> bool:
    plan, embedding = getattr(part, "tp_plan", None), part._modules.get("embed_tokens")
    is_base = getattr(part, "base_model", None) is part
    return bool(plan) and is_base and isinstance(embedding, nn.Embedding) and "embed_tokens" not in plan


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


class Names:
    """The module and parameter names of a model, and which of them a rule means."""

    def __init__(self, model: nn.Module):
        self.modules = dict(model.named_modules())
        self.aliases = dict(model.named_modules(remove_duplicate=False))
        self.parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        self.first_name = {id(module): name for name, module in self.modules.items()}
        self.wrappings = Wrappings(model)
        self._split = [
            (name, spelled.split("."))
            for name in [*self.aliases, *self.parameters]
            for spelled in self.wrappings.spellings(name, name in self.aliases)
            if spelled
        ]
        prefix = getattr(self.wrappings.base, "base_model_prefix", "")
        self.prefix = prefix if any(split == [prefix] for _, split in self._split) else ""

    def match(self, rule: str) -> list[str]:
        """Names of the modules that `rule` means, in full or relative to the base model.

        The weight of a layer, or the only parameter of a module without submodules, means the module; another
        parameter means itself.
        """
        targets = self._match_full(rule)
        if not targets and self.prefix:
            targets = self._match_full(f"{self.prefix}.{rule}")
        return list(dict.fromkeys(self._module_of(name) for name in targets))

    def _match_full(self, rule: str) -> list[str]:
        parts = rule.split(".")
        return [
            name
            for name, split in self._split
            if len(split) == len(parts) and all(part in ("*", own) for part, own in zip(parts, split))
        ]

    def _module_of(self, name: str) -> str:
        if name in self.aliases:
            return self.first_name[id(self.aliases[name])]
        owner, _, leaf = name.rpartition(".")
        module = self.aliases[owner]
        only = len(module._parameters) == 1 and not module._modules
        if only or leaf == "weight" and isinstance(module, (*LINEAR, nn.Embedding)):
            return self.first_name[id(module)]
        return name

    def owner_of(self, parameter: str) -> tuple[str, str]:
        """The module that holds a parameter, and the parameter's name in it."""
        owner, _, leaf = parameter.rpartition(".")
        return self.first_name[id(self.aliases[owner])], leaf

    def parent(self, name: str) -> nn.Module | None:
        """The module that holds `name`, as it was before adapters were put around modules; None at the root."""
        while name:
            name = name.rpartition(".")[0]
            if self.wrappings.is_own(name):
                return self.modules.get(name)
        return None

    def config(self, name: str) -> Any:
        """The config of the model or module nearest around `name`, itself included; None without one.

        A module that only holds others, such as a decoder's layer, mostly has none.
        """
        module = self.modules.get(name)
        if name and (parent := self.parent(name)) is not None and getattr(parent, "config", None):
            return parent.config
        while getattr(module, "config", None) is None and name:
            name = name.rpartition(".")[0]
            module = self.modules.get(name)
        return getattr(module, "config", None) or getattr(self.wrappings.base, "config", None)

    def not_a_module(self, name: str, rule: str) -> PlanError:
        """The error for a rule that means the parameter `name`, with a style for modules."""
        owner, _, leaf = name.rpartition(".")
        module = self.aliases[owner]
        return PlanError(
            f"tensor-parallel plan: the rule `{rule}` means the parameter `{name}` of size "
            f"{tuple(module._parameters[leaf].shape)}, one of several of a {type(module).__name__}. "
            f"Name the module `{owner}` instead."
        )

    def nearest(self, rule: str) -> str:
        spelled = (".".join(split) for _, split in self._split)
        known = dict.fromkeys(wildcards(name) if "*" in rule else name for name in spelled)
        relative = [name.removeprefix(f"{self.prefix}.") for name in known] if self.prefix else []
        return nearest(rule, [*known, *relative])


def wildcards(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
