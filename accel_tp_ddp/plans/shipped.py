"""The plans that this package ships, as data by family of architectures, and whether they fit a model.

`data/FAMILY.yaml` has the rules of the model type of that name, or of those that `data/families.yaml` lists for it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from ..core.errors import PlanError
from ..styles.registry import style_label
from .names import Names, unmarked
from .rules import inside, parts_of

__all__ = ["ShippedPlan", "check_shipped", "model_types", "read_shipped", "shipped_plans"]

_DATA = Path(__file__).parent / "data"


@dataclass(frozen=True)
class ShippedPlan:
    """This package's rules for a model, or for a model inside it.

    Attributes:
        model_type: Whose rules they are.
        part: Name of the model inside; "" for the outermost.
        kind: Its class.
        own: Styles by names in the part, with the marks of the data.
    """

    model_type: str
    part: str
    kind: type[nn.Module]
    own: dict[str, Any]

    @property
    def rules(self) -> dict[str, Any]:
        """Styles by names in the whole model."""
        return inside(self.part, self.own)


def shipped_plans(model: nn.Module) -> list[ShippedPlan]:
    """This package's own rules for the architecture, by names in `model`.

    A model type without such rules has those of the type which the model's class was written for.

    A model may be made of models, as one for images and text is: each has a config of its own, and the plan that this
    package ships for it. First the plan of the outermost, then those of its parts, the outer before the inner.
    """
    plans = []
    for name, part in parts_of(model):
        config = getattr(part, "config", None)
        for model_type in _model_types(part, config):
            if rules := read_shipped(model_type):
                plans.append(ShippedPlan(model_type, name, type(part), _where_it_holds(rules, config)))
                break
    return plans


def _model_types(part: nn.Module, config: Any) -> list[str]:
    """The config's own model type, and that of the class: transformers runs some models with the code of another."""
    kinds = (config, getattr(type(part), "config_class", None))
    return [kind.model_type for kind in kinds if isinstance(getattr(kind, "model_type", None), str)]


def check_shipped(names: Names, plans: list[ShippedPlan], given: Iterable[str], tp_size: int) -> None:
    """Raise for rules of this package that match nothing, though the data does not say that this may be.

    A model and the one inside it that it puts a head on have the same rules, which have to match in either. A rule of
    the user by the same name stands in for this package's.
    """
    given = {unmarked(rule) for rule in given}
    for plan, parts in _by_outermost(plans):
        missing = {}
        for rule, style in plan.own.items():
            spellings = [f"{part}.{rule}" if part else rule for part in parts]
            found = any(names.match(spelling) or unmarked(spelling) in given for spelling in spellings)
            if not found and not all(names.may_be_missing(spelling) for spelling in spellings):
                missing[unmarked(spellings[0])] = style
        if missing:
            raise _misfit(names, plan, missing, tp_size)


def _by_outermost(plans: list[ShippedPlan]) -> Iterator[tuple[ShippedPlan, list[str]]]:
    """Each plan but those of a part whose model type is that of a model around it; the names of that and these."""
    left = list(plans)
    while left:
        plan, before = left[0], f"{left[0].part}." if left[0].part else ""
        same = [other for other in left if other.model_type == plan.model_type and other.part.startswith(before)]
        same = [plan, *(other for other in same if other is not plan)]
        left = [other for other in left if other not in same]
        yield plan, [other.part for other in same]


def _misfit(names: Names, plan: ShippedPlan, missing: Mapping[str, Any], tp_size: int) -> PlanError:
    library = plan.kind.__module__.partition(".")[0]
    version = getattr(sys.modules.get(library), "__version__", None)
    rules = ", ".join(f"`{rule}: {style_label(style)}`" for rule, style in missing.items())
    first = next(iter(missing))
    return PlanError(
        f"tensor-parallel plan: this package's plan for the model type `{plan.model_type}` does not fit "
        f"{plan.kind.__name__}{f' of {library} {version}' if version else ''} (tp_size={tp_size}): "
        f"{rules} {'matches' if len(missing) == 1 else 'match'} no module or parameter.{names.nearest(first)} "
        "That leaves layers unsharded, perhaps with wrong gradients: an error of this package. Install a version "
        f"of {library} that the plan was written for, or say in tp_plan what holds instead: rules for the names that "
        f'there are, and a marked one for each that there is not, as `tp_plan={{"{first}?": "replicate"}}`.'
    )


