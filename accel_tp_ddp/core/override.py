"""One way to put a function of this package in the place of one of somebody else's.

A row of a table names what is replaced, the function that takes its place, and why. That function is called as

    function(*context, stock, owner, /, *args, **kwargs)

with what `install` was given as context, what was there before, ready to be called as `stock(*args, **kwargs)`, and
the object whose method it is; a function of a module, or a static method, has no owner. What stands before the `/` is
ours, what follows is upstream's. A property is a method without arguments.

Upstream changes with every release. Whatever is put in place is compared with what it was written for (`upstream`):
something that is not there any more is said once, or is an error where going on without it would be silently wrong; a
function with another signature is said once, and is an error where it is called.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from types import ClassMethodDescriptorType, MethodType, ModuleType
from typing import Any

from .errors import UpstreamError
from .upstream import Gone, NotLoaded, find_owner, installed_version, is_released, mismatch

__all__ = [
    "Override",
    "Refusal",
    "attributes",
    "check",
    "install",
    "install_for_all",
    "overridden",
    "stock_of",
    "uninstall",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Override:
    """One function of another package that is replaced.

    Attributes:
        owner: Import path of the class or module that has it.
        name: Its name there.
        function: What takes its place, called as the module says.
        place: Where it stands upstream, and in which release.
        reason: What it would do wrong, in one line.
        needs: Names that the replaced function has to use, since the one in its place works by what they find.
        since: The first release that has it, where an earlier one does without.
        counts: Whether training, or what is written, would be silently wrong if it were called otherwise upstream.
    """

    owner: str
    name: str
    function: Callable[..., Any]
    place: str
    reason: str
    needs: tuple[str, ...] = ()
    since: str = ""
    counts: bool = True

    @property
    def package(self) -> str:
        """What it is imported from."""
        return self.owner.partition(".")[0]

    def upstream(self) -> Any:
        """The class or module; imported, if need be."""
        return pkgutil.resolve_name(self.owner)

    def is_loaded(self) -> bool:
        """Whether the owner has been imported, and has the function."""
        try:
            return hasattr(find_owner(self.owner), self.name)
        except LookupError:
            return False

    def problem(self) -> str | None:
        """What is wrong with it upstream, as far as that has been imported; None if it is as it was."""
        try:
            owner = find_owner(self.owner)
        except NotLoaded:
            return None
        except Gone as gone:
            return self._unless_later(f"there is no `{gone}`")
        if not hasattr(owner, self.name):
            return self._unless_later(f"there is no `{self.owner}.{self.name}`")
        found = mismatch(owner, self.name, self.function, self.needs)
        return found and f"`{self.owner}.{self.name}` {found}"

    def _unless_later(self, problem: str) -> str | None:
        return None if self.since and not is_released(self.package, self.since) else problem


@dataclass(frozen=True)
class Refusal:
    """A function for a row: the call is an error."""

    message: str

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError(self.message)


class Overridden:
    """What stands in the place of one object's method; no bound function, so that it is copied and pickled with it."""

    refusal: str | None = None

    def __init__(self, row: Override, owner: Any, context: tuple[Any, ...], before: Callable | None):
        self.function = row.function
        self.refusal = _refusal(row)
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
        if self.refusal is not None:
            raise UpstreamError(self.refusal)
        return self.function(*self.context, self.stock, self.owner, *args, **kwargs)


def check(rows: Iterable[Override]) -> None:
    """Compare `rows` with what has been imported, and say on the main process what is not as it was, once.

    Raises:
        UpstreamError: If something is not there without which going on would be silently wrong.
    """
    wrong = {row: problem for row in rows if (problem := row.problem()) is not None}
    missing = {row: problem for row, problem in wrong.items() if row.counts and not row.is_loaded()}
    if missing:
        raise UpstreamError(" ".join(_lines(missing)))
    for line in _lines({row: problem for row, problem in wrong.items() if problem not in _SAID}):
        if int(os.environ.get("RANK", "0")) == 0:
            logger.warning("%s", line)
    _SAID.update(wrong.values())


_SAID: set[str] = set()
_MOST = 3  # that are named in one line


