"""The documents against the code: quoted errors, code blocks, links, and the site where mkdocs is installed."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml

import accel_tp_ddp

from ..helpers.launched import user_environment

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
BLOCKS = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINKS = re.compile(r"\]\((?!https?:|#)([^)\s#]+)")


# --- error texts -----------------------------------------------------------------------------------------------------


@cache
def literals() -> list[str]:
    """Every text of the package's code, with … where a value stands."""
    found = []
    for path in (ROOT / "accel_tp_ddp").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
    return [" ".join(text.split()) for text in found]


def quoted() -> list[str]:
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    return [" ".join(line[2:].split()) for line in text.splitlines() if line.startswith("> ")]


def in_the_source(quote: str) -> bool:
    return any(quote.strip("… ") in text for text in literals())


@pytest.mark.parametrize("quote", quoted())
def test_every_error_that_troubleshooting_quotes_is_in_the_source(quote):
    assert len(quote.strip("… ")) > 15, "too short to be searched for"
    assert in_the_source(quote), quote


def test_an_error_that_nobody_raises_would_be_found():
    assert len(quoted()) > 30
    assert not in_the_source("tp_size=… does not divide the … threads that were launched.")


# --- code blocks -----------------------------------------------------------------------------------------------------


def blocks():
    return [(page, text) for page in PAGES for text in BLOCKS.findall(page.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("page, block", blocks(), ids=lambda value: value.stem if isinstance(value, Path) else "block")
def test_python_blocks_parse_and_import_what_there_is(page, block):
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "accel_tp_ddp":
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "TensorParallelDDPPlugin":
            fields = accel_tp_ddp.TensorParallelDDPPlugin.__dataclass_fields__
            assert {keyword.arg for keyword in node.keywords} <= fields.keys(), ast.unparse(node)


LAUNCHED = "python -m accel_tp_ddp.launch --cpu --num_processes 4 train.py"


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "whole", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["launched", "all commands"]
)
def test_the_quick_start_runs_as_it_stands(whole, tmp_path):
    """Its script under its own commands, and then what it says to do with the result, in one process."""
    text = (DOCS / "quickstart.md").read_text(encoding="utf-8")
    train, load = BLOCKS.findall(text)
    (tmp_path / "train.py").write_text(train)
    (tmp_path / "load.py").write_text(load)
    (tmp_path / "load_merged.py").write_text(load.replace('("model")', '("merged")'))
    for folder in ("benchmarks", "recipes"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    blocks = re.findall(r"^```\n(.*?)^```", BLOCKS.sub("", text), re.M | re.S)
    commands = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    assert LAUNCHED in commands and commands[0] == "pip install ."  # whoever runs this has installed it
    chosen = [*commands[1:], "python load.py", "python load_merged.py"] if whole else [LAUNCHED, "python load.py"]
    for command in chosen:
        done = subprocess.run(
            in_this_environment(command),
            env=user_environment(),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert done.returncode == 0, command + done.stdout + done.stderr[-5000:]
    results = ["model", *(["merged"] if whole else [])]
    assert all(json.loads((tmp_path / name / "config.json").read_text())["vocab_size"] == 128 for name in results)
    assert (tmp_path / "state").is_dir()


def in_this_environment(command: str) -> list[str]:
    modules = {"accelerate": "accelerate.commands.accelerate_cli", "accel-tp-ddp": "accel_tp_ddp.cli"}
    words = command.split()
    setting = [words.pop(0)] if "=" in words[0] else []
    program, *rest = words
    own = [*(["-m", modules[program]] if program in modules else []), *rest]
    for option in ("--num_processes", "--config_file"):
        if option in own:  # any port, where others may run too
            own[own.index(option) : own.index(option)] = ["--main_process_port", "0"]
    return ["env", *setting, sys.executable, *own]


# --- links and the site ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    targets = LINKS.findall(BLOCKS.sub("", page.read_text(encoding="utf-8")))
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing


def test_every_page_is_in_the_menu_and_in_what_to_read():
    menu = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    pages = {
        page if isinstance(page, str) else next(iter(page.values()))
        for part in menu
        for page in next(iter(part.values()))
    }
    written = {path.name for path in DOCS.glob("*.md")}
    assert pages == written | {"overview.md", "contributing.md", "changelog.md"}
    read = (DOCS / "README.md").read_text(encoding="utf-8")
    assert all(f"({name})" in read for name in written - {"README.md", "overrides.md"})


def test_the_reference_names_all_that_is_public():
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^::: accel_tp_ddp\.(\w+)$", text, re.MULTILINE)) == set(accel_tp_ddp.__all__)


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="`make docs` has an environment of its own")
def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "troubleshooting" / "index.html").is_file()
