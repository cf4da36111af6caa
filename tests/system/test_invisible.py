"""Tensor parallelism is invisible: the same script gives what plain Accelerate DDP gives on dp ranks.

Every run here is compared step by step with plain DDP: losses, learning rates, gradient norms, the samples seen,
evaluation and the full weights at the end.
"""

from dataclasses import asdict, replace

import pytest

from ..helpers.faults import FAULTS, train_with
from ..helpers.models import ARCHITECTURES, FURTHER
from ..helpers.plain import BF16_SEEN, FP16_SEEN, LAYOUTS, assert_as_close_as_rounding, plain_ddp
from ..helpers.ranks import run_on_ranks
from ..helpers.training import (
    OPTIMIZERS,
    SERIES,
    TOLERANCE,
    WEIGHT_TOLERANCE,
    Spec,
    assert_same_run,
    differences,
    train,
)

OPTIONS = {
    "accumulation": {"accumulation": 2},
    "no clipping": {"max_norm": None},
    "reentrant checkpointing": {"checkpointing": "reentrant"},
    "non-reentrant checkpointing": {"checkpointing": "non_reentrant"},
    "sgd": {"optimizer": "sgd"},
    "eager attention": {"attention": "eager"},
    "a replica short of its last batch": {"samples": 18},
    "bf16": {"mixed_precision": "bf16"},
}


def assert_invisible(spec, tp, dp):
    actual = run_on_ranks(train, tp * dp, replace(spec, tp=tp))
    reference = plain_ddp(spec, dp)
    if tp == 1:
        assert_same_run(actual, reference, 0.0, 0.0)  # plain DDP it is
    elif spec == spec.exact:
        assert_same_run(actual, reference)
    else:
        seen = FP16_SEEN if "float16" in (spec.dtype, spec.autocast) else BF16_SEEN
        assert_as_close_as_rounding(actual, reference, plain_ddp(spec.exact, dp), seen)
    for rank, record in enumerate(actual):  # peers do not only come close to each other
        first = asdict(replace(actual[rank - rank % tp], weights=None))
        assert asdict(replace(record, weights=None)) == first, f"rank {rank} is not bit-equal to its first peer"


# --- every model in every layout -------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("model", ARCHITECTURES)
def test_a_run_is_that_of_plain_ddp(model, tied, layout):
    assert_invisible(Spec(model, tied=tied), *LAYOUTS[layout])


# --- experts, latent attention, sinks, key/value heads fewer than ranks ----------------------------------------------

FURTHER_LAYOUTS = {name: "tp2xdp2" for name in FURTHER} | {"qwen3_two_keys": "tp4xdp1"}


@pytest.mark.parametrize("model, layout", FURTHER_LAYOUTS.items())
def test_a_run_with_experts_latent_attention_sinks_or_shared_heads_is_that_of_plain_ddp(model, layout):
    assert_invisible(Spec(model, accumulation=2, steps=4), *LAYOUTS[layout])


# --- every option ----------------------------------------------------------------------------------------------------


def cases():
    """option x model x tied x layout, `slow` but for a slice in which the models take turns.

    Unmarked is each option with three models at tp2 x dp2, and with one in each other layout.
    """
    for turn, option in enumerate(OPTIONS):
        quick = {(ARCHITECTURES[(turn + step) % 6], step == 2, "tp2xdp2") for step in (0, 2, 4)}
        others = [layout for layout in LAYOUTS if layout != "tp2xdp2"]
        quick |= {(ARCHITECTURES[(turn + 1 + step) % 6], step == 1, layout) for step, layout in enumerate(others)}
        for model in ARCHITECTURES:
            for tied in (False, True):
                for layout in LAYOUTS:
                    marks = () if (model, tied, layout) in quick else pytest.mark.slow
                    name = f"{option}-{model}-{'tied' if tied else 'untied'}-{layout}"
                    yield pytest.param(option, model, tied, layout, marks=marks, id=name)


@pytest.mark.parametrize("option, model, tied, layout", list(cases()))
def test_a_run_with_an_option_is_that_of_plain_ddp(option, model, tied, layout):
    assert_invisible(Spec(model, tied=tied, **OPTIONS[option]), *LAYOUTS[layout])


@pytest.mark.parametrize("decay", ["ndim", "name"])
@pytest.mark.parametrize("optimizer", [kind for kind in OPTIMIZERS if ", " in kind])
def test_every_way_of_stepping_and_of_decaying_is_that_of_plain_ddp(optimizer, decay):
    model = {"ndim": "qwen3", "name": "gpt_neox"}[decay]
    assert_invisible(Spec(model, tied=decay == "ndim", optimizer=optimizer, decay=decay), 2, 2)


@pytest.mark.parametrize("optimizer", ["adamw, foreach", "sgd, nesterov"])
def test_weight_decay_on_other_parameters_is_another_run(optimizer):
    by_name, by_ndim = (plain_ddp(Spec("llama", optimizer=optimizer, decay=decay), 2) for decay in ("name", "ndim"))
    off = differences(by_name, by_ndim)
    assert off["losses"] > 5 * TOLERANCE and off["weight model.embed_tokens.weight"] > 5 * WEIGHT_TOLERANCE


PRECISIONS = {
    "bf16 weights": {"dtype": "bfloat16"},
    "fp16 weights": {"dtype": "float16"},
    "fp16 autocast": {"autocast": "float16"},
    "bf16 weights and autocast": {"dtype": "bfloat16", "mixed_precision": "bf16"},
}


