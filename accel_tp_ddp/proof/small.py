"""A small model of the same class for any model of transformers, so small that its plan can be proved in seconds.

Only the full model's classes, configs and structure are looked at; its weights are not touched. What the plan depends
on is held by `sizes`, and checked here: the small model has the full one's description (`fingerprint.describe`).
"""

from __future__ import annotations

import copy
import inspect
import itertools
import logging
import random
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..core.errors import PlanError
from ..core.wrappers import unwrap
from ..plans.names import Names, unmarked, wildcards
from ..plans.peft import adapted_model
from ..plans.plan import Plan, resolve_plan, unplanned
from ..plans.rules import InferredPlan, PlanLike, load_plan
from .fingerprint import describe
from .forwards import take_over_forwards
from .inputs import example_inputs, plain_inputs
from .sizes import Choice, changes_between, kinds_in_lists, layer_counts, named_layers, parts_of, shrunk
from .switches import left_out

__all__ = [
    *("CannotShrink", "Small", "as_it_is", "first_of_each", "layer_kinds", "layer_structure", "renumbered"),
    *("small_models", "small_unplanned"),
]

SEED = 20
MOST_PARAMETERS = 300_000_000  # of a model that is run here: a few seconds
FEW_PARAMETERS = 20_000_000  # of one that is taken as it is
_MOST_INPUTS = 64
_ALIKE = 6  # after so many candidates that fail alike, or run and miss modules, others are not tried
_TRIALS = 48  # by count, not by time: ranks have to come to the same model

# Heads a rank, their ratio to keys and values, and the width of a head, from the most shrunk on. None: as they are.
_SIZES: tuple[tuple[int | None, int, int | None], ...] = (
    *((2, 2, 16), (2, 2, 8), (2, 4, 16), (4, 2, 16), (4, 2, 8), (2, 2, 32), (8, 2, 16), (2, 2, 64), (2, 2, 128)),
    *((None, 2, 16), (4, 4, 64), (2, 2, None), (None, 2, None)),
)


class CannotShrink(Exception):
    """No small model can stand for this one; the message says why, in a sentence."""


@dataclass(frozen=True)
class Small:
    """A small model that a plan can be proved on.

    Attributes:
        model: Freshly built, in fp32 on the CPU, in training mode, without dropout. Equal on every rank.
        inputs: Keyword arguments for its forward.
        how: In which way it is smaller, for messages.
        prefix: Name in the full model of the part that it stands for; "" for the whole.
        rules: The plan as `resolve_plan` takes it for this model.
        missed: Planned modules that a forward with these inputs does not run, numbers as `*`.
    """

    model: nn.Module
    inputs: dict[str, Any]
    how: str
    prefix: str = ""
    rules: PlanLike = "auto"
    missed: tuple[str, ...] = ()


def small_models(model: nn.Module, plan: Plan, rules: PlanLike = "auto") -> Iterator[Small]:
    """A small model for each part of `model` that has to be proved by itself: mostly one, for the whole.

    Parts are the models of transformers in a module that is none itself, and those that a forward of the whole with
    the inputs at hand does not run, such as the vision model where only text is at hand. Changes nothing, communicates
    nothing, and leaves random states as they were. The same on every rank.

    Args:
        model: The full model, bare or compiled, on any device.
        plan: Its plan, as resolved.
        rules: What the plan was resolved from.

    Raises:
        CannotShrink: If there is no small model for the whole or for one of its parts.
    """
    model = unwrap(model)
    try:
        whole = _small(model, plan, rules, "")
    except CannotShrink as error:
        yield from _by_parts(model, plan, rules, error)
        return
    yield whole
    left = set(whole.missed)
    for name in _parts_inside(model):
        missed = {wildcards(entry) for entry in _planned(plan) if _is_inside(entry, name)}
        if missed and missed <= left:
            try:
                yield _small(model.get_submodule(name), None, _rules_inside(model, rules, name), name, plan)
            except CannotShrink:
                continue  # the modules stay among those that `missed` names
            left -= missed


