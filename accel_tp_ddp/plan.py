"""Plans: from patterns and styles to a verified list of what happens where. Nothing here touches a weight."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from torch.distributed.tensor.parallel import ParallelStyle

from .errors import PlanError, nearest
from .shard import Layout
from .styles import Style, get_style, style_label, tied_partner
from .styles.base import Site
from .styles.torch_style import TorchStyle

__all__ = ["Plan", "PlanEntry", "resolve_plan"]

PlanLike = str | os.PathLike | Mapping[str, str | Style | ParallelStyle]
_SHIPPED = Path(__file__).parent / "plans"


@dataclass(frozen=True)
class PlanEntry:
    """One module of the model with the style that was chosen for it.

    Attributes:
        site: The module and its surroundings.
        style: The style object.
        label: The style as the plan names it.
        source: Where the rule came from: "user", "package", "model" or "tied".
        layouts: Layout of each sharded parameter, by its name in the module.
    """

    site: Site
    style: Style
    label: str
    source: str
    layouts: dict[str, Layout] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """A resolved and verified plan. `print(plan)` shows what is sharded how."""

    model: str
    tp_size: int
    entries: tuple[PlanEntry, ...]
    parameters: tuple[tuple[str, torch.Size], ...]
    unmatched: tuple[str, ...] = ()

    @property
    def layouts(self) -> dict[str, Layout]:
        """Layout of every sharded parameter, by full name."""
        return {entry.site.parameter(name): layout for entry in self.entries for name, layout in entry.layouts.items()}

    def signature(self) -> str:
        """Equal on two ranks only if both would shard the same parameters in the same way."""
        rows = [f"{entry.site.name}={entry.label}:{entry.layouts}" for entry in self.entries]
        return "\n".join(
            [f"tp_size={self.tp_size}", *rows, *(f"{name}{tuple(size)}" for name, size in self.parameters)]
        )

    def __str__(self) -> str:
        layouts = self.layouts
        total = sum(size.numel() for _, size in self.parameters)
        held = sum(_local_size(size, layouts.get(name)).numel() for name, size in self.parameters)
        rows: dict[tuple, int] = {}
        sizes = dict(self.parameters)
        for entry in self.entries:
            names = entry.layouts or {}
            cells = [
                f"{name} {_show(sizes[full])} -> {_show(_local_size(sizes[full], layout))}"
                if (full := entry.site.parameter(name)) in sizes
                else f"{name} tied"
                for name, layout in names.items()
            ]
            row = (_wildcards(entry.site.name), entry.label, entry.source, ", ".join(cells) or "whole on every rank")
            rows[row] = rows.get(row, 0) + 1
        widths = [max((len(row[column]) for row in rows), default=0) for column in range(3)]
        lines = [
            f"Tensor-parallel plan of {self.model}: tp_size={self.tp_size}, "
            f"{sum(name in layouts for name in sizes)} of {len(sizes)} parameters sharded, "
            f"{total:,} elements in all, {held:,} on the first rank ({held / max(total, 1):.1%})"
        ]
        for row, count in rows.items():
            times = f"{count:>4} x " if count > 1 else " " * 7
            lines.append("  " + times + "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths)), row[3]]))
        if self.unmatched:
            lines.append(f"  rules of the model's own plan that match nothing here: {', '.join(self.unmatched)}")
        return "\n".join(lines)


def resolve_plan(model: nn.Module, tp_size: int, plan: PlanLike = "auto") -> Plan:
    """Work out which module gets which style, and verify all of it. Changes nothing and communicates nothing.

    A name is a full module or parameter name, or one relative to the base model; `*` stands for exactly one dotted
    part. An exact name beats a pattern, fewer `*` beat more, the user's entry beats this package's, which beats the
    model's own.

    Args:
        model: The unsharded model.
        tp_size: Number of tensor-parallel ranks.
        plan: `"auto"`; a mapping of names to styles, which adds to and overrides what `"auto"` finds; or the path of a
            YAML or JSON file that holds such a mapping.

    Raises:
        PlanError: (a ValueError) with the full name, the size and the nearest names, if a rule of the user matches
            nothing, a style is unknown or cannot be applied, sizes or head counts do not divide by `tp_size`, tied
            weights disagree, or nothing would be sharded.
    """
    user = load_plan(plan)
    names = _Names(model)
    sources = [
        ("user", user),
        ("package", _shipped_plan(model)),
        ("model", dict(getattr(model, "tp_plan", None) or {})),
    ]
    if not any(rules for _, rules in sources):
        raise PlanError(
            f"tensor-parallel plan: {type(model).__name__} has no plan of its own and this package ships none for it. "
            'Pass `tp_plan={"name.of.a.module": "style", ...}` or the path of a YAML file with such a mapping.'
        )
    chosen: dict[str, tuple[Any, str, str]] = {}
    unmatched = []
    for source, rules in sources:
        ranked = sorted(rules.items(), key=lambda rule: rule[0].count("*"))
        claimed: dict[str, int] = {}
        for rule, value in ranked:
            targets = names.match(rule)
            if not targets:
                if source == "user":
                    raise PlanError(
                        f"tensor-parallel plan: the rule `{rule}: {style_label(value)}` (tp_size={tp_size}) matches "
                        f"no module or parameter of {type(model).__name__}.{names.nearest(rule)} "
                        "Correct the name; `*` stands for exactly one dotted part."
                    )
                if source == "model":
                    unmatched.append(rule)
                continue
            get_style(value, rule)
            for target in targets:
                if target not in chosen or claimed.get(target) == rule.count("*"):
                    chosen[target] = (value, rule, source)
                    claimed[target] = rule.count("*")
    entries = [_entry(model, names, name, *chosen[name], tp_size) for name in names.modules if name in chosen]
    entries = _settle_tied(model, names, entries, tp_size)
    result = Plan(
        type(model).__name__,
        tp_size,
        tuple(entries),
        tuple((name, param.shape) for name, param in model.named_parameters()),
        tuple(unmatched),
    )
    if tp_size > 1 and not result.layouts and not any(isinstance(entry.style, TorchStyle) for entry in entries):
        raise PlanError(
            f"tensor-parallel plan: the plan shards no parameter of {type(model).__name__} (tp_size={tp_size}). "
            "Name at least one module with a style that shards it, or set tp_size=1."
        )
    return result


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


def _shipped_plan(model: nn.Module) -> dict[str, Any]:
    """This package's own rules for the architecture: data in `plans/<model_type>.yaml`."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    return _read_shipped(model_type) if isinstance(model_type, str) else {}


