"""`accel-tp-ddp merge`: the checkpoint that the run itself would have written, out of its sharded state."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import resource
import shutil
import struct
import subprocess
import sys
import termios
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import AutoModelForCausalLM

from accel_tp_ddp.checkpoint import merge as merging
from accel_tp_ddp.checkpoint.folder import MANIFEST, Manifest
from accel_tp_ddp.cli import main

from ..helpers.files import contents
from ..helpers.models import build_config, build_model
from ..helpers.ranks import run_on_ranks
from ..helpers.sharded import MLP_PLAN, accelerator_for, build_mlp, token_batch

SIZE = "60KB"
RUNS = {  # name: tp size, the plan, the models
    "loaded experts": (2, "auto", lambda folder: [AutoModelForCausalLM.from_pretrained(f"{folder}/source")]),
    "tied in bfloat16": (2, "auto", lambda folder: [build_model("phi3", tied=True).to(torch.bfloat16)]),
    "three": (4, MLP_PLAN, lambda folder: [build_mlp(seed=0), build_mlp(seed=1), build_mlp(seed=2)]),
}


def run(folder: str, names: tuple[str, ...]) -> None:
    """Train a step, save the state, and export by the run's own means."""
    for name in names:
        tp, plan, build = RUNS[name]
        accelerator = accelerator_for(tp, plan)
        models = [accelerator.prepare(model) for model in build(folder)]
        for index, model in enumerate(models):
            if name != "three":
                optimizer = accelerator.prepare(torch.optim.SGD(model.parameters(), lr=0.1))
                accelerator.backward(model(**token_batch()).loss)
                optimizer.step()
                accelerator.unwrap_model(model).save_pretrained(f"{folder}/{name} {index}", max_shard_size=SIZE)
            else:
                accelerator.save_model(model, f"{folder}/{name} {index}", max_shard_size=SIZE)
        accelerator.save_state(f"{folder}/{name}")
        accelerator.free_memory()
        AcceleratorState._reset_state()


@pytest.fixture(scope="module")
def states(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("states")
    build_model("mixtral").save_pretrained(folder / "source")
    run_on_ranks(run, 4, str(folder), tuple(RUNS))
    return folder


@pytest.mark.parametrize(("name", "index"), [("loaded experts", 0), ("tied in bfloat16", 0), ("three", 1)])
def test_a_merged_state_is_what_the_run_would_have_saved_file_for_file(name, index, states, tmp_path, capsys):
    choice = ["--model", str(index)] if name == "three" else []
    assert main(["merge", str(states / name), str(tmp_path / "out"), "--max-shard-size", SIZE, *choice]) == 0
    ours, wanted = contents(tmp_path / "out"), contents(states / f"{name} {index}")
    assert ours.keys() == wanted.keys()
    assert {file for file in wanted if ours[file] != wanted[file]} == set()
    assert str(tmp_path / "out") in capsys.readouterr().out


@pytest.mark.parametrize("name", ["loaded experts", "tied in bfloat16"])
def test_a_merged_model_loads_with_nothing_missing_and_nothing_unexpected(name, states, tmp_path):
    merging.merge(states / name, tmp_path / "out", verify=False)
    loaded, told = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.isfinite(loaded(**token_batch()).loss)


def as_of_an_earlier_version(state: Path, copy: Path) -> Path:
    """The state without what it says of its models."""
    shutil.copytree(state, copy)
    shutil.rmtree(copy / "models")
    manifest = Manifest.read(copy)
    (copy / MANIFEST).unlink()
    files = {name: entry for name, entry in manifest.files.items() if not name.startswith("models/")}
    Manifest(manifest.about, files).write(copy)
    return copy


@pytest.mark.parametrize("name", ["loaded experts", "tied in bfloat16"])
def test_an_older_state_takes_its_config_from_elsewhere(name, states, tmp_path, capsys):
    old = as_of_an_earlier_version(states / name, tmp_path / "old")
    assert main(["merge", str(old), str(tmp_path / "out")]) == 2
    assert "--config" in capsys.readouterr().err
    config = states / f"{name} 0" / ("config.json" if "tied" in name else "")
    arguments = ["merge", str(old), str(tmp_path / "out"), "--config", str(config), "--max-shard-size", SIZE]
    assert main(arguments) == 0
    ours, wanted = contents(tmp_path / "out"), contents(states / f"{name} 0")
    weights = {file for file in wanted if "safetensors" in file or file == "config.json"}
    assert {file for file in weights if ours[file] != wanted[file]} == set()


@pytest.mark.parametrize("terminal", [False, True])
def test_the_command_prints_json_and_a_progress_bar_on_a_terminal_alone(states, tmp_path, terminal):
    command = [sys.executable, "-m", "accel_tp_ddp.cli", "merge", "--json", "--model", "2"]
    command += [str(states / "three"), str(tmp_path / "out")]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    reader, writer = pty.openpty() if terminal else os.pipe()
    if terminal:
        fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))  # one of no width shows no bar
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=writer, text=True, timeout=300, env=environment)
    os.close(writer)
    said = ""
    with suppress(OSError):  # at the end of a terminal
        while data := os.read(reader, 4096):
            said += data.decode(errors="replace")
    os.close(reader)
    assert done.returncode == 0, said
    result = json.loads(done.stdout)
    assert result["files"] == ["model.safetensors"] and result["kind"] == "MLP" and result["tensors"] == 6
    assert ("Merging" in said, "Comparing checksums" in said) == (terminal, terminal)