@pytest.mark.parametrize("model, optimizer, layout", [("qwen3", "sgd", "tp2xdp2"), ("gpt_neox", "adamw", "tp4xdp1")])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_half_precision_drifts_no_further_than_plain_ddp_does(precision, model, optimizer, layout):
    assert_invisible(Spec(model, optimizer=optimizer, **PRECISIONS[precision]), *LAYOUTS[layout])


def test_the_quick_slice_has_each_option_in_each_layout_and_with_three_models():
    quick = [case.values for case in cases() if not case.marks]
    for option in OPTIONS:
        for layout in LAYOUTS:
            models = {model for o, model, _, where in quick if (o, where) == (option, layout)}
            assert len(models) >= (3 if layout == "tp2xdp2" else 1)
    assert {model for _, model, _, _ in quick} == set(ARCHITECTURES)
    assert {tied for _, _, tied, _ in quick} == {False, True}


@pytest.mark.parametrize("samples", sorted({Spec("llama").samples, 18}))
def test_the_runs_are_shuffled_and_end_on_an_uneven_batch(samples):
    records = plain_ddp(Spec("llama", samples=samples), 2)
    epoch = -(-samples // 8)  # batches of each replica
    first, second = (sum(record.ids[:epoch], []) for record in records)
    assert set(first) | set(second) == set(range(samples))
    assert len(first) + len(second) > samples, "nothing had to be filled up"
    assert first != sorted(first) and records[0].ids[:epoch] != records[0].ids[epoch : 2 * epoch]


# --- teeth -----------------------------------------------------------------------------------------------------------

# Where each fault of `helpers/faults.py` is to be seen: what runs, in which layout, and what has to be off.
SHOWN_BY = {
    "local clip norm": (Spec("llama"), "tp2xdp2", "gradient_norms"),
    "norm without clipping": (Spec("llama", optimizer="sgd"), "tp2xdp2", "losses"),
    "replicated parameters counted by every rank": (Spec("llama"), "tp2xdp2", "gradient_norms"),
    # Equal parts on all ranks, as DDP refuses the world by itself where they differ.
    "DDP over the world": (Spec("llama", vocabulary=132), "tp2xdp2", "losses"),
    "row bias on every rank": (Spec("gpt_neox"), "tp2xdp2", "losses"),
    "partial gradients not summed": (Spec("qwen3"), "tp2xdp2", "weight model.layers.0.self_attn.q_norm.weight"),
    "partial gradients summed again": (Spec("qwen3", accumulation=2), "tp2xdp1", "gradient_norms"),
    "copy without its backward": (Spec("llama"), "tp2xdp2", "gradient_norms"),
    "copy with a mean for its sum": (Spec("llama"), "tp2xdp2", "gradient_norms"),
    "gather with a sum in its backward": (Spec("llama"), "tp2xdp2", "gradient_norms"),
    "reduce with a sum in its backward": (Spec("llama"), "tp2xdp2", "gradient_norms"),
    "packed weights cut as one": (Spec("phi3"), "tp2xdp2", "losses"),
    "lookup not masked": (Spec("llama"), "tp2xdp2", "losses"),
    "scheduler steps for every process": (Spec("llama"), "tp2xdp2", "learning_rates"),
    "metrics with duplicates": (Spec("llama"), "tp2xdp2", "in evaluation"),
    "shared heads counted by every rank": (Spec("llama_one_key"), "tp2xdp2", "gradient_norms"),
    "peers on different batches": (Spec("llama"), "tp2xdp2", "trained on"),
}


def test_each_fault_of_a_run_is_tried():
    assert SHOWN_BY.keys() == set(FAULTS)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_a_run_is_caught(fault):
    spec, layout, sign = SHOWN_BY[fault]
    tp, dp = LAYOUTS[layout]
    assert_same_run(run_on_ranks(train_with, tp * dp, None, replace(spec, tp=tp)), plain_ddp(spec, dp))
    wrong = run_on_ranks(train_with, tp * dp, fault, replace(spec, tp=tp))
    with pytest.raises(AssertionError, match=sign):
        assert_same_run(wrong, plain_ddp(spec, dp), 10 * TOLERANCE, 10 * WEIGHT_TOLERANCE)


# These move a run by less than bf16 does; only the fp32 runs can tell.
BELOW_BF16 = {"replicated parameters counted by every rank", "partial gradients summed again"}


@pytest.mark.parametrize("fault", [f for f in FAULTS if SHOWN_BY[f][2] in SERIES and f not in BELOW_BF16])
def test_a_fault_of_a_run_is_caught_in_bf16(fault):
    exact, layout, _ = SHOWN_BY[fault]
    tp, dp = LAYOUTS[layout]
    spec = replace(exact, mixed_precision="bf16")
    wrong = run_on_ranks(train_with, tp * dp, fault, replace(spec, tp=tp))
    with pytest.raises(AssertionError):
        assert_as_close_as_rounding(wrong, plain_ddp(spec, dp), plain_ddp(exact, dp))


@pytest.mark.parametrize("precision", ["bf16 weights", "fp16 weights", "fp16 autocast"])
def test_a_local_clip_norm_is_caught_in_half_precision(precision):
    spec = Spec("qwen3", optimizer="sgd", **PRECISIONS[precision])
    wrong = run_on_ranks(train_with, 4, "local clip norm", replace(spec, tp=2))
    with pytest.raises(AssertionError, match="own drift"):
        assert_as_close_as_rounding(wrong, plain_ddp(spec, 2), plain_ddp(spec.exact, 2), FP16_SEEN)