@cache
def _read_shipped(model_type: str) -> dict[str, Any]:
    path = _SHIPPED / f"{model_type}.yaml"
    return dict(_read_plan_file(path)) if path.is_file() else {}


class _Names:
    """The module and parameter names of a model, and which of them a rule means."""

    def __init__(self, model: nn.Module):
        self.modules = dict(model.named_modules())
        self.aliases = dict(model.named_modules(remove_duplicate=False))
        self.parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        self.first_name = {id(module): name for name, module in self.modules.items()}
        self._split = [(name, name.split(".")) for name in [*self.aliases, *self.parameters] if name]
        prefix = getattr(model, "base_model_prefix", "")
        self.prefix = prefix if prefix and prefix in self.modules else ""

    def match(self, rule: str) -> list[str]:
        """Names of the modules that `rule` means, in full or relative to the base model."""
        targets = self._match_full(rule)
        if not targets and self.prefix:
            targets = self._match_full(f"{self.prefix}.{rule}")
        return list(dict.fromkeys(self._module_of(name, rule) for name in targets))

    def _match_full(self, rule: str) -> list[str]:
        parts = rule.split(".")
        return [
            name
            for name, split in self._split
            if len(split) == len(parts) and all(part in ("*", own) for part, own in zip(parts, split))
        ]

    def _module_of(self, name: str, rule: str) -> str:
        if name in self.aliases:
            return self.first_name[id(self.aliases[name])]
        owner, _, leaf = name.rpartition(".")
        module = self.aliases[owner]
        if leaf == "weight" and isinstance(module, (nn.Linear, nn.Embedding)) or len(module._parameters) == 1:
            return self.first_name[id(module)]
        size = tuple(module._parameters[leaf].shape)
        raise PlanError(
            f"tensor-parallel plan: the rule `{rule}` means the parameter `{name}` of size {size}, "
            f"one of several of a {type(module).__name__}. Name the module `{owner}` instead."
        )

    def nearest(self, rule: str) -> str:
        known = dict.fromkeys(_wildcards(name) if "*" in rule else name for name, _ in self._split)
        relative = [name.removeprefix(f"{self.prefix}.") for name in known] if self.prefix else []
        return nearest(rule, [*known, *relative])


