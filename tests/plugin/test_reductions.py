"""The rest of Accelerate's calls: each gives what plain DDP on dp ranks gives."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.local_sgd import LocalSGD
from accelerate.utils import GradScalerKwargs, set_seed

from accel_tp_ddp import TensorParallelDDPPlugin, grad_scaler

from ..helpers.compare import assert_tensors_close
from ..helpers.faults import injected
from ..helpers.models import VOCABULARY, build_model
from ..helpers.ranks import run_on_ranks
from ..helpers.training import make_accelerator


def split(tp: int | None, padding: bool):
    accelerator = make_accelerator(tp)
    parts = []
    for inputs in (list(range(7)), torch.arange(7), {"a": list(range(5)), "b": list("vwxyz")}):
        with accelerator.split_between_processes(
            inputs, apply_padding=padding and not isinstance(inputs, dict)
        ) as part:
            parts.append(part.tolist() if isinstance(part, torch.Tensor) else part)
    return parts


@pytest.mark.parametrize("padding", [False, True])
def test_inputs_are_split_between_replicas(padding):
    plain = run_on_ranks(split, 2, None, padding)
    assert plain[0] != plain[1]
    assert run_on_ranks(split, 4, 2, padding) == [plain[0], plain[0], plain[1], plain[1]]


def numbers(tp: int | None):
    accelerator = make_accelerator(tp)
    replica = accelerator.process_index
    value = torch.tensor(float(replica + 1))
    objects = [replica, accelerator.process_index == 0]
    if accelerator.process_index == accelerator.num_processes - 1:
        accelerator.set_trigger()
    lengths = accelerator.pad_across_processes(torch.ones(replica + 1, 2), dim=0).shape
    from accelerate.utils import broadcast_object_list

    return {
        "mean": accelerator.gather(value).mean().item(),
        "mean of reduce": accelerator.reduce(value, "mean").item(),
        "sum over processes": accelerator.reduce(value, "sum").item() / accelerator.num_processes,
        "padded": tuple(lengths),
        "broadcast": broadcast_object_list(list(objects)),
        "trigger": accelerator.check_trigger(),
    }


def test_means_triggers_padding_and_broadcasts_are_those_of_plain_ddp():
    plain = run_on_ranks(numbers, 2, None)
    for rank, result in enumerate(run_on_ranks(numbers, 4, 2)):
        assert result == plain[rank // 2]


def local_sgd(tp: int | None):
    accelerator = make_accelerator(tp)
    set_seed(0)
    model = build_model("llama")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    replica = accelerator.process_index
    with LocalSGD(accelerator=accelerator, model=model, local_sgd_steps=2) as local:
        for index in range(4):
            generator = torch.Generator().manual_seed(10 * index + replica)
            ids = torch.randint(0, VOCABULARY, (2, 8), generator=generator)
            with accelerator.no_sync(model):
                model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            local.step()
    return accelerator.get_state_dict(model)


def test_local_sgd_averages_over_replicas_only():
    plain, sharded = run_on_ranks(local_sgd, 2, None), run_on_ranks(local_sgd, 4, 2)
    assert_tensors_close(sharded[0], plain[0], 1e-5)


def overflow(rank_with_inf: int):
    accelerator = make_accelerator(2)
    model = build_model("llama")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    scaler = grad_scaler(accelerator.torch_device_mesh, device="cpu", init_scale=2.0**10, growth_interval=1)
    scales, moved = [], []
    for index in range(3):
        before = [param.detach().clone() for param in model.parameters()]
        ids = torch.randint(0, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(index))
        scaler.scale(model(input_ids=ids, labels=ids).loss).backward()
        if index == 1 and accelerator.tensor_parallel_rank == rank_with_inf:
            next(param for param in model.parameters() if param.tp_shard is not None).grad.view(-1)[0] = float("inf")
        scaler.step(optimizer.optimizer)
        scaler.update()
        optimizer.optimizer.zero_grad()
        scales.append(scaler.get_scale())
        moved.append(any(not torch.equal(a, b) for a, b in zip(before, model.parameters())))
    return scales, moved


@pytest.mark.parametrize("rank", [0, 1])
def test_an_overflow_on_one_rank_skips_the_step_on_all_of_them(rank):
    results = run_on_ranks(overflow, 2, rank)
    assert results[0] == results[1]
    scales, moved = results[0]
    assert moved == [True, False, True]
    assert scales == [2.0**11, 2.0**10, 2.0**11]


def prepared_overflow(rank_with_inf: int | None, fault: str | None = None):
    """As a script meets it: through the accelerator's own optimizer, clipping and scheduler."""
    options = {"init_scale": 2.0**10, "growth_interval": 1}
    accelerator = make_accelerator(2, kwargs_handlers=[GradScalerKwargs(**options)])
    accelerator.scaler = torch.amp.GradScaler("cpu", **options)  # Accelerate makes one for fp16, but not on the CPU
    model = build_model("qwen3")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    with injected(fault):
        model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
        return scaled_steps(accelerator, model, optimizer, scheduler, rank_with_inf)


