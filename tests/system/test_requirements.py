"""What is imported is declared, what is declared is imported, and all that an installation takes is pinned."""

from __future__ import annotations

import ast
import re
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from configparser import ConfigParser
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PYTHONS = ("3.10.13", "3.11.7", "3.12.1", "3.13.0")
#: Where nothing is installed, other than by what is declared here.
OUR_OWN = {"accel_tp_ddp", "benchmarks", "recipes", "tests"}
#: Declared, and used by other means than an import.
COMMANDS = {"ruff": "`make test`", "mypy": "`make test`", "pytest-timeout": "`timeout` in setup.cfg"}
#: What builds the package, and installs it.
BUILD = ("pip", "setuptools", "wheel")
LOADERS = ("importorskip", "import_module")
#: Used where they are installed, and not to be had from PyPI as others are.
BESIDE = {
    "deepspeed": "its build wants torch in the same environment",
    "ray": "of one recipe, in an environment of its own",
}


def declared() -> dict[str, list[Requirement]]:
    """The requirements by section of setup.cfg; those of the package itself under the empty name."""
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    sections = {"": config["options"]["install_requires"], **config["options.extras_require"]}
    lines = {name: [line.partition("#")[0].strip() for line in text.splitlines()] for name, text in sections.items()}
    return {name: [Requirement(line) for line in own if line] for name, own in lines.items()}


def names(requirements: Iterable[Requirement]) -> set[str]:
    return {canonicalize_name(requirement.name) for requirement in requirements}


# --- imports ---------------------------------------------------------------------------------------------------------