def _entry(model: nn.Module, names: _Names, name: str, value: Any, rule: str, source: str, tp_size: int) -> PlanEntry:
    parent_name = name.rpartition(".")[0]
    parent = names.modules.get(parent_name) if name else None
    module = names.modules[name]
    config = getattr(parent, "config", None) or getattr(module, "config", None) or getattr(model, "config", None)
    site = Site(name, module, parent, config, tp_size, style_label(value))
    style = get_style(value, rule)
    style.verify(site)
    return PlanEntry(site, style, site.style, source, style.layouts(site))


def _settle_tied(model: nn.Module, names: _Names, entries: list[PlanEntry], tp_size: int) -> list[PlanEntry]:
    """A tied weight is one parameter, so all modules that use it have to cut it alike.

    A module that the plan does not name follows the one that it does name.
    """
    owners: dict[int, list[tuple[str, str]]] = {}
    for module_name, module in names.modules.items():
        for key, param in module._parameters.items():
            if param is not None:
                owners.setdefault(id(param), []).append((module_name, key))
    by_name = {entry.site.name: entry for entry in entries}
    for places in owners.values():
        if len(places) < 2:
            continue
        planned = [(by_name[name], key) for name, key in places if name in by_name]
        sharded = [(entry, key) for entry, key in planned if key in entry.layouts]
        torch_styled = [entry for entry, _ in planned if isinstance(entry.style, TorchStyle)]
        if not sharded and not torch_styled:
            continue
        first = (torch_styled[0] if torch_styled else sharded[0][0]).site
        for name, key in places:
            entry = by_name.get(name)
            if entry is None and sharded:
                layout = sharded[0][0].layouts[sharded[0][1]]
                value = tied_partner(names.modules[name], layout.dim)
                if value is not None:
                    entry = by_name[name] = _entry(model, names, name, value, name, "tied", tp_size)
            alike = entry is not None and (
                isinstance(entry.style, TorchStyle)
                if torch_styled
                else entry.layouts.get(key) == sharded[0][0].layouts[sharded[0][1]]
            )
            if not alike:
                full = f"{name}.{key}" if name else key
                size = tuple(names.modules[name]._parameters[key].shape)
                other = f"`{name}: {entry.label}`" if entry else "no rule"
                raise PlanError(
                    f"tensor-parallel plan: `{full}` of size {size} is tied to a weight of "
                    f"`{first.name}: {first.style}`, but {other} would leave it cut otherwise (tp_size={tp_size}). "
                    f"Give `{name}` a style that cuts the same dimension, or both `replicate`."
                )
    return [by_name[name] for name in names.modules if name in by_name]


def _local_size(size: torch.Size, layout: Layout | None, rank: int = 0) -> torch.Size:
    if layout is None:
        return size
    local = list(size)
    local[layout.dim] = layout.sizes[rank]
    return torch.Size(local)


def _wildcards(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _show(size: torch.Size) -> str:
    return "x".join(map(str, size)) or "scalar"