def scaled_steps(accelerator, model, optimizer, scheduler, rank_with_inf):
    history = []
    for index in range(4):
        ids = torch.randint(0, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(index))
        accelerator.backward(model(input_ids=ids, labels=ids).loss)
        if index in (1, 2) and dist.get_rank() == rank_with_inf:
            sharded = next(param for param in model.parameters() if param.tp_shard is not None)
            sharded.grad.view(-1)[0] = float("nan") if index == 2 else float("inf")
        if index != 1:  # with clipping, which unscales, and without
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
        before = [param.detach().clone() for param in model.parameters()]
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        moved = any(not torch.equal(a, b) for a, b in zip(before, model.parameters()))
        history.append(
            (
                accelerator.optimizer_step_was_skipped,
                accelerator.scaler.get_scale(),
                moved,
                scheduler.get_last_lr()[0],
                *({int(state["step"]) for state in optimizer.state.values()} if index else ()),
            )
        )
    return history


@pytest.mark.parametrize("rank", [0, 1])
def test_a_skipped_step_is_reported_on_every_rank_and_scales_stay_equal(rank):
    plain = run_on_ranks(prepared_overflow, 2, None)[0]
    results = run_on_ranks(prepared_overflow, 2, rank)
    assert results[0] == results[1]
    history = results[0]
    assert [skipped for skipped, *_ in history] == [False, True, True, False] != [skipped for skipped, *_ in plain]
    assert [moved for _, _, moved, *_ in history] == [True, False, False, True]
    assert [scale for _, scale, *_ in history] == [2.0**11, 2.0**10, 2.0**9, 2.0**10]
    rates = [rate for _, _, _, rate, *_ in history]
    assert rates[0] == rates[1] == rates[2] > rates[3], "the schedule waits for a skipped step"


def test_without_an_agreement_one_rank_steps_and_its_peer_does_not():
    first, second = run_on_ranks(prepared_overflow, 2, 1, "overflow on one rank")
    assert [skipped for skipped, *_ in first] != [skipped for skipped, *_ in second]
    assert [scale for _, scale, *_ in first] != [scale for _, scale, *_ in second]


IMPLEMENTATIONS = {"foreach": {"foreach": True}, "for-loop": {"foreach": False}, "fused": {"fused": True}}