def small_unplanned(model: nn.Module, tp_size: int, heads: int = 1) -> Small:
    """A small model for the whole of one that has no plan yet, see `small_models`. Its `rules` are none.

    Args:
        model: The full model.
        tp_size: How many ranks are to share it.
        heads: How many heads a rank has at least, if the full model has as many.

    Raises:
        CannotShrink: If there is none.
    """
    model = unwrap(model)
    plan, base = unplanned(model, tp_size), adapted_model(model)
    if not _is_model(base):
        return _copied(model, plan, InferredPlan(), "")
    return _Shrinking(model, base, plan, InferredPlan(), heads).first("")


def _by_parts(model: nn.Module, plan: Plan, rules: PlanLike, error: CannotShrink) -> Iterator[Small]:
    """The outermost models inside; raises `error` where planned modules lie outside of them."""
    parts = list(_parts_inside(model))
    outermost = [name for name in parts if not any(_is_inside(name, other) for other in parts if other != name)]
    planned = {name: [entry for entry in _planned(plan) if _is_inside(entry, name)] for name in outermost}
    if not all(any(entry in inside for inside in planned.values()) for entry in _planned(plan)) or not outermost:
        raise error
    for name, inside in planned.items():
        if inside:
            part, own = model.get_submodule(name), _rules_inside(model, rules, name)
            try:
                found = list(small_models(part, _plan_inside(part, plan, own, name), own))
            except CannotShrink as inner:
                raise CannotShrink(f"{error} Nor for its part `{name}`: {inner}") from inner
            for small in found:
                yield replace(small, prefix=_join(name, small.prefix))


def _planned(plan: Plan) -> list[str]:
    return [entry.site.name for entry in plan.entries if entry.layouts or not entry.style.leaves_alone]


def _is_inside(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


def _join(*names: str) -> str:
    return ".".join(name for name in names if name)


def _is_model(module: nn.Module) -> bool:
    """Whether it is a model of transformers with a config that another can be made from."""
    return hasattr(type(module), "base_model_prefix") and hasattr(getattr(module, "config", None), "to_dict")


def _parts_inside(model: nn.Module) -> Iterator[str]:
    """Names of the models inside, the outer before the inner."""
    return (name for name, module in model.named_modules() if name and _is_model(adapted_model(module)))


def _rules_inside(model: nn.Module, rules: PlanLike, prefix: str) -> PlanLike:
    """The user's rules for a part, by names in it."""
    own, names, new = load_plan(rules), Names(model), {}
    at = prefix.split(".")
    for rule, style in own.items():
        for spelled in [rule, *([f"{names.prefix}.{rule}"] if names.prefix else [])]:
            split, there = unmarked(spelled).split("."), any(_is_inside(name, prefix) for name in names.match(spelled))
            if there and len(split) > len(at) and all(part in ("*", known) for part, known in zip(split, at)):
                new[".".join(split[len(at) :])] = style
                break
    return InferredPlan(new) if isinstance(rules, InferredPlan) else new or "auto"


def _plan_inside(part: nn.Module, plan: Plan, rules: PlanLike, prefix: str) -> Plan:
    """The part's own plan, which has to be what the whole's says of it."""
    try:
        own = resolve_plan(part, plan.tp_size, rules)
    except PlanError as error:
        raise CannotShrink(f"the plan of `{prefix}` by itself does not hold: {error}") from error
    inside = {(entry.site.name, entry.label) for entry in own.entries if entry.layouts}
    whole = {
        (entry.site.name.removeprefix(prefix).removeprefix("."), entry.label)
        for entry in plan.entries
        if entry.layouts and _is_inside(entry.site.name, prefix)
    }
    if inside != whole:
        name, label = min(inside ^ whole)
        raise CannotShrink(f"`{prefix}.{name}: {label}` is planned otherwise where `{prefix}` stands by itself")
    return own


def _small(model: nn.Module, plan: Plan | None, rules: PlanLike, prefix: str, whole: Plan | None = None) -> Small:
    if plan is None:
        assert whole is not None
        plan = _plan_inside(model, whole, rules, prefix)
    base = adapted_model(model)
    if not _is_model(base):
        return _copied(model, plan, rules, prefix)
    return _Shrinking(model, base, plan, rules).first(prefix)


def as_it_is(model: nn.Module, tp_size: int, rules: PlanLike = "auto", prefix: str = "") -> Small:
    """`model` itself in the place of a small one, in fp32 on the CPU, with inputs that its forward takes.

    Its constant weights are moved, and its dropout is set to zero.

    Raises:
        CannotShrink: If it cannot be told what its forward takes.
    """
    base = adapted_model(model)
    problem = "nothing was found to try"
    with _as_before():
        _draw(model)
        _silence(model)
        torch.manual_seed(SEED + 1)
        candidates = example_inputs(base) if _is_model(base) else plain_inputs(base)
        for inputs in itertools.islice(candidates, _MOST_INPUTS):
            try:
                missed = _run(copy.deepcopy(model), inputs, tp_size, rules)
            except Exception as error:
                problem = f"with {', '.join(inputs)} it raises {_said(error)}"
            else:
                return Small(model, inputs, "the model as it is", prefix, rules, missed)
    raise CannotShrink(f"it cannot be told what the forward of {type(base).__name__} takes: {problem}.")


def _copied(model: nn.Module, plan: Plan, rules: PlanLike, prefix: str) -> Small:
    """A module without a config, as it is."""
    name = type(model).__name__
    count = sum(param.numel() for param in model.parameters())
    if count > FEW_PARAMETERS:
        raise CannotShrink(
            f"{name} has no config that a smaller one could be built from, and with {count:,} parameters it is too "
            "large to be proved as it is."
        )
    if any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()]):
        raise CannotShrink(f"{name} has no config that it could be built anew from, and no weights.")
    return as_it_is(_redrawn(model), plan.tp_size, rules, prefix)


