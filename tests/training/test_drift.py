"""What is replicated over tensor-parallel ranks stays equal bit by bit, and is watched."""

from __future__ import annotations

import pytest
import torch

from accel_tp_ddp import TensorParallelDDPPlugin
from accel_tp_ddp.training.drift import checksum

from ..helpers.drifting import drift, noisy_gradients
from ..helpers.ranks import run_on_ranks


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
