"""One way to put a function of this package in the place of one of somebody else's.

A row of a table names what is replaced, the function that takes its place, and why. That function is called as

    function(*context, stock, owner, /, *args, **kwargs)

with what `install` was given as context, what was there before, ready to be called as `stock(*args, **kwargs)`, and
the object whose method it is; a function of a module, or a static method, has no owner. What stands before the `/` is
ours, what follows is upstream's. A property is a method without arguments.
"""

from __future__ import annotations

import functools
import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import MethodType, ModuleType
from typing import Any

__all__ = ["Override", "Refusal", "attributes", "install", "install_for_all", "overridden", "stock_of", "uninstall"]


@dataclass(frozen=True)
class Override:
    """One function of another package that is replaced.

    Attributes:
        owner: Import path of the class or module that has it.
        name: Its name there.
        function: What takes its place, called as the module says.
        place: Where it stands upstream, and in which release.
        reason: What it would do wrong, in one line.
    """

    owner: str
    name: str
    function: Callable[..., Any]
    place: str
    reason: str

    def upstream(self) -> Any:
        """The class or module; imported, if need be."""
        return pkgutil.resolve_name(self.owner)

    def is_loaded(self) -> bool:
        """Whether the owner has been imported, and has the function."""
        module, _, name = self.owner.rpartition(".")
        owner = sys.modules.get(self.owner) or getattr(sys.modules.get(module), name, None)
        return hasattr(owner, self.name)


@dataclass(frozen=True)
class Refusal:
    """A function for a row: the call is an error."""

    message: str

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError(self.message)


class Overridden:
    """What stands in the place of one object's method; no bound function, so that it is copied and pickled with it."""

    def __init__(self, row: Override, owner: Any, context: tuple[Any, ...], before: Callable | None):
        self.function = row.function
        self.__name__ = row.name
        self.owner = owner
        self.context = context
        self.before = before  # what the object itself had there already

    @property
    def stock(self) -> Callable:
        if self.before is not None:
            return self.before
        return MethodType(getattr(type(self.owner), self.__name__), self.owner)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.stock)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*self.context, self.stock, self.owner, *args, **kwargs)


def install(owner: Any, rows: Iterable[Override], *context: Any) -> None:
    """Replace methods of one object: those of `rows` that its class has."""
    for row in rows:
        if callable(getattr(type(owner), row.name, None)):
            before = vars(owner).get(row.name)
            if isinstance(before, Overridden) and before.function == row.function:
                before = before.before
            vars(owner)[row.name] = Overridden(row, owner, context, before)


def uninstall(owner: Any, rows: Iterable[Override]) -> None:
    """Give one object back what `install` has replaced."""
    for row in rows:
        found = vars(owner).get(row.name)
        if isinstance(found, Overridden) and found.function == row.function:
            del vars(owner)[row.name]
            if found.before is not None:
                vars(owner)[row.name] = found.before


def stock_of(owner: Any, name: str) -> Callable:
    """What an object, a class or a module had before."""
    found = vars(owner)[name]
    return found.stock if isinstance(found, Overridden) else found.__wrapped__


def install_for_all(rows: Iterable[Override], context_of: Callable[[Any], tuple[Any, ...] | None]) -> None:
    """Replace methods of classes, once, for those objects that `context_of` finds a context for.

    Rows of classes that have not been imported yet, or that do not have the method, are passed over.
    """
    for row in rows:
        if row.is_loaded():
            owner = row.upstream()
            found = inspect.getattr_static(owner, row.name)
            if row.name not in vars(owner) or getattr(getattr(found, "fget", found), "row", None) != row:
                setattr(owner, row.name, _method(row, found, context_of))


@contextmanager
def overridden(rows: Iterable[Override], *context: Any) -> Iterator[None]:
    """Within the block, replace functions of modules, and methods of classes, for everybody."""
    with ExitStack() as stack:
        for row in rows:
            owner = row.upstream()
            stock = inspect.getattr_static(owner, row.name)
            if isinstance(owner, ModuleType):
                replacement: Any = _function(row, stock, context)
            elif isinstance(stock, staticmethod):
                replacement = staticmethod(_function(row, stock.__func__, context))
            else:
                replacement = _method(row, stock, lambda _: context)
            stack.enter_context(attributes(owner, **{row.name: replacement}))
        yield


def _function(row: Override, stock: Callable, context: tuple[Any, ...]) -> Callable:
    return functools.wraps(stock)(functools.partial(row.function, *context, stock))


def _method(row: Override, found: Any, context_of: Callable[[Any], tuple[Any, ...] | None]) -> Any:
    stock: Callable = found.__get__ if isinstance(found, property) else found

    @functools.wraps(getattr(found, "fget", found))
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        context = context_of(self)
        if context is None:
            return stock(self, *args, **kwargs)
        return row.function(*context, functools.partial(stock, self), self, *args, **kwargs)

    vars(method)["row"] = row
    return property(method) if isinstance(found, property) else method


_MISSING = object()


@contextmanager
def attributes(owner: Any, **values: Any) -> Iterator[None]:
    """Within the block, let an object, class or module have these attributes of its own."""
    before = {name: vars(owner).get(name, _MISSING) for name in values}
    try:
        for name, value in values.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in before.items():
            if value is _MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, value)
