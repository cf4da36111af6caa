"""The plans that this package ships, as data: families, conditions and marks; one that no longer fits is refused."""

from __future__ import annotations

import pytest
import transformers
from torch import nn
from transformers import (
    BartConfig,
    BartForCausalLM,
    BartModel,
    BertConfig,
    BertForMaskedLM,
    BertForNextSentencePrediction,
    CLIPVisionConfig,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
)

from accel_tp_ddp import PlanError, parallelize, resolve_plan
from accel_tp_ddp.plans import shipped
from accel_tp_ddp.plans.names import unmarked

from ..helpers.models import build_model
from ..helpers.ranks import run_on_ranks
from ..helpers.sharded import tp_mesh

SMALL = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    "vocab_size": 60,
}
STACKS = {
    **{"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48},
    **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": 60, "max_position_embeddings": 32},
}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 60}


def files():
    return {path.stem for path in shipped._DATA.glob("*.yaml")} - {"families"}


def sharded(model, plan="auto"):
    return {entry.site.name for entry in resolve_plan(model, 2, plan).entries if entry.layouts}


def rename(model, old, new):
    """Every module called `old` is called `new`, as a later release of transformers might."""
    count = 0
    for module in list(model.modules()):
        if old in module._modules:
            module._modules = {new if name == old else name: child for name, child in module._modules.items()}
            count += 1
    assert count
    return model


# --- the files -------------------------------------------------------------------------------------------------------


def test_the_rules_of_every_model_type_can_be_read():
    types = shipped.model_types()
    assert len(types) > 110
    for model_type in types:
        assert shipped.read_shipped(model_type), model_type


def test_no_two_files_have_equal_rules():
    by_rules = {}
    for name in files():
        rules = shipped._read_family(name)
        by_rules.setdefault(repr(sorted(rules.items(), key=lambda rule: rule[0])), []).append(name)
    assert [names for names in by_rules.values() if len(names) > 1] == []


def test_every_file_belongs_to_a_model_type_or_is_extended():
    families = shipped._read_data("families")
    extended = {shipped._read_data(name).get("extends") for name in files()}
    assert families.keys() <= files()
    assert {family for family, types in families.items() if not types} == files() - set(shipped.model_types().values())
    assert files() == set(shipped.model_types().values()) | extended - {None}
    assert all(len(types) != 1 for types in families.values()), "a file of one model type has its name"


def test_a_condition_replaces_a_rule_that_it_repeats():
    config = DeepseekV3Config(q_lora_rank=None)
    without = shipped._where_it_holds(shipped.read_shipped("deepseek_v3"), config)
    config.q_lora_rank = 8
    with_rank = shipped._where_it_holds(shipped.read_shipped("deepseek_v3"), config)
    assert {name for name in without if ".q_" in name} == {"layers.*.self_attn.q_proj"}
    assert {name for name in with_rank if ".q_" in name} == {"layers.*.self_attn.q_b_proj"}
    rules = {"a?": "colwise", "if x": {"a": "colwise"}}
    config.x = True
    assert shipped._where_it_holds(rules, config) == {"a": "colwise"}
    assert shipped._where_it_holds(rules, nn.Module()) == {"a?": "colwise"}


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Writes files to be read in the place of this package's."""
    caches = (shipped.model_types, shipped.read_shipped)
    monkeypatch.setattr(shipped, "_DATA", tmp_path)
    for cached in caches:
        cached.cache_clear()

    def write(**texts):
        for name, text in texts.items():
            (tmp_path / f"{name}.yaml").write_text(text)

    write(families="pair: [one, two]\nbase: []\n", base="a: colwise\nb?:\n  c: rowwise\n  if big: {d: colwise}\n")
    yield write
    for cached in caches:
        cached.cache_clear()