def _redrawn(model: nn.Module) -> nn.Module:
    """A copy on the CPU in fp32, with weights that are the same on every rank, whatever they were drawn from."""
    tensors = [*model.parameters(), *model.buffers()]
    known = {
        id(tensor): tensor.detach().to("cpu", torch.float32 if tensor.is_floating_point() else tensor.dtype, copy=True)
        for tensor in tensors
    }
    memo: dict[int, Any] = {
        id(tensor): nn.Parameter(known[id(tensor)], tensor.requires_grad and tensor.is_floating_point())
        if isinstance(tensor, nn.Parameter)
        else known[id(tensor)]
        for tensor in tensors
    }
    copied = copy.deepcopy(model, memo)
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for param in copied.parameters():
            if param.is_floating_point() and param.numel() and not bool((param == param.flatten()[0]).all()):
                scale = param.shape[-1] ** -0.5 if param.ndim > 1 else 0.1
                param.copy_(scale * torch.randn(param.shape, generator=generator))
    return copied


class _Shrinking:
    """The search for a small model that stands for `model`.

    Args:
        model: The full model, with adapters.
        base: The model of transformers in it.
    """

    def __init__(self, model: nn.Module, base: nn.Module, plan: Plan, rules: PlanLike, least_heads: int = 1):
        self.least_heads = least_heads
        self.model, self.base, self.plan, self.rules = model, base, plan, rules
        self.tp_size = plan.tp_size
        self.rows = set(describe(model, plan))
        self.problems: dict[int, str] = {}  # the first, by how far its candidate came
        self.options: dict[str, Any] | None = None
        self.tried: set[str] = set()
        self.marks = _marks(model)
        self.times: Counter[str] = Counter()  # how often a forward failed alike, whatever the sizes

    def first(self, prefix: str) -> Small:
        with _as_before():
            found: list[Small] = []
            for choice in self._choices():
                if (small := self._try(choice, prefix)) is not None:
                    found.append(small)
                    if not small.missed or len(found) == _ALIKE:
                        break
                if max(self.times.values(), default=0) >= _ALIKE:
                    break
        if found:
            return min(found, key=lambda small: len(small.missed))
        reason = self.problems[max(self.problems)] if self.problems else "there is nothing to make smaller"
        raise CannotShrink(f"No small {type(self.base).__name__} can stand for this one: {reason}.")

    def _choices(self) -> Iterator[Choice]:
        layers = list(layer_choices(self.base, self.plan))
        choices = (
            Choice(kept, heads, ratio, width, images)
            for heads, ratio, width in _SIZES
            if heads is None or heads >= self.least_heads
            for images in (True, False)
            for kept in layers
        )
        return itertools.islice(choices, _TRIALS)

    def _try(self, choice: Choice, prefix: str) -> Small | None:
        """The small model of this choice, if it stands for the full one and runs."""
        stage = 0
        try:
            quiet = shrunk(self.base.config, self.tp_size, replace(choice, quiet=True))
            rules = renumbered(self.rules, choice, self.base)
            if (key := repr((sorted(changes_between(self.base.config, quiet)), rules))) in self.tried:
                return None
            self.tried.add(key)
            problem = self._difference(shrunk(self.base.config, self.tp_size, choice), rules)
            if problem:
                self._problem(1, problem)
                return None
            stage = 2
            model = self._build(quiet, "cpu")
            _draw(model)
            _silence(model)
            _name_tokens(model)
        except Exception as error:
            self._problem(stage, f"building one raises {_said(error)}")
            return None
        torch.manual_seed(SEED + 1)
        problem = "it cannot be told what its forward takes"
        try:
            for inputs in itertools.islice(example_inputs(adapted_model(model)), _MOST_INPUTS):
                try:
                    missed = _run(copy.deepcopy(model), inputs, self.tp_size, rules)
                except Exception as error:
                    problem = f"the forward of one raises {_said(error)}"
                    self._problem(4, problem)
                else:
                    return Small(model.train(), inputs, self._how(quiet), prefix, rules, missed)
        except Exception as error:
            self._problem(3, f"making inputs for one raises {_said(error)}")
            return None
        self.times[problem] += 1
        self._problem(3, problem)
        return None

    def _problem(self, stage: int, text: str) -> None:
        self.problems.setdefault(stage, text)

    def _difference(self, config: Any, rules: PlanLike) -> str:
        """In what a model of this config differs from the full one, but for its sizes."""
        model = self._build(config, "meta")
        count = sum(param.numel() for param in model.parameters())
        if count > MOST_PARAMETERS:
            return f"one of the same structure has {count:,} parameters, too many to run here"
        rows = set(describe(model, _resolved(model, self.tp_size, rules)))
        if rows == self.rows:
            return ""
        only = sorted(self.rows - rows)
        row = only[0] if only else min(rows - self.rows)
        return f"one of its config differs from it, in {len(self.rows ^ rows)} respects, such as `{row[:160]}`"

    def _build(self, config: Any, device: str) -> nn.Module:
        kind: Any = type(self.base)
        if self.options is None:
            self.options = self._find_options(kind, config)
        torch.manual_seed(SEED)
        with torch.device(device):
            base = kind._from_config(copy.deepcopy(config), dtype=torch.float32, **self.options)
            take_over_forwards(self.base, base)
            model = _with_adapters(self.model, self.base, base)
        _set_alike(model, self.marks)
        return model

    def _find_options(self, kind: Any, config: Any) -> dict[str, Any]:
        """The switches that the constructor took, such as `add_pooling_layer`, by the modules that it made."""
        wanted = {wildcards(name) for name, _ in self.base.named_modules()}
        switches = {
            name: each.default
            for name, each in inspect.signature(kind.__init__).parameters.items()
            if isinstance(each.default, bool)
        }
        for options in [{}, *({name: not default} for name, default in switches.items())]:
            if not switches:
                break
            with torch.device("meta"):
                built = kind._from_config(copy.deepcopy(config), dtype=torch.float32, **options)
            if {wildcards(name) for name, _ in built.named_modules()} == wanted:
                return options
        return {}

    def _how(self, config: Any) -> str:
        """The sizes that say most, for messages."""
        known = {name: f"{name} {small} for {full}" for name, full, small in changes_between(self.base.config, config)}
        telling = [text for name, text in known.items() if _TELLING.search(name)]
        return ", ".join(telling[:6]) or "as it is, built anew"


