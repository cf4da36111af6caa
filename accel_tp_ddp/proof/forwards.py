"""Forwards that a program has put in the place of a model's own, taken over by the small model that stands for it."""

from __future__ import annotations

from collections.abc import Callable
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import nn

from ..styles.forward import call_behind

__all__ = ["take_over_forwards"]


def take_over_forwards(full: nn.Module, small: nn.Module) -> None:
    """Give modules of `small` the forwards that were set on the modules of the same names in `full`.

    What such a function holds of the full model, as in its closure, is replaced by what the small one has there:
    modules, their methods and configs. Everything else is shared.
    """
    own = dict(small.named_modules())
    known: dict[int, Any] = {}
    for name, module in full.named_modules():
        if name in own:
            known[id(module)] = own[name]
            if (config := getattr(module, "config", None)) is not None:
                known.setdefault(id(config), getattr(own[name], "config", config))
    for name, module in full.named_modules():
        forward = module.__dict__.get("forward")
        if forward is not None and name in own and call_behind(forward) is None:
            own[name].forward = _taken_over(forward, known)


def _taken_over(value: Any, known: dict[int, Any]) -> Any:
    if id(value) in known:
        return known[id(value)]
    if isinstance(value, MethodType):
        return MethodType(_taken_over(value.__func__, known), _taken_over(value.__self__, known))
    if isinstance(value, FunctionType) and value.__closure__:
        return _function(value, known)
    return value


def _function(function: FunctionType, known: dict[int, Any]) -> Callable:
    cells = tuple(CellType() for _ in function.__closure__ or ())
    taken = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, cells)
    known[id(function)] = taken  # before what it closes over, which may be itself
    taken.__kwdefaults__ = function.__kwdefaults__
    taken.__qualname__, taken.__module__ = function.__qualname__, function.__module__
    taken.__dict__.update(function.__dict__)
    for own, cell in zip(cells, function.__closure__ or ()):
        try:
            own.cell_contents = _taken_over(cell.cell_contents, known)
        except ValueError:  # an empty cell
            continue
    return taken
