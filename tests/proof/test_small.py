"""A small model stands for a full one, whatever the full one's size, and is the same on every rank."""

import random
import re

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GPT2Config,
    GPT2ForSequenceClassification,
    JambaConfig,
    JambaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from accel_tp_ddp import resolve_plan
from accel_tp_ddp.plans.names import wildcards
from accel_tp_ddp.proof.fingerprint import describe
from accel_tp_ddp.proof.sizes import Choice, layer_counts, shrunk
from accel_tp_ddp.proof.small import CannotShrink, Small, small_models

LLAMA_3_70B = {
    **{"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    **{"num_key_value_heads": 8, "vocab_size": 128256, "pad_token_id": 128001, "eos_token_id": [128001, 128009]},
}


def on_meta(kind: type, config, **options) -> nn.Module:
    with torch.device("meta"):
        return kind(config, **options)


def small_of(model: nn.Module, tp_size: int = 2, rules="auto") -> list[Small]:
    return list(small_models(model, resolve_plan(model, tp_size, rules), rules))


def description(model: nn.Module, rules="auto") -> list[str]:
    """Without what is drawn at random in training, which a small model does not do."""
    rows = describe(model, resolve_plan(model, 2, rules))
    return [row for row in rows if not re.search(r"mask_(time|feature)_prob|jitter|noise", row)]


FULL = {
    "llama": lambda: on_meta(LlamaForCausalLM, LlamaConfig(**LLAMA_3_70B)),
    "qwen2, tied, late windows": lambda: on_meta(
        Qwen2ForCausalLM,
        Qwen2Config(num_key_value_heads=4, tie_word_embeddings=True, use_sliding_window=True, max_window_layers=20),
    ),
    "mixtral": lambda: on_meta(MixtralForCausalLM, MixtralConfig()),
    "deepseek_v3": lambda: on_meta(DeepseekV3ForCausalLM, DeepseekV3Config(num_hidden_layers=12)),
    "jamba": lambda: on_meta(JambaForCausalLM, JambaConfig(num_hidden_layers=16)),
    "gpt2, classes": lambda: on_meta(GPT2ForSequenceClassification, GPT2Config(num_labels=3)),
    "t5": lambda: on_meta(T5ForConditionalGeneration, T5Config(num_layers=12, num_heads=16)),
    "whisper": lambda: on_meta(WhisperForConditionalGeneration, WhisperConfig(encoder_layers=12, d_model=384)),
    "vit": lambda: on_meta(ViTForImageClassification, ViTConfig()),
    "clip": lambda: on_meta(CLIPModel, CLIPConfig()),
    "llava": lambda: on_meta(LlavaForConditionalGeneration, LlavaConfig()),
    "bert without a pooler": lambda: on_meta(BertModel, BertConfig(), add_pooling_layer=False),
}


@pytest.mark.parametrize("name", FULL)
def test_the_small_model_has_the_full_ones_description_and_trains(name):
    full = FULL[name]()
    (small,) = small_of(full)
    assert type(small.model) is type(full) and small.prefix == "" and small.missed == ()
    plan = resolve_plan(small.model, 2, small.rules)
    assert description(small.model, small.rules) == description(full)
    assert sum(p.numel() for p in small.model.parameters()) < 5_000_000
    assert {(p.dtype, p.device.type) for p in small.model.parameters()} == {(torch.float32, "cpu")}
    output = small.model(**small.inputs)
    terms = [getattr(output, "loss", None)]
    if terms[0] is None:
        terms = [value.square().mean() for value in output.values() if torch.is_tensor(value) and value.requires_grad]
    torch.stack(list(terms)).sum().backward()
    sharded = {entry.site.parameter(key): entry.site.held(key).grad for entry in plan.entries for key in entry.layouts}
    with_gradient = {wildcards(key) for key, grad in sharded.items() if grad is not None and grad.abs().max() > 0}
    assert with_gradient == set(map(wildcards, sharded)) and len(sharded) > 5


@pytest.mark.parametrize("name", ["llama", "mixtral", "whisper", "llava"])
def test_it_is_the_same_on_every_rank(name):
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        random.seed(seed)
        (small,) = small_of(FULL[name]())
        results.append((small.model.state_dict(), small.inputs, small.how))
    (state, inputs, how), (other_state, other_inputs, other_how) = results
    assert how == other_how and state.keys() == other_state.keys() and inputs.keys() == other_inputs.keys()
    assert all(torch.equal(value, other_state[key]) for key, value in state.items())
    for key, value in inputs.items():
        assert torch.equal(value, other_inputs[key]) if torch.is_tensor(value) else value == other_inputs[key]


def test_everything_global_is_as_before_and_the_context_does_not_matter():
    full = FULL["llama"]()
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"), torch.no_grad():
            (small,) = small_of(full)
            assert torch.get_default_dtype() == torch.bfloat16 and not torch.is_grad_enabled()
            assert torch.empty(1).is_meta
    finally:
        torch.set_default_dtype(torch.float32)
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
    assert all(p.dtype == torch.float32 and p.requires_grad and not p.is_meta for p in small.model.parameters())
    assert not any(value.is_meta for value in small.inputs.values() if torch.is_tensor(value))


def test_the_full_models_config_and_weights_are_left_alone():
    full = LlamaForCausalLM(LlamaConfig(hidden_size=64, num_attention_heads=8, intermediate_size=96, vocab_size=100))
    config, state = full.config.to_dict(), {key: value.clone() for key, value in full.state_dict().items()}
    assert small_of(full)
    assert full.config.to_dict() == config
    assert all(torch.equal(value, state[key]) for key, value in full.state_dict().items())


def test_nothing_is_constant_and_nothing_drops_out():
    config = GPT2Config(resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3, num_labels=3)
    (small,) = small_of(on_meta(GPT2ForSequenceClassification, config))
    for name, param in small.model.named_parameters():
        assert not (param == param.flatten()[0]).all(), name
    assert small.model.training
    with torch.no_grad():
        first, second = (small.model(**small.inputs).loss for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    "tp_size, heads, key_values, expected",
    [
        (2, 32, 32, (4, 4)),  # as many of both
        (2, 32, 8, (8, 4)),  # two heads a rank at least
        (2, 32, 1, (4, 1)),  # fewer key/value heads than ranks stay
        (4, 32, 4, (8, 4)),  # one a rank stays one a rank
        (4, 32, 2, (8, 2)),
        (8, 64, 8, (16, 8)),
        (2, 14, 2, (4, 2)),
        (4, 14, 2, (10, 2)),  # not divisible by the ranks, and so it stays
        (4, 12, 12, (8, 8)),
    ],
)
def test_heads_keep_their_relation_to_ranks_and_to_each_other(tp_size, heads, key_values, expected):
    config = LlamaConfig(hidden_size=heads * 64, num_attention_heads=heads, num_key_value_heads=key_values)
    small = shrunk(config, tp_size, Choice())
    assert (small.num_attention_heads, small.num_key_value_heads) == expected
    assert small.hidden_size == small.num_attention_heads * small.head_dim


@pytest.mark.parametrize("tp_size", [2, 3, 4, 8])
@pytest.mark.parametrize("field, value", [("vocab_size", 50257), ("vocab_size", 50304), ("intermediate_size", 11008)])
def test_what_divides_by_the_ranks_still_does_and_what_does_not_does_not(tp_size, field, value):
    small = shrunk(LlamaConfig(**{field: value}), tp_size, Choice())
    new = getattr(small, field)
    assert new < value and (new % tp_size == 0) == (value % tp_size == 0)


def test_special_tokens_lie_in_the_small_vocabulary_and_stay_apart():
    config = LlavaConfig(image_token_index=31999, text_config=LlamaConfig(pad_token_id=31998, eos_token_id=31997))
    small = shrunk(config, 2, Choice())
    tokens = [small.image_token_index, small.text_config.pad_token_id, small.text_config.eos_token_id]
    assert len(set(tokens)) == 3 and max(tokens) < small.text_config.vocab_size < 200


def test_a_layer_of_each_kind_stays():
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    config = Qwen2Config(num_hidden_layers=24, layer_types=kinds * 4, use_sliding_window=True)
    ((place, count),) = layer_counts(config)
    assert (place, count) == (("", "num_hidden_layers"), 24)
    (small,) = small_of(on_meta(Qwen2ForCausalLM, config))
    assert small.model.config.layer_types == ["sliding_attention", "full_attention"]
    full = DeepseekV3Config(num_hidden_layers=12, first_k_dense_replace=3)
    (small,) = small_of(on_meta(DeepseekV3ForCausalLM, full))
    assert (small.model.config.num_hidden_layers, small.model.config.first_k_dense_replace) == (2, 1)


def test_rules_for_single_layers_go_to_the_layers_that_stay():
    rules = {f"model.layers.5.mlp.{name}_proj": "replicate" for name in ("gate", "up", "down")}
    full = on_meta(LlamaForCausalLM, LlamaConfig(num_hidden_layers=8))
    (small,) = small_of(full, rules=rules)
    plan = resolve_plan(small.model, 2, small.rules)
    assert description(small.model, small.rules) == description(full, rules)
    labels = {entry.site.name: entry.label for entry in plan.entries}
    ups = [labels[f"model.layers.{index}.mlp.up_proj"] for index in range(small.model.config.num_hidden_layers)]
    assert sorted(ups) == ["colwise", "replicate"]


def test_adapters_are_added_anew():
    peft = pytest.importorskip("peft")
    with torch.device("meta"):
        full = peft.get_peft_model(
            LlamaForCausalLM(LlamaConfig(num_hidden_layers=8)),
            peft.LoraConfig(
                task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"]
            ),
        )
        full.add_adapter("other", peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["v_proj"]))
        full.set_adapter("other")
    (small,) = small_of(full)
    assert type(small.model) is type(full) and small.model.active_adapter == "other"
    assert small.missed == ("base_model.model.lm_head.modules_to_save.default",)  # of an adapter that is not active
    assert description(small.model) == description(full)
    assert all(param.abs().max() > 0 for name, param in small.model.named_parameters() if "lora_B" in name)
    assert set(full.peft_config) == {"default", "other"} and full.peft_config["default"].target_modules == {
        *("q_proj", "down_proj"),
    }