def overflow_in_one_gradient(tp: int | None, rank_with_inf: int):
    """For each implementation of AdamW, unscaled before the step or by it; the overflow is in one rank's backward."""
    results = {}
    for name, options in IMPLEMENTATIONS.items():
        for unscales in (True, False):
            accelerator = make_accelerator(tp)
            accelerator.scaler = scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1)
            set_seed(0)
            model = build_model("llama")
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-5, **options)
            model, optimizer = accelerator.prepare(model, optimizer)
            assert accelerator.scaler is scaler, "whoever holds it, holds the one that is used"
            scales, moved = [], []
            for index in range(3):
                before = [param.detach().clone() for param in model.parameters()]
                seed = 10 * index + accelerator.process_index
                ids = torch.randint(0, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(seed))
                handles = []
                if index == 1 and dist.get_rank() == rank_with_inf:
                    weight = next(p for n, p in model.named_parameters() if n.endswith("0.mlp.up_proj.weight"))
                    handles = [weight.register_hook(lambda gradient: torch.full_like(gradient, float("inf")))]
                accelerator.backward(model(input_ids=ids, labels=ids).loss)
                for handle in handles:
                    handle.remove()
                if unscales:
                    accelerator.unscale_gradients()
                optimizer.step()
                optimizer.zero_grad()
                scales.append(scaler.get_scale())
                moved.append(any(not torch.equal(a, b) for a, b in zip(before, model.parameters())))
            results[name, unscales] = scales, moved, accelerator.get_state_dict(model)
    return results


@pytest.mark.parametrize("rank", [1, 2])
def test_an_overflow_of_one_rank_is_one_of_all_replicas_in_every_implementation(rank):
    plain = run_on_ranks(overflow_in_one_gradient, 2, None, rank // 2)
    sharded = run_on_ranks(overflow_in_one_gradient, 4, 2, rank)
    assert len(plain[0]) == 6
    for case, (scales, moved, weights) in plain[0].items():
        assert moved == [True, False, True] and scales == [2.0**11, 2.0**10, 2.0**11]
        for results in sharded:
            assert results[case][:2] == (scales, moved), f"{case}"
        assert_tensors_close(sharded[0][case][2], weights, 1e-5)


def step_without_gradients(tp: int | None):
    accelerator = make_accelerator(tp)
    accelerator.scaler = torch.amp.GradScaler("cpu")
    model = build_model("llama")
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    accelerator.scaler.scale(torch.zeros(()))
    optimizer.step()


def test_a_scaled_step_without_gradients_is_the_error_that_it_is_without_tensor_parallelism():
    plain = run_on_ranks(step_without_gradients, 1, None, expect_raise=True)
    sharded = run_on_ranks(step_without_gradients, 2, 2, expect_raise=True)
    assert {(raised.type_name, raised.message) for raised in [*plain, *sharded]} == {
        ("AssertionError", "No inf checks were recorded for this optimizer.")
    }


class Shampoo(torch.optim.SGD):
    """By its name."""


def refuse(name: str, order: str):
    accelerator = Accelerator(parallelism_config=TensorParallelDDPPlugin(tp_size=2))
    model = build_model("llama")
    optimizer = {"LBFGS": torch.optim.LBFGS, "Shampoo": Shampoo}[name](model.parameters(), lr=1e-3)
    if order == "together":
        accelerator.prepare(model, optimizer)
    elif order == "optimizer first":
        optimizer = accelerator.prepare(optimizer)
        accelerator.prepare(model)
    elif order == "optimizer later":
        accelerator.prepare(model)
        accelerator.prepare(optimizer)
    else:
        accelerator.prepare_model(model)
        accelerator.prepare_optimizer(optimizer)


@pytest.mark.parametrize(
    "name, order",
    [
        ("Shampoo", "together"),
        ("LBFGS", "together"),
        ("Shampoo", "optimizer first"),
        ("LBFGS", "optimizer later"),
        ("Shampoo", "by prepare_optimizer"),
    ],
)
def test_optimizers_that_need_full_matrices_are_refused_by_name(name, order):
    for error in run_on_ranks(refuse, 2, name, order, expect_raise=True):
        assert error.type_name == "ValueError"
        assert f"the optimizer {name} works on full matrices" in error.message and "AdamW" in error.message
        assert f"register_whole_step({name})" in error.message
