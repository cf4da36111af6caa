"""Optimizers whose step looks at full matrices do under tensor parallelism what they do without it."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import CommDebugMode
from transformers.optimization import Adafactor

from accel_tp_ddp import full_state_dict, register_whole_step
from accel_tp_ddp.training.full_tensor_step import FullTensorStep, deal, steps_on_full_tensors
from accel_tp_ddp.training.optimizer import full_optimizer_state as trainers_optimizer_state

from ..helpers.compare import assert_tensors_close, relative_errors
from ..helpers.faults import STEP_FAULTS, train_with
from ..helpers.models import build_model
from ..helpers.plain import plain_ddp
from ..helpers.ranks import run_on_ranks
from ..helpers.training import TOLERANCE, Spec, assert_same_run, differences, make_accelerator, train

RUNS = {
    "adafactor, tied": (Spec("llama", tied=True, optimizer="adafactor"), 2, 2),
    "adafactor, packed": (Spec("phi3", optimizer="adafactor"), 4, 1),
    "with momentum, shared heads": (Spec("llama_one_key", optimizer="adafactor_of_transformers"), 2, 2),
}


@pytest.mark.parametrize("which", RUNS)
def test_adafactor_is_that_of_plain_ddp(which):
    spec, tp, dp = RUNS[which]
    actual = run_on_ranks(train, tp * dp, replace(spec, tp=tp))
    assert_same_run(actual, plain_ddp(spec, dp))
    assert len(actual[0].losses) == 6


@pytest.mark.parametrize("fault", STEP_FAULTS)
def test_adafactor_on_shards_is_another_run_than_plain_ddp(fault):
    spec, tp, dp = RUNS["adafactor, tied"]
    off = differences(run_on_ranks(train_with, tp * dp, fault, replace(spec, tp=tp)), plain_ddp(spec, dp))
    assert off["losses"] > 10 * TOLERANCE, off


# --- others ----------------------------------------------------------------------------------------------------------


class Lamb(torch.optim.Optimizer):
    """Steps in proportion to the norm of the parameter (arXiv:1904.00962), and counts its steps by group."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr, "step": 0})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            group["step"] += 1
            for param in group["params"]:
                if param.grad is None:
                    continue
                mean = self.state[param].setdefault("mean", torch.zeros_like(param))
                mean.lerp_(param.grad, 0.5)
                update = mean / (1 - 0.5 ** group["step"])
                param -= group["lr"] * update * (param.norm() / update.norm())
        return loss


def build_optimizer(kind, model):
    matrices = [param for param in model.parameters() if param.ndim == 2]
    if kind == "Muon":
        return torch.optim.Muon(matrices, lr=0.1)
    half = len(matrices) // 2
    others = [param for param in model.parameters() if param.ndim != 2]
    return register_whole_step(Lamb)([{"params": matrices[:half]}, {"params": [*matrices[half:], *others]}], lr=0.1)


def several_steps(kind, with_closure):
    """How far the weights are off those of the unsharded model, and how far they have gone."""
    model, reference = build_model("llama_one_key"), build_model("llama_one_key")
    start = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    own, other = build_optimizer(kind, model), build_optimizer(kind, reference)
    schedule = torch.optim.lr_scheduler.ConstantLR(own)  # wraps `step`
    accelerator = make_accelerator(2)
    model, prepared = accelerator.prepare(model, own)
    params, seen = list(model.parameters()), []
    own.register_step_pre_hook(lambda *args: seen.append("pre"))
    own.register_step_post_hook(lambda *args: seen.append("post"))
    torch.optim.lr_scheduler.ConstantLR(other)
    tokens = torch.arange(1, 25).view(2, 12)

    def take_step(model, optimizer):
        def closure():
            optimizer.zero_grad()
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            return loss

        if with_closure:
            return optimizer.step(closure).item()
        loss = closure().item()
        optimizer.step()
        return loss

    for _ in range(3):
        losses = take_step(model, own), take_step(reference, other)
        assert abs(losses[0] / losses[1] - 1) < 2e-3  # which Muon on shards is not
        assert all(param.grad is not None and param.grad.shape == param.shape for param in model.parameters())
    assert seen == ["pre", "post"] * 3
    assert [id(param) for param in model.parameters()] == [id(param) for param in params]
    assert set(own.state) == {param for group in own.param_groups for param in group["params"]}
    assert kind == "Muon" or [group["step"] for group in own.param_groups] == [3, 3]
    assert steps_on_full_tensors(prepared) and schedule.optimizer is own
    full, expected = full_state_dict(model), reference.state_dict()
    moved = relative_errors(expected, start)
    return max(relative_errors(full, expected).values()), max(moved.values())