class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.head = BertModel(BertConfig()), nn.Linear(768, 3)
        self.decoder = LlamaForCausalLM(LlamaConfig(num_hidden_layers=4))


def test_models_inside_a_module_of_ones_own_stand_by_themselves():
    with torch.device("meta"):
        full = Both()
    found = small_of(full, rules={"decoder.model.layers.*.mlp.up_proj": "colwise"})
    assert [(small.prefix, type(small.model), small.rules) for small in found] == [
        ("encoder", BertModel, "auto"),
        ("decoder", LlamaForCausalLM, {"model.layers.*.mlp.up_proj": "colwise"}),
    ]


def test_a_planned_module_outside_of_them_cannot_be_shrunk():
    with torch.device("meta"):
        full = Both()
    with pytest.raises(CannotShrink, match="Both has no config"):
        small_of(full, rules={"head": "rowwise_split_input"})


def test_a_model_that_was_changed_after_it_was_built_says_where():
    full = on_meta(LlamaForCausalLM, LlamaConfig(num_hidden_layers=4))
    full.lm_head = nn.Sequential(nn.Linear(4096, 64, device="meta"), nn.Linear(64, 32000, device="meta"))
    rules = {"lm_head": "replicate", "lm_head.0": "colwise", "lm_head.1": "rowwise"}
    plan = resolve_plan(full, 2, rules)
    with pytest.raises(CannotShrink, match="No small LlamaForCausalLM can stand for this one: .*lm_head"):
        list(small_models(full, plan, rules))


def test_what_a_script_has_set_on_the_model_is_on_the_small_one_too():
    model = LlamaForCausalLM(
        LlamaConfig(num_hidden_layers=4, hidden_size=64, intermediate_size=96, vocab_size=128, num_attention_heads=4)
    )
    model.note, model.gradient_checkpointing = "a run", True
    for layer in model.model.layers:
        layer.self_attn.watched = True
    (small,) = small_models(model, resolve_plan(model, 2))
    assert small.model.note == "a run" and all(layer.self_attn.watched for layer in small.model.model.layers)
