"""The module and parameter names of a model, and which of them a rule means."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..core.errors import PlanError, nearest
from ..styles.conv1d import LINEAR
from .peft import Wrappings

__all__ = ["Names", "unmarked", "wildcards"]


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
        parameter means itself. Marks (`?`) make no difference.
        """
        rule = unmarked(rule)
        targets = self._match_full(rule)
        if not targets and self.prefix:
            targets = self._match_full(f"{self.prefix}.{rule}")
        return list(dict.fromkeys(self._module_of(name) for name in targets))

    def may_be_missing(self, rule: str) -> bool:
        """Whether `rule` may match nothing: the part of it up to a mark names nothing here, or the list that `*` goes
        through is empty."""
        parts = rule.split(".")
        heads = [".".join(parts[: end + 1]) for end in range(len(parts))]
        if any(head.endswith("?") and not self.match(head) for head in heads):
            return True
        lists = [self.match(head) for head, following in zip(heads, parts[1:]) if following == "*"]
        return any(found and not any(self._has_members(name) for name in found) for found in lists)

    def _has_members(self, name: str) -> bool:
        return name not in self.modules or len(self.modules[name]._modules) > 0

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


def unmarked(rule: str) -> str:
    """A rule's name without marks: `a.b?.c` may match nothing where there is no `a.b`."""
    return rule.replace("?", "")


def wildcards(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