@pytest.mark.parametrize("kind, with_closure", [("Lamb", False), ("Lamb", True), ("Muon", False)])
def test_a_registered_optimizer_steps_on_full_tensors(kind, with_closure):
    for off, moved in run_on_ranks(several_steps, 2, kind, with_closure):
        assert moved > 0.05
        assert off < (1e-2 if kind == "Muon" else 1e-5)  # Muon orthogonalizes in bfloat16


def failing_step():
    """A step that raises leaves gradients and state where a next step finds them."""
    accelerator = make_accelerator(2)
    model = build_model("llama")
    optimizer = build_optimizer("Lamb", model)
    model, optimizer = accelerator.prepare(model, optimizer)
    tokens = torch.arange(1, 25).view(2, 12)
    model(input_ids=tokens, labels=tokens).loss.backward()
    group = optimizer.optimizer.param_groups[1]
    group["lr"], lr = "much", group["lr"]
    for _ in range(2):
        try:
            optimizer.step()
            raise AssertionError("no error")
        except TypeError:
            pass
        assert len(optimizer.optimizer.param_groups) == 2
    group["lr"] = lr
    before = {name: tensor.clone() for name, tensor in full_state_dict(model).items()}
    optimizer.step()
    return min(relative_errors(full_state_dict(model), before).values())


def test_a_full_tensor_step_that_raises_can_be_taken_again():
    assert min(run_on_ranks(failing_step, 2)) > 1e-3


