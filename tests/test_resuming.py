"""A run that was saved at one tp x dp goes on at any other as if nothing had happened."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from .compare import assert_tensors_close
from .ranks import run_on_ranks
from .resuming import LAYOUTS, MORE, SAVED_AFTER, Run, go_on_from, save_and_go_on

TOLERANCE = 2e-4  # relative, of losses
RUNS = {"shared heads, adamw": Run(1, "llama_one_key"), "phi3, sgd": Run(1, "phi3", "sgd")}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return tmp_path_factory.mktemp("states")


@pytest.fixture(scope="module")
def saved(folders):
    @cache
    def at(which, layout):
        tp, dp = LAYOUTS[layout]
        folder = folders / f"{which}-{layout}".replace(", ", "-")
        return folder, run_on_ranks(save_and_go_on, tp * dp, RUNS[which].with_tp(tp), str(folder))

    return at


@pytest.fixture(scope="module")
def loaded(saved):
    @cache
    def at(which, layout):
        tp, dp = LAYOUTS[layout]
        states = [str(saved(which, other)[0]) for other in LAYOUTS]
        return run_on_ranks(go_on_from, tp * dp, RUNS[which].with_tp(tp), states)

    return at


@pytest.mark.parametrize("there", LAYOUTS)
@pytest.mark.parametrize("here", LAYOUTS)
@pytest.mark.parametrize("which", RUNS)
def test_a_run_goes_on_at_any_other_layout(saved, loaded, which, here, there):
    (first, *_), records = saved(which, here)[1], loaded(which, there)
    assert len(first.losses) == SAVED_AFTER + MORE
    number = list(LAYOUTS).index(here)
    for rank, record in enumerate(per_folder[number] for per_folder in records):
        assert record.same_objects, f"rank {rank}: load_state has replaced parameters"
        assert_tensors_close(record.weights, first.weights, 1e-6)
        assert_tensors_close(record.state, first.state, 1e-6)
        if rank == 0 or not all(name.startswith("1x") for name in (here, there)):
            assert record.step == first.step  # Accelerate's own, from 1x1 to 1x2: the second rank begins at zero
        assert record.learning_rates == pytest.approx(first.learning_rates[SAVED_AFTER:])
        torch.testing.assert_close(record.losses, first.losses[SAVED_AFTER:], rtol=TOLERANCE, atol=0)
