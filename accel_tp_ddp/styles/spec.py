"""How a plan spells a style: `name`, `name(argument, key=value)`, and several of a module joined by ` + `."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Spelled", "build", "parse"]

_PART = re.compile(r"\s*(?P<name>[A-Za-z_]\w*)\s*(?:\((?P<arguments>[^()]*)\))?\s*")
_ARGUMENT = re.compile(r"\s*(?:(?P<key>[A-Za-z_]\w*)\s*=)?\s*(?P<value>-?\d+|[A-Za-z_]\w*)\s*")
_WORDS = {"true": True, "True": True, "false": False, "False": False}


@dataclass(frozen=True)
class Spelled:
    """One style of a plan's value. `called`: whether it was written with parentheses."""

    name: str
    called: bool = False
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


def parse(value: str) -> list[Spelled]:
    """The styles that a plan's value names.

    Raises:
        ValueError: If it is not spelled as this file's first line says, with the part that is not.
    """
    return [_part(text) for text in value.split("+")]


def _part(text: str) -> Spelled:
    match = _PART.fullmatch(text)
    if match is None:
        raise ValueError(f"`{text.strip()}` is no style's name, with or without arguments in parentheses")
    inside = match["arguments"]
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for argument in inside.split(",") if inside and inside.strip() else []:
        found = _ARGUMENT.fullmatch(argument)
        if found is None:
            raise ValueError(f"`{argument.strip()}` is no name, number or name=value")
        word = found["value"]
        value = int(word) if word.lstrip("-").isdigit() else _WORDS.get(word, word)
        if found["key"] is None:
            if kwargs:
                raise ValueError(f"`{argument.strip()}` stands behind a name=value")
            args.append(value)
        elif found["key"] in kwargs:
            raise ValueError(f"`{found['key']}` is given twice")
        else:
            kwargs[found["key"]] = value
    return Spelled(match["name"], inside is not None, tuple(args), kwargs)


def build(style: Callable[..., Any], spelled: Spelled) -> Any:
    """`style(*args, **kwargs)`, its arguments checked by the annotations int and str.

    Raises:
        ValueError: If they do not fit.
    """
    signature = inspect.signature(style, eval_str=True)
    try:
        bound = signature.bind(*spelled.args, **spelled.kwargs)
    except TypeError as error:
        raise ValueError(str(error)) from error
    for name, value in bound.arguments.items():
        parameter = signature.parameters[name]
        values = value if parameter.kind is parameter.VAR_POSITIONAL else (value,)
        for one in values:
            if parameter.annotation in (int, str) and type(one) is not parameter.annotation:
                kind = {int: "a number", str: "a name"}[parameter.annotation]
                raise ValueError(f"`{one}` is not {kind}")
    return style(*bound.args, **bound.kwargs)
