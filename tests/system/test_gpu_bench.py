"""`python -m benchmarks.gpu` where there is no GPU: it says so, tries what CPU ranks can do, and waits for nobody."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import gpu, gpu_checks

ROOT = Path(__file__).parents[2]


def run(*args):
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, "-m", "benchmarks.gpu", *args]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert gpu.main([]) == 2
    assert "there is no GPU here" in capsys.readouterr().out


def test_cpu_ranks_try_the_script():
    done = run("--cpu", "--only", "losses_of_one_process", "fp16_training", "one_rank_of_eight")
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing below says anything about a GPU" in lines[0]
    assert [line.split()[0] for line in lines[1:4]] == ["pass", "skipped", "pass"]
    assert lines[-1] == "2 pass, 0 FAIL, 1 skipped"


def test_names_of_no_check(capsys):
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--cpu", "--only", "nothing_like_it"])
    assert ended.value.code == 2 and "--list prints the names" in capsys.readouterr().err


def test_every_check_is_listed(capsys):
    assert gpu.main(["--list"]) == 0
    assert capsys.readouterr().out.split() == [*gpu_checks.CHECKS, *gpu_checks.FIGURES]


def test_ranks_that_hang_are_ended(tmp_path):
    started = time.monotonic()
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    assert not gpu._wait([process], str(tmp_path), started + 1)
    assert process.poll() is not None and time.monotonic() - started < 60


def test_a_rank_that_dies_is_quoted(tmp_path):
    (tmp_path / "0.log").write_text("first\nout of memory\n")
    assert gpu._answer(str(tmp_path), 0) == {"outcome": "none", "words": "out of memory"}


def test_operations_are_those_that_torch_counts():
    model = gpu_checks.build()
    model.set_attn_implementation("eager")  # whose products torch counts in full, as the formula does
    data = gpu_checks.batch(gpu_checks.Place("cpu", "gloo", 0))
    with FlopCounterMode(display=False) as counted:
        model(**data).loss.backward()
    config, tokens = model.config, data["input_ids"].numel()
    own = gpu_checks.operations_a_token(
        gpu_checks.multiplied(model), config.num_hidden_layers, config.hidden_size, data["input_ids"].shape[1]
    )
    assert own == pytest.approx(counted.get_total_flops() / tokens, rel=0.01)
