"""The host runs ahead of the device: a step under tensor parallelism waits for it no more often than one without."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from peft.tuners.trainable_tokens import TrainableTokensLayer

from accel_tp_ddp import TensorParallelDDPPlugin
from accel_tp_ddp.training.drift import DriftGuard
from accel_tp_ddp.training.same_batch import watch_batches

from ..helpers.drifting import prepare
from ..helpers.host import HostWaits
from ..helpers.models import build_model
from ..helpers.ranks import run_on_ranks
from ..helpers.sharded import token_batch, tp_mesh


@pytest.mark.parametrize(
    "wait",
    [
        lambda value: value.sum().item(),
        lambda value: value.tolist(),
        lambda value: bool(value.any()),
        lambda value: int(value.sum()),
        lambda value: value.cpu(),
        lambda value: value[value > 0],
        lambda value: torch.tensor([1, 2]),
        lambda value: torch.equal(value, value),
    ],
)
def test_what_waits_is_counted(wait):
    with HostWaits() as waits:
        (torch.ones(3) * 2).sum()
        wait(torch.ones(3))
    assert len(waits.calls) == 1


def waits_of_a_comparison():
    _, model, optimizer = prepare("llama_one_key", replica_check_steps=0)
    model(**token_batch()).loss.backward()
    optimizer.step()
    guard = DriftGuard(tp_mesh(2), 0, "heal")
    guard.add(model)
    compared = len(list(guard._replicated(optimizer.optimizer)))
    with HostWaits() as waits:
        assert guard.compare(optimizer.optimizer) == []
    return compared, waits.calls


def test_a_comparison_waits_once_whatever_it_compares():
    for compared, waits in run_on_ranks(waits_of_a_comparison, 2):
        assert compared > 30
        assert waits == ["tolist"]


def waits_of_a_batch():
    model = torch.nn.Linear(4, 4)
    watch_batches(model, tp_mesh(2), 1)
    model.forward = lambda *args, **kwargs: None
    with HostWaits() as waits:
        model(*(torch.ones(3) for _ in range(6)))
    return waits.calls


def test_a_comparison_of_batches_waits_once():
    assert run_on_ranks(waits_of_a_batch, 2) == [["tolist"]] * 2


def waits_of_a_step(architecture, tp):
    options = {"parallelism_config": TensorParallelDDPPlugin(tp_size=tp)} if tp else {}
    accelerator = Accelerator(**options)
    model = build_model(architecture)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    found = []
    for _ in range(3):
        with HostWaits() as waits:
            accelerator.backward(model(**token_batch()).loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        found.append(waits.calls)
    return found


@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe", "gpt2", "llama_one_key"])
def test_a_step_waits_as_often_as_without_tensor_parallelism(architecture):
    plain = run_on_ranks(waits_of_a_step, 1, architecture, None)[0]
    for first, *sharded in run_on_ranks(waits_of_a_step, 2, architecture, 2):
        assert sharded == plain[1:]
        assert len(first) > len(plain[0])  # the batch is compared in the first step


def waits_of_trained_tokens(tied):
    model = get_peft_model(build_model("llama", tied=tied), LoraConfig(trainable_token_indices=[1, 2, 130], r=2))
    plain, batch = copy.deepcopy(model), token_batch()
    sharded = Accelerator(parallelism_config=TensorParallelDDPPlugin(tp_size=2)).prepare(model)
    with torch.inference_mode():
        sharded(**batch)  # which may leave nothing behind that a backward cannot use
    sharded(**batch).loss.backward()
    with HostWaits() as waits:
        sharded(**batch)
    with HostWaits() as waits_of_plain:
        plain(**batch)
    layers = [
        module for each in (sharded, plain) for module in each.modules() if isinstance(module, TrainableTokensLayer)
    ]
    for layer in layers:
        layer.token_indices = {name: [3, 4, 5] for name in layer.token_indices}
    assert len(layers) == 2 * (1 + tied)
    torch.testing.assert_close(sharded(**batch).loss, plain(**batch).loss)
    return waits.calls, waits_of_plain.calls


@pytest.mark.parametrize("tied", [False, True])
def test_trained_tokens_are_sent_to_the_device_once(tied):
    for waits, plain in run_on_ranks(waits_of_trained_tokens, 2, tied):
        assert len(plain) - len(waits) == 1 + tied, (waits, plain)
