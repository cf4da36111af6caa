"""Features that are on together train as plain DDP does: every two values of any two of them meet in some run."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest

from ..helpers.plain import LAYOUTS, assert_as_close_as_rounding, plain_ddp
from ..helpers.ranks import run_on_ranks
from ..helpers.training import Spec, assert_same_run, train

FACTORS: dict[str, tuple[Any, ...]] = {
    "model": ("llama", "qwen3", "gpt2", "mixtral"),
    "layout": ("tp2xdp2", "tp4xdp1", "tp2xdp1"),
    "compiled": (None, "by layer"),  # as a whole: test_compiled.py
    "checkpointing": (None, "reentrant", "non_reentrant"),
    "loss_parallel": (False, True),
    "sequence_parallel": (False, True),
    "overlap": (False, True),
    "zero1": (False, True),
    "lora": (False, True),
    "accumulation": (1, 2),
    "mixed_precision": ("no", "bf16"),
    "tied": (False, True),
}
OF_THE_PLUGIN = ("loss_parallel", "sequence_parallel", "overlap", "zero1")
Pair = tuple[tuple[str, Any], tuple[str, Any]]


def pairs(run: dict[str, Any]) -> set[Pair]:
    return set(itertools.combinations(run.items(), 2))


def wanted() -> set[Pair]:
    of_two = itertools.combinations(FACTORS, 2)
    return {((a, x), (b, y)) for a, b in of_two for x in FACTORS[a] for y in FACTORS[b]}


def covering_array() -> Iterator[dict[str, Any]]:
    """Runs in which all pairs occur, each made greedily: the next value is the one with most pairs not yet seen."""
    left = wanted()
    while left:
        (name, value), (other, its_value) = min(left, key=str)
        run = {name: value, other: its_value}
        for factor in FACTORS:
            if factor in run:
                continue
            run[factor] = max(FACTORS[factor], key=lambda value: len(pairs(ordered({**run, factor: value})) & left))
        run = ordered(run)
        left -= pairs(run)
        yield run


def ordered(run: dict[str, Any]) -> dict[str, Any]:
    return {name: run[name] for name in FACTORS if name in run}


RUNS = list(covering_array())
HERE = 7  # which have every value of every feature; all of them have every two


def test_the_runs_that_are_not_slow_have_every_value():
    for name in RUNS[0]:
        assert {run[name] for run in RUNS[:HERE]} == {run[name] for run in RUNS}


def test_every_two_values_meet():
    assert set().union(*map(pairs, RUNS)) >= wanted()


def train_with(spec, features):
    set_to = {f"ACCEL_TP_DDP_{name.upper()}": str(on).lower() for name, on in features.items()}
    with mock.patch.dict(os.environ, set_to):
        return train(spec)


def name_of(run: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" if value is not True else name for name, value in run.items() if value)


@pytest.mark.parametrize(
    "run",
    [*RUNS[:HERE], *(pytest.param(run, marks=pytest.mark.slow) for run in RUNS[HERE:])],
    ids=name_of,
)
def test_features_together_train_as_plain_ddp(run):
    script = {name: value for name, value in run.items() if name not in (*OF_THE_PLUGIN, "layout")}
    spec, (tp, dp) = Spec(**script), LAYOUTS[run["layout"]]
    features = {name: run[name] for name in OF_THE_PLUGIN}
    actual = run_on_ranks(train_with, tp * dp, replace(spec, tp=tp), features)
    # Not compiled, as Accelerate's checkpoints of compiled layers have other names. Reentrant checkpointing is part of
    # the script: it takes the routers' loss from Mixtral, in transformers.
    plain = replace(spec, compiled=None)
    if plain == plain.exact:
        assert_same_run(actual, plain_ddp(plain, dp))
    else:
        assert_as_close_as_rounding(actual, plain_ddp(plain, dp), plain_ddp(plain.exact, dp))
