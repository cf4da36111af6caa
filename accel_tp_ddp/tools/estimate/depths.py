"""Which layers of a model are simulated, so that all of them can be told from the few."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...core.errors import BadInputError, NoPlanError
from ...plans.names import wildcards
from ...plans.plan import Plan, resolve_plan
from ...plans.rules import PlanLike
from ...proof.sizes import Choice, cut_layers, layer_counts, parts_of
from ...proof.small import first_of_each, layer_kinds, layer_structure, renumbered
from ..target import build_target, read_config, said

__all__ = ["Depth", "Model", "adapted"]

_MOST_KINDS = 6  # of layers that differ; where there are more, all layers are simulated

Kept = dict[int, tuple[int, ...]]


@dataclass(frozen=True)
class Depth:
    """A model with some of its layers.

    Attributes:
        layers: For each number of layers that the config counts, which of them.
        times: How often the full model has what this depth has beyond the least one.
    """

    layers: Kept
    times: int = 0


class Model:
    """What a command names, to be built with any of its layers.

    Args:
        spec: See `build_target`.
        plan: `"auto"`, or a file; see `resolve_plan`.
        lora: The rank of adapters on all linear layers, which then are all that is trained; 0: none.

    Attributes:
        full: On the meta device.
        frozen: Parameters that a step on text does not reach, with `*` for numbers, such as a vision model's.
    """

    def __init__(self, spec: str, plan: PlanLike = "auto", trust_remote_code: bool = False, lora: int = 0):
        self.spec, self.plan, self.trust, self.lora = spec, plan, trust_remote_code, lora
        module, colon, function = spec.partition(":")
        self.full = build_target(spec, trust_remote_code=trust_remote_code)
        named = bool(colon) and function.isidentifier()
        self.config: Any = None if named else read_config(spec, trust_remote_code)
        if self.config is not None:
            self.config = self.full.config  # settled: lists that a file leaves out are there
        self.kind = type(self.full).__name__
        self.frozen: frozenset[str] = frozenset()
        self._places: dict[int, list[tuple[str, str]]] = {}
        for place, count in layer_counts(self.config) if self.config is not None else ():
            self._places.setdefault(count, []).append(place)
        try:
            unsharded = resolve_plan(self.full, 1, plan)
        except NoPlanError as error:
            raise BadInputError(
                f"{self.kind} has no plan of its own and this package ships none for it. Give --plan FILE, which "
                "`accel-tp-ddp plan MODEL --tp 2 --infer` prints."
            ) from error
        self._kinds = {n: layer_kinds(self.full, unsharded, n, at) for n, at in self._places.items()}
        self._lists = {name: module for name, module in self.full.named_modules() if isinstance(module, nn.ModuleList)}

    @property
    def vocabulary(self) -> int:
        text = self.full.config.get_text_config() if hasattr(self.full, "config") else None
        return int(getattr(text, "vocab_size", 0) or 0)

    @property
    def layers(self) -> int:
        """Of the largest stack that is trained."""
        return max((count for count in self._places if not self._is_frozen(count)), default=0)

    def resolve(self, tp_size: int) -> Plan:
        """The plan of the full model."""
        return resolve_plan(self.full, tp_size, self.plan)

    def depths(self) -> list[Depth]:
        """The least depth, with each kind of layer, and for each kind one that has a layer of it more.

        Two or more layers are left, so that the first and the last are others. What is frozen is as deep as it is.
        """
        kept: Kept = {}
        more: list[tuple[int, Any]] = []
        for count, kinds in self._kinds.items():
            numbers = Counter(kinds)
            if self._is_frozen(count) or len(numbers) > _MOST_KINDS:
                kept[count] = tuple(range(count))
                continue
            kept[count] = first_of_each(kinds, 2)
            held = Counter(kinds[index] for index in kept[count])
            more += [(count, kind) for kind in numbers if numbers[kind] > held[kind]]
        least = Depth(kept)
        made = [least]
        for count, kind in more:
            kinds = self._kinds[count]
            index = next(n for n, each in enumerate(kinds) if each == kind and n not in kept[count])
            times = Counter(kinds)[kind] - sum(kinds[n] == kind for n in kept[count])
            made.append(Depth({**kept, count: tuple(sorted({*kept[count], index}))}, times))
        if all(self._is_as_expected(depth) for depth in made):
            return made
        return [Depth({count: tuple(range(count)) for count in self._places})]

    def freeze(self, names: Iterable[str]) -> None:
        """Leave these parameters, by their names in a shallow model, as they are."""
        self.frozen = frozenset(map(wildcards, names))

    def builder(self, depth: Depth, dtype: torch.dtype) -> Callable[[], nn.Module]:
        """What builds this depth of the model; `rules_for` gives its plan."""

        def build() -> nn.Module:
            model = self._cut(depth, dtype) if self.config is not None else build_target(self.spec, "cpu", self.trust)
            for name, param in model.named_parameters():
                if wildcards(name) in self.frozen:
                    param.requires_grad_(False)
            return adapted(model, self.lora) if self.lora else model

        return build

    def rules_for(self, depth: Depth) -> PlanLike:
        """The plan with the numbers that the layers have at this depth."""
        if self.config is None or self.plan == "auto":
            return self.plan
        return renumbered(self.plan, Choice(self._by_place(depth)), self.full)

    def _by_place(self, depth: Depth) -> Mapping[tuple[str, str], tuple[int, ...]]:
        return {place: depth.layers[count] for count, at in self._places.items() for place in at}

    def _cut(self, depth: Depth, dtype: torch.dtype) -> nn.Module:
        config = cut_layers(self.config, self._by_place(depth))
        for _, own in parts_of(config):
            for name, value in {"dtype": dtype, "use_cache": False}.items():
                if name in own:
                    own[name] = value
        config.dtype = dtype
        kind: Any = type(self.full)
        made: nn.Module = kind._from_config(config)
        return made

    def _is_as_expected(self, depth: Depth) -> bool:
        """Whether each layer of the shallow model is of the kind of the one that it stands for."""
        with torch.device("meta"):
            try:
                lists = dict(self._cut(depth, torch.float32).named_modules())
            except Exception:  # sizes that do not go together surface anywhere
                return False
        for name, full in self._lists.items():
            kept = depth.layers.get(len(full))
            if kept is None or not isinstance(lists.get(name), nn.ModuleList):
                continue
            made: Any = lists[name]
            if len(made) == len(full):
                continue
            same = len(made) == len(kept) and all(
                layer_structure(layer, {}) == layer_structure(full[n], {}) for layer, n in zip(made, kept)
            )
            if not same:
                return False
        return True

    def _is_frozen(self, count: int) -> bool:
        """Whether all stacks of so many layers are."""
        if not self.frozen:
            return False
        names = [name for name, module in self._lists.items() if len(module) == count]
        found = [wildcards(param) for param, _ in self.full.named_parameters()]
        inside = [param for param in found for name in names if param.startswith(f"{wildcards(name)}.")]
        return bool(inside) and all(param in self.frozen for param in inside)


def adapted(model: nn.Module, rank: int) -> nn.Module:
    """With LoRA of this rank on all linear layers but the output layer."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise BadInputError("--lora needs PEFT. Run `pip install peft`, or leave it out.") from error
    try:
        return get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM"))
    except ValueError as error:
        raise BadInputError(f"--lora: PEFT refuses this model: {said(error)}. Leave it out.") from error
