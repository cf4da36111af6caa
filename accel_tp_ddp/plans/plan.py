"""Plans: from patterns and styles to a verified list of what happens where. Nothing here touches a weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from ..core.errors import NoPlanError, PlanError
from ..core.layout import Layout
from ..styles.base import Site, Style
from ..styles.peft import adapter_style
from ..styles.registry import get_style, is_known, style_label, tied_partner
from ..styles.replicated import Replicate
from .names import Names, unmarked, wildcards
from .rules import InferredPlan, PlanLike, load_plan, own_plan
from .shipped import check_shipped, shipped_plans

__all__ = ["Plan", "PlanEntry", "Rule", "UnusedRule", "local_size", "resolve_plan", "unplanned"]


class Rule(NamedTuple):
    """A rule that was followed: its name without marks, its style as the plan spells it, and where it came from."""

    name: str
    style: str
    source: str


class UnusedRule(NamedTuple):
    """A rule that was not followed.

    Attributes:
        name: As it is written, with its marks.
        style: As the plan spells it.
        source: Where it came from; see `PlanEntry`.
        overridden: The rule that holds in its place, for the first module that it means; None: it matches nothing.
    """

    name: str
    style: str
    source: str
    overridden: Rule | None = None


@dataclass(frozen=True)
class PlanEntry:
    """One module of the model with the style that was chosen for it.

    Attributes:
        site: The module and its surroundings.
        style: The style object.
        label: The style as the plan names it.
        source: Where the rule came from: "user", "package", "model", "inferred" or "tied".
        layouts: Layout of each sharded parameter, by its name in the module.
    """

    site: Site
    style: Style
    label: str
    source: str
    layouts: dict[str, Layout] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """A resolved and verified plan. `print(plan)` shows what is sharded how.

    Attributes:
        model: Class of the model.
        tp_size: Tensor-parallel ranks.
        entries: What was chosen for each module.
        parameters: Name and full size of every parameter.
        dtypes: Their dtypes.
        rules: The rules that were followed, by the modules and bare parameters that they were followed for.
        unused: The others.
        sequence_parallel: Whether the sequence is spread between the blocks of layers.
        overlap: Elements of an input from which on weight gradients are computed while its gradient is summed; None:
            never.
    """

    model: str
    tp_size: int
    entries: tuple[PlanEntry, ...]
    parameters: tuple[tuple[str, torch.Size], ...]
    dtypes: tuple[torch.dtype, ...] = ()
    rules: Mapping[str, Rule] = field(default_factory=dict)
    unused: tuple[UnusedRule, ...] = ()
    sequence_parallel: bool = False
    overlap: int | None = None

    @property
    def unmatched(self) -> tuple[str, ...]:
        """Rules of the model's own plan that match nothing: upstream may have renamed a module."""
        return tuple(rule.name for rule in self.unused if rule.source == "model" and rule.overridden is None)

    @property
    def layouts(self) -> dict[str, Layout]:
        """Layout of every sharded parameter, by full name."""
        return {entry.site.parameter(name): layout for entry in self.entries for name, layout in entry.layouts.items()}

    @property
    def layouts_by_parameter(self) -> dict[nn.Parameter, Layout]:
        """Layout of every sharded parameter, by the parameter that its module holds at the moment."""
        places = [
            (entry.site.module, name, layout) for entry in self.entries for name, layout in entry.layouts.items()
        ]
        return {
            param: layout for module, name, layout in places if (param := module._parameters.get(name)) is not None
        }

    def signature(self) -> str:
        """Equal on two ranks only if both would shard the same parameters in the same way."""
        styles = [f"{entry.site.name}: {entry.label}, {entry.layouts}" for entry in self.entries]
        sizes = [f"{name} {tuple(size)} {dtype}" for (name, size), dtype in zip(self.parameters, self.dtypes)]
        switches = [f"{name}={getattr(self, name)}" for name in ("sequence_parallel", "overlap")]
        return "\n".join([f"tp_size={self.tp_size}", *switches, *sizes, *styles])

    @property
    def headline(self) -> str:
        """What is sharded, in one line."""
        layouts = self.layouts
        total = sum(size.numel() for _, size in self.parameters)
        held = sum(local_size(size, layouts.get(name)).numel() for name, size in self.parameters)
        return (
            f"Tensor-parallel plan of {self.model}: tp_size={self.tp_size}, "
            f"{sum(name in layouts for name, _ in self.parameters)} of {len(self.parameters)} parameters sharded, "
            f"{total:,} elements in all, {held:,} on the first rank ({held / max(total, 1):.1%})"
        )

    def __str__(self) -> str:
        rows: dict[tuple, int] = {}
        sizes = dict(self.parameters)
        for entry in self.entries:
            names = entry.layouts or {}
            cells = [
                f"{name} {_show(sizes[full])} -> {_show(local_size(sizes[full], layout))}"
                if (full := entry.site.parameter(name)) in sizes
                else f"{name} tied"
                for name, layout in names.items()
            ]
            row = (wildcards(entry.site.name), entry.label, entry.source, ", ".join(cells) or "replicated")
            rows[row] = rows.get(row, 0) + 1
        widths = [max((len(row[column]) for row in rows), default=0) for column in range(3)]
        lines = [self.headline]
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
    model's own. A rule with a mark, as `encoder?.layers.*.fc1`, may match nothing where there is no `encoder`.

    Args:
        model: The unsharded model.
        tp_size: Number of tensor-parallel ranks.
        plan: `"auto"`; a mapping of names to styles, which adds to and overrides what `"auto"` finds; or the path of a
            YAML or JSON file that holds such a mapping.

    Raises:
        NoPlanError: If there is no rule at all.
        PlanError: (a ValueError) with the full name, the size and the nearest names, if a rule of the user or of
            this package matches nothing, a style is unknown or cannot be applied, sizes or head counts do not divide
            by `tp_size`, tied weights disagree, or nothing would be sharded.
    """
    user = load_plan(plan)
    names = Names(model)
    shipped = [] if isinstance(plan, InferredPlan) else shipped_plans(names.wrappings.base)
    sources = [
        ("user", user),
        *(("package", part.rules) for part in shipped),
        ("model", own_plan(names.wrappings.base)),
    ]
    if isinstance(plan, InferredPlan):
        sources = [("inferred", user)]
    if not any(rules for _, rules in sources):
        raise NoPlanError(
            f"tensor-parallel plan: {type(model).__name__} has no plan of its own and this package ships none for it. "
            'Pass `tp_plan={"name.of.a.module": "style", ...}` or the path of a YAML file with such a mapping.'
        )
    chosen: dict[str, tuple[Any, str, str]] = {}
    unused: list[UnusedRule] = []
    matched: list[tuple[UnusedRule, list[str]]] = []
    own: set[str] = set()
    for source, rules in sources:
        ranked = sorted(rules.items(), key=lambda rule: rule[0].count("*"))
        claimed: dict[str, int] = {}
        for rule, value in ranked:
            targets = names.match(rule)
            if not targets:
                if source in ("user", "inferred") and not ("?" in rule and names.may_be_missing(rule)):
                    raise PlanError(
                        f"tensor-parallel plan: the rule `{rule}: {style_label(value)}` (tp_size={tp_size}) matches "
                        f"no module or parameter of {type(model).__name__}.{names.nearest(rule)} "
                        "Correct the name; `*` stands for exactly one dotted part."
                    )
                unused.append(UnusedRule(rule, style_label(value), source))
                continue
            matched.append((UnusedRule(rule, style_label(value), source), targets))
            if source == "user":
                get_style(value, rule)
            else:
                own.update(targets)
            for target in targets:
                if target not in chosen or claimed.get(target) == rule.count("*"):
                    chosen[target] = (value, unmarked(rule), source)
                    claimed[target] = rule.count("*")
    check_shipped(names, shipped, user, tp_size)
    _check_supported(names, chosen, tp_size)
    bare = _bare_styles(names, chosen, own, tp_size)
    entries = [_entry(names, name, *chosen[name], tp_size, bare.get(name)) for name in names.modules if name in chosen]
    entries = _settle_tied(names, entries, tp_size)
    entries = _with_adapters(names, entries, tp_size)
    followed = {target: Rule(rule, style_label(value), source) for target, (value, rule, source) in chosen.items()}
    for unneeded, targets in matched:
        rule, style, source, _ = unneeded
        holding = [followed[target] for target in targets]
        if not any((held.name, held.source) == (unmarked(rule), source) for held in holding):
            if holding[0][1:] != (style, source):  # else the same of a part, under its name there
                unused.append(unneeded._replace(overridden=holding[0]))
    result = replace(unplanned(model, tp_size), entries=tuple(entries), rules=followed, unused=tuple(unused))
    refuse_empty(result)
    return result


def unplanned(model: nn.Module, tp_size: int) -> Plan:
    """The plan of a model before there is a rule: nothing is sharded."""
    parameters = [(name, param.shape, param.dtype) for name, param in model.named_parameters()]
    sizes, dtypes = tuple(each[:2] for each in parameters), tuple(each[2] for each in parameters)
    return Plan(type(model).__name__, tp_size, (), sizes, dtypes)


def refuse_empty(plan: Plan) -> None:
    """A plan that shards nothing would train as many equal copies as there are ranks, without a word."""
    if plan.tp_size > 1 and not plan.layouts and not any(entry.style.runs_on_dtensors for entry in plan.entries):
        raise PlanError(
            f"tensor-parallel plan: the plan shards no parameter of {plan.model} (tp_size={plan.tp_size}). "
            "Name at least one module with a style that shards it, or set tp_size=1."
        )


def _check_supported(names: Names, chosen: dict[str, tuple[Any, str, str]], tp_size: int) -> None:
    """Raise for styles of the model's own plan that are still to come."""
    missing = {rule: style_label(value) for value, rule, _ in chosen.values() if not is_known(value)}
    if missing:
        listed = ", ".join(f"`{rule}: {style}`" for rule, style in missing.items())
        model = type(names.modules[""]).__name__
        raise PlanError(
            f"tensor-parallel plan: the plan of {model} has rules that are not supported yet "
            f"(tp_size={tp_size}): {listed}. To train with these parts replicated, set each of these rules "
            "to `replicate` in tp_plan."
        )


