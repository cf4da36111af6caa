"""With zero1 a run is that of plain DDP, and each replica keeps its part of the optimizer's state."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import cache

import pytest
import torch

from accel_tp_ddp.training.zero1 import zero1_of

from ..helpers.ranks import run_on_ranks
from ..helpers.training import Spec, assert_same_run, train


def with_zero1(fn, *args):
    os.environ["ACCEL_TP_DDP_ZERO1"] = "true"
    return fn(*args)


# --- runs ------------------------------------------------------------------------------------------------------------

RUNS = {
    "adamw": (Spec("llama", tied=True, accumulation=2), 2, 2),
    "tp 1, three replicas": (Spec("llama"), 1, 3),
    "fused, shared heads": (Spec("llama_one_key", optimizer="adamw, fused"), 2, 2),
    "one by one": (Spec("qwen3", optimizer="adamw, one by one", max_norm=None), 1, 2),
    "momentum": (Spec("phi3", optimizer="sgd, nesterov"), 2, 2),
    "adafactor": (Spec("llama", optimizer="adafactor"), 2, 2),
    "adafactor, tp 1": (Spec("llama", optimizer="adafactor_of_transformers"), 1, 2),
    "checkpointed": (Spec("llama", checkpointing="reentrant"), 2, 2),
    "gpt2": (Spec("gpt2"), 2, 2),
}


@cache
def plain_ddp(spec, dp):
    return run_on_ranks(train, dp, spec)


@pytest.mark.parametrize("which", RUNS)
def test_a_run_with_zero1_is_that_of_plain_ddp(which):
    spec, tp, dp = RUNS[which]
    actual = run_on_ranks(with_zero1, tp * dp, train, replace(spec, tp=tp))
    assert_same_run(actual, plain_ddp(spec, dp))
