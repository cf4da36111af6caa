"""The recipes, launched as their first lines say, at a scale of seconds."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
TINY = (
    "--max_train_steps 12 --num_warmup_steps 2 --learning_rate 1e-2 --per_device_train_batch_size 4 --logging_steps 4 "
    "--vocab_size 512 --hidden_size 128 --num_hidden_layers 2 --max_corpus_mb 0.3 --block_size 64 "
    "--max_eval_blocks 27 --required_drop 2"
).split()


def launch(config, *arguments, recipe="finetune_causal_lm.py", unaware=False, timeout=150):
    """Runs a recipe under the launcher; its processes do not outlive a timeout. Returns what it printed."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])  # this checkout's package
    env.pop("ACCELERATE_USE_CPU", None)
    if torch.accelerator.is_available():
        env["ACCELERATE_USE_CPU"] = "true"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", ROOT / "recipes/configs" / config]
    if unaware:
        command += ["-m", "accel_tp_ddp.launch"]
    process = subprocess.Popen(
        [*command, ROOT / "recipes" / recipe, *arguments],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output
    return output


def test_recipe_learns_and_its_checkpoint_is_the_trained_model(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCEL_TP_DDP_PROVE", "always")
    output = launch("cpu_tp2_dp2.yaml", *TINY, "--output_dir", str(tmp_path))

    assert "2 replicas of 2 ranks" in output
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["steps"] == 12
    assert results["perplexity_before"] == pytest.approx(512, rel=0.3), "an untrained model knows nothing"
    assert results["perplexity_after"] < results["perplexity_before"] / 2
    assert results["perplexity_reloaded"] == pytest.approx(results["perplexity_after"], rel=1e-4)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in tmp_path.iterdir()}


def test_lora_recipe_learns_and_plain_peft_loads_its_adapters(tmp_path):
    tiny = "--max_train_steps 10 --max_eval_blocks 21 --block_size 64 --per_device_train_batch_size 4".split()
    output = launch("cpu_tp2_dp2.yaml", *tiny, "--output_dir", str(tmp_path), recipe="lora.py", unaware=True)

    assert "parameters are trained" in output
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["steps"] == 10
    assert results["perplexity_after"] < results["perplexity_before"] / 2
    assert results["perplexity_reloaded"] == pytest.approx(results["perplexity_after"], rel=1e-4)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in tmp_path.iterdir()}


# script: what to add to its launch line, and what has to become of its first measure
UNAWARE = {
    "finetune_trainer.py": ("--per_device_train_batch_size 4 --max_blocks 400", "perplexity", lambda a, b: b < a / 2),
    "classify_trainer.py": ("--per_device_train_batch_size 8", "accuracy", lambda a, b: b > a + 0.1),
    "sft_trl.py": ("--per_device_train_batch_size 4", "loss", lambda a, b: b < a - 1),
}


PLAIN = """
distributed_type: MULTI_GPU
num_machines: 1
num_processes: 2
main_process_port: 0
mixed_precision: 'no'
"""


@pytest.mark.slow
def test_a_trainer_script_on_a_text_file_logs_what_it_logs_under_plain_ddp(tmp_path):
    (tmp_path / "plain.yaml").write_text(PLAIN)
    logs = {}
    for name, config in (("plain", tmp_path / "plain.yaml"), ("sharded", "cpu_tp2_dp2.yaml")):
        options = f"--text_file {ROOT}/README.md --block_size 48 --per_device_train_batch_size 2 --max_steps 6"
        options += f" --logging_steps 1 --eval_steps 3 --save_steps 3 --output_dir {tmp_path}/{name} --use_cpu"
        launch(config, *options.split(), recipe="finetune_trainer.py", unaware=name == "sharded")
        state = json.loads((tmp_path / name / "checkpoint-6/trainer_state.json").read_text())
        logs[name] = [
            {key: row[key] for key in row if "_per_" not in key and "time" not in key} for row in state["log_history"]
        ]
    assert len(logs["plain"]) == 9 and logs["plain"][1].keys() >= {"loss", "grad_norm", "learning_rate"}
    for ours, theirs in zip(logs["sharded"], logs["plain"], strict=True):
        assert ours == pytest.approx(theirs, rel=2e-4)


@pytest.mark.parametrize(
    "recipe", [pytest.param(name, marks=() if name == "sft_trl.py" else pytest.mark.slow) for name in UNAWARE]
)
def test_a_recipe_that_knows_nothing_of_it_runs_under_the_launcher(recipe, tmp_path):
    options, measure, improved = UNAWARE[recipe]
    options += f" --max_steps 20 --eval_strategy no --save_strategy no --output_dir {tmp_path} --use_cpu"
    output = launch("cpu_tp2_dp2.yaml", *options.split(), recipe=recipe, unaware=True)

    assert output.count("TensorParallelDDPPlugin(tp_size=2, dp_replicate_size=2") == 1
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["steps"] == 20
    assert improved(results[f"{measure}_before"], results[f"{measure}_after"]), results
    assert {"config.json", "model.safetensors"} <= {path.name for path in tmp_path.iterdir()}
    assert "accel_tp_ddp" not in "\n".join(_code(ROOT / "recipes" / recipe)), "no knowledge of it in the code"


def _code(path):
    return [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