_TELLING = re.compile(r"layers?$|hidden_size$|d_model$|n_embd$|heads$|n_head$|vocab_size$|experts$")


def layer_choices(model: nn.Module, plan: Plan) -> Iterator[dict[tuple[str, str], tuple[int, ...]]]:
    """Which layers to keep, by the fields that count them: of each kind one, or the first of them; few before many."""
    config: Any = model.config
    places: dict[int, list[tuple[str, str]]] = {}
    for place, count in layer_counts(config):
        places.setdefault(count, []).append(place)
    kinds = {count: layer_kinds(model, plan, count, at) for count, at in places.items()}
    named = {count: set().union(*(named_layers(config, place, count) for place in at)) for count, at in places.items()}
    seen: list[dict[int, tuple[int, ...]]] = []
    for number in (0, 2, 3, 4, 6, 8, 12):
        for select in (first_of_each, _up_to_each):
            kept = {count: select(kinds[count], number) for count in places}
            if kept not in seen:
                seen.append(kept)
        every = {count: tuple(sorted({*first_of_each(kinds[count], 0), *named[count]})) for count in places}
        if every not in seen:
            seen.append(every)
    every = {count: tuple(range(count)) for count in places}
    for kept in [*seen, *([every] if every not in seen else [])]:
        yield {place: kept[count] for count, at in places.items() for place in at}


