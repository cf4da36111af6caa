"""A run that was saved at one tp x dp resumes at any other as if nothing had happened."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from ..helpers.compare import assert_tensors_close
from ..helpers.ranks import run_on_ranks
from ..helpers.resuming import LAYOUTS, MORE, SAVED_AFTER, Run, go_on_from, save_and_go_on

TOLERANCE = 2e-4  # relative, of losses
RUNS = {"shared heads, adamw": Run(1, "llama_one_key"), "packed shared heads, sgd": Run(1, "phi3_one_key", "sgd")}
#: The state of these has other shapes than the parameters.
WHOLE = {"adafactor": Run(1, optimizer="adafactor"), "momentum": Run(1, optimizer="adafactor_of_transformers")}
ALWAYS = {("adafactor", "2x2", "4x1"), ("adafactor", "1x1", "2x1"), ("momentum", "2x1", "1x2")}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return tmp_path_factory.mktemp("states")


@pytest.fixture(scope="module")
def saved(folders):
    @cache
    def at(which, layout):
        tp, dp = LAYOUTS[layout]
        folder = folders / f"{which}-{layout}".replace(", ", "-")
        return folder, run_on_ranks(save_and_go_on, tp * dp, (RUNS | WHOLE)[which].with_tp(tp), str(folder))

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
def test_a_run_resumes_at_any_other_layout(saved, loaded, which, here, there):
    number = list(LAYOUTS).index(here)
    assert_goes_on(saved(which, here)[1], [records[number] for records in loaded(which, there)], here, there)


@pytest.mark.parametrize(
    "which, here, there",
    [
        pytest.param(*run, marks=() if run in ALWAYS else pytest.mark.slow)
        for run in ((which, here, there) for which in WHOLE for here in LAYOUTS for there in LAYOUTS)
    ],
)
def test_a_run_with_factored_optimizer_state_resumes_at_any_other_layout(saved, which, here, there):
    folder, records = saved(which, here)
    (tp, dp), run = LAYOUTS[there], WHOLE[which].with_tp(LAYOUTS[there][0])
    resumed = run_on_ranks(go_on_from, tp * dp, run, [str(folder)])
    assert any("row" in name for name in records[0].state)
    assert_goes_on(records, [record for (record,) in resumed], here, there)


def assert_goes_on(uninterrupted, resumed, here, there):
    first = uninterrupted[0]
    assert len(first.losses) == SAVED_AFTER + MORE
    for rank, record in enumerate(resumed):
        assert record.same_objects, f"rank {rank}: load_state has replaced parameters"
        assert_tensors_close(record.weights, first.weights, 1e-6)
        assert_tensors_close(record.state, first.state, 1e-6)
        if rank == 0 or not all(name.startswith("1x") for name in (here, there)):
            assert record.step == first.step  # Accelerate's own, from 1x1 to 1x2: the second rank begins at zero
        assert record.learning_rates == pytest.approx(first.learning_rates[SAVED_AFTER:])
        torch.testing.assert_close(record.losses, first.losses[SAVED_AFTER:], rtol=TOLERANCE, atol=0)
