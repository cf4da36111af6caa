"""The ranks that hold one replica get the same batch, or the first forward says that they do not."""

from __future__ import annotations

import torch
import torch.distributed as dist
from accelerate import Accelerator

from accel_tp_ddp import TensorParallelDDPPlugin

from ..helpers.models import VOCABULARY, build_model
from ..helpers.ranks import run_on_ranks


def forwards(seeds_by: str, lengths_by: str = "", bad_from: int = 0, every: int = 3, count: int = 5):
    """Run some forwards; from number `bad_from` on, the batch depends on the rank named by `seeds_by`."""
    plugin = TensorParallelDDPPlugin(tp_size=2, replica_check_steps=every)
    accelerator = Accelerator(parallelism_config=plugin)
    model = accelerator.prepare(build_model("llama"))
    ranks = {
        "": 0,
        "replica": accelerator.data_parallel_rank,
        "process": dist.get_rank(),
    }
    for index in range(count):
        by, length = (seeds_by, lengths_by) if index >= bad_from else ("replica", "")
        generator = torch.Generator().manual_seed(ranks[by])
        ids = torch.randint(0, VOCABULARY, (2, 6 + ranks[length]), generator=generator)
        model(input_ids=ids, labels=ids)
    return index


def test_replicas_may_get_different_batches():
    assert run_on_ranks(forwards, 4, "replica", "replica") == [4] * 4


def test_another_batch_on_a_peer_is_an_error_on_every_rank_at_the_first_forward():
    for error in run_on_ranks(forwards, 4, "process", expect_raise=True):
        assert error.type_name == "ValueError"
        assert "forward number 1" in error.message and "`input_ids`" in error.message
        assert "[2, 6]" in error.message and "process_index" in error.message
        assert "ranks [0, 1]" in error.message or "ranks [2, 3]" in error.message


def test_another_shape_on_a_peer_is_named_and_does_not_hang():
    for error in run_on_ranks(forwards, 4, "process", "process", expect_raise=True):
        assert "[2, 6]" in error.message and "[2, 7]" in error.message or "[2, 9]" in error.message


def test_a_later_difference_of_batches_is_found_at_the_next_comparison():
    for error in run_on_ranks(forwards, 4, "process", bad_from=1, expect_raise=True):
        assert "forward number 4" in error.message


def test_a_batch_check_of_zero_steps_switches_the_comparison_off():
    assert run_on_ranks(forwards, 4, "process", every=0) == [4] * 4