def test_families_extensions_and_blocks(data):
    data(pair="extends: base\nb.c: replicate\nif big: {b.e: rowwise}\n", alone="extends: pair\na: rowwise\n")
    assert shipped.model_types() == {"alone": "alone", "one": "pair", "two": "pair"}
    pair = {"a": "colwise", "b.c": "replicate", "if big": {"b?.d": "colwise", "b.e": "rowwise"}}
    assert shipped.read_shipped("one") == shipped.read_shipped("two") == pair
    assert shipped.read_shipped("alone") == {**pair, "a": "rowwise"}
    assert shipped.read_shipped("base") == shipped.read_shipped("pair") == shipped.read_shipped("other") == {}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a: [1", "expected ',' or ']'"),
        ("- a", "it holds no mapping"),
        ("a: 3", "a: 3 is no rule"),
        ("b:\n  a:", "b.a: None is no rule"),
        ("extends: alone\na: colwise", "it extends itself"),
        ("extends: nothing\na: colwise", "No such file"),
    ],
)
def test_a_malformed_file_is_an_error_of_the_package_that_names_it(data, text, why):
    data(alone=text)
    with pytest.raises(PlanError, match=r"(alone|nothing)\.yaml, a file of this package, is malformed") as caught:
        shipped.read_shipped("alone")
    assert why in str(caught.value)


def test_a_model_type_of_two_families_is_refused(data):
    data(alone="a: colwise", families="pair: [one, alone]")
    with pytest.raises(PlanError, match="families.yaml.*alone is in pair and in alone"):
        shipped.model_types()


def test_a_family_that_is_no_list_is_refused(data):
    data(families="pair: one")
    with pytest.raises(PlanError, match="families.yaml, a file of this package, is malformed: pair: 'one' is no list"):
        shipped.model_types()


# --- rules that match nothing ----------------------------------------------------------------------------------------


def test_a_plan_that_a_renamed_module_has_left_is_refused():
    """Else its layers would be replicated without a word, and the rest of the model still be sharded."""
    with pytest.raises(PlanError) as caught:
        resolve_plan(rename(build_model("gpt2"), "attn", "self_attn"), 2)
    text = str(caught.value)
    for part in (
        "this package's plan for the model type `gpt2` does not fit GPT2LMHeadModel",
        f"of transformers {transformers.__version__} (tp_size=2)",
        "`h.*.attn.c_attn: packed_colwise(3)`, `h.*.attn.c_proj: rowwise`, `h.*.attn: local_sizes(",
        "h.*.self_attn.c_attn",  # the nearest
        "an error of this package",
        'tp_plan={"h.*.attn.c_attn?": "replicate"}',
    ):
        assert part in text
    assert "mlp" not in text.partition("Nearest")[0]


@pytest.mark.parametrize(
    ("build", "old", "rule"),
    [
        (lambda: BertForMaskedLM(BertConfig(**SMALL)), "query", "encoder.layer.*.attention.self.query: colwise"),
        (lambda: BertForMaskedLM(BertConfig(**SMALL)), "encoder", "encoder.layer.*.attention.self.query: colwise"),
        (lambda: BertForMaskedLM(BertConfig(**SMALL)), "decoder", "cls.predictions.decoder: colwise_gather_output"),
        (lambda: BartModel(BartConfig(**STACKS)), "fc1", "encoder.layers.*.fc1: colwise"),
        (lambda: T5ForConditionalGeneration(T5Config(**T5)), "q", "encoder.block.*.layer.*.SelfAttention.q: colwise"),
    ],
)
def test_the_first_rule_that_matches_nothing_is_named(build, old, rule):
    assert sharded(build())
    with pytest.raises(PlanError, match="does not fit") as caught:
        resolve_plan(rename(build(), old, "renamed"), 2)
    assert f"(tp_size=2): `{rule}`" in str(caught.value)


def test_a_norm_that_the_config_turns_on_has_to_be_there():
    with pytest.raises(PlanError, match=r"`layers\.\*\.self_attn\.q_layernorm: local_modules\(norms\)`"):
        resolve_plan(rename(build_model("stablelm", qk_layernorm=True), "q_layernorm", "query_norm"), 2)


