"""What a plan was proved on: the code, the structure, the cuts and the switches of a model, and none of its sizes.

A model that was shrunk with its relations kept has the fingerprint of the full one.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator, Mapping
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import Placement

from ..core.layout import Layout
from ..core.wrappers import unwrap
from ..plans.plan import Plan, PlanEntry
from .sources import UNKNOWN, Sources, class_name, digest
from .switches import attributes, relation, switches

__all__ = ["describe", "fingerprint"]


def fingerprint(model: nn.Module, plan: Plan) -> str | None:
    """Equal for two models only if a plan that is right for the one is right for the other.

    None if that cannot be said: code without a source file, such as a notebook's cell, or a style whose state cannot
    be read. Such a model is proved each time. Compare `describe` of two to see whether one can stand for the other.
    """
    rows = [*describe(model, plan), *(["sequence_parallel"] if plan.sequence_parallel else [])]
    return None if any(row.startswith(UNKNOWN) for row in rows) else digest("\n".join(rows))


def describe(model: nn.Module, plan: Plan) -> list[str]:
    """The rows that the fingerprint is made of, sorted. Numbers in names are `*`, so layers of a kind are one.

    Left out, as a small model has them otherwise or they are none of the plan's: sizes, hooks, `requires_grad`,
    dtypes, devices, and which of transformers' own attention functions is set.
    """
    return sorted(set(_Description(unwrap(model), plan).rows()))


class _Description:
    def __init__(self, model: nn.Module, plan: Plan):
        self.model = model
        self.tp_size = plan.tp_size
        self.sources = Sources()
        self.entries: dict[int, list[PlanEntry]] = {}
        for entry in plan.entries:
            self.entries.setdefault(id(entry.site.module), []).append(entry)
        self._modules: set[str] = set()
        self._walked: dict[int, tuple[str, str]] = {}
        self._configs: dict[int, tuple[str, Any]] = {}
        self._owners: dict[int, list[str]] = {}
        self._kinds: dict[type, str] = {}
        self._states: dict[int, str] = {}
        self._layouts: dict[Layout, str] = {}
        self._heads: dict[int, str] = {}
        self._unknown: set[str] = set()

    def rows(self) -> Iterator[str]:
        yield f"tp_size {self.tp_size}"
        yield f"model {self._walk('', self.model)}"
        yield from self._modules
        for names in self._owners.values():
            if len(names) > 1:
                yield f"tied {' '.join(sorted(set(names)))}"
        for name, config in self._configs.values():
            yield from (f"config {name or '-'} {row}" for row in switches(config, self.tp_size))
        yield from self._unknown
        yield from self.sources.rows()

    def _walk(self, name: str, module: nn.Module) -> str:
        """Adds the rows of a module and of those inside it, and returns a digest of all of them.

        So that not only each module is told, but also which ones stand together in a layer.
        """
        if (known := self._walked.get(id(module))) is not None:
            self._modules.add(f"shared {name} {known[0]}")
            return known[1]
        own = self._own(name, module)
        self._modules.add(f"module {name or '-'} {own}")
        parts, kinds = [own], set()
        for key, child in module._modules.items():
            full = f"{name}.{'*' if key.isdigit() else key}" if name else "*" if key.isdigit() else key
            if child is None:
                parts.append(f"{key} None")
                continue
            inside = self._walk(full, child)
            if key.isdigit():
                kinds.add(inside)
                self._modules.add(f"kind {full} {inside}")
            else:
                parts.append(f"{key} {inside}")
        result = digest("\n".join([*parts, *sorted(kinds)]))
        self._walked[id(module)] = (name, result)
        return result

    def _own(self, name: str, module: nn.Module) -> str:
        kind = type(module)
        if kind not in self._kinds:
            self.sources.add_class(kind)
            self._kinds[kind] = class_name(kind)
        for field in ("config", "peft_config"):
            if (config := module.__dict__.get(field)) is not None:
                self._configs.setdefault(id(config), (name, config))
        if (forward := module.__dict__.get("forward")) is not None:
            forward = getattr(forward, "__func__", forward)
            self.sources.add_function(forward)
            self._modules.add(f"forward {name or '-'} {self._state(forward)}")
        names = []
        for key, param in module._parameters.items():
            if param is not None:
                names.append(key)
                self._owners.setdefault(id(param), []).append(f"{name}.{key}" if name else key)
        cells = [self._kinds[kind], *names, "|", *(key for key, held in module._buffers.items() if held is not None)]
        cells += ["|", *sorted(attributes(module, self.tp_size))]
        for entry in self.entries.get(id(module), ()):
            cells += ["|", self._entry(entry)]
        return " ".join(cells)

    def _entry(self, entry: PlanEntry) -> str:
        site = entry.site
        cells = [entry.label, self._state(entry.style)]
        cells += [f"{name} {self._layout(layout)}" for name, layout in sorted(entry.layouts.items())]
        cells += [f"{name} {self._state(style)}" for name, style in sorted(site.bare.items())]
        for name, param in site.module._parameters.items():
            if param is not None and param.ndim > 2:  # experts are stacked in a dimension that is not cut
                cells.append(f"{name} divisible {[size % self.tp_size == 0 for size in param.shape]}")
        if site.key_value_heads is not None:
            cells.append(f"key/value heads {relation(site.key_value_heads, self.tp_size)}")
        if id(site.config) not in self._heads:
            self._heads[id(site.config)] = _heads(site.head_counts(), self.tp_size)
        return "; ".join([*cells, self._heads[id(site.config)]])

    def _layout(self, layout: Layout) -> str:
        if (known := self._layouts.get(layout)) is not None:
            return known
        holders: dict[tuple[int, int], int] = {}
        for ranges in layout.ranges:
            for span in set(ranges):
                holders[span] = holders.get(span, 0) + 1
        pieces = set()
        for ranges in layout.ranges:
            lengths = [stop - start for start, stop in ranges]
            alike = [lengths.index(length) for length in lengths]  # which pieces are of one length
            pieces.add(f"{len(ranges)} pieces {alike} on {[holders[span] for span in ranges]} ranks")
        even = "even" if len(set(layout.sizes)) == 1 else "uneven"
        self._layouts[layout] = f"dim {layout.dim} {even} {len(layout.parts)} parts {sorted(pieces)}"
        return self._layouts[layout]

    def _state(self, value: Any) -> str:
        """A style, or what it keeps: by its class, and its values."""
        if id(value) not in self._states:
            self._states[id(value)] = self._spell(value, ())
        return self._states[id(value)]

    def _spell(self, value: Any, around: tuple[int, ...]) -> str:
        if value is None or isinstance(value, (bool, int, float, str, bytes, enum.Enum, Placement)):
            return repr(value)
        if isinstance(value, (torch.dtype, torch.device)):
            return str(value)
        if isinstance(value, Layout):
            return self._layout(value)
        if isinstance(value, type):
            self.sources.add_class(value)
            return class_name(value)
        if isinstance(value, (FunctionType, BuiltinFunctionType)):
            self.sources.add_function(value)
            closed = [cell.cell_contents for cell in getattr(value, "__closure__", None) or ()]
            return f"{value.__module__}.{value.__qualname__}{self._spell_all(closed, around) if closed else ''}"
        if id(value) in self._configs:
            return "a config of the model"
        if isinstance(value, MethodType) and isinstance(value.__self__, nn.Module):
            return f"method {self._spell(value.__func__, around)}"
        if id(value) in around or isinstance(value, (torch.Tensor, nn.Module)):
            return self._cannot_tell(value)
        around = (*around, id(value))
        if isinstance(value, (list, tuple)):
            return self._spell_all(value, around)
        if isinstance(value, (set, frozenset)):
            return f"{{{', '.join(sorted(self._spell(item, around) for item in value))}}}"
        if isinstance(value, Mapping):
            return self._spell_fields("", value, around)
        self.sources.add_class(type(value))
        fields = getattr(value, "__dict__", None)
        if fields is None:
            return self._cannot_tell(value)
        return self._spell_fields(class_name(type(value)), fields, around)

    def _spell_all(self, values: Iterable[Any], around: tuple[int, ...]) -> str:
        return f"[{', '.join(self._spell(item, around) for item in values)}]"

    def _spell_fields(self, kind: str, fields: Mapping[Any, Any], around: tuple[int, ...]) -> str:
        cells = [f"{self._spell(key, around)}: {self._spell(item, around)}" for key, item in fields.items()]
        return f"{kind}({', '.join(sorted(cells))})"

    def _cannot_tell(self, value: Any) -> str:
        self._unknown.add(f"{UNKNOWN}the state of a {class_name(type(value))}")
        return "?"


def _heads(counts: Mapping[str, int], tp_size: int) -> str:
    """What the config says of its heads, against the ranks and each other."""
    queries, keys = (counts.get(name) for name in ("num_attention_heads", "num_key_value_heads"))
    cells = [f"{name} {relation(count, tp_size)}" for name, count in sorted(counts.items())]
    if queries and keys:
        cells.append("as many of both" if queries == keys else "grouped")
    return ", ".join(cells)