def _bare_styles(
    names: Names, chosen: dict[str, tuple[Any, str, str]], own: set[str], tp_size: int
) -> dict[str, dict[str, Style]]:
    """The styles of bare parameters, by the module that holds them and their name in it.

    Raises:
        PlanError: If the module's own style does not let its forward use sharded parameters of its own.
    """
    bare: dict[str, dict[str, Style]] = {}
    for target, (value, rule, source) in chosen.items():
        if target in names.modules:
            continue
        owner, leaf = names.owner_of(target)
        style = get_style(value, rule)
        owner_value, owner_rule, _ = chosen.get(owner, ("replicate", owner, ""))
        if get_style(owner_value, owner_rule).takes_parameters:
            bare.setdefault(owner, {})[leaf] = style
        elif source == "user" and target not in own and leaf in ("weight", "bias"):
            raise names.not_a_module(target, rule)
        elif not style.leaves_alone:
            size = tuple(names.modules[owner]._parameters[leaf].shape)
            raise PlanError(
                f"tensor-parallel plan: the rule `{rule}: {style_label(value)}` (tp_size={tp_size}) shards the bare "
                f"parameter `{target}` of size {size}, but the module that uses it is planned as "
                f"`{owner}: {style_label(owner_value)}`. Set `{owner}` to `moe_tp_experts` if it holds experts and to "
                f"`local_params` otherwise, or set `{rule}` to `replicate` too."
            )
    return bare


