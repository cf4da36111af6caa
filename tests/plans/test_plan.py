"""Plans: which names a rule means, which rule wins, and what is cut where. Nothing here shards a weight."""

import json
import logging
import pickle

import pytest
import torch
import torch.distributed as dist
import yaml
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, PrepareModuleInput, RowwiseParallel

from accel_tp_ddp import PlanError, Style, parallelize, register_style, resolve_plan
from accel_tp_ddp.plans.rules import own_plan
from accel_tp_ddp.styles import registry
from accel_tp_ddp.styles.packed import PackedColwise

from ..helpers.models import ARCHITECTURES, LAYERS, VOCABULARY, build_model
from ..helpers.ranks import run_on_ranks

HIDDEN, INTERMEDIATE, HEAD = 64, 96, 8
QUERIES, KEYS = 8, 4  # heads


@pytest.fixture(autouse=True)
def registered_styles_are_forgotten(monkeypatch):
    monkeypatch.setattr(registry, "_STYLES", dict(registry._STYLES))


def chosen(plan):
    """(style, source) by module name."""
    return {entry.site.name: (entry.label, entry.source) for entry in plan.entries}


def from_user(model, rules, tp_size=2):
    """The modules that a user's rules reach, with their styles."""
    entries = chosen(resolve_plan(model, tp_size, rules))
    return {name: label for name, (label, source) in entries.items() if source == "user"}


def of_layers(*relative):
    return {f"model.layers.{layer}.{name}" for layer in range(LAYERS) for name in relative}


def held(layout, rank):
    """The indices that a rank holds, in its order."""
    return [index for start, stop in layout.ranges[rank] for index in range(start, stop)]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.inner = nn.ModuleDict({"up": nn.Linear(8, 12), "down": nn.Linear(12, 8)})


