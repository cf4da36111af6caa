"""recipes/compare_runs.py: where runs part, from what Trainer, a list or a line a step says."""

import importlib.util
import json

import pytest

from recipes.compare_runs import main

STEPS = range(1, 31)
LOSSES = [4.0 / step**0.5 for step in STEPS]


def written(folder, name, losses, form="lists"):
    path = folder / f"{name}.json"
    rows = [{"step": s, "loss": x, "grad_norm": 2 * x, "learning_rate": 1e-3} for s, x in zip(STEPS, losses)]
    if form == "trainer":
        path.write_text(json.dumps({"log_history": [*rows, {"step": 30, "eval_loss": 1.0}]}))
    elif form == "lines":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        path.write_text(
            json.dumps({"losses": losses, "norms": [2 * x for x in losses], "rates": [1e-3] * len(losses)})
        )
    return str(path)


@pytest.mark.parametrize("form", ["lists", "trainer", "lines"])
def test_runs_that_agree_and_runs_that_part(form, tmp_path, capsys):
    near = [x * (1 + 1e-5) for x in LOSSES]
    far = [x * (1.01 if step >= 17 else 1) for step, x in zip(STEPS, LOSSES)]
    paths = [written(tmp_path, name, losses, form) for name, losses in (("a", LOSSES), ("b", near), ("c", far))]
    out = str(tmp_path / "runs.png")
    assert main([*paths[:2], "--names", "plain", "near", "--out", out]) == 0
    assert "near: loss: as plain over 30 steps, at most 1.0e-05 apart" in capsys.readouterr().out
    assert main([*paths, "--names", "plain", "near", "far", "--out", out]) == 1
    told = capsys.readouterr().out
    assert (
        "far: loss: parts from plain at step 17" in told and "far: gradient norm: parts from plain at step 17" in told
    )
    assert "far: learning rate: as plain over 30 steps" in told
    if importlib.util.find_spec("matplotlib"):
        assert (tmp_path / "runs.png").read_bytes().startswith(b"\x89PNG")


def test_a_loss_that_is_no_number_parts(tmp_path, capsys):
    paths = [written(tmp_path, "a", LOSSES), written(tmp_path, "b", [*LOSSES[:-1], float("nan")])]
    assert main([*paths, "--names", "a", "b", "--out", str(tmp_path / "runs.png")]) == 1
    assert "b: loss: parts from a at step 30: nan" in capsys.readouterr().out


@pytest.mark.parametrize("text, said", [("{", "neither JSON"), ("{}", "has none of: loss"), (None, "cannot be read")])
def test_bad_input_is_one_line(text, said, tmp_path, capsys):
    bad = tmp_path / "bad.json"
    if text is not None:
        bad.write_text(text)
    assert main([written(tmp_path, "a", LOSSES), str(bad)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and said in lines[0]


def test_one_run_is_bad_input(tmp_path):
    assert main([written(tmp_path, "a", LOSSES)]) == 2
