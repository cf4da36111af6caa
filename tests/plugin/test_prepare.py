"""`prepare` takes several models, any order, and frozen parameters, and they train as under plain DDP."""

import gc
import weakref

import pytest
import torch

from accel_tp_ddp import full_state_dict

from ..helpers.compare import assert_tensors_close, relative_error
from ..helpers.models import build_model
from ..helpers.prepared import REPLICAS, inputs, plain_and_sharded, replica
from ..helpers.ranks import run_on_ranks
from ..helpers.sharded import MLP_PLAN, TOLERANCE, accelerator_for, build_mlp, token_batch


def two_models(tp, calls):
    """Two models that train on each other's output."""
    accelerator = accelerator_for(tp, MLP_PLAN)
    first, second = build_mlp(seed=1), build_mlp(seed=2)
    optimizers = [torch.optim.AdamW(each.parameters(), lr=0.01) for each in (first, second)]
    if calls == "one":
        first, second, *optimizers = accelerator.prepare(first, second, *optimizers)
    elif calls == "a call for each":
        first, optimizers[0] = accelerator.prepare(first, optimizers[0])
        second, optimizers[1] = accelerator.prepare(second, optimizers[1])
    else:
        first, second = accelerator.prepare(first), accelerator.prepare(second)
        optimizers = list(accelerator.prepare(*optimizers))
    losses = []
    for step in range(4):
        x = inputs(10 * step + replica(accelerator))
        hidden = first(x)
        loss = second(torch.cat([hidden, x[:, 3:]], 1)).square().mean() + hidden.mean()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_([*first.parameters(), *second.parameters()], 0.1)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(loss))
    return losses, full_state_dict(first), full_state_dict(second)


@REPLICAS
@pytest.mark.parametrize("calls", ["one", "a call for each", "models, then optimizers"])
def test_two_models_train_as_under_plain_ddp(calls, dp):
    plain, sharded = plain_and_sharded(two_models, dp, calls)
    for rank, (losses, first, second) in enumerate(sharded):
        wanted = plain[rank // 2]
        assert losses == pytest.approx(wanted[0], rel=TOLERANCE)
        assert_tensors_close(first, wanted[1], 1e-4)
        assert_tensors_close(second, wanted[2], 1e-4)


def ordered(tp, order):
    accelerator = accelerator_for(tp, MLP_PLAN)
    model = build_mlp()
    if order == "model alone, its optimizer later":
        model = accelerator.prepare(model)
        optimizer = accelerator.prepare(torch.optim.AdamW(model.parameters(), lr=0.01))
    elif order == "model alone, an earlier optimizer later":
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        model = accelerator.prepare(model)
        optimizer = accelerator.prepare(optimizer)
    elif order == "optimizer first":
        optimizer = accelerator.prepare(torch.optim.AdamW(model.parameters(), lr=0.01))
        model = accelerator.prepare(model)
    elif order == "optimizer before model in one call":
        optimizer, model = accelerator.prepare(torch.optim.AdamW(model.parameters(), lr=0.01), model)
    elif order == "prepare_model":
        model = accelerator.prepare_model(model)
        optimizer = accelerator.prepare_optimizer(torch.optim.AdamW(model.parameters(), lr=0.01))
    elif order == "evaluation first":
        model = accelerator.prepare_model(model, evaluation_mode=True)
        model.eval()
        with torch.no_grad():
            model(inputs(3))
        model.train()
        optimizer = accelerator.prepare(torch.optim.AdamW(model.parameters(), lr=0.01))
    else:  # one after the other
        former = accelerator.prepare(build_mlp(seed=5))
        accelerator.backward(former(inputs(1)).sum())
        alive = weakref.ref(accelerator.unwrap_model(former))
        (former,) = accelerator.free_memory(former)
        gc.collect()
        assert alive() is None, "the first model is still held"
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        model, optimizer = accelerator.prepare(model, optimizer)
    losses = []
    # Under plain DDP an evaluation model is never wrapped, so replicas are given the same there.
    offset = 0 if order == "evaluation first" else replica(accelerator)
    for step in range(4):
        loss = model(inputs(10 * step + offset)).square().mean()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses, full_state_dict(model)


@REPLICAS
@pytest.mark.parametrize(
    "order",
    [
        "model alone, its optimizer later",
        "model alone, an earlier optimizer later",
        "optimizer first",
        "optimizer before model in one call",
        "prepare_model",
        "evaluation first",
        "one after the other",
    ],
)
def test_any_order_of_preparing_trains_as_under_plain_ddp(order, dp):
    plain, sharded = plain_and_sharded(ordered, dp, order)
    for rank, (losses, weights) in enumerate(sharded):
        wanted, same = plain[rank // 2]
        assert losses == pytest.approx(wanted, rel=TOLERANCE)
        assert_tensors_close(weights, same, 1e-4)


def foreign_optimizer():
    accelerator = accelerator_for(2, MLP_PLAN)
    accelerator.prepare(build_mlp(), torch.optim.SGD(build_mlp().parameters(), lr=0.1))


def test_an_optimizer_of_another_model_is_refused():
    for raised in run_on_ranks(foreign_optimizer, 2, expect_raise=True):
        assert raised.type_name == "ValueError" and "SGD" in raised.message


FROZEN = {
    "embedding": lambda name: "embed" in name,
    "all but norms": lambda name: "norm" not in name,
    "first layer and embedding": lambda name: "embed" in name or "layers.0." in name,
    "all but one sharded": lambda name: name != "model.layers.0.mlp.down_proj.weight",
    "norms": lambda name: "norm" in name,
}


def frozen_run(tp, which):
    accelerator = accelerator_for(tp)
    model = build_model("qwen3")
    for name, param in model.named_parameters():
        param.requires_grad_(not FROZEN[which](name))
    optimizer = torch.optim.SGD([param for param in model.parameters() if param.requires_grad], lr=0.3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model, optimizer = accelerator.prepare(model, optimizer)
    losses, norms = [], []
    for step in range(3):
        loss = model(**token_batch(10 * step + replica(accelerator))).loss
        accelerator.backward(loss)
        norms.append(float(accelerator.clip_grad_norm_(model.parameters(), 1.0)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    state = full_state_dict(model)
    for name in state:
        assert torch.equal(state[name], before[name]) == FROZEN[which](name), name
    return losses, norms, state


@REPLICAS
@pytest.mark.parametrize("which", FROZEN)
def test_frozen_parameters_stay_and_the_others_train_as_under_plain_ddp(which, dp):
    plain, sharded = plain_and_sharded(frozen_run, dp, which)
    for rank, (losses, norms, state) in enumerate(sharded):
        wanted = plain[rank // 2]
        assert losses == pytest.approx(wanted[0], rel=TOLERANCE)
        assert norms == pytest.approx(wanted[1], rel=TOLERANCE)
        assert_tensors_close(state, wanted[2], 1e-4)


def frozen_model():
    accelerator = accelerator_for(2)
    model = build_model("llama").requires_grad_(False)
    reference = build_model("llama")(**token_batch()).logits
    prepared = accelerator.prepare_model(model, evaluation_mode=True)
    assert prepared is model, "nothing to average"
    return relative_error(prepared(**token_batch()).logits, reference)


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_wholly_frozen_model_computes_rightly(ranks):
    assert max(run_on_ranks(frozen_model, ranks)) < TOLERANCE
