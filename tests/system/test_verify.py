"""`accel-tp-ddp verify`: its exit codes, its table, and what it takes for a model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig

ROOT = Path(__file__).parents[2]
WRONG = "model.layers.*.mlp.gate_proj: packed_colwise(2)\n"
BUILDER = """
from transformers import AutoModelForCausalLM, Qwen3Config

def small():
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16, "vocab_size": 128}
    return AutoModelForCausalLM.from_config(Qwen3Config(num_attention_heads=8, num_key_value_heads=4, **sizes))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify")
    LlamaConfig(num_hidden_layers=24, num_key_value_heads=8, architectures=["LlamaForCausalLM"]).save_pretrained(
        folder
    )
    (folder / "wrong.yaml").write_text(WRONG)
    (folder / "typo.yaml").write_text("model.layers.*.mlp.gate_prj: colwise\n")
    (folder / "builder.py").write_text(BUILDER)
    (folder / "empty").mkdir()
    return folder


def verify(folder, *arguments):
    """The exit code, what it printed, and what it said of an error."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "accel_tp_ddp.cli", "verify", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=250)
    return done.returncode, done.stdout, done.stderr.strip().splitlines()[-1:]


def test_a_right_plan_is_a_table_that_says_so(folder):
    code, printed, _ = verify(folder, ".", "--tp", "2")
    assert code == 0
    lines = printed.splitlines()
    assert lines[0].split() == ["module", "forward", "gradient", "replicated"]
    assert any(line.split()[0] == "model.layers.0.self_attn.q_proj" and "part" in line for line in lines)
    assert "num_hidden_layers 2 for 24" in lines[-2] and lines[-1] == "the plan is right"
    assert "WRONG" not in printed and "DIFFERS" not in printed


def test_a_wrong_plan_is_exit_code_1_and_names_the_first_wrong_module(folder):
    code, printed, _ = verify(folder, "config.json", "--tp", "2", "--plan", "wrong.yaml", "--json")
    assert code == 1
    answer = json.loads(printed)
    assert not answer["ok"] and "`model.layers.*.mlp.down_proj`" in answer["error"]
    rows = {row["module"]: row for row in answer["modules"]}
    assert rows["model.layers.0.mlp.down_proj"]["forward"] > 0.1 > rows["model.layers.0.self_attn"]["forward"]


def test_a_model_may_come_from_a_function_and_be_compared_as_it_is(folder):
    code, printed, _ = verify(folder, "builder:small", "--tp", "4", "--full", "--json")
    answer = json.loads(printed)
    assert code == 0 and answer["ok"], answer
    assert "as it is" in answer["how"]
    assert {row["replicated"] for row in answer["modules"]} == {True, None}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((".", "--tp", "2", "--plan", "typo.yaml"), "gate_proj"),
        ((".", "--tp", "2", "--plan", "none.yaml"), "none.yaml"),
        ((".", "--tp", "3"), "not divisible by tp_size"),
        ((".", "--tp", "1"), "Give 2 or more"),
        (("empty", "--tp", "2"), "no config.json"),
        (("builder:large", "--tp", "2"), "names no function"),
        (("os:getcwd", "--tp", "2"), "returned a str"),
        (("nobody/nothing", "--tp", "2"), "has no config that can be read"),
    ],
)
def test_bad_input_is_exit_code_2_and_one_line_that_says_what_to_change(arguments, words, folder, monkeypatch, capsys):
    from accel_tp_ddp.cli import main

    monkeypatch.chdir(folder)
    assert main(["verify", *arguments]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert line.startswith("accel-tp-ddp: ") and words in line
