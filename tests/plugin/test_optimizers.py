"""An optimizer that was built, and has stepped, before `prepare` continues as in one process."""

import pytest
import torch

from ..helpers.models import VOCABULARY, build_model
from ..helpers.prepared import OPTIMIZERS, check_continues
from ..helpers.ranks import run_on_ranks
from ..helpers.sharded import MLP_PLAN, accelerator_for, build_mlp
from ..helpers.training import make_accelerator


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


def with_a_parameter_of_the_loss(tp, folder):
    """A temperature that belongs to no prepared model is trained beside it, saved and loaded."""
    accelerator = make_accelerator(tp)
    model, temperature = build_model("llama"), torch.nn.Parameter(torch.tensor([1.5, 0.5]))
    optimizer = torch.optim.AdamW([*model.parameters(), temperature], lr=0.01)
    model, optimizer = accelerator.prepare(model, optimizer)
    losses = []
    for step in range(4):
        if step == 2:
            accelerator.save_state(folder)
            accelerator.wait_for_everyone()
            before = temperature.detach().clone()
            accelerator.load_state(folder)
            assert torch.equal(temperature, before)
        ids = torch.randint(0, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(step))
        loss = model(input_ids=ids, labels=ids).loss * temperature[0] + temperature[1] ** 2
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_([*model.parameters(), temperature], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses += [loss.item(), float(norm)]
    return losses, temperature.tolist()


def test_a_parameter_of_the_loss_is_trained_beside_the_model_as_under_plain_ddp(tmp_path):
    plain = run_on_ranks(with_a_parameter_of_the_loss, 2, None, str(tmp_path / "plain"))
    ours = run_on_ranks(with_a_parameter_of_the_loss, 4, 2, str(tmp_path / "tp"))
    for rank, (losses, temperature) in enumerate(ours):
        assert losses == pytest.approx(plain[rank // 2][0], rel=2e-4)
        assert temperature == pytest.approx(plain[rank // 2][1], rel=2e-4)
