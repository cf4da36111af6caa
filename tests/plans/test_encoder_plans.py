"""Encoders and encoder-decoders under the plans of this package: training, dropout, generation, what is refused."""

import copy
import tempfile
from functools import cache

import pytest
import torch
import torch.distributed as dist
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from accel_tp_ddp import full_gradients, parallelize
from accel_tp_ddp.core.errors import PlanError
from accel_tp_ddp.plans.names import Names
from accel_tp_ddp.plans.plan import resolve_plan
from accel_tp_ddp.plans.shipped import shipped_plans
from benchmarks.sweep import encoders

from ..helpers import epochs
from ..helpers.compare import relative_errors
from ..helpers.faults import injected
from ..helpers.ranks import run_on_ranks
from ..helpers.sharded import TOLERANCE, accelerator_for, tp_mesh

VOCABULARY, LABELS, LENGTH = 99, 3, 10
ENCODER = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"vocab_size": VOCABULARY, "max_position_embeddings": 32, "initializer_range": 0.1, "pad_token_id": 0},
}
STACKS = {
    **{"d_model": 32, "encoder_layers": 3, "decoder_layers": 3, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48},
    **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": VOCABULARY, "init_std": 0.1},
    **{"max_position_embeddings": 32, "pad_token_id": 0, "decoder_start_token_id": 2, "forced_eos_token_id": None},
}
T5 = {
    **{"d_model": 32, "d_kv": 12, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": VOCABULARY},
    **{"relative_attention_num_buckets": 8, "pad_token_id": 0, "decoder_start_token_id": 0},
}
RELATIVE = {"relative_attention": True, "max_relative_positions": 16, "pos_att_type": ["c2p", "p2c"]}
MODELS = {
    "bert": (AutoModelForSequenceClassification, {**ENCODER, "num_labels": LABELS}),
    "deberta": (AutoModelForMaskedLM, {**ENCODER, **RELATIVE}),
    "deberta-v2": (AutoModelForMaskedLM, {**ENCODER, **RELATIVE, "position_buckets": 8}),
    "t5": (AutoModelForSeq2SeqLM, T5),
    "bart": (AutoModelForSeq2SeqLM, STACKS),
}
DROPOUT = ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout_rate", "dropout", "attention_dropout")


def build(model_type, dropout=0.0, **overrides):
    """Tiny, with seeded weights none of which is constant; no rate of dropout but the one given."""
    kind, sizes = MODELS[model_type]
    config = AutoConfig.for_model(model_type, **{**sizes, **overrides})
    for name in DROPOUT:
        if getattr(config, name, None) is not None:
            setattr(config, name, dropout)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = kind.from_config(config, dtype=torch.float32)
        for param in model.parameters():
            if param.ndim == 1 or not param.any():
                param += 0.1 * torch.randn_like(param)
    return model


def rows(model_type, count, seed):
    """Samples of ragged length, padded on the right, with one label each or with a target sequence."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, VOCABULARY, (count, LENGTH), generator=generator)
    targets = torch.randint(3, VOCABULARY, (count, LENGTH - 3), generator=generator)
    samples = []
    for index in range(count):
        mask = (torch.arange(LENGTH) < LENGTH - index % 4).long()
        labels = torch.tensor(index % LABELS) if model_type == "bert" else targets[index]
        samples.append({"input_ids": tokens[index] * mask, "attention_mask": mask, "labels": labels})
    return samples


def train(model_type, tp, folder=None):
    return epochs.train(build(model_type), rows(model_type, 18, seed=1), rows(model_type, 7, seed=2), tp, folder)


@cache
def plain(model_type):
    return run_on_ranks(train, 2, model_type, None)


def test_a_classifier_trains_as_under_plain_ddp():
    epochs.assert_same(run_on_ranks(train, 4, "bert", 2), plain("bert"))


def test_an_encoder_decoder_trains_and_saves_as_under_plain_ddp():
    with tempfile.TemporaryDirectory() as folder:
        run = run_on_ranks(train, 4, "t5", 2, folder)
    assert all(rank.reloaded for rank in run)
    epochs.assert_same(run, plain("t5"))


def batch_for(model_type):
    batch = epochs.together(rows(model_type, 3, seed=5))
    if MODELS[model_type][0] is AutoModelForMaskedLM:
        batch["labels"] = batch["input_ids"].clone()
    return batch


def generated(model, batch):
    options = {"max_new_tokens": 6, "min_new_tokens": 5, "do_sample": False}
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return [model.generate(**inputs, **options, num_beams=beams).tolist() for beams in (1, 3)]


def beside_the_unsharded(model_type, fault=None):
    """The worst relative error of a gradient under gradient checkpointing, its name, and what both generate."""
    batch = batch_for(model_type)
    reference = build(model_type)
    reference(**batch).loss.backward()
    expected = {name: param.grad for name, param in reference.named_parameters() if param.grad is not None}
    with injected(fault):
        model = parallelize(build(model_type), tp_mesh())
        model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(**batch).loss.backward()
        # A key's bias has no gradient but rounding.
        floor = 1e-4 * torch.stack([gradient.norm() for gradient in expected.values()]).norm().item()
        errors = relative_errors(full_gradients(model), expected, floor)
    worst = max(errors, key=errors.get)
    tokens = [generated(each.eval(), batch) for each in (reference, model)] if fault is None else []
    return errors[worst], worst, tokens


@pytest.mark.parametrize("model_type", ["t5", "bart"])
def test_encoder_decoders_learn_and_generate_as_unsharded(model_type):
    for error, worst, (expected, tokens) in run_on_ranks(beside_the_unsharded, 2, model_type):
        assert error < TOLERANCE, f"{worst} is off by {error:.1e}"
        assert tokens == expected


def test_a_position_bias_of_other_heads_shows():
    for error, _, _ in run_on_ranks(beside_the_unsharded, 2, "t5", "position bias of other heads"):
        assert error > 100 * TOLERANCE


def same_on_every_rank(value):
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return all(other == values[0] for other in values)


def differing_over_ranks(model_type, fault=None, checkpointing=False, **overrides):
    """What differs over the ranks in training mode, with dropout: losses, gradients of replicated parameters."""
    differing, losses = set(), set()
    with injected(fault):
        model = parallelize(build(model_type, dropout=0.2, **overrides).train(), tp_mesh())
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for step in range(4):
            torch.manual_seed(step)
            model.zero_grad()
            loss = model(**batch_for(model_type)).loss
            loss.backward()
            losses.add(loss.item())
            held = {name: p.grad for name, p in model.named_parameters() if p.tp_shard is None and p.grad is not None}
            differing |= {name for name in held if not same_on_every_rank(held[name].tolist())}
            differing |= set() if same_on_every_rank(loss.item()) else {"loss"}
    assert len(losses) == 4, "nothing drops out"
    return sorted(differing)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("model_type", ["deberta", "deberta-v2"])
def test_what_all_heads_share_is_dropped_out_alike(model_type, checkpointing):
    assert run_on_ranks(differing_over_ranks, 2, model_type, checkpointing=checkpointing) == [[], []]


def test_a_mask_a_rank_for_what_all_heads_share_shows():
    fault = "a dropout mask a rank for what is replicated"
    for differing in run_on_ranks(differing_over_ranks, 2, "deberta", fault):
        assert differing == ["deberta.encoder.rel_embeddings.weight"]


def test_all_ranks_skip_the_same_layers():
    skipping = {"encoder_layerdrop": 0.5, "decoder_layerdrop": 0.5}
    assert run_on_ranks(differing_over_ranks, 2, "bart", **skipping) == [[], []]


def test_each_rank_holds_the_position_bias_of_its_heads():
    layouts = resolve_plan(build("t5"), 2).layouts
    biases = [name for name in layouts if name.endswith("relative_attention_bias.weight")]
    assert len(biases) == 2 and all(layouts[name].dim == 1 for name in biases)


@pytest.mark.parametrize(
    ("model_type", "tp", "named"),
    [
        ("t5", 3, ["SelfAttention.q", "tp_size=3", "4"]),
        ("bert", 8, ["attention.self.query", "tp_size=8", "4"]),
    ],
)
def test_heads_that_the_ranks_do_not_divide_are_refused(model_type, tp, named):
    with pytest.raises(PlanError) as refused:
        resolve_plan(build(model_type), tp)
    assert all(word in str(refused.value) for word in named)


def test_heads_that_mix_with_those_of_other_ranks_are_refused():
    with pytest.raises(PlanError, match=r"attention\.self.*tp_size=2.*talking_head=True.*replicate"):
        resolve_plan(build("deberta", talking_head=True), 2)


def loads_full_weights(model_type):
    """Of a sharded model whose weights were halved: what is off after loading the unsharded model's, and a copy's."""
    reference, batch = build(model_type), batch_for(model_type)
    model = parallelize(build(model_type), tp_mesh())
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(0.5)
    off = []
    for loaded in (model, copy.deepcopy(model)):
        keys = loaded.load_state_dict(reference.state_dict())
        with torch.no_grad():
            off.append(abs(loaded.eval()(**batch).loss.item() - reference.eval()(**batch).loss.item()))
        assert not keys.missing_keys and not keys.unexpected_keys
    return max(off)


def test_a_bias_with_a_second_name_in_the_head_around_it_loads_from_full_weights():
    assert max(run_on_ranks(loads_full_weights, 2, "deberta")) < 1e-5


def saved_state(model_type, folder):
    """The loss before a state is saved, and after it has been loaded into a model of other weights."""
    accelerator = accelerator_for(2)
    model = accelerator.prepare(build(model_type))
    batch = batch_for(model_type)
    losses = []
    for step in range(2):
        with torch.no_grad():
            losses.append(model.eval()(**batch).loss.item())
            if step == 0:
                accelerator.save_state(folder)
                for param in model.parameters():
                    param.mul_(0.5)
        accelerator.load_state(folder)
    return losses


def test_a_state_with_a_tied_bias_is_saved_and_loaded():
    with tempfile.TemporaryDirectory() as folder:
        for before, after in run_on_ranks(saved_state, 2, "deberta", folder):
            assert after == pytest.approx(before, rel=1e-6)


def swept():
    """Every swept model that is not made of two, by its type."""
    models = {}
    for case in (*encoders.encoders(), *encoders.further_encoders(), *encoders.encoder_decoders()):
        torch.manual_seed(0)
        models.setdefault(case.name.split(" ")[0], []).append(case.build())
    return models


def test_each_rule_of_these_plans_means_something_in_a_swept_model():
    for model_type, models in swept().items():
        plans = [shipped_plans(model) for model in models]
        assert all(plans), f"{model_type} has no plan"
        rules = {rule for plan in plans for rule in plan[0].rules}
        matched = {rule for rule in rules for model in models if Names(model).match(rule)}
        unmatched = rules - matched
        assert not unmatched, f"{model_type}: {sorted(unmatched)} match nothing"
