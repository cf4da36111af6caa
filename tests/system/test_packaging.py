"""What `python -m build` makes: a wheel with all that the package reads, and a source distribution with the rest."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from configparser import ConfigParser
from email import message_from_string
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHIPPED = ("benchmarks", "constraints", "docs", "recipes", "tests")
FILES = ("CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "MANIFEST.in", "Makefile", "README.md", "constraints.txt")
BACKEND = """
import sys
from setuptools import build_meta
folder = sys.argv[1]  # setuptools sets others
print(build_meta.build_wheel(folder), build_meta.build_sdist(folder))
"""


def files_of(folder: Path) -> set[str]:
    made = ("__pycache__", ".ipynb_checkpoints")
    return {
        path.relative_to(ROOT).as_posix()
        for path in folder.rglob("*")
        if path.is_file()
        if not {*made} & {*path.parts}
    }


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Both archives, by the backend that `python -m build` calls, of a copy: it writes beside its sources."""
    copy, out = tmp_path_factory.mktemp("sources") / "copy", tmp_path_factory.mktemp("dist")
    copy.mkdir()
    for name in ("accel_tp_ddp", *SHIPPED):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (*FILES, "mkdocs.yml", "mkdocs_hooks.py", "noxfile.py", "ruff.toml", "setup.cfg", "setup.py"):
        shutil.copy(ROOT / name, copy)
    done = subprocess.run([sys.executable, "-c", BACKEND, out], cwd=copy, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    (wheel,), (source,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, source


def test_the_wheel_holds_the_package_and_nothing_else(built):
    with zipfile.ZipFile(built[0]) as wheel:
        found = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert found == files_of(ROOT / "accel_tp_ddp")
    assert {
        "accel_tp_ddp/proof/data/ledger.json",
        "accel_tp_ddp/py.typed",
        "accel_tp_ddp/plans/data/gpt2.yaml",
    } <= found


def test_the_source_distribution_holds_what_tests_and_documents_need(built):
    with tarfile.open(built[1]) as source:
        found = {name.partition("/")[2] for name in source.getnames()}
    for folder in ("accel_tp_ddp", *SHIPPED):
        assert files_of(ROOT / folder) <= found
    assert {*FILES} <= found


def test_the_metadata_says_what_it_is(built):
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    with zipfile.ZipFile(built[0]) as wheel:
        (place,) = {name.partition("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
        told = message_from_string(wheel.read(f"{place}/METADATA").decode())
        assert "accel-tp-ddp = accel_tp_ddp.cli:main" in wheel.read(f"{place}/entry_points.txt").decode()
        assert any(name.endswith("LICENSE") for name in wheel.namelist())
    assert told["Name"] == "accel-tp-ddp" and told["Version"] == config["metadata"]["version"]
    assert "Apache-2.0" in (told["License-Expression"] or told["License"])
    assert told["Description-Content-Type"] == "text/markdown" and "# accel_tp_ddp" in told.get_payload()
    assert "tensor parallelism" in told["Keywords"] and told["Requires-Python"] == config["options"]["python_requires"]
    assert len(told.get_all("Project-URL")) >= 2 and len(told.get_all("Classifier")) >= 10
    needed = [line for line in told.get_all("Requires-Dist") if "extra ==" not in line]
    wanted = [line for line in config["options"]["install_requires"].splitlines() if line and not line.startswith("#")]
    assert sorted(needed) == sorted(wanted)
