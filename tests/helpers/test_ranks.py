"""The helper that the other tests stand on: results in rank order, failures surface, hangs are cut, state is reset."""

import os
import random
import time

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch.distributed.device_mesh import init_device_mesh

from .ranks import CALLS_PER_POOL, RanksError, discard_pool, pids_of_pool, run_on_ranks


@pytest.fixture(autouse=True)
def short_patience(monkeypatch):
    monkeypatch.setattr("tests.helpers.ranks.GRACE", 1.0)
    monkeypatch.setattr("tests.helpers.ranks.SETTLE_TIMEOUT", 5.0)


def sum_of_ranks(offset):
    total = torch.tensor([dist.get_rank() + offset])
    dist.all_reduce(total)
    return dist.get_rank(), total.item()


def process_id():
    return os.getpid()


def sum_over_each_axis_of_a_mesh():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "tp"))
    sums = []
    for axis in mesh.mesh_dim_names:
        total = torch.tensor([dist.get_rank()])
        dist.all_reduce(total, group=mesh.get_group(axis))
        sums.append(total.item())
    return sums


def raise_on_rank_one():
    if dist.get_rank() == 1:
        raise ValueError("only rank one minds")
    dist.barrier()


def raise_everywhere(message):
    raise KeyError(f"{message} {dist.get_rank()}")


def hang_on_rank_zero():
    if dist.get_rank() == 0:
        time.sleep(1000)


def die_on_rank_one():
    if dist.get_rank() == 1:
        os._exit(7)


def one_rank_issues_one_collective_more():
    if dist.get_rank() == 0:
        dist.all_reduce(torch.zeros(1), async_op=True)


def unpicklable_result():
    return lambda: None


def leave_state_behind():
    os.environ["WORLD_SIZE"] = "77"
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    torch.manual_seed(5)
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    Accelerator(gradient_accumulation_steps=3)


def state_seen():
    fresh = AcceleratorState._shared_state == {}
    accelerator = Accelerator()
    return {
        "fresh": fresh,
        "world_size": os.environ["WORLD_SIZE"],
        "draw": (torch.rand(1).item(), random.random()),
        "dtype": torch.get_default_dtype(),
        "grad": torch.is_grad_enabled(),
        "accumulation": accelerator.gradient_accumulation_steps,
        "precision": accelerator.mixed_precision,
        "type": accelerator.distributed_type,
        "index": accelerator.process_index,
        "processes": accelerator.num_processes,
    }


def single_process_state():
    accelerator = Accelerator()
    return accelerator.distributed_type, accelerator.num_processes, dist.is_initialized(), "RANK" in os.environ


@pytest.mark.parametrize("world_size", [2, 4])
def test_results_come_in_rank_order_and_the_ranks_can_talk(world_size):
    total = sum(rank + 10 for rank in range(world_size))
    assert run_on_ranks(sum_of_ranks, world_size, 10) == [(rank, total) for rank in range(world_size)]


def test_the_same_processes_serve_the_next_call():
    first = run_on_ranks(process_id, 2)
    assert len(set(first)) == 2 and os.getpid() not in first
    assert run_on_ranks(process_id, 2) == first


def test_a_pool_is_renewed_after_so_many_calls():
    discard_pool(2)
    first = run_on_ranks(process_id, 2)
    for _ in range(CALLS_PER_POOL):
        last = run_on_ranks(process_id, 2)
    assert last != first


def test_a_raise_on_one_rank_surfaces_with_its_traceback():
    with pytest.raises(RanksError) as caught:
        run_on_ranks(raise_on_rank_one, 2)
    assert "rank 1 raised ValueError" in str(caught.value)
    assert "only rank one minds" in str(caught.value) and "in raise_on_rank_one" in str(caught.value)


def test_the_next_call_after_a_raise_works():
    with pytest.raises(RanksError):
        run_on_ranks(raise_on_rank_one, 2)
    assert run_on_ranks(sum_of_ranks, 2, 0) == [(0, 1), (1, 1)]


def test_each_call_can_build_its_own_mesh():
    for _ in range(3):
        assert run_on_ranks(sum_over_each_axis_of_a_mesh, 4) == [[2, 1], [4, 1], [2, 5], [4, 5]]


def end_the_group():
    dist.destroy_process_group()


def test_a_call_that_ends_the_process_group_is_followed_by_new_processes():
    run_on_ranks(end_the_group, 2)
    assert run_on_ranks(sum_of_ranks, 2, 10) == [(0, 21), (1, 21)]


def test_an_expected_raise_is_returned_for_every_rank():
    raised = run_on_ranks(raise_everywhere, 2, "no", expect_raise=True)
    assert [r.type_name for r in raised] == ["KeyError", "KeyError"]
    assert [r.message for r in raised] == ["'no 0'", "'no 1'"]
    assert raised[0].type_names == ("KeyError", "LookupError", "Exception", "BaseException")


def test_an_expected_raise_that_one_rank_lacks_is_an_error():
    with pytest.raises(RanksError):
        run_on_ranks(raise_on_rank_one, 2, expect_raise=True)
    with pytest.raises(RanksError, match="was to raise"):
        run_on_ranks(sum_of_ranks, 2, 0, expect_raise=True)


def test_a_hang_is_cut_and_shows_where():
    run_on_ranks(process_id, 2)
    pids = pids_of_pool(2)
    start = time.monotonic()
    with pytest.raises(RanksError) as caught:
        run_on_ranks(hang_on_rank_zero, 2, timeout=2)
    assert time.monotonic() - start < 60
    assert "rank 0 did not answer in time" in str(caught.value) and "in hang_on_rank_zero" in str(caught.value)
    assert "rank 1 returned" in str(caught.value)
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert run_on_ranks(sum_of_ranks, 2, 0) == [(0, 1), (1, 1)]


def test_a_dead_rank_surfaces_with_its_exit_code():
    with pytest.raises(RanksError, match="exit code 7"):
        run_on_ranks(die_on_rank_one, 2)


def test_ranks_left_out_of_step_fail_the_call_that_left_them():
    with pytest.raises(RanksError, match="out of step"):
        run_on_ranks(one_rank_issues_one_collective_more, 2)


def test_a_result_that_cannot_be_pickled_is_an_error():
    with pytest.raises(RanksError, match="unpicklable_result"):
        run_on_ranks(unpicklable_result, 2)


def test_a_call_sees_nothing_of_the_call_before():
    discard_pool(2)
    expected = run_on_ranks(state_seen, 2)
    assert [s["index"] for s in expected] == [0, 1]
    assert all(s["fresh"] and s["processes"] == 2 and s["type"] == DistributedType.MULTI_CPU for s in expected)
    run_on_ranks(leave_state_behind, 2)
    assert run_on_ranks(state_seen, 2) == expected


def test_one_rank_is_a_plain_single_process():
    assert run_on_ranks(single_process_state, 1) == [(DistributedType.NO, 1, False, False)]