def _lines(wrong: dict[Override, str]) -> list[str]:
    """One for each package."""
    lines = []
    for package in dict.fromkeys(row.package for row in wrong):
        own = {row: problem for row, problem in wrong.items() if row.package == package}
        effects: dict[str, str] = {}  # two rows may be of one module that has gone
        for row, problem in own.items():
            effects.setdefault(problem, row.reason)
        named = [f"{problem} (which, unless it is replaced, {reason})" for problem, reason in effects.items()]
        more = [f"{len(named) - _MOST} more (see `accel-tp-ddp overrides`)"] if len(named) > _MOST else []
        releases = ", ".join(dict.fromkeys(row.place.partition(",")[0] for row in own))
        lines.append(
            f"{package} {installed_version(package)} is not as accel_tp_ddp knows it, which was written for "
            f"{releases}: {'; '.join([*named[:_MOST], *more])}. Install that release, or a newer accel_tp_ddp."
        )
    return lines


def _refusal(row: Override) -> str | None:
    """What a call has to raise instead, if upstream's function is another by now."""
    problem = row.problem() if row.is_loaded() else None
    return _lines({row: problem})[0] if problem is not None else None


def install(owner: Any, rows: Iterable[Override], *context: Any) -> None:
    """Replace methods of one object: those of `rows` that its class has.

    Raises:
        UpstreamError: As `check` does, of an object that is upstream's.
    """
    for row in rows:
        if callable(getattr(type(owner), row.name, None)):
            before = vars(owner).get(row.name)
            if isinstance(before, Overridden) and before.function == row.function:
                before = before.before
            vars(owner)[row.name] = Overridden(row, owner, context, before)
        elif _is_upstreams(owner, row):
            check((row,))


def _is_upstreams(owner: Any, row: Override) -> bool:
    """Whether an object is of the class that a row names; others may do without what that has."""
    try:
        return isinstance(owner, find_owner(row.owner))
    except LookupError:
        return False


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
    """Replace methods of classes, once, for those objects that `context_of` finds a context for; or those classes,
    of class methods.

    Rows of classes that have not been imported yet are passed over.

    Raises:
        UpstreamError: As `check` does.
    """
    rows = tuple(rows)
    check(rows)
    for row in rows:
        if row.is_loaded():
            owner = row.upstream()
            found = inspect.getattr_static(owner, row.name)
            inside = getattr(found, "fget", getattr(found, "__func__", found))
            if row.name not in vars(owner) or getattr(inside, "row", None) != row:
                # torch's `Function.apply` is written in Python, or in C as of 2.14.
                of_class = isinstance(found, (classmethod, ClassMethodDescriptorType))
                method = _method(row, _of_class(found) if of_class else found, context_of)
                setattr(owner, row.name, classmethod(method) if of_class else method)


def _of_class(found: Any) -> Callable:
    """A class method as a function of the class."""
    if isinstance(found, classmethod):
        return found.__func__

    @functools.wraps(found)
    def function(owner: type, *args: Any, **kwargs: Any) -> Any:
        return found.__get__(None, owner)(*args, **kwargs)

    return function


@contextmanager
def overridden(rows: Iterable[Override], *context: Any) -> Iterator[None]:
    """Within the block, replace functions of modules, and methods of classes, for everybody.

    Raises:
        UpstreamError: If one of them is not there, or has another signature.
    """
    rows = tuple(rows)
    wrong = {row: problem for row in rows if (problem := _problem_of(row)) is not None}
    if wrong:
        raise UpstreamError(" ".join(_lines(wrong)))
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


def _problem_of(row: Override) -> str | None:
    """As `problem`, of what is used now: it has to be there in whatever release."""
    with suppress(ImportError, AttributeError):
        row.upstream()
    missing = f"there is no `{row.owner}.{row.name}`" if not row.is_loaded() else None
    return row.problem() or missing


def _function(row: Override, stock: Callable, context: tuple[Any, ...]) -> Callable:
    return functools.wraps(stock)(functools.partial(row.function, *context, stock))


def _method(row: Override, found: Any, context_of: Callable[[Any], tuple[Any, ...] | None]) -> Any:
    stock: Callable = found.__get__ if isinstance(found, property) else found
    refusal = _refusal(row)

    @functools.wraps(getattr(found, "fget", found))
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        context = context_of(self)
        if context is None:
            return stock(self, *args, **kwargs)
        if refusal is not None:
            raise UpstreamError(refusal)
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
