"""What is replaced upstream: each row names something that is there, and takes the arguments that it takes."""

import copy
import inspect
import json
import pickle
from importlib.util import find_spec
from pathlib import Path

import pytest

from accel_tp_ddp import cli
from accel_tp_ddp.core.override import (
    Override,
    Refusal,
    attributes,
    install,
    install_for_all,
    overridden,
    stock_of,
    uninstall,
)
from accel_tp_ddp.core.upstream import is_released, signature
from accel_tp_ddp.plugin.overrides import TABLES, as_markdown, as_rows
from accel_tp_ddp.plugin.replica_view import MODULES

from ..helpers.versions import needs_async_trainers


def marks_of(row):
    if row.since and find_spec(row.package) is not None and not is_released(row.package, row.since):
        return pytest.mark.skip(f"{row.package} has it since {row.since}")
    return needs_async_trainers if "async" in row.owner else ()


ROWS = [
    pytest.param(
        row,
        id=f"{table}: {row.name}",
        marks=marks_of(row),
    )
    for table, rows in TABLES.items()
    for row in rows
]
DOCS = Path(__file__).parents[2] / "docs" / "overrides.md"
OURS = inspect.Parameter.POSITIONAL_ONLY
MANY = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def upstream(row):
    package = row.owner.partition(".")[0]
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    found = getattr(row.upstream(), row.name)
    return getattr(found, "fget", found)


@pytest.mark.parametrize("row", ROWS)
def test_what_is_replaced_exists(row):
    assert callable(upstream(row)) or row in MODULES
    assert row.is_loaded() and row.reason and row.place.partition(" ")[0] == row.owner.partition(".")[0]


def arguments_taken(stock, function, bound):
    """The ways to call `stock` that `function` does not take: by position, and by name."""
    theirs = [p for p in signature(stock).parameters.values() if p.kind not in MANY][bound:]
    ours = inspect.signature(function)
    before = [None] * sum(p.kind is OURS for p in ours.parameters.values())
    by_position = [p.name for p in theirs if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    named = {p.name: None for p in theirs if p.kind is inspect.Parameter.KEYWORD_ONLY}
    ours.bind(*before, *[None] * len(by_position), **named)
    ours.bind(*before, **dict.fromkeys(by_position), **named)


@pytest.mark.parametrize("row", [each for each in ROWS if each.values[0] not in MODULES])
def test_a_replacement_takes_what_is_passed_upstream(row):
    stock, owner = upstream(row), row.upstream()
    is_method = inspect.isclass(owner) and not isinstance(inspect.getattr_static(owner, row.name), staticmethod)
    arguments_taken(stock, row.function, int(is_method))


def test_a_replacement_that_takes_less_is_noticed():
    with pytest.raises(TypeError):
        arguments_taken(lambda self, a, b: 0, lambda stock, owner, /, a: 0, 1)
    with pytest.raises(TypeError):
        arguments_taken(lambda self, a: 0, lambda stock, owner, /, b: 0, 1)


def test_the_list_in_the_docs_is_the_one_of_the_command(capsys):
    assert cli.main(["overrides"]) == 0
    printed = capsys.readouterr().out
    assert DOCS.read_text(encoding="utf-8") == printed == as_markdown() + "\n"
    assert cli.main(["overrides", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["overrides"]
    assert rows == as_rows() and len(rows) == len(ROWS) > 40


# --- how -------------------------------------------------------------------------------------------------------------


class Counter:
    def __init__(self):
        self.count = 1

    def add(self, number: int, times: int = 1) -> int:
        self.count += number * times
        return self.count

    @staticmethod
    def double(number: int) -> int:
        return 2 * number


def add_twice(factor, stock, owner, /, number, times=1):
    assert isinstance(owner, Counter)
    return stock(factor * number, times=times)


def triple(factor, stock, /, number):
    return stock(number) + factor


ADD = Override(f"{__name__}.Counter", "add", add_twice, "here", "adds once")
DOUBLE = Override(f"{__name__}.Counter", "double", triple, "here", "doubles")


def test_one_object_has_a_method_of_its_own():
    ours, other = Counter(), Counter()
    install(ours, (ADD, Override("nowhere", "is_not_there", add_twice, "", "")), 2)
    assert (ours.add(1), other.add(1), vars(ours).keys()) == (3, 2, {"count", "add"})
    assert inspect.signature(ours.add) == inspect.signature(other.add)
    assert stock_of(ours, "add")(1) == 4
    install(ours, (ADD,), 3)  # takes the place of the first
    assert ours.add(1) == 7
    uninstall(ours, (ADD,))
    assert vars(ours).keys() == {"count"}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda counter: pickle.loads(pickle.dumps(counter))])
def test_a_copy_has_the_method_too_and_works_on_itself(copied):
    ours = Counter()
    install(ours, (ADD,), 2)
    another = copied(ours)
    assert (another.add(1), ours.count, another.count) == (3, 1, 3)


def test_what_an_object_had_of_its_own_is_what_is_called_and_comes_back():
    ours = Counter()
    ours.add = patched = lambda number, times: -number
    install(ours, (ADD,), 2)
    assert ours.add(1) == -2
    uninstall(ours, (ADD,))
    assert ours.add is patched


def test_a_refusal_raises():
    ours = Counter()
    install(ours, (Override("", "add", Refusal("not now"), "", ""),), 2)
    with pytest.raises(RuntimeError, match="not now"):
        ours.add(1)


def test_methods_of_a_class_are_replaced_for_those_that_have_a_context(monkeypatch):
    stock = Counter.add
    monkeypatch.setattr(Counter, "add", stock)  # puts it back at the end
    for _ in range(2):
        install_for_all((ADD,), lambda counter: (2,) if counter.count == 1 else None)
    ours = Counter()
    assert (ours.add(1), ours.add(1)) == (3, 4)
    assert stock_of(Counter, "add") is stock
    install_for_all((Override("not.imported.Class", "add", add_twice, "", ""),), lambda counter: ())


def test_within_a_block_everybody_has_the_other_function():
    raw = dict(vars(Counter))
    with overridden((ADD, DOUBLE), 2):
        assert (Counter().add(1), Counter.double(1), Counter().double(1)) == (3, 4, 4)
    assert dict(vars(Counter)) == raw
    counter = Counter()
    with attributes(counter, count=5, other=6):
        assert (counter.count, counter.other) == (5, 6)
    assert vars(counter) == {"count": 1}
