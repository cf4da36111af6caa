"""How a plan spells a style: `name`, `name(argument, key=value)`, and several of a module joined by ` + `."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Spelled", "build", "parse"]

_NO_ARGUMENT = "is no name, number or name=value"
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
    return [_part(text.strip()) for text in value.split("+")]


def _part(text: str) -> Spelled:
    if text.isidentifier():
        return Spelled(text)
    refused = f"`{text}` is no style's name, with or without arguments in parentheses"
    try:
        call = ast.parse(text, mode="eval").body
    except SyntaxError as error:
        start, stop = (error.offset or 0) - 1, (error.end_offset or 0) - 1
        if "follows keyword argument" in error.msg:
            refused = f"an argument of `{text}` stands behind a name=value"
        elif text.endswith(")") and 0 < text.find("(") < start < stop:
            refused = f"`{text[start:stop]}` {_NO_ARGUMENT}"
        raise ValueError(refused) from error
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
        raise ValueError(refused)
    kwargs: dict[str, Any] = {}
    for keyword in call.keywords:
        if keyword.arg is None or keyword.arg in kwargs:
            raise ValueError(f"`{keyword.arg}` is given twice" if keyword.arg else f"`**` {_NO_ARGUMENT}")
        kwargs[keyword.arg] = _value(text, keyword.value)
    return Spelled(call.func.id, True, tuple(_value(text, node) for node in call.args), kwargs)


def _value(text: str, node: ast.expr) -> int | str | bool:
    word = ast.get_source_segment(text, node) or ""
    if word.removeprefix("-").isdigit():
        return int(word)
    if not word.isidentifier():
        raise ValueError(f"`{word}` {_NO_ARGUMENT}")
    return _WORDS.get(word, word)


def build(style: Callable[..., Any], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
    """`style(*args, **kwargs)`, its arguments checked by the annotations int and str.

    Raises:
        ValueError: If they do not fit.
    """
    signature = inspect.signature(style, eval_str=True)
    try:
        bound = signature.bind(*args, **(kwargs or {}))
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
