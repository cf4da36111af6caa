"""`accel-tp-ddp plan`: the resolved plan of a model that a command names, or an inferred one as YAML."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import yaml
from transformers import LlamaConfig

from accel_tp_ddp.cli import main

ROOT = Path(__file__).parents[2]


def test_the_plan_of_a_folder(tmp_path, capsys):
    LlamaConfig(num_hidden_layers=3, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    assert main(["plan", str(tmp_path), "--tp", "4"]) == 0
    printed = capsys.readouterr().out
    assert "Tensor-parallel plan of LlamaForCausalLM: tp_size=4" in printed
    assert "3 x model.layers.*.self_attn.o_proj" in printed and "4096x4096 -> 4096x1024" in printed
    assert main(["plan", str(tmp_path), "--tp", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rules"]["model.layers.2.mlp.down_proj"] == "rowwise"
    assert main(["plan", str(tmp_path), "--tp", "0"]) == 2


def test_an_inferred_plan_is_yaml_that_is_the_models_own(tmp_path):
    config = LlamaConfig(num_hidden_layers=3, num_key_value_heads=8, architectures=["LlamaForCausalLM"])
    config.save_pretrained(tmp_path)
    command = [sys.executable, "-m", "accel_tp_ddp.cli", "plan", str(tmp_path), "--tp", "2", "--infer"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ACCEL_TP_DDP_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    own = {f"model.{name}": style for name, style in LlamaConfig.base_model_tp_plan.items()}
    found = yaml.safe_load(done.stdout)
    assert {name: found[name] for name in own} == own