class Toy(nn.Module):
    """No plan, no config: three levels of names, one list, one number of two digits."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(11))
        self.head = nn.Linear(8, 10, bias=False)


class Based(nn.Module):
    """A head on a base model, where the same name stands in both."""

    base_model_prefix = "base"

    def __init__(self):
        super().__init__()
        self.base = Toy()
        self.head = nn.Linear(8, 10, bias=False)


# --- names -----------------------------------------------------------------------------------------------------------


def test_a_star_stands_for_exactly_one_dotted_part():
    toy = Toy()
    ups = {f"blocks.{i}.inner.up": "colwise" for i in range(11)}
    assert from_user(toy, {"blocks.*.inner.up": "colwise"}) == ups
    assert from_user(toy, {"blocks.10.*.up": "colwise"}) == {"blocks.10.inner.up": "colwise"}
    assert from_user(toy, {"*.*.inner.up": "colwise"}) == ups
    for too_few_or_many in ("blocks.*.up", "*.up", "blocks.*.*.inner.up", "*", "blocks.*.inner.up.*.*"):
        with pytest.raises(PlanError):
            resolve_plan(toy, 2, {too_few_or_many: "colwise"})
    for part_of_a_part in ("blocks.1*.inner.up", "blocks.*.inner.u*", "block*.0.inner.up", "blocks.[01].inner.up"):
        with pytest.raises(PlanError, match="matches no module"):
            resolve_plan(toy, 2, {part_of_a_part: "colwise"})


def test_a_dot_in_a_rule_is_a_dot():
    with pytest.raises(PlanError, match="matches no module"):
        resolve_plan(Toy(), 2, {"blocksx0xinner.up": "colwise"})


def test_names_may_be_full_or_relative_to_the_base_model():
    model = build_model("llama")
    full = {"model.layers.*.mlp.up_proj": "replicate", "model.embed_tokens": "embedding_colwise"}
    relative = {name.removeprefix("model."): style for name, style in full.items()}
    expected = {**dict.fromkeys(of_layers("mlp.up_proj"), "replicate"), "model.embed_tokens": "embedding_colwise"}
    assert from_user(model, full) == from_user(model, relative) == expected


def test_a_full_name_is_not_taken_for_a_relative_one():
    assert from_user(Based(), {"head": "colwise_gather_output"}) == {"head": "colwise_gather_output"}
    assert from_user(Based(), {"base.head": "colwise_gather_output"}) == {"base.head": "colwise_gather_output"}
    assert set(from_user(Based(), {"blocks.0.inner.up": "colwise"})) == {"base.blocks.0.inner.up"}


def test_the_name_of_a_parameter_means_its_module():
    model = build_model("llama")
    rules = {"lm_head.weight": "replicate", "layers.*.mlp.up_proj.weight": "replicate", "norm.weight": "replicate"}
    assert set(from_user(model, rules)) == {"lm_head", "model.norm", *of_layers("mlp.up_proj")}
    neox = build_model("gpt_neox")
    assert set(from_user(neox, {"gpt_neox.layers.0.mlp.dense_h_to_4h.weight": "colwise_gather_output"})) == {
        "gpt_neox.layers.0.mlp.dense_h_to_4h"
    }


@pytest.mark.parametrize(
    "name, style",
    [
        ("layers.0.mlp.dense_h_to_4h.bias", "colwise"),
        ("layers.0.input_layernorm.weight", "colwise"),
        ("layers.0.mlp.dense_h_to_4h.bias", "replicate"),
    ],
)
def test_one_of_several_parameters_cannot_be_treated_otherwise_than_its_module(name, style):
    with pytest.raises(PlanError, match="one of several") as error:
        resolve_plan(build_model("gpt_neox"), 2, {name: style})
    owner, _, _ = name.rpartition(".")
    assert f"Name the module `gpt_neox.{owner}` instead" in str(error.value)


def test_a_module_under_two_names_is_planned_once_under_its_first():
    toy = Toy()
    toy.again = toy.head
    assert from_user(toy, {"again": "colwise_gather_output"}) == {"head": "colwise_gather_output"}


# --- precedence ------------------------------------------------------------------------------------------------------


def in_both_orders(rules):
    return [dict(rules), dict(reversed(rules.items()))]


def test_an_exact_name_beats_a_pattern():
    for rules in in_both_orders({"blocks.*.inner.up": "colwise", "blocks.3.inner.up": "replicate"}):
        styles_ = from_user(Toy(), rules)
        assert styles_.pop("blocks.3.inner.up") == "replicate"
        assert len(styles_) == 10 and set(styles_.values()) == {"colwise"}


def test_an_exact_relative_name_beats_a_full_pattern():
    for rules in in_both_orders({"model.layers.*.mlp.up_proj": "colwise", "layers.1.mlp.up_proj": "replicate"}):
        assert from_user(build_model("llama"), rules) == {
            "model.layers.0.mlp.up_proj": "colwise",
            "model.layers.1.mlp.up_proj": "replicate",
        }


def test_fewer_stars_beat_more():
    rules = {"*.*.inner.*": "colwise", "blocks.*.inner.*": "rowwise", "blocks.*.inner.up": "colwise_gather_output"}
    for ordered in in_both_orders(rules):
        styles_ = from_user(Toy(), ordered)
        assert {styles_[f"blocks.{i}.inner.up"] for i in range(11)} == {"colwise_gather_output"}
        assert {styles_[f"blocks.{i}.inner.down"] for i in range(11)} == {"rowwise"}


def test_the_users_pattern_beats_an_exact_name_of_the_model():
    model = build_model("llama")
    assert own_plan(model).keys() >= {"lm_head", "model.embed_tokens"}
    entries = chosen(resolve_plan(model, 2, {"*": "replicate", "model.layers.*.*.up_proj": "replicate"}))
    assert entries["lm_head"] == entries["model.layers.1.mlp.up_proj"] == ("replicate", "user")
    assert entries["model.embed_tokens"] == ("embedding_rowwise", "model")
    assert entries["model.layers.1.mlp.down_proj"] == ("rowwise", "model")


def test_the_user_beats_the_package_and_the_package_beats_the_model():
    model = build_model("phi3")
    assert model.tp_plan["model.layers.*.self_attn.qkv_proj"] == "colwise_gather_output"
    entries = chosen(resolve_plan(model, 2))
    assert entries["model.layers.0.self_attn.qkv_proj"] == ("packed_qkv_colwise", "package")
    assert entries["lm_head"] == ("colwise_gather_output", "model")
    rules = {
        "layers.*.self_attn.qkv_proj": "colwise_gather_output",
        "layers.*.self_attn.o_proj": "rowwise_split_input",
    }
    entries = chosen(resolve_plan(model, 2, rules))
    assert entries["model.layers.0.self_attn.qkv_proj"] == ("colwise_gather_output", "user")
    assert entries["model.layers.0.mlp.gate_up_proj"] == ("packed_colwise", "package")


def test_a_mapping_adds_to_what_auto_finds():
    model = build_model("llama")
    auto = chosen(resolve_plan(model, 2))
    assert chosen(resolve_plan(model, 2, {})) == auto
    changed = chosen(resolve_plan(model, 2, {"lm_head": "replicate"}))
    assert changed.pop("lm_head") == ("replicate", "user") and auto.pop("lm_head") == (
        "colwise_gather_output",
        "model",
    )
    assert changed == auto


# --- where a plan comes from -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_auto_shards_every_linear_layer(architecture):
    model = build_model(architecture)
    plan = resolve_plan(model, 2)
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert len(linear) >= 4 * LAYERS + 1
    assert linear <= plan.layouts.keys()
    assert plan.layouts.keys() <= dict(model.named_parameters()).keys()


def test_a_mapping_a_yaml_file_and_a_json_file_say_the_same(tmp_path):
    model = build_model("llama")
    rules = {"model.layers.*.mlp.up_proj": "replicate", "lm_head.weight": "replicate"}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(rules))
    (tmp_path / "plan.yml").write_text(
        "# a comment\nmodel.layers.*.mlp.up_proj: replicate\n'lm_head.weight': replicate\n"
    )
    (tmp_path / "plan.json").write_text(json.dumps(rules))
    signature = resolve_plan(model, 2, rules).signature()
    assert signature != resolve_plan(model, 2).signature()
    for name in ("plan.yaml", "plan.yml", "plan.json"):
        assert resolve_plan(model, 2, tmp_path / name).signature() == signature
        assert resolve_plan(model, 2, str(tmp_path / name)).signature() == signature


def test_the_aliases_are_the_styles_they_stand_for():
    rules = {"blocks.*.inner.up": "colwise_rep", "blocks.*.inner.down": "rowwise_rep"}
    names = {"blocks.*.inner.up": "colwise_gather_output", "blocks.*.inner.down": "rowwise_split_input"}
    alias, full = (resolve_plan(Toy(), 4, each) for each in (rules, names))
    assert alias.layouts == full.layouts and len(full.layouts) == 33
    assert [type(entry.style) for entry in alias.entries] == [type(entry.style) for entry in full.entries]


def test_torch_styles_stand_in_a_plan_beside_names():
    class Custom(ParallelStyle):
        def _apply(self, module, device_mesh):
            return module

    rules = {
        "blocks.*.inner.up": ColwiseParallel(),
        "blocks.*.inner.down": RowwiseParallel(),
        "blocks.0": PrepareModuleInput(input_layouts=(Replicate(),), desired_input_layouts=(Shard(0),)),
        "blocks.1": Custom(),
        "head": "colwise_gather_output",
    }
    found = from_user(Toy(), rules)
    assert found["blocks.7.inner.up"] == "ColwiseParallel" and found["blocks.7.inner.down"] == "RowwiseParallel"
    assert found["blocks.0"] == "PrepareModuleInput" and found["blocks.1"] == "Custom"
    assert found["head"] == "colwise_gather_output"


@pytest.mark.parametrize("rules", [{"head": ColwiseParallel()}, {"blocks.*.inner.up": RowwiseParallel()}])
def test_sizes_under_torch_styles_are_verified_too(rules):
    toy = Toy()  # head: 10 outputs; up: 8 inputs
    resolve_plan(toy, 2, rules)
    with pytest.raises(PlanError, match="not divisible by tp_size"):
        resolve_plan(toy, 3, rules)


def test_a_registered_style_can_be_named():
    class Whole(Style):
        pass

    whole = Whole()
    register_style("leave_alone", whole)
    register_style("torch_colwise", ColwiseParallel())
    register_style("three_packed", PackedColwise(sections=3))
    rules = {"head": "leave_alone", "blocks.0.inner.up": "torch_colwise", "blocks.1.inner.up": "three_packed"}
    plan = resolve_plan(Toy(), 2, rules)
    assert from_user(Toy(), rules) == rules
    assert {entry.site.name: entry.style for entry in plan.entries}["head"] is whole
    assert held(plan.layouts["blocks.1.inner.up.weight"], 1) == [2, 3, 6, 7, 10, 11]
    with pytest.raises(PlanError, match="Nearest names that exist: leave_alone"):
        resolve_plan(Toy(), 2, {"head": "leave_alnoe"})


@pytest.mark.parametrize(
    "name, style", [("", Style()), (3, Style()), ("mine", "colwise"), ("mine", Style), ("mine", None)]
)
def test_only_a_style_can_be_registered_under_a_name(name, style):
    with pytest.raises(ValueError):
        register_style(name, style)
    assert name not in registry.style_names()


# --- tied weights ----------------------------------------------------------------------------------------------------


def test_an_embedding_without_a_rule_follows_the_head_that_it_is_tied_to(monkeypatch):
    rules = {rule: style for rule, style in own_plan(build_model("gpt_neox")).items() if "embed_in" not in rule}
    monkeypatch.setattr("accel_tp_ddp.plans.plan.shipped_plans", lambda model: [])
    # transformers has a rule for it since 5.24
    monkeypatch.setattr("accel_tp_ddp.plans.plan.own_plan", lambda model: rules)
    untied, tied = (resolve_plan(build_model("gpt_neox", tied=tie), 2) for tie in (False, True))
    assert "gpt_neox.embed_in" not in chosen(untied)
    assert chosen(tied)["gpt_neox.embed_in"] == ("embedding_rowwise", "tied")
    assert tied.layouts["gpt_neox.embed_in.weight"] == tied.layouts["lm_head.weight"]


def test_a_head_without_a_rule_follows_the_embedding_that_it_is_tied_to():
    toy = Toy()
    toy.embedding = nn.Embedding(10, 8)
    toy.head.weight = toy.embedding.weight
    entries = chosen(resolve_plan(toy, 2, {"embedding": "embedding_rowwise"}))
    assert entries["head"] == ("colwise_gather_output", "tied")
    entries = chosen(resolve_plan(toy, 2, {"embedding": "embedding_colwise"}))
    assert entries["head"] == ("rowwise_split_input", "tied")


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "phi3"])
@pytest.mark.parametrize(
    "rules",
    [
        {"lm_head": "replicate"},
        {"lm_head": "rowwise_split_input"},
        {"embedding": "embedding_colwise"},
        {"embedding": "replicate"},
        {"lm_head": ColwiseParallel(output_layouts=Replicate()), "embedding": "embedding_rowwise"},
    ],
    ids=["whole head", "head cut otherwise", "embedding cut otherwise", "whole embedding", "torch style and a name"],
)
def test_tied_weights_that_would_be_cut_differently_are_an_error(architecture, rules):
    rules = dict(rules)
    name = "gpt_neox.embed_in" if architecture == "gpt_neox" else "model.embed_tokens"
    if "embedding" in rules:
        rules[name] = rules.pop("embedding")
    elif architecture == "gpt_neox":
        rules[name] = "embedding_rowwise"
    with pytest.raises(PlanError, match="is tied to a weight of") as error:
        resolve_plan(build_model(architecture, tied=True, vocab_size=132), 2, rules)
    message = str(error.value)
    assert f"{(132, HIDDEN)}" in message and "tp_size=2" in message and "lm_head" in message and name in message
    resolve_plan(build_model(architecture, tied=False, vocab_size=132), 2, rules)


@pytest.mark.parametrize(
    "rules",
    [
        {"lm_head": "replicate", "model.embed_tokens": "replicate"},
        {"lm_head": "rowwise_split_input", "model.embed_tokens": "embedding_colwise"},
        {
            "lm_head": ColwiseParallel(output_layouts=Replicate()),
            "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
        },
    ],
    ids=["whole", "hidden dimension", "torch styles"],
)
def test_tied_weights_that_are_treated_alike_are_accepted(rules):
    resolve_plan(build_model("llama", tied=True, vocab_size=132), 2, rules)


# --- layouts ---------------------------------------------------------------------------------------------------------


def test_an_mlp_may_be_cut_into_parts_of_different_length():
    layouts = resolve_plan(build_model("llama", intermediate_size=90), 4).layouts
    for name in ("gate_proj", "up_proj", "down_proj"):
        assert layouts[f"model.layers.0.mlp.{name}.weight"].sizes == (23, 23, 23, 21)
    packed = resolve_plan(build_model("phi3", intermediate_size=90), 4).layouts
    assert packed["model.layers.0.mlp.gate_up_proj.weight"].sizes == (46, 46, 46, 42)
    assert packed["model.layers.0.mlp.down_proj.weight"].sizes == (23, 23, 23, 21)


def test_a_norm_without_a_row_for_each_head_is_refused_by_head_parameters():
    with pytest.raises(PlanError, match=r"of size \(16,\) has no row for each head.*replicated_with_grad_allreduce"):
        resolve_plan(build_model("qwen3"), 2, {"layers.*.self_attn.q_norm": "head_parameters"})


def test_gate_and_up_in_turns_are_not_cut_into_parts_of_different_length():
    model = build_model("gpt_oss", intermediate_size=31, experts_implementation="eager")
    with pytest.raises(PlanError, match="their parts would not fit each other"):
        resolve_plan(model, 2)


@pytest.mark.parametrize("tp_size", [2, 4])
def test_packed_weights_are_cut_section_by_section(tp_size):
    layouts = resolve_plan(build_model("phi3"), tp_size).layouts
    rows = torch.arange((QUERIES + 2 * KEYS) * HEAD)
    queries, keys, values = rows.split([QUERIES * HEAD, KEYS * HEAD, KEYS * HEAD])
    gate, up = torch.arange(2 * INTERMEDIATE).split(INTERMEDIATE)
    for layer in range(LAYERS):
        qkv = layouts[f"model.layers.{layer}.self_attn.qkv_proj.weight"]
        gate_up = layouts[f"model.layers.{layer}.mlp.gate_up_proj.weight"]
        assert qkv.dim == gate_up.dim == 0
        for rank in range(tp_size):
            parts = [part.view(tp_size, -1)[rank] for part in (queries, keys, values)]
            assert held(qkv, rank) == torch.cat(parts).tolist()
            parts = [part.view(tp_size, -1)[rank] for part in (gate, up)]
            assert held(gate_up, rank) == torch.cat(parts).tolist()
        assert qkv.sizes == ((QUERIES + 2 * KEYS) * HEAD // tp_size,) * tp_size
        assert not qkv.contiguous and not gate_up.contiguous


def test_packed_input_features_are_cut_section_by_section():
    toy = Toy()  # down: 12 inputs
    layout = resolve_plan(toy, 3, {"blocks.0.inner.down": "packed_rowwise"}).layouts["blocks.0.inner.down.weight"]
    assert layout.dim == 1
    assert [held(layout, rank) for rank in range(3)] == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]


@pytest.mark.parametrize("tp_size", [2, 3, 4])
def test_a_vocabulary_that_does_not_divide_is_cut_as_torch_chunk_cuts_it(tp_size):
    model = build_model("llama", hidden_size=96, num_attention_heads=12, num_key_value_heads=12)
    layouts = resolve_plan(model, tp_size).layouts
    chunks = [chunk.tolist() for chunk in torch.arange(VOCABULARY).chunk(tp_size)]
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert [held(layouts[name], rank) for rank in range(tp_size)] == chunks
    assert len({len(chunk) for chunk in chunks}) == 2, "the case is to be uneven"


def test_columns_rows_and_biases_are_cut_along_the_right_dimension():
    model = build_model("gpt_neox")
    layouts, sizes = resolve_plan(model, 4).layouts, {name: p.shape for name, p in model.named_parameters()}
    for layer in range(LAYERS):
        prefix = f"gpt_neox.layers.{layer}"
        for name in ("attention.query_key_value", "mlp.dense_h_to_4h"):
            for kind in ("weight", "bias"):
                layout = layouts[f"{prefix}.{name}.{kind}"]
                assert layout.dim == 0 and layout.sizes == (sizes[f"{prefix}.{name}.{kind}"][0] // 4,) * 4
        for name in ("attention.dense", "mlp.dense_4h_to_h"):
            layout = layouts[f"{prefix}.{name}.weight"]
            assert layout.dim == 1 and layout.sizes == (sizes[f"{prefix}.{name}.weight"][1] // 4,) * 4
            assert f"{prefix}.{name}.bias" not in layouts, "a row-parallel bias is whole"


# --- what a plan shows and leaves alone ------------------------------------------------------------------------------


def numbers_held_by_the_first_rank(model, plan):
    total = 0
    for name, param in model.named_parameters():
        layout = plan.layouts.get(name)
        total += param.numel() if layout is None else len(held(layout, 0)) * param.numel() // param.shape[layout.dim]
    return total


@pytest.mark.parametrize("architecture, tied", [("llama", False), ("qwen3", True), ("phi3", False)])
def test_a_printed_plan_shows_styles_sizes_and_what_a_rank_holds(architecture, tied):
    model = build_model(architecture, tied=tied)
    plan = resolve_plan(model, 4)
    text = str(plan)
    lines = text.splitlines()
    total = sum(param.numel() for param in model.parameters())
    assert type(model).__name__ in lines[0] and "tp_size=4" in lines[0]
    assert f"{total:,} elements" in lines[0] and f"{numbers_held_by_the_first_rank(model, plan):,} on" in lines[0]
    assert all(entry.label in text and entry.source in text for entry in plan.entries)
    (down,) = (line for line in lines if "mlp.down_proj" in line)
    assert f"{LAYERS} x model.layers.*.mlp.down_proj" in down
    assert f"{HIDDEN}x{INTERMEDIATE} -> {HIDDEN}x{INTERMEDIATE // 4}" in down and "rowwise" in down
    assert f"{VOCABULARY}x{HIDDEN} -> 33x{HIDDEN}" in text
    if architecture == "qwen3":
        (norm,) = (line for line in lines if "q_norm" in line)
        assert "replicated" in norm


def test_a_printed_plan_shows_the_sizes_of_a_tied_head():
    text = str(resolve_plan(build_model("gpt_neox", tied=True), 4))
    (head,) = (line for line in text.splitlines() if "lm_head" in line)
    assert "replicated" not in head


def test_rules_of_the_model_that_match_nothing_are_shown_and_no_error():
    toy = Toy()
    toy.tp_plan = {"head": "colwise_gather_output", "lm_head_2": "colwise"}
    plan = resolve_plan(toy, 2)
    assert plan.unmatched == ("lm_head_2",) and "lm_head_2" in str(plan).splitlines()[-1]
    with pytest.raises(PlanError, match="`lm_head_2: colwise`"):
        resolve_plan(toy, 2, {"lm_head_2": "colwise"})


def test_a_signature_tells_plans_apart_and_nothing_else():
    model = build_model("llama")
    signature = resolve_plan(model, 2).signature()
    assert resolve_plan(build_model("llama", seed=5), 2).signature() == signature, "values do not matter"
    others = [
        resolve_plan(model, 4),
        resolve_plan(model, 2, {"lm_head": "replicate"}),
        resolve_plan(build_model("llama", layers=LAYERS + 1), 2),
        resolve_plan(build_model("llama", intermediate_size=128), 2),
        resolve_plan(build_model("qwen3"), 2),
    ]
    assert len({signature, *(plan.signature() for plan in others)}) == len(others) + 1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_resolving_leaves_the_model_untouched(architecture, tied):
    def look(model):
        modules = [
            (name, id(module), sorted(module.__dict__), len(module._forward_pre_hooks), len(module._forward_hooks))
            for name, module in model.named_modules()
        ]
        params = [
            (name, id(param), param.data_ptr(), param._version, sorted(param.__dict__), param.requires_grad)
            for name, param in model.named_parameters(remove_duplicate=False)
        ]
        return modules, params, model.config.to_dict(), dict(model.tp_plan)

    model = build_model(architecture, tied=tied)
    before, weights = look(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for tp_size in (1, 2, 4):
        print(resolve_plan(model, tp_size))
    with pytest.raises(PlanError):
        resolve_plan(model, 3)
    assert look(model) == before
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def parallelize_and_listen():
    records = []

    class Listener(logging.Handler):
        def emit(self, record):
            records.append((record.name, record.levelname, record.getMessage()))

    logger, listener = logging.getLogger("accel_tp_ddp"), Listener()
    logger.addHandler(listener)
    level = logger.level
    try:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
        logger.setLevel(logging.WARNING)
        parallelize(build_model("llama"), mesh)
        assert not records, "a plan is information, not a warning"
        logger.setLevel(logging.INFO)
        parallelize(build_model("llama"), mesh)
    finally:
        logger.removeHandler(listener)
        logger.setLevel(level)
    return records


def test_the_plan_is_logged_once_on_the_main_process():
    first, second = run_on_ranks(parallelize_and_listen, 2)
    assert second == []
    ((name, level, message),) = first
    assert name.split(".")[0] == "accel_tp_ddp" and level == "INFO"
    assert message == str(resolve_plan(build_model("llama"), 2))


def test_an_error_in_a_plan_is_a_value_error_that_survives_pickling():
    with pytest.raises(ValueError) as error:
        resolve_plan(Toy(), 2, {"heads": "colwise"})
    assert isinstance(error.value, PlanError)
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)