def first_of_each(kinds: list[Any], least: int) -> tuple[int, ...]:
    """The first layers of each kind, and more of the first ones up to a number."""
    first = {kind: index for index, kind in reversed(list(enumerate(kinds)))}
    chosen = sorted(first.values())
    rest = [index for index in range(len(kinds)) if index not in chosen]
    return tuple(sorted([*chosen, *rest[: max(max(least, 2) - len(chosen), 0)]]))


def _up_to_each(kinds: list[Any], least: int) -> tuple[int, ...]:
    """All layers up to where every kind has been."""
    last = max(kinds.index(kind) for kind in set(kinds))
    return tuple(range(min(max(last + 1, least, 2), len(kinds))))


def layer_kinds(model: nn.Module, plan: Plan, count: int, places: Iterable[tuple[str, str]]) -> list[Any]:
    """What tells each of so many layers apart: in the config, in their modules, in the plan."""
    columns = [kinds_in_lists(model.config, place, count) for place in places]
    labels = {id(entry.site.module): entry.label for entry in plan.entries}
    inside: set[int] = set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and id(module) not in inside:
            inside |= set(map(id, module.modules()))
            columns.append([layer_structure(layer, labels) for layer in module])
    return list(zip(*columns)) if columns else [()] * count


def layer_structure(layer: nn.Module, labels: Mapping[int, str]) -> Any:
    return frozenset(
        (
            wildcards(name),
            type(module).__qualname__,
            tuple(module._parameters),
            labels.get(id(module)),
            tuple(
                (key, value)
                for key, value in vars(module).items()
                if isinstance(value, (bool, str)) and key != "training"
            ),
        )
        for name, module in layer.named_modules()
    )


def _resolved(model: nn.Module, tp_size: int, rules: PlanLike) -> Plan:
    """Its plan, or one without entries where the rules are none yet."""
    return (
        unplanned(model, tp_size)
        if isinstance(rules, InferredPlan) and not rules
        else resolve_plan(model, tp_size, rules)
    )


