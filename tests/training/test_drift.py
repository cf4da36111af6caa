"""What is replicated over tensor-parallel ranks stays equal bit by bit, and is watched."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator

from accel_tp_ddp import TensorParallelDDPPlugin
from accel_tp_ddp.training.drift import ReplicaGuard, checksum, is_replicated

from ..helpers.models import build_model
from ..helpers.ranks import run_on_ranks
from ..helpers.training import SyntheticTokens, make_optimizer


def prepare(architecture="qwen3", **options):
    accelerator = Accelerator(parallelism_config=TensorParallelDDPPlugin(tp_size=2, **options))
    model = build_model(architecture)
    optimizer = make_optimizer(model)
    return accelerator, *accelerator.prepare(model, optimizer)


def step(accelerator, model, optimizer, index=0):
    samples = SyntheticTokens(4, seed=10 + index + 100 * accelerator.data_parallel_rank)
    batch = {name: torch.stack([sample[name] for sample in samples]) for name in ("input_ids", "labels")}
    accelerator.backward(model(**batch).loss)
    optimizer.step()
    optimizer.zero_grad()


def replicated_checksums(model, optimizer):
    params = [param for param in model.parameters() if is_replicated(param)]
    states = [value for param in params for value in optimizer.state[param].values()]
    return [int(checksum(tensor)) for tensor in [*params, *states]]


def noisy_gradients(guarded: bool):
    """Every rank's gradients get other last bits, as from kernels that add in varying order."""
    if not guarded:
        ReplicaGuard.agree_on_gradients = lambda self, optimizer: None
    accelerator, model, optimizer = prepare(replica_check_steps=0)
    noise = torch.Generator().manual_seed(dist.get_rank())
    for param in model.parameters():
        param.register_hook(lambda grad: grad * (1 + 1e-6 * torch.randn(grad.shape, generator=noise)))
    for index in range(3):
        step(accelerator, model, optimizer, index)
    return replicated_checksums(model, optimizer)


def test_replicated_parameters_stay_bit_equal_where_gradients_differ_in_their_last_bits():
    first, second, *others = run_on_ranks(noisy_gradients, 4, True)
    assert len(first) > 10
    assert first == second
    assert others[0] == others[1]


def test_without_the_guard_those_gradients_drift_apart():
    first, second, *_ = run_on_ranks(noisy_gradients, 4, False, timeout=120)
    assert first != second
    run_on_ranks(restore_guard, 4)


def restore_guard():
    import importlib

    import accel_tp_ddp.training.drift

    importlib.reload(accel_tp_ddp.training.drift)


def drift(option: str, what: str):
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("accel_tp_ddp.training.drift").addHandler(handler)
    accelerator, model, optimizer = prepare(replica_check_steps=2, replica_drift=option)
    step(accelerator, model, optimizer)
    norm = accelerator.unwrap_model(model).model.norm.weight
    if accelerator.tensor_parallel_rank == 1:
        tensor = norm.data if what == "parameter" else optimizer.state[norm]["exp_avg"]
        tensor[3] += 1e-6
    step(accelerator, model, optimizer, 1)
    return replicated_checksums(model, optimizer), messages


@pytest.mark.parametrize("what", ["parameter", "optimizer state"])
def test_drift_is_healed_and_reported_by_name(what):
    results = run_on_ranks(drift, 4, "heal", what)
    (first, messages), (second, _), *_ = results
    assert first == second
    assert len(messages) == 1 and "model.norm.weight" in messages[0], messages


def test_drift_raises_on_every_rank_if_asked():
    raised = run_on_ranks(drift, 4, "raise", "parameter", expect_raise=True)
    assert all("model.norm.weight" in error.message for error in raised)


def test_a_drift_option_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match='"heal" or "raise"'):
        TensorParallelDDPPlugin(replica_drift="ignore")


@pytest.mark.parametrize("size", [1, 4, 1023, (1 << 18) + 5, (1 << 20) + 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_a_checksum_shows_one_changed_element_anywhere(size, dtype):
    tensor = torch.zeros(size, dtype=dtype)
    before = int(checksum(tensor))
    assert 0 <= before < 1 << 62
    for index in {0, size // 2, size - 1}:
        changed = tensor.clone()
        changed[index] = 1
        assert int(checksum(changed)) != before
        changed[index] = 0
        assert int(checksum(changed)) == before


def test_a_checksum_shows_swapped_elements():
    assert int(checksum(torch.tensor([1.0, 2.0]))) != int(checksum(torch.tensor([2.0, 1.0])))
