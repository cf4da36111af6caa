"""`torchrun --max-restarts` starts a run again whose rank was killed, and it resumes as if nothing had happened."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ..helpers.launched import user_environment
from ..helpers.ranks import run_on_ranks
from ..scripts.elastic import STEPS, train

SCRIPT = Path(__file__).parents[1] / "scripts" / "elastic.py"
KILLED_AT = 4


def rows(folder):
    return [json.loads(line) for line in Path(folder, "losses.jsonl").read_text().splitlines()]


def torchrun(folder, *args):
    # On the second see docs/checkpoints.md.
    environment = user_environment(ACCELERATE_USE_CPU="true", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    launcher = ["-m", "torch.distributed.run", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    command = [sys.executable, *launcher, "--nproc-per-node", "4", "--max-restarts", "2", SCRIPT, folder, *args]
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr[-8000:]
    return done


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    run_on_ranks(train, 4, str(folder))
    return [row["loss"] for row in rows(folder)]


@pytest.mark.parametrize("behind", [pytest.param("async", marks=pytest.mark.slow), "sync"])
def test_a_run_whose_rank_is_killed_is_restarted_and_resumes(tmp_path, uninterrupted, behind):
    done = torchrun(tmp_path, KILLED_AT, behind)
    attempts = sorted({row["attempt"] for row in rows(tmp_path)})
    assert len(attempts) == 2  # the second may be numbered 2: if another process has taken the port meanwhile
    first, second = ([row for row in rows(tmp_path) if row["attempt"] == attempt] for attempt in attempts)
    assert first[-1]["step"] == KILLED_AT - 1 and "exitcode: -9" in done.stderr.replace("exitcode -9", "exitcode: -9")
    # the newest checkpoint is damaged (and of an earlier step, or still being written, in the background)
    assert "load_state passes over a damaged checkpoint" in done.stderr
    assert second[0]["step"] in ((KILLED_AT - 1,) if behind == "sync" else range(1, KILLED_AT))
    assert "Unable to shutdown process" not in done.stderr, "the other ranks have not ended by themselves"
    curve = {row["step"]: row["loss"] for row in first + second}
    assert [curve[step] for step in range(STEPS)] == pytest.approx(uninterrupted, rel=2e-4)
    assert len(uninterrupted) == STEPS
    overlap = {row["step"]: row["loss"] for row in first}
    for row in second:
        if row["step"] in overlap:
            assert row["loss"] == pytest.approx(overlap[row["step"]], rel=2e-4)
