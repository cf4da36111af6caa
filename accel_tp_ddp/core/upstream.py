"""Whether what an override replaces is still there, with the signature that the override was written for.

Nothing about an upstream function is written down twice: what stands after the `/` of an override's own function are
upstream's parameters, and those have to be there, in the same places, and to be all that a caller must give.
"""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import PathFinder
from types import CodeType, ModuleType
from typing import Any

__all__ = ["Gone", "NotLoaded", "find_owner", "installed_version", "is_released", "mismatch", "release", "signature"]


class NotLoaded(LookupError):
    """What has not been imported yet."""


class Gone(LookupError):
    """What is not there, in a package that has been imported."""


def find_owner(path: str) -> Any:
    """The class or module of that import path, as far as it has been imported; no module is imported here.

    Raises:
        NotLoaded: If its module, or its package, has not been imported.
        Gone: If its package has been imported, and has no such module or class.
    """
    parts = path.split(".")
    loaded = next((n for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in sys.modules), 0)
    if not loaded:
        raise NotLoaded(path)
    found: Any = sys.modules[".".join(parts[:loaded])]
    left = parts[loaded:]
    if not left:
        return found
    if len(left) == 1 and left[0] in vars(found):
        return vars(found)[left[0]]
    where = getattr(found, "__path__", None)
    for n, part in enumerate(left):
        spec = PathFinder.find_spec(".".join(parts[: loaded + n + 1]), where) if where is not None else None
        if spec is None:
            if n == 0 and len(left) == 1:
                return _given_when_asked_for(found, path)
            if n == 0 or n < len(left) - 1:
                raise Gone(".".join(parts[: loaded + n + 1]))
            break  # a class of a module that is still to be imported
        where = spec.submodule_search_locations
    raise NotLoaded(path)


def _given_when_asked_for(module: Any, path: str) -> Any:
    """What a package imports once it is asked for, such as `vllm.LLM`."""
    try:
        return getattr(module, path.rpartition(".")[2])
    except (AttributeError, ImportError):
        raise Gone(path) from None


def mismatch(owner: Any, name: str, function: Callable[..., Any], needs: tuple[str, ...] = ()) -> str | None:
    """How `owner.name` differs from what `function` was written to replace; None if it does not.

    Args:
        owner: A class or module that has it.
        function: Takes upstream's parameters after its `/`. Without a `/` it is no replacement of a function.
        needs: Names that upstream's function, or one beside it that it calls, has to use: the replacement works by
            what they find.
    """
    return _mismatch(inspect.getattr_static(owner, name), owner, function, needs)


@functools.cache  # a model has thousands of modules
def _mismatch(found: Any, owner: Any, function: Callable[..., Any], needs: tuple[str, ...]) -> str | None:
    stock = found.fget if isinstance(found, property) else getattr(found, "__func__", found)
    ours = list(inspect.signature(function).parameters.values())
    if inspect.isfunction(function) and not any(p.kind is p.POSITIONAL_ONLY for p in ours):
        return None
    if not callable(stock):
        return "is no function"
    bound = inspect.isclass(owner) and not isinstance(found, staticmethod)
    theirs = list(signature(stock).parameters.values())[int(bound) :]
    missing = [need for need in needs if need not in _names(inspect.unwrap(stock), owner)]
    return _signatures([p for p in ours if p.kind is not p.POSITIONAL_ONLY], theirs) or (
        f"does not use `{missing[0]}`" if missing else None
    )


def signature(function: Callable[..., Any]) -> inspect.Signature:
    """`inspect.signature`; of a function in C that tells none, one that takes whatever it is given."""
    try:
        return inspect.signature(function)
    except ValueError:
        return inspect.signature(_takes_anything)


def _takes_anything(owner: Any, /, *args: Any, **kwargs: Any) -> None: ...


def _signatures(ours: list[inspect.Parameter], theirs: list[inspect.Parameter]) -> str | None:
    """The first parameter of `ours` that `theirs` lack or have elsewhere, or that `theirs` want and `ours` lack."""
    many = {p.kind for p in theirs}
    own_many = {p.kind for p in ours}
    places = [p.name for p in theirs if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    names = {p.name for p in theirs}
    for place, param in enumerate(p for p in ours if p.kind is p.POSITIONAL_OR_KEYWORD):
        if param.name not in names:
            if param.VAR_KEYWORD not in many:
                return f"takes no `{param.name}`"
        elif param.name not in places:
            return f"takes `{param.name}` by keyword only"
        elif places.index(param.name) != place:
            return f"takes `{param.name}` as argument {places.index(param.name) + 1}, not {place + 1}"
    for param in ours:
        if param.kind is param.KEYWORD_ONLY and param.name not in names and param.VAR_KEYWORD not in many:
            return f"takes no `{param.name}`"
    own = {p.name for p in ours}
    for param in theirs:
        if param.default is param.empty and param.name not in own and param.kind is not param.VAR_KEYWORD:
            by_position = param.kind in (param.POSITIONAL_ONLY, param.POSITIONAL_OR_KEYWORD)
            passed = param.VAR_POSITIONAL if by_position else param.VAR_KEYWORD
            if param.kind is not param.VAR_POSITIONAL and passed not in own_many:
                return f"wants `{param.name}`"
    return None


def _names(function: Callable[..., Any], owner: Any) -> set[str]:
    """Names that a function uses, and those that its fellows use which it names."""
    own = set(_names_in(getattr(function, "__code__", None)))
    fellows = (inspect.getattr_static(owner, name, None) for name in own)
    codes = (getattr(getattr(fellow, "__func__", fellow), "__code__", None) for fellow in fellows)
    return own.union(*map(_names_in, codes))


def _names_in(code: CodeType | None) -> Iterator[str]:
    if code is not None:
        yield from code.co_names
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                yield from _names_in(constant)


def installed_version(package: str) -> str:
    """The installed release of what is imported as `package`."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        module: ModuleType | None = sys.modules.get(package)
        return str(getattr(module, "__version__", "(of an unknown release)"))


def release(version: str) -> tuple[int, ...]:
    """The numbers of a version, to compare: `5.20.2` as (5, 20, 2)."""
    numbers = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, numbers[0].split("."))) if numbers else ()


def is_released(package: str, since: str) -> bool:
    """Whether the installed release of a package is `since`, or a later one."""
    return release(installed_version(package)) >= release(since)