def imports(tree: ast.AST, inside: bool = False) -> Iterator[tuple[str, bool]]:
    """Top-level packages that are imported, and whether only when a function is called."""
    for node in ast.iter_child_nodes(tree):
        function = inside or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        if isinstance(node, ast.Import):
            yield from ((alias.name.partition(".")[0], inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0], inside
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") in LOADERS:
            named = node.args and isinstance(node.args[0], ast.Constant)
            if named:
                yield str(node.args[0].value).partition(".")[0], inside
        yield from imports(node, function)


def imported(folder: str) -> dict[str, set[str]]:
    """Distributions that the files of a folder import: when `loaded`, or only when something is `called`."""
    known = packages_distributions()
    found: dict[str, set[str]] = {"loaded": set(), "called": set()}
    for path in sorted((ROOT / folder).rglob("*.py")):
        for package, inside in imports(ast.parse(path.read_text(encoding="utf-8"))):
            if package not in OUR_OWN and package not in sys.stdlib_module_names:
                providers = known.get(package, [package])  # one that is not installed goes by its own name
                found["called" if inside else "loaded"] |= set(map(canonicalize_name, providers))
    return found


@pytest.mark.parametrize(
    "folder, extras",
    [
        ("accel_tp_ddp", ()),
        ("recipes", ("recipes", "benchmarks")),  # a picture is matplotlib's
        ("tests", ("test", "plot")),  # a picture is drawn where there is matplotlib
        ("benchmarks", ("benchmarks",)),
    ],
)
def test_what_is_imported_is_declared(folder, extras):
    requirements = declared()
    found = imported(folder)
    enough = names(requirements[""]).union(BESIDE, *(names(requirements[extra]) for extra in extras))
    assert found["loaded"] <= enough
    anywhere = set().union(*map(names, requirements.values()))
    assert found["called"] <= (anywhere if folder == "accel_tp_ddp" else enough)


def test_the_tests_have_what_the_recipes_need():
    requirements = declared()
    assert names(requirements["recipes"]) <= names(requirements["test"])


def test_what_is_declared_is_imported():
    found = {folder: set().union(*imported(folder).values()) for folder in sorted(OUR_OWN)}
    users = {
        "": found["accel_tp_ddp"] | found["recipes"],
        "recipes": found["recipes"],
        "test": found["tests"] | found["recipes"] | set(COMMANDS),
        "benchmarks": found["benchmarks"],
        "plot": found["accel_tp_ddp"],
        "docs": {"mkdocs-material", "mkdocstrings"},  # by mkdocs.yml
    }
    requirements = declared()
    assert requirements.keys() == users.keys()
    for section, own in requirements.items():
        assert names(own) <= users[section], section or "install_requires"


def test_every_requirement_says_from_which_release_on():
    for own in declared().values():
        for requirement in own:
            assert [spec.operator for spec in requirement.specifier] == [">="], str(requirement)


# --- pins ------------------------------------------------------------------------------------------------------------


def pins(path: Path = ROOT / "constraints.txt") -> list[Requirement]:
    lines = [line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
    return [Requirement(line) for line in lines if line and not line.startswith("-")]


def pinned_on(python: str = ".".join(map(str, sys.version_info[:3])), platform: str = sys.platform) -> dict[str, str]:
    """The version of each distribution there."""
    there = {
        "python_full_version": python,
        "python_version": python.rpartition(".")[0],
        "sys_platform": platform,
    }
    found: dict[str, str] = {}
    for pin in pins():
        if pin.marker is None or pin.marker.evaluate(there):
            name = canonicalize_name(pin.name)
            assert name not in found, f"{name} is pinned twice"
            found[name] = re.fullmatch(r"==(.+)", str(pin.specifier))[1]
    return found


@pytest.mark.parametrize("platform", ["linux", "darwin", "win32"])
@pytest.mark.parametrize("python", PYTHONS)
def test_what_is_declared_is_pinned_for_every_python(python, platform):
    found = pinned_on(python, platform)
    requirements = declared()
    assert found.keys() >= names(requirements[""]) | names(requirements["test"]) | set(BUILD)
    for requirement in (*requirements[""], *requirements["test"]):
        assert requirement.specifier.contains(found[canonicalize_name(requirement.name)]), str(requirement)


def test_what_the_pinned_releases_need_is_pinned_too():
    """As far as they are installed: what another release needs is not asked for."""
    found, requirements = pinned_on(), declared()
    left = deque((requirement, "setup.cfg") for requirement in (*requirements[""], *requirements["test"]))
    seen: set[tuple[str, frozenset[str]]] = set()
    missing: dict[str, str] = {}
    while left:
        requirement, asked_by = left.popleft()
        name, extras = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if name not in found:
            missing[name] = asked_by
            continue
        try:
            installed = distribution(name)
        except PackageNotFoundError:
            continue
        if (name, extras) in seen or not Requirement(f"{name}=={found[name]}").specifier.contains(installed.version):
            continue
        seen.add((name, extras))
        for text in installed.requires or ():
            further = Requirement(text)
            if further.marker is None or any(further.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
                left.append((further, f"{name} {installed.version}"))
    assert len(seen) > 20, "this walk has to see most of what is installed"
    assert not missing, f"to be pinned in constraints.txt (`make constraints`), with who needs it: {missing}"


def test_the_chosen_releases_are_those_pinned():
    chosen = [*pins(ROOT / "constraints" / "torch.txt"), *pins(ROOT / "constraints" / "chosen.txt")]
    for python in PYTHONS:
        found = pinned_on(python)
        for pin in chosen:
            if pin.marker is None or pin.marker.evaluate({"python_version": python.rpartition(".")[0]}):
                assert found[canonicalize_name(pin.name)] == str(pin.specifier).removeprefix("==")


# --- the oldest ------------------------------------------------------------------------------------------------------

#: They run or check the tests, or draw: any release that does is good enough.
TOOLS = {
    "hypothesis",
    "matplotlib",
    "mkdocs-material",
    "mkdocstrings",
    "mypy",
    "packaging",
    "pytest",
    "pytest-timeout",
    "ruff",
}
#: Of the programs that `benchmarks.programs` runs where they are installed.
PROGRAMS = {"lm-eval", "setfit"}


def literal(name: str, path: Path = ROOT / "noxfile.py") -> object:
    """What a module assigns to a name; nox itself is no requirement of the tests."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return ast.literal_eval(node.value)
    raise KeyError(name)


def test_the_oldest_releases_that_are_tried_are_those_that_are_declared():
    requirements = [requirement for own in declared().values() for requirement in own]
    floors = {canonicalize_name(each.name): re.fullmatch(r">=(.+)", str(each.specifier))[1] for each in requirements}
    tried = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins(ROOT / OLDEST)}
    assert tried == {name: floor for name, floor in floors.items() if name not in TOOLS | PROGRAMS | {"torch"}}
    assert "-c torch.txt" in (ROOT / OLDEST).read_text(encoding="utf-8").splitlines()


OLDEST = literal("SETS")["oldest"]


def test_nox_runs_tests_that_are_there_with_sets_that_are_there():
    assert literal("SETS").keys() == {"oldest", "pinned", "newest"}
    assert all((ROOT / constraints).is_file() for constraints in literal("SETS").values())
    contract = literal("CONTRACT")
    assert len(set(contract)) == len(contract) > 10 and all((ROOT / file).is_file() for file in contract)
