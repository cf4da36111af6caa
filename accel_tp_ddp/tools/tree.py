"""A resolved plan as a tree: of each module its style, what a rank holds of it, and why it holds all of the rest.

Modules beside each other that are alike, as a decoder's layers are, are one: `layers.0-79`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import groupby
from math import prod
from typing import Any

import torch
from torch import nn

from ..core.layout import Layout
from ..plans.plan import Plan, PlanEntry, local_size

__all__ = ["as_tree", "readable", "ranges", "rows", "totals", "walk"]

Node = dict[str, Any]

NO_RULE = "no rule names it"
ONE_RANK = "there is one rank"


def as_tree(model: nn.Module, plan: Plan) -> Node:
    """The modules of `model` under `plan`, from the root.

    Modules without a parameter and without a style, as activations, are left out.

    Returns:
        A node. `name`: full, with ranges for what is folded ("" for the root); `kind`: its class; `count`: how many
        modules it stands for; `style`, `source`, `rule`: what was chosen, where that came from (user, package, model,
        inferred, tied, adapter) and the rule's name, all None where none names it; `bytes`: what the first rank holds
        of it and of all in it; `parameters`: its own; `children`: nodes.

        Of a parameter: `name` in its module; `dtype`; `full`: its shape; `local`: that of each rank's part, in rank
        order; `bytes`, as of a node; `ranks`: how many ranks hold each element, at most; `style`, `source`, `rule`, as
        of a node, where a rule names the parameter itself; `replicated`: why every rank holds all of it, or None;
        `tied`: the full name of the parameter that it is one with, and counted as, or None.
    """
    tree = _Tree(model, plan).node("", "", model)
    _finish(tree, "", 1)
    return tree


class _Tree:
    def __init__(self, model: nn.Module, plan: Plan):
        self.plan = plan
        self.entries: dict[nn.Module, list[PlanEntry]] = {}
        for entry in plan.entries:
            self.entries.setdefault(entry.site.module, []).append(entry)
        named, layouts = dict(model.named_parameters(remove_duplicate=False)), plan.layouts
        self.layouts = {id(param): layouts[name] for name, param in named.items() if name in layouts}
        self.seen: dict[int, str] = {}
        self.shared: dict[nn.Module, str] = {}

    def node(self, name: str, key: str, module: nn.Module, around: PlanEntry | None = None) -> Node:
        entries = self.entries.get(module, [])
        source = entries[0].source if entries else None
        rule = self.plan.rules.get(name)
        node: Node = {
            **{"name": key, "kind": type(module).__name__, "count": 1},
            **{"style": " + ".join(each.label for each in entries) or None, "source": source},
            **{"rule": rule.name if rule else None, "bytes": 0, "parameters": [], "children": []},
        }
        if module in self.shared:
            return {**node, "kind": f"{node['kind']}, the one of {self.shared[module]}"}
        self.shared[module] = name
        entry = entries[0] if entries else around
        for leaf, param in module._parameters.items():
            if param is not None:
                node["parameters"].append(self._parameter(f"{name}.{leaf}" if name else leaf, leaf, param, entry))
        adapters = entry if entry is not None and entry.source == "adapter" else None  # their parts have no rule
        for child_key, child in module._modules.items():
            if child is not None:
                inside = adapters if child_key != "base_layer" else None
                made = self.node(f"{name}.{child_key}" if name else child_key, child_key, child, inside)
                if made["style"] or made["parameters"] or made["children"]:
                    node["children"].append(made)
        node["children"] = list(_folded(node["children"]))
        return node

    def _parameter(self, name: str, leaf: str, param: nn.Parameter, entry: PlanEntry | None) -> Node:
        tp_size, layout, rule = self.plan.tp_size, self.layouts.get(id(param)), self.plan.rules.get(name)
        name_of_rule, style, source = rule if rule is not None else (None, None, None)
        first = self.seen.setdefault(id(param), name)
        local = [list(local_size(param.shape, layout, rank)) for rank in range(tp_size)]
        return {
            **{"name": leaf, "dtype": str(param.dtype).removeprefix("torch."), "full": list(param.shape)},
            **{"local": local, "ranks": tp_size if layout is None else _holders(layout)},
            **{"style": style, "source": source, "rule": name_of_rule, "tied": None if first == name else first},
            "replicated": self._why_replicated(name, entry) if layout is None else None,
        }

    def _why_replicated(self, name: str, entry: PlanEntry | None) -> str:
        if self.plan.tp_size == 1:
            return ONE_RANK
        if (rule := self.plan.rules.get(name)) is not None:
            return f"the rule says `{rule.style}`"
        if entry is None:
            return NO_RULE
        if entry.style.leaves_alone:
            return f"the rule says `{entry.label}`"
        if entry.style.runs_on_dtensors:
            return f"`{entry.label}` cuts it by itself, when it is applied: not counted here"
        if entry.style.partial_gradients:
            return f"`{entry.label}`: each rank uses all of it on its part, and gradients are summed"
        if entry.layouts:
            return f"`{entry.label}` cuts {' and '.join(entry.layouts)}, and each rank needs all of this"
        return f"`{entry.label}` cuts none"


def _holders(layout: Layout) -> int:
    """How many ranks hold what is held by most."""
    counts = Counter(span for ranges_ in layout.ranges for span in set(ranges_) if span[0] < span[1])
    return max(counts.values(), default=1)


def _folded(children: list[Node]) -> Iterator[Node]:
    """The children of a node: lists become their members, and members that are alike become one."""
    for child in children:
        members = child["children"]
        is_list = members and all(each["name"].split(".")[0][:1].isdigit() for each in members)
        if is_list and not child["style"] and not child["parameters"]:
            yield from ({**each, "name": f"{child['name']}.{each['name']}"} for each in _alike(members))
        else:
            yield child


def _alike(members: list[Node]) -> Iterator[Node]:
    found: dict[str, list[Node]] = {}
    for member in members:
        found.setdefault(repr({**member, "name": None}), []).append(member)
    for same in found.values():
        if len(same) == 1 or not all(each["name"].isdigit() for each in same):
            yield from same
            continue
        yield {**same[0], "name": ranges([int(each["name"]) for each in same]), "count": len(same)}


def _finish(node: Node, before: str, times: int) -> None:
    """Full names, and sums: of all that a folded node stands for."""
    node["name"] = ".".join(part for part in (before, node["name"]) if part)
    node["count"] *= times
    held = 0
    for param in node["parameters"]:
        param["bytes"] = 0 if param["tied"] else prod(param["local"][0]) * _itemsize(param) * node["count"]
        held += param["bytes"]
    for child in node["children"]:
        _finish(child, node["name"], node["count"])
        held += child["bytes"]
    node["bytes"] = held


def totals(tree: Node, tp_size: int) -> dict[str, Any]:
    """What there is in all and on each rank, tied parameters once.

    Returns:
        `parameters` and `bytes` in all; `ranks`: for each rank its `parameters` and `bytes`; `share`: what the first
        rank holds of all bytes; `replicated`: the bytes that every rank holds, and `replicated_share`: of the first
        rank's bytes.
    """
    full = size = replicated = 0
    held, held_bytes = [0] * tp_size, [0] * tp_size
    for node, param in walk(tree):
        if param["tied"]:
            continue
        count, itemsize = node["count"], _itemsize(param)
        full += prod(param["full"]) * count
        size += prod(param["full"]) * count * itemsize
        for rank, local in enumerate(param["local"]):
            held[rank] += prod(local) * count
            held_bytes[rank] += prod(local) * count * itemsize
        if param["replicated"]:
            replicated += param["bytes"]
    return {
        **{"parameters": full, "bytes": size},
        "ranks": [{"parameters": count, "bytes": number} for count, number in zip(held, held_bytes)],
        **{"replicated": replicated, "replicated_share": replicated / max(held_bytes[0], 1)},
        "share": held_bytes[0] / max(size, 1),
    }


def walk(node: Node) -> Iterator[tuple[Node, Node]]:
    """Every parameter, with the node that holds it."""
    for param in node["parameters"]:
        yield node, param
    for child in node["children"]:
        yield from walk(child)


def _itemsize(param: Node) -> int:
    dtype: torch.dtype = getattr(torch, param["dtype"])
    return dtype.itemsize


# ------------------------------------------------------------------------------------------------------------- as text


def rows(tree: Node) -> list[str]:
    """The tree as lines: names, styles and where they come from, the first rank's bytes, and shapes."""
    cells = [("module", "style", "from", "a rank", "parameters"), *_rows(tree, "", "")]
    widths = [max(len(row[column]) for row in cells) for column in range(4)]
    aligned: list[Callable[[str, int], str]] = [str.ljust, str.ljust, str.ljust, str.rjust]
    return [
        "  ".join([*(align(cell, width) for align, cell, width in zip(aligned, row, widths)), row[4]]).rstrip()
        for row in cells
    ]


