"""Ranks that choose other experts for the same tokens are found out; it costs nothing where it is not looked for."""

from __future__ import annotations

import copy
import logging
import pickle

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from accel_tp_ddp.training.decisions import Decisions, decisions_of

from ..helpers.drifting import prepare, step
from ..helpers.models import build_model
from ..helpers.ranks import run_on_ranks
from ..helpers.sharded import shard, token_batch, tp_mesh

EXPERTS = ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]


def choose_otherwise(module, args):
    hidden, chosen, *others = args
    return hidden, (chosen + (torch.arange(len(chosen)) == 3).long()[:, None]) % 4, *others


def train(option, steps, wrong, architecture="qwen3_moe", **options):
    """Three steps, compared after the second one; in step `wrong` rank 1 sends a token to other experts."""
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("accel_tp_ddp.training.drift").addHandler(handler)
    accelerator, model, optimizer = prepare(architecture, replica_check_steps=steps, replica_drift=option, **options)
    experts = accelerator.unwrap_model(model).get_submodule(EXPERTS[1])
    for index in range(3):
        hook = None
        if index == wrong and accelerator.tensor_parallel_rank == 1:
            hook = experts.register_forward_pre_hook(choose_otherwise)
        step(accelerator, model, optimizer, index)
        if hook is not None:
            hook.remove()
    logging.getLogger("accel_tp_ddp.training.drift").removeHandler(handler)
    return messages


@pytest.mark.parametrize("steps, wrong, found", [(2, 1, True), (2, 0, False), (2, None, False), (1, 2, True)])
def test_other_experts_on_one_rank_are_reported_by_name(steps, wrong, found):
    for messages in run_on_ranks(train, 2, "heal", steps, wrong):
        assert len(messages) == found
        if found:
            assert f"before step {wrong + 1}" in messages[0] and f"choices for {EXPERTS[1]}" in messages[0]
            assert EXPERTS[0] not in messages[0] and "autotuning" in messages[0]


def test_other_experts_on_one_rank_are_an_error_on_all_if_asked():
    for raised in run_on_ranks(train, 2, "raise", 2, 1, expect_raise=True):
        assert raised.type_name == "RuntimeError" and f"choices for {EXPERTS[1]}" in raised.message


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def operations():
    model, counts = shard(build_model("qwen3_moe"), tp_mesh(2)), {}
    watched = dict(decisions_of(model))
    for due in (False, True):
        for decisions in watched.values():
            decisions.begin(due)
        with Operations() as counted, torch.no_grad():
            model(**token_batch())
        counts[due] = counted.count, [int(decisions.number("cpu")) for decisions in watched.values()]
    for name in watched:
        del model.get_submodule(name)._tp_decisions
    with Operations() as counted, torch.no_grad():
        model(**token_batch())
    return list(watched), counted.count, counts


def test_nothing_is_computed_where_no_comparison_is_due():
    for names, unwatched, counts in run_on_ranks(operations, 2):
        assert names == EXPERTS
        assert counts[False] == (unwatched, [0, 0])
        assert counts[True][0] > unwatched and all(counts[True][1])


def test_a_copy_begins_with_nothing():
    decisions = Decisions()
    decisions.begin(due=True)
    decisions.note([torch.tensor([1, 2])])
    for other in (copy.deepcopy(decisions), pickle.loads(pickle.dumps(decisions))):
        assert not other.due and int(other.number("cpu")) == 0


def test_order_and_number_of_what_is_noted_count():
    def number(*tensors):
        decisions = Decisions()
        decisions.note(map(torch.tensor, tensors))
        return int(decisions.number("cpu"))

    assert len({number([1], [2]), number([2], [1]), number([1]), number([0]), number([0], [0]), number()}) == 6