def _marks(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The switches that modules keep as attributes, by their wildcard names, where all of that name have the same.

    A script may have set some on the full model, which one that is built anew would not have.
    """

    def is_mark(key: str, value: Any) -> bool:
        return (value is None or isinstance(value, (bool, str))) and key[0] != "_" and not left_out(key)

    found: dict[str, list[dict[str, Any]]] = {}
    for name, module in model.named_modules():
        own = {key: each for key, each in vars(module).items() if is_mark(key, each)}
        found.setdefault(wildcards(name), []).append(own)
    return {
        name: {key: each for key, each in first.items() if all(other.get(key, ...) == each for other in others)}
        for name, (first, *others) in found.items()
    }


def _set_alike(model: nn.Module, marks: Mapping[str, Mapping[str, Any]]) -> None:
    for name, module in model.named_modules():
        own = vars(module)
        for key, value in marks.get(wildcards(name), {}).items():
            own[key] = value


def renumbered(rules: PlanLike, choice: Choice, model: nn.Module) -> PlanLike:
    """The user's rules with the numbers that the layers kept have in the small model."""
    own = load_plan(rules)
    if not own or not any(part.isdigit() for rule in own for part in rule.split(".")):
        return rules
    by_count: dict[int, dict[int, int]] = {}
    counts = dict(layer_counts(model.config))
    for place, layers in choice.layers.items():
        by_count[counts[place]] = {full: small for small, full in enumerate(layers)}
    names, new = Names(model), {}
    for rule, style in own.items():
        parts: list[str] = []
        for part in unmarked(rule).split("."):
            if part.isdigit():
                lists = [names.modules.get(found) for found in names.match(".".join(parts))] if parts else []
                count = next((len(found) for found in lists if isinstance(found, nn.ModuleList)), None)
                if count in by_count:
                    if int(part) not in by_count[count]:
                        break
                    part = str(by_count[count][int(part)])
            parts.append(part)
        else:
            new[".".join(parts)] = style
    return InferredPlan(new) if isinstance(rules, InferredPlan) else new or "auto"


def _with_adapters(full: nn.Module, full_base: nn.Module, base: nn.Module) -> nn.Module:
    """`base` with what PEFT has put into the full model, added anew."""
    model, held = base, []
    if full is not full_base:
        wrapper: Any = full
        for name, config in wrapper.peft_config.items():
            config, original = _small_adapter(config, base)
            if model is base:
                model = type(wrapper)(base, config, name)
            else:
                model.add_adapter(name, config)
            held.append((model.peft_config[name], original))
        active = wrapper.active_adapter
        if isinstance(active, str) and active != model.active_adapter:
            model.set_adapter(active)
    for name, module in full_base.named_modules():
        configs = module.__dict__.get("peft_config")
        if configs and (name or full is full_base):
            inner = base.get_submodule(name)
            for adapter, config in configs.items():
                config, original = _small_adapter(config, inner)
                sys.modules["peft"].inject_adapter_in_model(config, inner, adapter)
                held.append((config, original))
            inner.__dict__.setdefault("peft_config", {adapter: config for adapter, (config, _) in zip(configs, held)})
    for config, original in held:
        vars(config).update(original)
    return model


def _small_adapter(config: Any, base: nn.Module) -> tuple[Any, dict[str, Any]]:
    """A copy that suits a small model, and the fields of it that are to be as they were once it has been added."""
    new = copy.deepcopy(config)
    original = {}
    if getattr(new, "inference_mode", False):
        original["inference_mode"], new.inference_mode = True, False
    if not isinstance(getattr(new, "init_lora_weights", True), bool):
        original["init_lora_weights"], new.init_lora_weights = new.init_lora_weights, True
    names = {name for name, _ in base.named_modules()}
    for field in ("target_modules", "modules_to_save", "target_parameters", "exclude_modules"):
        listed = getattr(new, field, None)
        if isinstance(listed, (list, set, tuple)):
            there = [
                name
                for name in listed
                if not any(part.isdigit() for part in name.split("."))
                or any(known == name or known.endswith(f".{name}") for known in names)
            ]
            setattr(new, field, type(listed)(there or listed))
    layers = getattr(new, "layers_to_transform", None)
    if isinstance(layers, (list, tuple)):
        numbers = {int(part) for name in names for part in name.split(".") if part.isdigit()}
        new.layers_to_transform = [index for index in layers if index in numbers] or list(layers)[:1]
    return new, original


@contextmanager
def _as_before() -> Iterator[None]:
    """Within, models are built on the CPU in fp32 with gradients; after, everything global is as it was."""
    python, numpy, dtype = random.getstate(), np.random.get_state(), torch.get_default_dtype()
    loggers = [logging.getLogger(name) for name in ("transformers", "peft")]
    levels = [logger.level for logger in loggers]
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(torch.device("cpu"))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast("cpu", enabled=False))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.CRITICAL)
            torch.set_default_dtype(torch.float32)
            random.seed(SEED)
            np.random.seed(SEED)
            yield
        finally:
            for logger, level in zip(loggers, levels):
                logger.setLevel(level)
            torch.set_default_dtype(dtype)
            random.setstate(python)
            np.random.set_state(numpy)


