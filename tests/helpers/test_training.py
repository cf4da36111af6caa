"""The script that the other tests compare by, under plain Accelerate: repeatable, and its tolerances have teeth."""

from dataclasses import replace

import pytest
import torch

from .models import ARCHITECTURES, LAYERS, VOCABULARY, build_model
from .ranks import run_on_ranks
from .training import (
    EVAL_SAMPLES,
    TOLERANCE,
    TRAIN_SAMPLES,
    WEIGHT_TOLERANCE,
    Spec,
    assert_same_run,
    differences,
    train,
)

DP = pytest.mark.parametrize("dp", [1, 2])


@pytest.fixture(scope="module")
def plain():
    """Records of plain Accelerate on dp ranks, each computed once."""
    known = {}

    def get(spec, dp):
        if (spec, dp) not in known:
            known[spec, dp] = run_on_ranks(train, dp, spec)
        return known[spec, dp]

    return get


@DP
def test_the_same_spec_gives_the_same_bits(plain, dp):
    spec = Spec("llama")
    assert set(differences(run_on_ranks(train, dp, spec), plain(spec, dp)).values()) == {0.0}


@DP
def test_a_run_takes_six_clipped_steps_and_evaluates_each_sample_once(plain, dp):
    for record in plain(Spec("llama"), dp):
        assert len(record.learning_rates) == len(record.gradient_norms) == 6
        assert min(record.gradient_norms) > Spec("llama").max_norm
        assert all(ids == list(range(EVAL_SAMPLES)) for ids in record.eval_ids)
        assert record.losses[-1] < record.losses[0]


def test_replicas_see_different_samples_and_share_an_epoch(plain):
    first, second = (sum(record.ids[:3], []) for record in plain(Spec("llama"), 2))
    assert set(first) | set(second) == set(range(TRAIN_SAMPLES))
    assert set(first[:8]).isdisjoint(second[:8])


def test_weights_come_on_the_main_process_only(plain):
    records = plain(Spec("llama"), 2)
    assert records[0].weights and records[1].weights is None
    assert records[0].weights.keys() == build_model("llama").state_dict().keys()


@DP
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("model", ARCHITECTURES)
def test_rounding_stays_a_tenth_below_the_tolerances(plain, model, optimizer, dp):
    spec = Spec(model, optimizer=optimizer)
    run = run_on_ranks(train, dp, replace(spec, noise=1e-7))
    assert_same_run(run, plain(spec, dp), TOLERANCE / 10, WEIGHT_TOLERANCE / 10)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param({"noise": 1e-3}, id="weights off by a thousandth"),
        pytest.param({"mixed_precision": "bf16"}, id="bf16"),
        pytest.param({"max_norm": 0.45}, id="clipped by another factor"),
    ],
)
def test_a_wrong_run_exceeds_the_tolerances(plain, wrong, optimizer):
    spec = Spec("llama", accumulation=2, optimizer=optimizer)
    off = differences(plain(replace(spec, **wrong), 2), plain(spec, 2))
    assert min(off["losses"], off["gradient_norms"], off["eval_losses"]) > 5 * TOLERANCE
    assert max(error for name, error in off.items() if name.startswith("weight ")) > 5 * WEIGHT_TOLERANCE


@pytest.mark.parametrize("checkpointing", ["reentrant", "non_reentrant"])
def test_checkpointing_changes_nothing(plain, checkpointing):
    assert_same_run(plain(Spec("llama", checkpointing=checkpointing), 2), plain(Spec("llama"), 2), 1e-5, 1e-5)


def test_accumulation_takes_a_step_at_the_end_of_an_uneven_epoch(plain):
    record = plain(Spec("llama", accumulation=2), 2)[0]
    assert len(record.losses) == 9 and len(record.learning_rates) == 6


def test_without_clipping_no_norm_is_recorded_and_the_run_is_another(plain):
    record, clipped = plain(Spec("llama", max_norm=None), 2)[0], plain(Spec("llama"), 2)[0]
    assert record.gradient_norms == [] and record.losses != clipped.losses


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("model", ARCHITECTURES)
def test_the_tiny_models_are_what_they_say(model, tied):
    built = build_model(model, tied=tied)
    embedding, head = built.get_input_embeddings().weight, built.get_output_embeddings().weight
    assert (embedding is head) == tied
    assert embedding.shape[0] == VOCABULARY and built.config.num_hidden_layers == LAYERS
    for name, parameter in built.named_parameters():
        assert parameter.dtype == torch.float32 and parameter.std() > 0.02, f"{name} is constant: a fault hides there"
    again = build_model(model, tied=tied).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in built.state_dict().items())
