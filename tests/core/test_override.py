"""An override is compared with what it was written for: a place that has gone, or is another, gives one line."""

import sys
from types import ModuleType

import pytest

from accel_tp_ddp.core import override
from accel_tp_ddp.core.errors import UpstreamError
from accel_tp_ddp.core.override import Override, check, install, install_for_all, overridden
from accel_tp_ddp.core.upstream import Gone, NotLoaded, find_owner, is_released, mismatch

PACKAGE = "someones_package"


class Saver:
    def save(self, folder, overwrite=False):
        return self.gather(), folder, overwrite

    def gather(self):
        return self.parts

    @property
    def is_main(self):
        return True

    @staticmethod
    def reset(everything):
        pass


def save(stock, owner, /, folder, overwrite=False):
    return ("ours", *stock(folder, overwrite=overwrite))


@pytest.fixture
def package(monkeypatch):
    """An imported package with a module, of release 2.0; it and what was said are forgotten again."""
    package, module = ModuleType(PACKAGE), ModuleType(f"{PACKAGE}.saving")
    package.__path__, package.__version__, package.saving = [], "2.0", module
    module.Saver = type("Saver", (), {name: found for name, found in vars(Saver).items() if name[0] != "_"})
    monkeypatch.setitem(sys.modules, PACKAGE, package)
    monkeypatch.setitem(sys.modules, f"{PACKAGE}.saving", module)
    monkeypatch.setattr(override, "_SAID", set())
    return module


def row(name="save", function=save, **options):
    owner = options.pop("owner", f"{PACKAGE}.saving.Saver")
    return Override(owner, name, function, "someones_package 1.9, saving.py:1", "writes a part", **options)


# --- what is found out -----------------------------------------------------------------------------------------------


def other_name(self, directory, overwrite=False): ...
def other_order(self, overwrite, folder=None): ...
def by_keyword(self, *, folder, overwrite=False): ...
def one_required_more(self, folder, overwrite, mesh): ...
def required_by_keyword(self, folder, overwrite=False, *, mesh): ...
def one_less(self, folder): ...


DIFFERENT = [
    (other_name, "takes no `folder`"),
    (other_order, "takes `folder` as argument 2, not 1"),
    (by_keyword, "takes `folder` by keyword only"),
    (one_required_more, "wants `mesh`"),
    (required_by_keyword, "wants `mesh`"),
    (one_less, "takes no `overwrite`"),
    ("a string", "is no function"),
]


@pytest.mark.parametrize("theirs, problem", DIFFERENT)
def test_another_signature_is_a_mismatch(theirs, problem):
    assert mismatch(type("Other", (), {"save": theirs}), "save", save) == problem


def one_optional_more(self, folder, overwrite=False, mesh=None): ...
def anything(self, folder, *args, **kwargs): ...
def anything_by_name(self, folder, overwrite=False, **options): ...


@pytest.mark.parametrize("theirs", [one_optional_more, anything_by_name])
def test_what_is_only_added_is_none(theirs):
    assert mismatch(type("Other", (), {"save": theirs}), "save", save) is None


def passes_all(stock, owner, /, *args, **kwargs): ...
def of_a_property(stock, owner, /): ...
def of_a_static_method(stock, /, everything): ...
def takes_an_option_of_its_own(stock, owner, /, folder, overwrite=False, *args, ours=None, **kwargs): ...


def test_a_replacement_that_passes_all_on_takes_any_signature():
    for theirs in (other_name, other_order, by_keyword, one_required_more, required_by_keyword, anything):
        assert mismatch(type("Other", (), {"save": theirs}), "save", passes_all) is None
    assert mismatch(Saver, "is_main", of_a_property) is None
    assert mismatch(Saver, "reset", of_a_static_method) is None
    assert mismatch(Saver, "reset", of_a_property) == "wants `everything`"
    theirs = type("Other", (), {"save": anything_by_name})
    assert mismatch(theirs, "save", takes_an_option_of_its_own) is None


def test_what_the_replaced_function_has_to_use_is_looked_for_in_it_and_in_what_it_calls():
    assert mismatch(Saver, "save", save, ("gather", "parts")) is None
    assert mismatch(Saver, "save", save, ("gather", "state_dict")) == "does not use `state_dict`"


def test_a_place_is_looked_for_without_importing_anything(package):
    assert find_owner(f"{PACKAGE}.saving") is package and find_owner(f"{PACKAGE}.saving.Saver") is package.Saver
    for missing in (f"{PACKAGE}.saving.Other", f"{PACKAGE}.writing", f"{PACKAGE}.writing.Saver"):
        with pytest.raises(Gone):
            find_owner(missing)
    before = set(sys.modules)
    for later in ("xml.sax.saxutils.XMLGenerator", "xml.sax.saxutils", "not_imported.at_all"):
        with pytest.raises(NotLoaded):
            find_owner(later)
    assert set(sys.modules) == before and "xml.sax" not in before