def _entry(
    names: Names,
    name: str,
    value: Any,
    rule: str,
    source: str,
    tp_size: int,
    bare: dict[str, Style] | None = None,
) -> PlanEntry:
    parent = names.parent(name)
    module = names.modules[name]
    site = Site(name, module, parent, names.config(name), tp_size, style_label(value), bare or {})
    style = get_style(value, rule)
    style.verify(site)
    return PlanEntry(site, style, site.style, source, style.layouts(site))


def _with_adapters(names: Names, entries: list[PlanEntry], tp_size: int) -> list[PlanEntry]:
    """Each entry, followed by one for the adapters that have been put around its module."""
    by_module = {entry.site.module: entry for entry in entries}
    names.wrappings.check(entry.site for entry in entries if not entry.style.leaves_alone)
    around: dict[nn.Module, list[PlanEntry]] = {}
    for layer in reversed(names.wrappings.layers()):  # from the innermost
        base = layer.module.get_base_layer()
        entry = by_module.get(base)
        site = Site(layer.name, layer.module, names.parent(layer.base_name), None, tp_size, "lora")
        style = adapter_style(site, entry.style if entry else Replicate(), entry.layouts if entry else {})
        around.setdefault(base, []).append(PlanEntry(site, style, site.style, "adapter", style.layouts(site)))
    result: list[PlanEntry] = []
    for entry in entries:
        result += [entry, *around.pop(entry.site.module, [])]
    return [*result, *(entry for left in around.values() for entry in left)]


def _settle_tied(names: Names, entries: list[PlanEntry], tp_size: int) -> list[PlanEntry]:
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
        torch_styled = [entry for entry, _ in planned if entry.style.runs_on_dtensors]
        if not sharded and not torch_styled:
            continue
        first = (torch_styled[0] if torch_styled else sharded[0][0]).site
        users = [name for name, key in places if not _only_holds(name, places)]
        for name, key in places:
            if name not in users:
                continue
            entry = by_name.get(name)
            if entry is None and sharded:
                layout = sharded[0][0].layouts[sharded[0][1]]
                value = tied_partner(names.modules[name], layout.dim)
                if value is not None:
                    entry = by_name[name] = _entry(names, name, value, name, "tied", tp_size)
            alike = entry is not None and (
                entry.style.runs_on_dtensors
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


def _only_holds(name: str, places: list[tuple[str, str]]) -> bool:
    """Whether module `name` merely keeps a second name for a parameter of a module inside it, as BERT's heads do."""
    return any(other.startswith(f"{name}.") for other, _ in places if name)


def local_size(size: torch.Size, layout: Layout | None, rank: int = 0) -> torch.Size:
    """The size of what `rank` holds of a parameter of this full size; all of it without a layout."""
    if layout is None:
        return size
    local = list(size)
    local[layout.dim] = layout.sizes[rank]
    return torch.Size(local)


def _show(size: torch.Size) -> str:
    return "x".join(map(str, size)) or "scalar"
