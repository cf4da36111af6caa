"""Dropout: equal over tensor-parallel ranks where activations are replicated, different where they are sharded."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from accel_tp_ddp import TensorParallelDDPPlugin
from accel_tp_ddp.training.drift import checksum

from ..helpers.models import VOCABULARY, build_model
from ..helpers.ranks import run_on_ranks

RATE = 0.25


def masks(device_specific: bool = False, checkpointing: bool | None = None, steps: int = 1, eval_too: bool = False):
    """Every mask that was drawn, in order, with the number of dimensions of what it fell on."""
    accelerator = Accelerator(parallelism_config=TensorParallelDDPPlugin(tp_size=2))
    set_seed(3, device_specific=device_specific)
    model = build_model("gpt_neox", attention="eager", attention_dropout=RATE, hidden_dropout=RATE)
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
    model = accelerator.prepare(model)
    drawn = []
    dropout = torch.nn.functional.dropout

    def spy(input, p=0.5, training=True, inplace=False):
        if training and p > 0:
            state = torch.get_rng_state()
            mask = dropout(torch.ones_like(input), p, True) != 0
            torch.set_rng_state(state)
            drawn.append((input.ndim, int(checksum(mask)), 1 - mask.float().mean().item()))
        return dropout(input, p, training, inplace)

    torch.nn.functional.dropout = spy
    try:
        generator = torch.Generator().manual_seed(1 + accelerator.data_parallel_rank)
        ids = torch.randint(0, VOCABULARY, (4, 12), generator=generator)
        for _ in range(steps):
            model.train()
            accelerator.backward(model(input_ids=ids, labels=ids).loss)
            if eval_too:
                model.eval()
                model(input_ids=ids)
    finally:
        torch.nn.functional.dropout = dropout
    return drawn, int(checksum(torch.get_rng_state()))


@pytest.mark.parametrize("device_specific", [False, True])
def test_masks_agree_on_replicated_and_differ_on_sharded_activations_and_over_replicas(device_specific):
    results = run_on_ranks(masks, 4, device_specific)
    (first, state), (second, peer_state), (third, _), (fourth, _) = results
    assert {ndim for ndim, *_ in first} == {3, 4} and len(first) >= 7
    for (ndim, mask, _), (peer_ndim, peer_mask, _) in zip(first, second, strict=True):
        assert ndim == peer_ndim
        assert (mask == peer_mask) == (ndim == 3)  # attention probabilities, over this rank's heads, have four
    assert state == peer_state
    for other in (third, fourth):
        assert all(mask != theirs for (_, mask, _), (_, theirs, _) in zip(first, other, strict=True))


def test_each_mask_is_new_and_has_the_given_rate():
    (first, _), *_ = run_on_ranks(masks, 4, steps=3)
    assert len({mask for _, mask, _ in first}) == len(first)
    rates = [rate for *_, rate in first]
    assert abs(sum(rates) / len(rates) - RATE) < 0.02


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_draws_the_same_masks(reentrant):
    results = run_on_ranks(masks, 4, checkpointing=reentrant)
    for drawn, _ in results:
        forward = [mask for ndim, mask, _ in drawn if ndim == 4]
        count = len(forward) // 2  # two layers, each once in the forward and once again in the backward
        assert count == 2 and sorted(forward[:count]) == sorted(forward[count:])
    assert results[0][1] == results[1][1]


def test_evaluation_draws_nothing():
    (plain, state), *_ = run_on_ranks(masks, 4, steps=2)
    (with_eval, state_with_eval), *_ = run_on_ranks(masks, 4, steps=2, eval_too=True)
    assert plain == with_eval and state == state_with_eval


def without_dropout():
    set_seed(3)
    accelerator = Accelerator(parallelism_config=TensorParallelDDPPlugin(tp_size=2))
    model = accelerator.prepare(build_model("llama"))
    before = int(checksum(torch.get_rng_state()))
    ids = torch.randint(0, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, labels=ids).loss.backward()
    return before == int(checksum(torch.get_rng_state()))


def test_a_model_without_dropout_leaves_the_random_state_alone():
    assert run_on_ranks(without_dropout, 2) == [True, True]