def _rows(node: Node, indent: str, before: str) -> Iterator[tuple[str, str, str, str, str]]:
    name = node["name"].removeprefix(f"{before}.") if before else node["name"] or node["kind"]
    own = node["count"] > 1 and any(char in name for char in "-,")
    label = f"{indent}{name}" + (f"  {node['kind']}" if own else "")
    size = readable(node["bytes"]) if node["bytes"] else ""
    yield label, node["style"] or "", node["source"] or "", size, ", ".join(map(_cell, node["parameters"]))
    for child in node["children"]:
        yield from _rows(child, f"{indent}  ", node["name"])


def _cell(param: Mapping[str, Any]) -> str:
    shape = "x".join(map(str, param["full"])) or "scalar"
    if param["tied"]:
        return f"{param['name']} is {param['tied']}"
    if param["replicated"]:
        return f"{param['name']} {shape} replicated"
    parts = groupby("x".join(map(str, local)) for local in param["local"])
    locals_ = [(part, len(list(same))) for part, same in parts]
    shown = locals_[0][0] if len(locals_) == 1 else ", ".join(f"{part} on {count}" for part, count in locals_)
    named = f" by {param['style']}" if param["style"] else ""
    return f"{param['name']} {shape} -> {shown}{named}" + (f", each on {param['ranks']}" if param["ranks"] > 1 else "")


def readable(size: float) -> str:
    """Bytes, in the unit that leaves one to four digits before the point."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:,.2f} GiB"


def ranges(numbers: Iterable[int]) -> str:
    """Rising numbers in short: `0-2,4,6-9`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ",".join("-".join(map(str, run)) for run in runs)