def test_the_part_of_a_model_is_named_in_full():
    tower = CLIPVisionConfig(**{**SMALL, "image_size": 16, "patch_size": 4})
    text = LlamaConfig(**SMALL)
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=tower, text_config=text, image_token_index=3))
    rename(model, "fc1", "up")
    with pytest.raises(PlanError, match=r"`model\.vision_tower\.encoder\.layers\.\*\.mlp\.fc1: colwise` matches no"):
        resolve_plan(model, 2)


def on_ranks():
    model = rename(build_model("gpt2"), "attn", "self_attn")
    before = {name: param.clone() for name, param in model.named_parameters()}
    with pytest.raises(PlanError, match="does not fit GPT2LMHeadModel"):
        parallelize(model, tp_mesh())
    return all(param.equal(before[name]) for name, param in model.named_parameters())


def test_no_rank_touches_a_weight_of_a_model_that_the_plan_does_not_fit():
    assert run_on_ranks(on_ranks, 2) == [True, True]


def test_the_user_says_what_holds_instead():
    model = rename(build_model("gpt2"), "attn", "self_attn")
    expected = {name.replace(".attn", ".self_attn") for name in sharded(build_model("gpt2"))}
    plan = shipped.shipped_plans(build_model("gpt2"))[0].rules
    attention = {rule: style for rule, style in plan.items() if ".attn" in rule}
    moved = {rule.replace(".attn", ".self_attn"): style for rule, style in attention.items()}
    with pytest.raises(PlanError, match="does not fit"):
        resolve_plan(model, 2, moved)
    assert sharded(model, {**moved, **{f"{rule}?": "replicate" for rule in attention}}) == expected


def test_a_rule_of_the_user_without_a_mark_still_has_to_match():
    with pytest.raises(PlanError, match="matches no module or parameter of GPT2LMHeadModel"):
        resolve_plan(build_model("gpt2"), 2, {"h.*.mlp.c_fx": "replicate"})
    with pytest.raises(PlanError, match="matches no module or parameter of GPT2LMHeadModel"):
        resolve_plan(build_model("gpt2"), 2, {"h?.*.mlp.c_fx": "replicate"})  # there is an h
    assert resolve_plan(build_model("gpt2"), 2, {"h.*.mlp.c_fx?": "replicate"})


# --- parts that a model lacks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "first"),
    [
        (lambda: BertForMaskedLM(BertConfig(**SMALL)).bert, "embeddings.word_embeddings"),
        (lambda: BertForNextSentencePrediction(BertConfig(**SMALL)), "bert.embeddings.word_embeddings"),
        (lambda: BartForCausalLM(BartConfig(**STACKS)), "model.decoder.layers.0.fc1"),
        (lambda: T5EncoderModel(T5Config(**T5)), "encoder.block.0.layer.1.DenseReluDense.wi"),
        (lambda: build_model("gpt2").transformer, "wte"),
        (lambda: T5EncoderModel(T5Config(**T5, feed_forward_proj="gated-gelu")), "shared"),
    ],
)
def test_a_model_without_a_head_or_a_stack_keeps_the_rest_of_the_plan(build, first):
    assert first in sharded(build())


def test_a_list_without_members_is_no_rename():
    model = BertForMaskedLM(BertConfig(**{**SMALL, "num_hidden_layers": 0}))
    assert sharded(model) == {"bert.embeddings.word_embeddings", "cls.predictions.decoder"}


@pytest.mark.parametrize("rank", [None, 8])
def test_only_the_query_projection_that_there_is_has_a_rule(rank):
    sizes = {"kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    sizes |= {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
    sizes |= {"moe_intermediate_size": 16, "num_key_value_heads": 4, "q_lora_rank": rank}
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**SMALL, **sizes))
    queries = {name.rpartition(".")[2] for name in sharded(model) if ".q_" in name}
    assert queries == {"q_b_proj" if rank else "q_proj"}


def test_marks_do_not_show_in_a_resolved_plan():
    entries = resolve_plan(build_model("gpt2"), 2).entries
    assert "lm_head" in {entry.site.name for entry in entries}
    assert not any("?" in entry.label or "?" in entry.site.name for entry in entries)
    assert any("?" in rule for rule in shipped.read_shipped("gpt2")) and unmarked("a?.b?") == "a.b"