def full_state_and_back():
    """`optimizer.state_dict()` of the unsharded model goes in, and comes out, whole."""
    reference = build_model("llama")
    options = {"lr": 0.1, "relative_step": False, "beta1": 0.9}  # with a momentum of the parameter's shape
    optimizer = Adafactor(reference.parameters(), **options)
    tokens = torch.arange(1, 25).view(2, 12)
    reference(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    model = build_model("llama")
    other = Adafactor(model.parameters(), **options)
    make_accelerator(2).prepare(model, other)
    other.load_state_dict(optimizer.state_dict())
    wanted = optimizer.state_dict()["state"]
    assert any(state["exp_avg"].ndim == 2 for state in wanted.values())
    for got in (other.state_dict()["state"], trainers_optimizer_state(other)["state"]):
        for number in wanted:
            ours, theirs = ({k: torch.as_tensor(v) for k, v in s[number].items()} for s in (got, wanted))
            assert_tensors_close(ours, theirs, 0.0)


def test_a_full_optimizer_state_of_plain_ddp_is_loaded_unchanged():
    run_on_ranks(full_state_and_back, 2)


def test_only_optimizers_can_be_registered_for_full_tensor_steps():
    with pytest.raises(TypeError, match="subclass of torch.optim.Optimizer, not 3"):
        register_whole_step(3)
    assert not steps_on_full_tensors(torch.optim.SGD([torch.zeros(1)])) and FullTensorStep.__doc__


# --- dealing out -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes, ranks", [([5, 4, 3, 3, 1], 2), ([1] * 7, 4), ([9], 3), ([], 2), ([0, 0, 4, 4], 2)])
def test_matrices_are_dealt_out_by_size(sizes, ranks):
    owners = deal(sizes, ranks)
    loads = [sum(size for size, owner in zip(sizes, owners) if owner == rank) for rank in range(ranks)]
    assert len(owners) == len(sizes) and sum(loads) == sum(sizes)
    assert max(loads) - min(loads) <= max(sizes, default=0)


def dealt(kind, steps):
    """What each rank has stepped on, what was sent for it, and whether the ranks have the same afterwards."""
    model = build_model("llama_one_key")
    optimizer = build_optimizer(kind, model)
    accelerator = make_accelerator(2)
    model, _ = accelerator.prepare(model, optimizer)
    stock, taken = type(optimizer).step, []

    def step(self, closure=None):
        taken.extend(
            param.numel() for group in self.param_groups for param in group["params"] if param.grad is not None
        )
        return stock(self, closure)

    tokens, sent = torch.arange(1, 25).view(2, 12), []
    with mock.patch.object(type(optimizer), "step", step):
        for _ in range(steps):
            optimizer.zero_grad()
            model(input_ids=tokens, labels=tokens).loss.backward()
            taken.clear()
            with CommDebugMode() as mode:
                FullTensorStep._before(full_tensor_step(optimizer), optimizer, (optimizer,), {})
            sent.append({operation.__name__: count for operation, count in mode.get_comm_counts().items()})
            full_tensor_step(optimizer)._give_back()
    params = [param for group in optimizer.param_groups for param in group["params"] if param.tp_shard is not None]
    sharded = [param for param in params if param.tp_shard.is_sharded]
    states = [sorted((key, value.double().sum().item()) for key, value in optimizer.state[p].items()) for p in sharded]
    return taken, sent, states, sum(param.tp_shard.global_shape.numel() for param in sharded), len(sharded)


def full_tensor_step(optimizer):
    (found,) = (
        hook.__self__
        for hook in optimizer._optimizer_step_pre_hooks.values()
        if isinstance(getattr(hook, "__self__", None), FullTensorStep)
    )
    return found


@pytest.mark.parametrize("kind", ["Muon", "Lamb"])
def test_each_rank_steps_on_its_share_of_the_matrices(kind):
    ranks = run_on_ranks(dealt, 2, kind, 2)
    (first, _, states, elements, count), (second, _, other_states, *_) = ranks
    assert sum(first) + sum(second) == elements and len(first) + len(second) == count > 10
    assert abs(sum(first) - sum(second)) <= max(first + second)
    assert states == other_states and all(states)
    for _, sent, *_ in ranks:  # whatever the number of matrices: flags, there and back, errors, and two ranks' states
        assert sent == [{"allreduce_": 1, "alltoall_base_": 2, "_allgather_base_": 2, "broadcast_": 2}] * 2


class Refusal(Exception):
    def __init__(self, name, reason):  # which cannot be pickled and read again
        super().__init__(f"{name} {reason}")


FAILURES = {"common": ZeroDivisionError("no such number"), "cannot be sent": Refusal("this", "is not")}


class OnOneRank(Lamb):
    failure: Exception | None = None

    def step(self, closure=None):
        if self.failure is not None:
            raise self.failure
        return super().step(closure)


def failing_on_one_rank(failure):
    """An error of one rank's share is raised by the others too, and the next step goes on from what there is."""
    accelerator = make_accelerator(2)
    model = build_model("llama")
    made = register_whole_step(OnOneRank)(model.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, made)
    tokens = torch.arange(1, 25).view(2, 12)
    model(input_ids=tokens, labels=tokens).loss.backward()
    if accelerator.tensor_parallel_rank == 1:
        made.failure = FAILURES[failure]
    try:
        optimizer.step()
    except Exception as error:
        raised = type(error).__name__, str(error)
    made.failure = None
    assert all(param.grad is not None for param in model.parameters())
    optimizer.step()
    return raised, {name: tensor.sum().item() for name, tensor in full_state_dict(model).items()}


@pytest.mark.parametrize(
    "failure, elsewhere",
    [
        ("common", ("ZeroDivisionError", "no such number")),
        ("cannot be sent", ("RuntimeError", "Refusal: this is not")),
    ],
)
def test_an_error_of_one_ranks_share_is_raised_on_all(failure, elsewhere):
    (raised, weights), (own, others) = run_on_ranks(failing_on_one_rank, 2, failure)
    assert raised == elsewhere and own == (type(FAILURES[failure]).__name__, str(FAILURES[failure]))
    assert weights == others


class Noisy(Lamb):
    def step(self, closure=None):
        for group in self.param_groups:
            torch.rand(len(group["params"]) * (1 + dist.get_rank()))
        return super().step(closure)


def drawing():
    model = build_model("llama")
    optimizer = register_whole_step(Noisy)(model.parameters(), lr=0.1)
    model, optimizer = make_accelerator(2).prepare(model, optimizer)
    tokens = torch.arange(1, 25).view(2, 12)
    model(input_ids=tokens, labels=tokens).loss.backward()
    full_tensor_step(optimizer.optimizer)._before(optimizer.optimizer, (optimizer.optimizer,), {})
    return torch.rand(3).tolist()


def test_a_step_that_draws_leaves_the_ranks_with_one_random_state():
    first, second = run_on_ranks(drawing, 2)
    assert first == second
