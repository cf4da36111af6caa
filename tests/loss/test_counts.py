"""What a step with deferred logits takes, counted on one rank of a group whose collectives do nothing."""

from contextlib import contextmanager, nullcontext
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from accel_tp_ddp.loss import vocab_parallel
from accel_tp_ddp.loss.heads import defer_logits, losses_only
from accel_tp_ddp.model.check import check_model
from accel_tp_ddp.model.parallelize import shard

from ..helpers.collectives import CollectiveCalls
from ..helpers.models import build_model

VOCABULARY, LENGTH, SAMPLES, HIDDEN, ROWS = 4096, 64, 4, 64, 32
TOKENS = SAMPLES * LENGTH


@contextmanager
def one_rank_of(size):
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        yield init_device_mesh("cpu", (size,), mesh_dim_names=("tp",))
    finally:
        dist.destroy_process_group()


class Largest(TorchDispatchMode):
    """The largest result of any operation, in elements."""

    found = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **kwargs or {})
        for each in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(each, torch.Tensor):
                self.found = max(self.found, each.numel())
        return result


def step(tp, on, mode, lora=False):
    """A step's collectives, and what the mode has seen."""
    with one_rank_of(tp) as mesh, mock.patch.object(vocab_parallel, "LEAST_ROWS", ROWS):
        model = build_model("llama", vocab_size=VOCABULARY, max_position_embeddings=LENGTH)
        if lora:
            from peft import LoraConfig, get_peft_model

            model = get_peft_model(model, LoraConfig(target_modules=["lm_head"], r=4, task_type="CAUSAL_LM"))
        shard(model, mesh, check_model(model, mesh, "auto"))
        defer_logits(model, "auto")
        ids = torch.randint(0, VOCABULARY, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(0))
        with CollectiveCalls() as recorded, mode:
            with losses_only() if on else nullcontext():
                loss = model(input_ids=ids, labels=ids).loss
            forward = recorded.sizes
            loss.backward()
    return forward, recorded.sizes[len(forward) :]


@pytest.mark.parametrize("tp", [2, 4])
def test_a_chunk_takes_one_small_all_gather_and_the_backward_no_more_than_before(tp):
    before, backward_before = step(tp, False, nullcontext())
    forward, backward = step(tp, True, nullcontext())
    assert (
        before[-1] == ("all_gather_into_tensor", TOKENS * VOCABULARY // tp)
        and before[:-1] == forward[: len(before) - 1]
    )
    gathered = forward[len(before) - 1 :]
    assert {name for name, _ in gathered} == {"all_gather_into_tensor"}
    chunk = max(ROWS, TOKENS * HIDDEN // (VOCABULARY // tp))
    assert [size for _, size in gathered] == [3 * chunk] * (TOKENS // chunk)
    assert backward == backward_before


def test_an_adapters_gradient_rides_on_the_backward_as_before():
    assert step(2, True, nullcontext(), lora=True)[1] == step(2, False, nullcontext(), lora=True)[1]


def test_no_tensor_of_logits_is_larger_than_a_chunks():
    without, with_loss = Largest(), Largest()
    step(2, False, without)
    step(2, True, with_loss)
    assert without.found == TOKENS * VOCABULARY
    assert with_loss.found <= max(ROWS * VOCABULARY // 2, VOCABULARY // 2 * HIDDEN, TOKENS * HIDDEN * 4)


def test_the_peak_falls_with_the_logits():
    peaks = []
    for on in (False, True):
        tracker = MemTracker()
        step(2, on, tracker)
        peaks.append(sum(of["Total"] for of in tracker.get_tracker_snapshot("peak").values()))
    assert peaks[1] < 0.5 * peaks[0]