def _draw(model: nn.Module) -> None:
    """Moves what starts constant, so that it matters to the loss, and fills what a model leaves as the memory was."""
    torch.manual_seed(SEED + 2)
    with torch.no_grad():
        for module in model.modules():
            ours = type(module).__module__.startswith("torch.")
            for param in module._parameters.values():
                if param is None or not param.is_floating_point() or not param.numel():
                    continue
                if param.ndim > 2 and not ours:  # stacked experts; others lose nothing by it
                    param.normal_(std=0.1)
                elif param.ndim <= 1 or not param.isfinite().all() or bool((param == param.flatten()[0]).all()):
                    param.nan_to_num_(0.0, 0.0, 0.0).add_(torch.randn_like(param), alpha=0.1)


def _name_tokens(model: nn.Module) -> None:
    """The special tokens without which a loss cannot be computed, where a config leaves them open."""
    for _, own in parts_of(adapted_model(model).config):
        for name in ("pad_token_id", "decoder_start_token_id"):
            if "vocab_size" in own and own.get(name, 0) is None:
                own[name] = 0
        if own.get("is_encoder_decoder") and own.get("decoder_start_token_id") is None:
            own["decoder_start_token_id"] = own.get("pad_token_id") or 0


_NOISE = re.compile(r"dropout|layerdrop|layer_drop|drop_prob|jitter|noise")


def _silence(model: nn.Module) -> None:
    """Nothing drops out, and nothing is drawn at random."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and _NOISE.search(name):
                module.__dict__[name] = 0.0


_REPLACED = ".original_module"  # what PEFT keeps beside the copy that it trains


def _run(model: nn.Module, inputs: dict[str, Any], tp_size: int, rules: PlanLike) -> tuple[str, ...]:
    """Forward and backward, unsharded. Raises where they do not give finite numbers.

    Returns:
        The planned modules that did not run, numbers as `*`.
    """
    plan = _resolved(model, tp_size, rules)
    planned = {name: model.get_submodule(name) for name in _planned(plan) if not name.endswith(_REPLACED)}
    ran: set[int] = set()
    hooks = [
        module.register_forward_pre_hook(lambda module, *_: ran.add(id(module)), with_kwargs=True)
        for module in planned.values()
    ]
    torch.manual_seed(SEED + 3)
    output = model.train()(**copy.deepcopy(inputs))
    for hook in hooks:
        hook.remove()
    loss = getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        terms = [(tensor.float() ** 2).mean() for tensor in _floating(output)]
        if not terms:
            raise ValueError("nothing in its output depends on its parameters")
        loss = torch.stack(terms).sum()
    loss.sum().backward()
    if not loss.isfinite().all():
        raise ArithmeticError("the loss is not finite")
    missed = set()
    for name, module in planned.items():
        gradients = [param.grad for param in module.parameters() if param.grad is not None]
        if not all(gradient.isfinite().all() for gradient in gradients):
            raise ArithmeticError(f"a gradient of `{name}` is not finite")
        if id(module) not in ran and not gradients:
            missed.add(wildcards(name))
    return tuple(sorted(missed))


def _floating(output: Any) -> Iterator[Tensor]:
    """The floating tensors in an output that depend on the parameters."""
    if isinstance(output, Tensor):
        if output.is_floating_point() and output.requires_grad:
            yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _floating(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from _floating(value)


def _said(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"
