"""An optimizer that was built, and has stepped, before `prepare` continues as in one process."""

import pytest
import torch

from ..helpers.prepared import OPTIMIZERS, check_continues
from ..helpers.ranks import run_on_ranks
from ..helpers.sharded import MLP_PLAN, accelerator_for, build_mlp


@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_an_optimizer_built_before_prepare_continues_as_in_one_process(kind, steps_before, ranks):
    run_on_ranks(check_continues, ranks, kind, steps_before)


def factored_state():
    model = build_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[model.up.weight]["row"] = torch.zeros(model.up.weight.shape[0])
    accelerator_for(2, MLP_PLAN).prepare(model, optimizer)


def test_optimizer_state_that_cannot_be_cut_is_refused():
    for raised in run_on_ranks(factored_state, 2, expect_raise=True):
        assert raised.type_name == "ValueError" and "`row`" in raised.message
