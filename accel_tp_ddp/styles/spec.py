"""How a plan spells a style: `name`, `name(argument, key=value)`, and several of a module joined by ` + `."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Spelled", "build", "parse"]

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
    try:
        call = ast.parse(text, mode="eval").body
    except SyntaxError as error:
        raise ValueError(_reason(text, error)) from error
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
        raise ValueError(_no_style(text))
    kwargs: dict[str, Any] = {}
    for keyword in call.keywords:
        if keyword.arg is None:
            raise ValueError(_no_argument("**"))
        if keyword.arg in kwargs:
            raise ValueError(f"`{keyword.arg}` is given twice")
        kwargs[keyword.arg] = _value(text, keyword.value)
    return Spelled(call.func.id, True, tuple(_value(text, node) for node in call.args), kwargs)


def _value(text: str, node: ast.expr) -> int | str | bool:
    word = ast.get_source_segment(text, node) or ""
    if word.removeprefix("-").isdigit():
        return int(word)
    if not word.isidentifier():
        raise ValueError(_no_argument(word))
    return _WORDS.get(word, word)


def _reason(text: str, error: SyntaxError) -> str:
    if "follows keyword argument" in error.msg:
        return f"an argument of `{text}` stands behind a name=value"
    start, stop = (error.offset or 0) - 1, (error.end_offset or 0) - 1
    inside = text.endswith(")") and 0 < text.find("(") < start < stop
    return _no_argument(text[start:stop]) if inside else _no_style(text)


def _no_argument(word: str) -> str:
    return f"`{word}` is no name, number or name=value"


def _no_style(text: str) -> str:
    return f"`{text}` is no style's name, with or without arguments in parentheses"


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