def test_releases_are_compared_by_their_numbers(package):
    assert is_released(PACKAGE, "1.10") and is_released(PACKAGE, "2.0") and not is_released(PACKAGE, "2.0.1")


# --- what is said ----------------------------------------------------------------------------------------------------


def said(caplog):
    return [record.getMessage() for record in caplog.records]


def test_what_is_as_it_was_is_not_worth_a_line(package, caplog):
    check([row(), row(owner="not_imported.at_all")])
    ours = package.Saver()
    ours.parts = 1
    install(ours, [row()])
    assert ours.save("here") == ("ours", 1, "here", False) and said(caplog) == []


def test_another_signature_is_said_once_and_an_error_where_it_is_called(package, caplog):
    package.Saver.save = one_required_more
    check([row()])
    check([row()])
    assert said(caplog) == [
        "someones_package 2.0 is not as accel_tp_ddp knows it, which was written for someones_package 1.9: "
        "`someones_package.saving.Saver.save` wants `mesh` (which, unless it is replaced, writes a part). "
        "Install that release, or a newer accel_tp_ddp."
    ]
    ours = package.Saver()
    install(ours, [row()])
    with pytest.raises(UpstreamError, match="wants `mesh`"):
        ours.save("here")
    install_for_all([row()], lambda saver: () if saver is not ours else None)
    with pytest.raises(UpstreamError, match="wants `mesh`"):
        package.Saver().save("here")
    with pytest.raises(UpstreamError, match="wants `mesh`"), overridden([row()]):
        pass
    assert len(said(caplog)) == 1


def test_ranks_other_than_the_main_process_say_nothing(package, caplog, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    package.Saver.save = one_required_more
    check([row()])
    assert said(caplog) == []


GONE = {
    "method": f"`{PACKAGE}.saving.Saver.save`",
    "class": f"`{PACKAGE}.saving.Saver`",
    "module": f"`{PACKAGE}.saving`",
}


def take_away(package, what):
    if what == "method":
        del package.Saver.save
    elif what == "class":
        del package.Saver
    else:
        del sys.modules[PACKAGE].saving, sys.modules[f"{PACKAGE}.saving"]


@pytest.mark.parametrize("what", GONE)
def test_what_has_gone_is_an_error_where_it_counts_and_a_line_where_it_does_not(package, caplog, what):
    take_away(package, what)
    with pytest.raises(UpstreamError, match=f"there is no {GONE[what]}.*writes a part") as raised:
        check([row()])
    assert "\n" not in str(raised.value) and said(caplog) == []
    install_for_all([row(counts=False)], lambda saver: ())
    assert said(caplog) == [str(raised.value)]
    with pytest.raises(UpstreamError), overridden([row(counts=False)]):
        pass


def test_what_came_later_is_passed_over_in_an_earlier_release_but_not_where_it_is_used(package, caplog):
    later = row("new", since="2.1")
    check([later])
    install_for_all([later], lambda saver: ())
    assert said(caplog) == []
    with pytest.raises(UpstreamError, match="there is no `someones_package.saving.Saver.new`"), overridden([later]):
        pass
    with pytest.raises(UpstreamError, match="new"):
        check([row("new", since="1.9.3")])


def test_an_object_of_another_class_may_do_without(package, caplog):
    install(object.__new__(type("Other", (), {})), [row()])
    assert said(caplog) == []


def test_a_release_that_changes_much_has_one_line(package, caplog):
    wrong = [row(name, counts=False) for name in ("a", "b", "c", "d", "e")]
    check(wrong)
    (line,) = said(caplog)
    assert line.count("there is no") == 3 and "2 more" in line


class Counts(dict):
    """Its `fromkeys` is a class method that is written in C, and tells no signature of its own."""


def test_a_class_method_that_is_written_in_c_is_replaced_for_its_class(package, monkeypatch):
    def fromkeys(value, stock, owner, /, *args, **kwargs):
        return stock(*args, value)

    package.Counts = Counts
    rows = [Override("someones_package.saving.Counts", "fromkeys", fromkeys, "someones 2.0", "knows no value")]
    install_for_all(rows, lambda owner: (7,) if owner is Counts else None)
    try:
        assert Counts.fromkeys("ab") == {"a": 7, "b": 7} and type(Counts.fromkeys("a")) is Counts
        assert type("Other", (Counts,), {}).fromkeys("a") == {"a": None}
    finally:
        del Counts.fromkeys
