"""Trainer resumes from its newest checkpoint at another tp x dp, with what it keeps and the model it loads at the end.

At as many replicas it is the run that was never stopped; at another number it is what plain DDP makes of its own
checkpoint there.
"""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers

from ..helpers.ranks import run_on_ranks
from ..helpers.trainer import WORST_AT_THE_END, Case, assert_same, assert_same_checkpoint, make_trainer, train_and_save

STOPPED_AT, STEPS = 4, 8
SAVING = {
    "max_steps": STEPS,
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": 2,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "learning_rate": 1e-2,
    "warmup_steps": 2,
    **WORST_AT_THE_END,  # so the best is neither the last nor, at first, among the last two
}
CASES = {"adamw": Case(SAVING), "adafactor": Case({**SAVING, "optim": "adafactor"})}
#: saved at, resumed at: (tp, dp); tp None: without the plugin
SAME_REPLICAS = {
    ("adafactor", (2, 1), (4, 1)): (),
    ("adafactor", (2, 1), (None, 1)): (),
    ("adafactor", (2, 1), (2, 1)): pytest.mark.slow,
    ("adafactor", (None, 1), (2, 1)): pytest.mark.slow,
    ("adamw", (2, 1), (4, 1)): pytest.mark.slow,
    ("adamw", (2, 2), (2, 2)): pytest.mark.slow,
    ("adamw", (2, 2), (None, 2)): pytest.mark.slow,
}
OTHER_REPLICAS = {
    ("adamw", (2, 2), (2, 1)): (),
    ("adamw", (2, 2), (4, 1)): pytest.mark.slow,
    ("adamw", (2, 1), (2, 2)): pytest.mark.slow,
    ("adafactor", (2, 2), (2, 1)): pytest.mark.slow,
}


class Stop(transformers.TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == STOPPED_AT


def train(tp, folder, case, stop=False, resume=None):
    trainer = make_trainer(tp, folder, case)
    if stop:
        trainer.add_callback(Stop())
    result = train_and_save(trainer, folder, case, resume)
    best = Path(trainer.state.best_model_checkpoint).name
    return {**result, "best": best, "kept": sorted(path.name for path in Path(folder).glob("checkpoint-*"))}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What a run gives on each rank, and the folder it wrote: to its end, stopped, or gone on from a stopped one's."""

    @cache
    def get(name, layout, stop=False, after=None):
        folder = tmp_path_factory.mktemp("run") / "out"
        if after is not None:
            shutil.copytree(get(name, after, stop=True)[1], folder)
            shutil.rmtree(folder / "final")
        tp, dp = layout
        results = run_on_ranks(train, (tp or 1) * dp, tp, str(folder), CASES[name], stop, after is not None or None)
        return results[:: tp or 1], folder

    return get


def parameters(cases):
    return pytest.mark.parametrize("name, saved_at, resumed_at", [pytest.param(*c, marks=m) for c, m in cases.items()])


@parameters(SAME_REPLICAS)
def test_a_trainer_run_resumes_at_another_layout_as_if_never_stopped(runs, name, saved_at, resumed_at):
    expected = runs(name, (None, resumed_at[1]))
    assert_same_run(runs(name, resumed_at, after=saved_at), expected)
    if resumed_at[1] == 1:  # so the best is not just the last; on two replicas it is
        assert {run["best"] for run in expected[0]} != {"checkpoint-8"}
    assert_was_stopped(runs(name, saved_at, stop=True))


@parameters(OTHER_REPLICAS)
def test_a_trainer_run_resumes_at_other_replicas_as_plain_ddp_does(runs, name, saved_at, resumed_at):
    expected = runs(name, (None, resumed_at[1]), after=(None, saved_at[1]))
    assert_same_run(runs(name, resumed_at, after=saved_at), expected)
    assert_was_stopped(runs(name, saved_at, stop=True))


def assert_was_stopped(run):
    (first, *_), folder = run
    assert first["counts"][0] == STOPPED_AT and first["kept"] == ["checkpoint-2", "checkpoint-4"]
    assert not (folder / "checkpoint-8").exists()


def assert_same_run(actual, expected):
    (ours, folder), (theirs, reference) = actual, expected
    for got, wanted in zip(ours, theirs, strict=True):
        assert [row["step"] for row in wanted["logs"] if "loss" in row] == list(range(1, STEPS + 1))
        # The mean at the end is over what this process has run.
        steps, wanted_steps = ([row for row in run["logs"] if "train_loss" not in row] for run in (got, wanted))
        assert_same(steps, wanted_steps, 2e-4)
        assert_same(got["evaluated"], wanted["evaluated"], 2e-4)
        assert got["counts"] == pytest.approx(wanted["counts"], rel=1e-9)
        assert got["best"] == wanted["best"]
        assert got["kept"] == wanted["kept"] and {got["best"], "checkpoint-8"} <= set(got["kept"])
    assert_same_checkpoint(folder / "final", reference / "final")
    for name in ours[0]["kept"]:
        assert_same_checkpoint(folder / name, reference / name)


def draws_after_loading(tp, folder):
    trainer = make_trainer(tp, folder, Case())
    torch.manual_seed(dist.get_rank() if tp else 0)  # in no file, as the state of a GPU from which nobody has drawn
    trainer._load_rng_state(folder)
    return torch.rand(3).tolist()


def test_the_ranks_of_a_replica_resume_with_one_random_state(tmp_path):
    plain = run_on_ranks(draws_after_loading, 1, None, str(tmp_path))
    assert run_on_ranks(draws_after_loading, 2, 2, str(tmp_path)) == 2 * plain