# --- bad input -------------------------------------------------------------------------------------------------------


def told(arguments: list, capsys) -> tuple[int, str]:
    code = main(["merge", *map(str, arguments)])
    captured = capsys.readouterr()
    error = captured.err.strip().splitlines()[-1]
    assert captured.out == "" and error.startswith("accel-tp-ddp: ")
    return code, error


def other_config(states: Path, tmp_path: Path) -> list:
    build_config("phi3", layers=3).save_pretrained(tmp_path / "config")
    (tmp_path / "config" / "config.json").write_text(
        json.dumps(
            {**json.loads((tmp_path / "config" / "config.json").read_text()), "architectures": ["Phi3ForCausalLM"]}
        )
    )
    return [states / "tied in bfloat16", tmp_path / "out", "--config", tmp_path / "config"]


def full_folder(states: Path, tmp_path: Path) -> list:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("")
    return [states / "tied in bfloat16", tmp_path / "out"]


BAD_INPUT = {
    "no such state": (lambda states, tmp: [tmp / "none", tmp / "out"], "does not exist"),
    "no state": (lambda states, tmp: [states / "source", tmp / "out"], "its weights are not sharded"),
    "several models": (lambda states, tmp: [states / "three", tmp / "out"], "--model, of [0, 1, 2]"),
    "no such model": (lambda states, tmp: [states / "three", tmp / "out", "--model", 3], "holds the models [0, 1, 2]"),
    "another model's config": (other_config, "`model.layers.2."),
    "no config": (lambda s, tmp: [s / "tied in bfloat16", tmp / "out", "--config", tmp], "cannot be read as a config"),
    "no size": (lambda s, t: [s / "tied in bfloat16", t / "out", "--max-shard-size", "9 hogsheads"], "9 hogsheads"),
    "a folder with something in it": (full_folder, "give a new folder"),
    "no argument": (lambda states, tmp: [tmp], "OUT_DIR"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_exit_code_2_and_one_line_that_says_what_to_change(case, states, tmp_path, capsys):
    arguments, words = BAD_INPUT[case]
    given = arguments(states, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    code, error = told(given, capsys)
    assert code == 2 and words.lower() in error.lower()
    assert sorted(tmp_path.rglob("*")) == before, "nothing is left"


@pytest.mark.parametrize("how", ["flipped", "short", "missing"])
def test_a_damaged_state_is_exit_code_1_and_names_the_file(how, states, tmp_path, capsys):
    state = tmp_path / "state"
    shutil.copytree(states / "three", state)
    file = sorted((state / "tensors").glob("*.distcp"))[1]
    data = file.read_bytes()
    if how == "missing":
        file.unlink()
    else:
        file.write_bytes(data[:-7] if how == "short" else data[:-300] + bytes([data[-300] ^ 1]) + data[-299:])
    code, error = told([state, tmp_path / "out", "--model", 0], capsys)
    assert code == 1 and str(file) in error
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_nothing_behind(states, tmp_path, capsys):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
        code, error = told([states / "loaded experts", tmp_path / "out"], capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2 and "File too large" in error and "make room" in error
    assert list(tmp_path.iterdir()) == []


def save_adapters(folder: str) -> None:
    from peft import LoraConfig, get_peft_model

    accelerator = accelerator_for(2)
    config = LoraConfig(r=4, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM")
    accelerator.prepare(get_peft_model(build_model("llama"), config))
    accelerator.save_state(folder)


def test_a_state_with_adapters_says_how_to_export_them(tmp_path, capsys):
    run_on_ranks(save_adapters, 2, str(tmp_path / "state"))
    code, error = told([tmp_path / "state", tmp_path / "out"], capsys)
    assert code == 2 and "save_pretrained" in error


# --- memory ----------------------------------------------------------------------------------------------------------


def test_merging_reads_each_tensor_once_and_keeps_no_more_than_a_file(states, tmp_path, monkeypatch):
    reads, alive, most = [], [], 0
    stock = merging.StoredTensors.tensor

    def tensor(self, name):
        nonlocal most
        reads.append(name)
        made = stock(self, name)
        alive.append(torch.multiprocessing.reductions.StorageWeakRef(made.untyped_storage()))
        most = max(most, sum(not reference.expired() for reference in alive))
        return made

    monkeypatch.setattr(merging.StoredTensors, "tensor", tensor)
    merging.merge(states / "tied in bfloat16", tmp_path / "out", max_shard_size="20KB")
    assert len(reads) == len(set(reads)) > 12
    written = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    files = [list(written.values()).count(name) for name in set(written.values())]
    assert most <= max(files) + 1 < len(reads) / 2


def test_plain_accelerate_reads_what_is_merged_of_a_model_without_a_config(states, tmp_path):
    merging.merge(states / "three", tmp_path / "out", model=0)
    from accelerate import load_checkpoint_in_model

    model = build_mlp(seed=5)
    load_checkpoint_in_model(model, tmp_path / "out")
    for name, tensor in build_mlp(seed=0).state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
