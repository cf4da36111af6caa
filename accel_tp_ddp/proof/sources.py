"""The Python files whose code a model runs, by what they hold: equal code is equal, whatever its version says."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from functools import lru_cache
from hashlib import blake2b
from pathlib import PurePath
from types import CodeType, FunctionType, ModuleType
from typing import Any

__all__ = ["UNKNOWN", "Sources"]

#: Begins the rows of what cannot be told apart from other things of its kind.
UNKNOWN = "unknown: "

_NOT_FOLLOWED = {*sys.stdlib_module_names, "torch", "accel_tp_ddp"} - {"__main__"}
_PLAIN = (bool, int, float, str, type(None))
_SWITCHES = (bool, str, type(None))
_digests: dict[str, tuple[tuple[int, int], str]] = {}


class Sources:
    """Collects the files of classes, of the functions in them, and of what those files name at their top.

    A file of an installed package is taken with the files of the functions and classes that it names; one of the
    user's own (a script, a checkout, code that came with a model) with all that can be reached so, as any of it may
    change at any time. Files that only bases come from, such as that of a library's class of all models, are taken
    alone. What is imported within a function is not found.

    The user's own count as they were loaded, too: a file that was edited since is not what runs.
    """

    def __init__(self) -> None:
        # Dictionaries of modules by their identity: two of one name may have been loaded one after the other.
        self._modules: dict[int, Mapping[str, Any]] = {}
        self._followed: set[int] = set()
        self._classes: set[type] = set()

    def add_class(self, kind: type) -> None:
        for base in kind.__mro__:
            if base in self._classes and base is not kind:
                continue
            self._classes.add(base)
            module = _module_of(base)
            self._add(module, follow=base is kind or _is_own(module))
            for value in vars(base).values():
                for function in _functions(value):
                    self._add(function.__globals__, follow=False)

    def add_function(self, function: Any) -> None:
        for inner in _functions(function):
            self._add(inner.__globals__, follow=True)

    def rows(self) -> Iterator[str]:
        for module in self._modules.values():
            name, file = module["__name__"], module.get("__file__")
            found = _digest(file) if file is not None else None
            if found is None:
                yield f"{UNKNOWN}{name} has no source file"
            else:
                yield f"source {spelled(name)} {found}"
            if _is_own(module):
                yield f"loaded {spelled(name)} {_loaded(module)}"
        for kind in self._classes:
            if id(module := _module_of(kind)) in self._modules and _is_own(module):
                yield f"loaded {class_name(kind)} {digest(_sorted_lines(_class_texts(kind, module)))}"

    def _add(self, module: Mapping[str, Any], follow: bool) -> None:
        if not _counts(module):
            return
        self._modules[id(module)] = module
        if not follow or id(module) in self._followed:
            return
        self._followed.add(id(module))
        for inner in _named(module):
            if _counts(inner):
                self._add(inner, follow=_is_own(module) and _is_own(inner))


def spelled(name: str) -> str:
    """A module's name, without where it lies where that is the user's affair."""
    module = _module(name)
    if not _counts(module) or module.get("__file__") is None or not _is_own(module):
        return name
    return name.rpartition(".")[2].removeprefix("__mp_main__") or "__main__"


def class_name(kind: type) -> str:
    return f"{spelled(kind.__module__)}.{kind.__qualname__}"


def _module(name: str) -> Mapping[str, Any]:
    module = sys.modules.get(name)
    return vars(module) if module is not None else {"__name__": name}


def _module_of(kind: type) -> Mapping[str, Any]:
    for value in vars(kind).values():
        for function in _functions(value):
            if function.__globals__.get("__name__") == kind.__module__:
                return function.__globals__
    return _module(kind.__module__)


def _counts(module: Mapping[str, Any]) -> bool:
    return module.get("__name__", "builtins").partition(".")[0] not in _NOT_FOLLOWED


def _is_own(module: Mapping[str, Any]) -> bool:
    """Whether it is the user's own, and of no installed package."""
    return not _installed(module.get("__file__") or "")


@lru_cache(maxsize=10_000)
def _installed(file: str) -> bool:
    return not {"site-packages", "dist-packages"}.isdisjoint(PurePath(file).parts)


def _functions(value: Any) -> Iterator[FunctionType]:
    """The Python functions in what a class or module holds, those inside of decorated ones too."""
    if isinstance(value, (classmethod, staticmethod)):
        value = value.__func__
    elif isinstance(value, property):
        value = value.fget
    while isinstance(value, FunctionType):
        yield value
        value = value.__dict__.get("__wrapped__")


def _named(module: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The modules that functions, classes and tables of them come from that a module names at its top."""
    own = module["__name__"].partition(".")[0]
    for value in list(module.values()):
        if isinstance(value, ModuleType):
            file = getattr(value, "__file__", None)
            if value.__name__.partition(".")[0] == own or file is not None and _is_own(vars(value)):
                yield vars(value)
        else:
            yield from _home(value)
            for table in _tables(value):
                for inner in list(table.values()):
                    yield from _home(inner)


def _home(value: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(value, type):
        yield _module_of(value)
    else:
        for function in _functions(value):
            yield function.__globals__


def _tables(value: Any) -> Iterable[dict]:
    """The plain dicts of a table such as a registry of functions; nothing of the table's own code is run."""
    if type(value) is dict:
        return [value]
    if isinstance(value, MutableMapping) and not isinstance(value, dict):
        return [held for part in (value, type(value)) for held in vars(part).values() if type(held) is dict]
    return []


def _loaded(module: Mapping[str, Any]) -> str:
    """Of the code of a module's functions and methods, and of its constants."""
    cells: list[str] = []
    for name, value in list(module.items()):
        if isinstance(value, type) and value.__module__ == module["__name__"]:
            cells += _class_texts(value, module)
        else:
            cells += _texts(name, name, value, module)
    return digest(_sorted_lines(cells))


def _class_texts(kind: type, module: Mapping[str, Any]) -> Iterator[str]:
    for key, held in vars(kind).items():
        yield from _texts(f"{kind.__qualname__}.{key}", key, held, module)


def _sorted_lines(cells: Iterable[str]) -> str:
    return "\n".join(sorted(cells))


def _texts(name: str, key: str, value: Any, module: Mapping[str, Any]) -> Iterator[str]:
    """Constants are those that are spelled so, and a class's switches: other values may be counters."""
    if isinstance(value, _PLAIN) and (key.isupper() or name != key and key[:2] != "__" and type(value) in _SWITCHES):
        yield f"{name} {value!r}"
    for function in _functions(value):
        if function.__globals__ is module:
            defaults = [each for each in function.__defaults__ or () if isinstance(each, _PLAIN)]
            yield f"{name} {_code(function.__code__)} {defaults}"


def _code(code: CodeType) -> str:
    held = [_code(each) if isinstance(each, CodeType) else _constant(each) for each in code.co_consts]
    return digest("\n".join([code.co_code.hex(), *code.co_names, *held]))


def _constant(value: Any) -> str:
    return str(sorted(map(repr, value))) if isinstance(value, frozenset) else repr(value)


def _digest(file: str) -> str | None:
    """Of the file's bytes; None if it cannot be read. Read again only when it has changed."""
    try:
        found = os.stat(file)
        key = (found.st_mtime_ns, found.st_size)
        known = _digests.get(file)
        if known is None or known[0] != key:
            with open(file, "rb") as opened:
                known = _digests[file] = (key, digest(opened.read()))
    except OSError:
        return None
    return known[1]


def digest(text: bytes | str) -> str:
    return blake2b(text.encode() if isinstance(text, str) else text, digest_size=16).hexdigest()
