"""A slice of the sweep over architectures at tp 2, by its own command: `benchmarks/sweep`, docs/ARCHITECTURES.md."""

import subprocess
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path

import pytest
from packaging.version import Version

from accel_tp_ddp import PlanError
from accel_tp_ddp.styles.registry import get_style, style_names
from benchmarks.sweep import table
from benchmarks.sweep.cases import groups

ROOT = Path(__file__).parents[2]
# One or more for each style of the registry.
SLICE = {
    "causal": (
        *("apertus", "gemma3n_text", "gpt_oss", "inkling_text", "llama4_text", "longcat_flash", "mixtral"),
        "qwen3_5_moe_text",
    ),
    "encoders": ("deberta", "mpnet"),
    "odd": (
        *("cohere: norm of each head", "glm4_moe: norm of queries and keys", "phi: norm of queries and keys"),
        *("llama: embedding cut along the hidden size, tied", "llama: intermediate size 127, biases"),
        *("mixtral: experts of 31", "phi3: one key/value head"),
    ),
}
ELSEWHERE = {"AllReduce"}  # no plan that is in use names it: tests/styles/test_full_gradients.py


@cache
def answers(folder: Path) -> dict[str, dict[str, dict]]:
    names = [name for names in SLICE.values() for name in names]
    command = [sys.executable, "-m", "benchmarks.sweep", "--tp", "2", "--jobs", "2", "--results", str(folder)]
    command += ["--group", *SLICE, "--only", *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    found = {f"{group}: {name}": own for group in SLICE for name, own in table.load(group, folder).items()}
    assert done.returncode == 0 and len(found) == len(names), done.stdout[-5000:] + done.stderr[-2000:]
    return found


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    return answers(tmp_path_factory.mktemp("sweep"))


def test_loss_gradients_steps_and_export_of_each_are_those_of_the_unsharded_model(swept):
    assert len(swept) >= 12
    assert {name: own["tp 2"]["reason"] for name, own in swept.items() if own["tp 2"]["result"] != "pass"} == {}


def test_the_sweep_uses_every_registered_style(swept):
    occurring = {style for own in swept.values() for style in own["tp 2"]["styles"]}
    assert set(without_arguments()) - occurring == ELSEWHERE


def without_arguments():
    """Classes of the styles that a plan may name without arguments."""
    for name in style_names():
        with suppress(PlanError):
            yield type(get_style(name, name)).__name__


def test_the_sweep_counts_collectives(swept):
    assert (swept["causal: mixtral"]["tp 2"]["forward"], swept["causal: mixtral"]["tp 2"]["backward"]) == (6, 5)


def test_there_are_saved_results_of_the_pinned_transformers():
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pinned = [path for path in table.versions() if f"\ntransformers=={path.name} " in pins]
    newest = max(pinned, key=lambda path: Version(path.name))  # Python 3.10 has another, of which not all was run
    assert all(table.load(name, newest) for name in groups())


def test_the_saved_results_are_of_cases_that_exist():
    for name, module in groups().items():
        assert table.load(name).keys() <= {case.name for case in module.cases()}, name