@cache
def model_types() -> dict[str, str]:
    """Every model type that this package ships a plan for, and the file in `data` that has it."""
    families = _read_data("families")
    named = {path.stem for path in _DATA.glob("*.yaml")} - {"families"} - families.keys()
    result = {name: name for name in sorted(named)}
    for family, types in families.items():
        if not isinstance(types, list):
            raise _malformed("families", f"{family}: {types!r} is no list of model types")
        for model_type in types:
            if model_type in result:
                raise _malformed("families", f"{model_type} is in {family} and in {result[model_type]}")
            result[model_type] = family
    return result


@cache
def read_shipped(model_type: str) -> dict[str, Any]:
    """The rules for a model type, those that hold under a condition in a mapping of their own: `if FIELD`."""
    family = model_types().get(model_type)
    return _read_family(family) if family else {}


def _read_family(family: str, within: tuple[str, ...] = ()) -> dict[str, Any]:
    """The rules in a file, and those of the one that it extends, unless it repeats them."""
    data = _read_data(family)
    base = data.pop("extends", None)
    if base is None:
        return _flat(family, data)
    if base in (family, *within):
        raise _malformed(family, "it extends itself")
    rules = _read_family(base, (family, *within))
    own = _flat(family, data)
    for condition, further in own.items():
        if isinstance(further, Mapping):
            own[condition] = _with(rules.get(condition, {}), further)
    return _with(rules, own)


def _flat(family: str, block: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Rules by full names: those in a block have its name in front, and conditions stand outside all blocks."""
    flat: dict[str, Any] = {}
    for name, value in block.items():
        if isinstance(name, str) and isinstance(value, str):
            flat[before + name] = value
        elif not isinstance(name, str) or not isinstance(value, Mapping) or not value:
            raise _malformed(family, f"{before}{name}: {value!r} is no rule")
        elif name.startswith("if "):
            flat.setdefault(name, {}).update(_flat(family, value, before))
        else:
            for inner, style in _flat(family, value, f"{before}{name}.").items():
                if isinstance(style, Mapping):
                    flat.setdefault(inner, {}).update(style)
                else:
                    flat[inner] = style
    return flat


def _where_it_holds(rules: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """The rules for this config: those under `if FIELD:` only where it is set, in the place of others they repeat.

    Those under `if not FIELD:` hold where it is not set.
    """
    result = {rule: style for rule, style in rules.items() if not isinstance(style, Mapping)}
    for condition, further in rules.items():
        if isinstance(further, Mapping):
            *negated, field = condition.removeprefix("if ").split()
            if bool(getattr(config, field, None)) is not bool(negated):
                result = _with(result, further)
    return result


def _with(rules: Mapping[str, Any], further: Mapping[str, Any]) -> dict[str, Any]:
    """`rules` and `further`, which stand in for those of the same name, marked or not."""
    repeated = {unmarked(rule) for rule in further}
    return {**{rule: style for rule, style in rules.items() if unmarked(rule) not in repeated}, **further}


def _read_data(name: str) -> dict[str, Any]:
    path = _DATA / f"{name}.yaml"
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise _malformed(name, str(error)) from error
    if not isinstance(data, dict) or not data:
        raise _malformed(name, "it holds no mapping")
    return data


def _malformed(name: str, why: str) -> PlanError:
    return PlanError(f"tensor-parallel plan: {_DATA / name}.yaml, a file of this package, is malformed: {why}.")
