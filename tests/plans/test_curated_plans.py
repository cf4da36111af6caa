"""Plans that this package ships for architectures without one: right, exported as usual, and refused with a reason."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaForSequenceClassification,
)
from transformers.pytorch_utils import Conv1D

from accel_tp_ddp import PlanError, full_gradients, full_state_dict, parallelize, resolve_plan, styles
from accel_tp_ddp.plans.shipped import model_types, read_shipped
from accel_tp_ddp.styles.region import Region

from ..helpers.compare import assert_tensors_close, relative_errors
from ..helpers.faults import CURATED_FAULTS, injected
from ..helpers.models import CURATED, build_config, build_model
from ..helpers.ranks import run_on_ranks
from ..helpers.resuming import MORE, SAVED_AFTER, Run, go_on_from, save_and_go_on
from ..helpers.sharded import TOLERANCE, token_batch, tp_mesh
from ..helpers.training import Spec, assert_same_run, train

PADDED = {"input_ids": torch.tensor([[0, 0, 5, 6, 7], [9, 8, 7, 6, 5]])}
PADDED["attention_mask"] = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


# --- gradients, weights and generation -------------------------------------------------------------------------------


def reads(model):
    """What the unsharded and the sharded model should agree on."""
    batch = token_batch()
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][1, 7:] = 0
    batch["labels"] = batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)
    output = model(**batch)
    output.loss.backward()
    gradients = full_gradients(model)
    tokens = model.eval().generate(**PADDED, max_new_tokens=4, do_sample=False, pad_token_id=0)
    return {"logits": output.logits.detach(), **gradients}, tokens.tolist()


def on_ranks(architectures, attention=None, fault=None):
    answers = {}
    for name in architectures:
        with injected(fault):
            model = parallelize(build_model(name, attention=attention), tp_mesh())
            state = full_state_dict(model)
            answers[name] = (*reads(model), state, sum(p.numel() for p in model.parameters()))
    return answers


@cache
def unsharded(name, attention=None):
    return reads(build_model(name, attention=attention))


EAGER = ("gpt2", "falcon_two_keys", "stablelm")  # which have an attention of another kind, too


@pytest.mark.parametrize("tp, attention, names", [(2, "eager", EAGER), (4, None, CURATED)], ids=["eager", "all"])
def test_a_curated_plan_gives_the_unsharded_model(tp, attention, names):
    for rank in run_on_ranks(on_ranks, tp, names, attention):
        assert rank.keys() == set(names)
        for name, (tensors, tokens, state, held) in rank.items():
            reference = build_model(name, attention=attention)
            expected, generated = unsharded(name, attention)
            assert expected.keys() == {"logits", *dict(reference.named_parameters())}
            assert_tensors_close(tensors, expected, TOLERANCE, floor=1e-4)
            assert tokens == generated
            assert state.keys() == reference.state_dict().keys()
            assert all(torch.equal(state[key], value) for key, value in reference.state_dict().items())
            assert held < (1 / tp + 0.04) * sum(param.numel() for param in reference.parameters())


SHOWN_BY = {  # a model, and the end of a parameter's name whose gradient is wrong then
    "bias kept in a row-parallel layer": ("gpt2", ("ln_2.weight",)),
    "biases of other heads": ("bloom", ("query_key_value.weight",)),
    "norms of other heads": ("stablelm", ("q_layernorm.norms.7.weight",)),
    "gradients of a list of norms not summed": ("stablelm", ("norms.0.weight", "norms.3.weight")),
    "gathered keys without their gradients' sum": ("falcon_one_key", ("query_key_value.weight",)),
    "keys of another group": ("falcon_two_keys", ("query_key_value.weight",)),
    "input sections cut as one": ("codegen", ("out_proj.weight",)),
}


def test_each_fault_of_curated_plans_is_tried():
    assert SHOWN_BY.keys() == set(CURATED_FAULTS)


@pytest.mark.parametrize("fault", SHOWN_BY)
def test_a_fault_of_a_curated_plans_style_shows_in_the_gradients(fault):
    name, signs = SHOWN_BY[fault]
    worst = 0.0
    for rank in run_on_ranks(on_ranks, 4, [name], None, fault):
        errors = relative_errors(rank[name][0], unsharded(name)[0], floor=1e-4)
        worst = max(worst, *(error for key, error in errors.items() if key.endswith(signs)))
    assert worst > 100 * TOLERANCE


LEFT_WHOLE = {f"transformer.h.*.self_attention{inside}": "replicate" for inside in ("", ".query_key_value", ".dense")}


def with_its_attention_left_whole():
    model = build_model("falcon_one_key", num_attention_heads=7, hidden_size=56)
    return reads(parallelize(model, tp_mesh(), LEFT_WHOLE))


def test_a_model_whose_heads_do_not_divide_trains_with_replicated_attention():
    model = build_model("falcon_one_key", num_attention_heads=7, hidden_size=56)
    with pytest.raises(PlanError, match="7, is not divisible by tp_size"):
        resolve_plan(model, 2)
    expected, generated = reads(model)
    for tensors, tokens in run_on_ranks(with_its_attention_left_whole, 2):
        assert_tensors_close(tensors, expected, TOLERANCE, floor=1e-4)
        assert tokens == generated


def recomputed():
    """Gradients with dropout, of a forward that is kept and of one that is done again in the backward."""
    found = []
    for checkpointing in (False, True):
        model = parallelize(build_model("gpt2_dropout"), tp_mesh()).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        torch.manual_seed(11)
        model(**token_batch()).loss.backward()
        found.append(full_gradients(model))
    return found


def test_gpt2_drops_out_the_same_again_when_activations_are_recomputed():
    without = unsharded("gpt2")[0]
    for kept, again in run_on_ranks(recomputed, 2):
        assert_tensors_close(again, kept, TOLERANCE)
        assert (
            relative_errors(kept, {k: v for k, v in without.items() if k != "logits"})["transformer.wpe.weight"] > 0.1
        )


def initialized_again():
    model = parallelize(build_model("gpt2"), tp_mesh())
    torch.manual_seed(9)
    for block in model.transformer.h:
        model._init_weights(block.mlp)
    return full_state_dict(model)


def test_a_layer_that_its_block_initializes_is_drawn_in_full():
    reference = build_model("gpt2")
    torch.manual_seed(9)
    for block in reference.transformer.h:
        reference._init_weights(block.mlp)
    before = build_model("gpt2").state_dict()
    assert not torch.equal(before["transformer.h.0.mlp.c_proj.weight"], reference.transformer.h[0].mlp.c_proj.weight)
    for state in run_on_ranks(initialized_again, 2):
        assert_tensors_close(state, reference.state_dict(), 0.0)


# --- through Accelerate ----------------------------------------------------------------------------------------------


def test_gpt2_trains_as_under_plain_ddp():
    reference = run_on_ranks(train, 2, Spec("gpt2", tied=True, steps=4))
    assert_same_run(run_on_ranks(train, 4, Spec("gpt2", tied=True, tp=2, steps=4)), reference)


def test_gpt2_resumes_from_a_state_that_was_saved_at_another_layout(tmp_path):
    first, *_ = run_on_ranks(save_and_go_on, 2, Run(2, "gpt2"), str(tmp_path / "state"))
    assert len(first.losses) == SAVED_AFTER + MORE
    for (record,) in run_on_ranks(go_on_from, 4, Run(4, "gpt2"), [str(tmp_path / "state")]):
        assert record.same_objects
        assert_tensors_close(record.weights, first.weights, 1e-6)
        assert_tensors_close(record.state, first.state, 1e-6)
        torch.testing.assert_close(record.losses, first.losses[SAVED_AFTER:], rtol=2e-4, atol=0)


def exported(folder):
    """Loads full weights of another seed into sharded models, and writes ordinary checkpoints."""
    for name in CURATED:
        model = parallelize(build_model(name), tp_mesh())
        model.load_state_dict(build_model(name, seed=3).state_dict())
        model.save_pretrained(f"{folder}/{name}")


def test_what_is_exported_is_an_ordinary_checkpoint(tmp_path):
    run_on_ranks(exported, 2, str(tmp_path))
    for name in CURATED:
        expected = build_model(name, seed=3).eval()
        loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / name, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
        assert_tensors_close(loaded.state_dict(), expected.state_dict(), 0.0)
        with torch.no_grad():
            assert torch.equal(loaded(**PADDED).logits, expected(**PADDED).logits)


# --- heads -----------------------------------------------------------------------------------------------------------

_HEADS = {"gpt2": GPT2ForSequenceClassification, "llama": LlamaForSequenceClassification}


def classifier(name):
    torch.manual_seed(4)
    config = build_config(name, num_labels=1, pad_token_id=0, problem_type="regression")
    return _HEADS[name]._from_config(config).eval()


def scored(model):
    output = model(**PADDED, labels=torch.tensor([0.5, -1.0]))
    output.loss.backward()
    return {"scores": output.logits.detach(), **full_gradients(model)}


def scored_on_ranks():
    return [scored(parallelize(classifier(name), tp_mesh())) for name in _HEADS]


def test_a_reward_model_scores_and_learns_as_unsharded():
    expected = [scored(classifier(name)) for name in _HEADS]
    for rank in run_on_ranks(scored_on_ranks, 2):
        for actual, reference in zip(rank, expected, strict=True):
            assert_tensors_close(actual, reference, 1e-4, floor=1e-4)


# --- the spelling of plans -------------------------------------------------------------------------------------------


def heads_handed_over():
    """What `local_heads` makes of arguments of several shapes, and the gradient of one that wants one."""
    attention = Attention()
    attention.forward = lambda hidden, bias: bias
    mesh = tp_mesh()
    style = styles.get_style("local_heads(bias, dim=-3, heads=num_heads)", "attention")
    style.apply(styles.Site("attention", attention, None, None, mesh.size(), "local_heads"), Region(mesh))
    whole = torch.arange(2 * 8 * 6.0).view(2, 8, 1, 6)
    bias = whole.clone().requires_grad_()
    (attention(None, bias=bias) * (mesh.get_local_rank() + 1)).sum().backward()
    shapes = (whole, whole.view(16, 1, 6), whole[:, :1], whole[0, :, 0], None)
    return [attention(None, value) for value in shapes], bias.grad


def test_an_argument_is_cut_by_heads_where_it_has_them():
    whole = torch.arange(2 * 8 * 6.0).view(2, 8, 1, 6)
    for rank, ((four, three, same, flat, none), gradient) in enumerate(run_on_ranks(heads_handed_over, 2)):
        own = whole[:, 4 * rank : 4 * rank + 4]
        assert torch.equal(four, own) and torch.equal(three, own.reshape(8, 1, 6))
        assert torch.equal(same, whole[:, :1]) and torch.equal(flat, whole[0, :, 0]) and none is None
        assert torch.equal(gradient[:, :4], torch.ones(2, 4, 1, 6)), "from the first rank"
        assert torch.equal(gradient[:, 4:], 2 * torch.ones(2, 4, 1, 6)), "from the second"


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_heads, self.width, self.name, self.kind = 8, 12, "attention", True
        self.qkv = Conv1D(3 * 24, 24)
        self.out = Conv1D(24, 24)
        self.list = nn.ModuleList(nn.LayerNorm(3) for _ in range(6))

    def forward(self, hidden, bias=None):
        return self.out(self.qkv(hidden))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = Attention()


BAD = {
    "unknown_style(3)": ("unknown style `unknown_style`", "Allowed:"),
    "local_size(num_heads)": ("unknown style `local_size`", "local_sizes"),
    "local_sizes": ("`local_sizes` in", "it names no attribute", "`local_sizes(attribute, ...)`"),
    "local_sizes()": ("it names no attribute",),
    "local_sizes(num_head)": ("`num_head` of the Attention is None", "num_heads"),
    "local_sizes(width)": ("`width` of the Attention is 12, which is not divisible", "divides 12"),
    "local_sizes(name)": ("'attention' and no integer",),
    "local_sizes(kind)": ("True and no integer",),
    "local_sizes(3)": ("`3` is not a name",),
    "local_sizes(num_heads": ("cannot be read", "joined by ` + `"),
    "local_sizes(num heads)": ("`num heads` is no name, number or name=value",),
    "local_sizes(a=1, num_heads)": ("stands behind a name=value",),
    "local_heads(bias)": ("missing a required argument: 'dim'", "local_heads(argument, dim=dimension"),
    "local_heads(bias, dim=x)": ("`x` is not a number",),
    "local_heads(bias, dim=1, dim=1)": ("`dim` is given twice",),
    "local_heads(bias, dim=1)": ("its config states no number of heads", "`heads=`"),
    "local_heads(bias, dim=1, heads=width)": ("number of heads, 12, is not divisible",),
    "local_heads(alibi, dim=1, heads=num_heads)": ("no argument `alibi`", "hidden, bias"),
    "local_modules(norms)": ("`norms` of the Attention is NoneType and no ModuleList",),
    "local_modules(list)": ("the 6 modules of `list` cannot be divided evenly",),
    "requires(kind=False)": ("has kind=True, which cannot be sharded", "Build the model with kind=False"),
    "requires()": ("it names no attribute",),
    "replicate(2)": ("`replicate` of", "takes no arguments"),
    "replicate + + replicate": ("`` is no style's name",),
    "colwise + rowwise": ("the module is a Attention",),
}


@pytest.mark.parametrize("value", BAD)
def test_a_value_that_cannot_be_right_is_refused_with_a_reason(value):
    with pytest.raises(PlanError) as caught:
        resolve_plan(Model(), 8, {"attention": value, "attention.qkv": "packed_colwise(3)"})
    for part in BAD[value]:
        assert part in str(caught.value)
    assert "attention" in str(caught.value)


@pytest.mark.parametrize(
    "value, parts",
    {
        "packed_colwise(0)": ("`0` is no number of sections", "`packed_colwise(sections)`"),
        "packed_colwise(x)": ("`x` is not a number",),
        "packed_colwise(5)": ("is not 5 equal sections",),
        "packed_colwise(9)": ("has a packed section of 8, which is not divisible",),
        "grouped_qkv_colwise()": ("missing a required argument: 'heads'",),
        "grouped_qkv_colwise(heads)": ("`heads` of the Attention around it is None",),
        "grouped_qkv_colwise(width, num_heads)": ("does not hold 12 queries (width) with 8 keys",),
        "grouped_qkv_colwise(width)": ("12 groups of 1 queries", "multiple of 12 that divides 12"),
        "colwise + rowwise": ("Colwise and Rowwise would both shard the module",),
    }.items(),
)
def test_a_layer_that_does_not_hold_what_its_style_says_is_refused(value, parts):
    with pytest.raises(PlanError) as caught:
        resolve_plan(Model(), 3 if "+" in value else 16, {"attention.qkv": value})
    for part in parts:
        assert part in str(caught.value)


def test_a_cut_through_a_head_is_refused():
    """Each section is divisible by the ranks, the heads in it are not."""
    whole = {"transformer.wte": "replicate", "lm_head": "replicate", "transformer.h.*.attn": "replicate"}
    with pytest.raises(PlanError, match="sections of 8 heads of width 16, which are not divisible"):
        resolve_plan(build_model("gpt2", hidden_size=128), 16, whole)
    with pytest.raises(PlanError, match="sections of 4 heads of width 16, which are not divisible"):
        resolve_plan(build_model("codegen", hidden_size=256), 8)
    with pytest.raises(PlanError, match="is not divisible by tp_size"):
        resolve_plan(build_model("bloom"), 3)


def test_weights_that_a_module_reads_by_itself_are_refused():
    with pytest.raises(PlanError, match="has slow_but_exact=True, which cannot be sharded"):
        resolve_plan(build_model("bloom", slow_but_exact=True), 2)


def test_an_attribute_is_divided_once_whoever_comes_first():
    attention = Attention()
    styles.around.set_local_size(attention, "num_heads", 4)
    styles.around.set_local_size(attention, "num_heads", 2)
    assert attention.num_heads == 4 and styles.around.full_size(attention, "num_heads") == 8


def test_a_projection_changes_the_counts_of_its_own_heads_only():
    attention = Attention()
    attention.head_dim, attention.num_kv_heads, attention.n_heads, attention.experts = 3, 4, 4, 8
    config = SimpleNamespace(num_attention_heads=8, num_key_value_heads=4)
    counts = []
    for features in (24, 12):  # queries, then keys
        projection = styles.Site("attention.proj", nn.Linear(24, features), attention, config, 2, "colwise")
        styles.heads.show_local_heads(projection, [features])
        counts.append((attention.num_heads, attention.num_kv_heads, attention.n_heads, attention.experts))
    assert counts == [(4, 4, 4, 8), (4, 2, 4, 8)], "`n_heads` is no number of queries, `experts` none of heads"


def test_a_transposed_layer_is_cut_along_the_dimension_of_its_outputs():
    layouts = resolve_plan(build_model("gpt2"), 2).layouts
    attention, mlp = "transformer.h.0.attn", "transformer.h.0.mlp"
    assert layouts[f"{attention}.c_attn.weight"].dim == 1 and layouts[f"{attention}.c_attn.bias"].dim == 0
    assert layouts[f"{attention}.c_attn.weight"].ranges[1] == ((32, 64), (96, 128), (160, 192))
    assert layouts[f"{attention}.c_proj.weight"].dim == 0 and layouts[f"{mlp}.c_fc.weight"].dim == 1
    assert f"{attention}.c_proj.bias" not in layouts


class Renamed(GPT2Config):
    model_type = "renamed"


def test_a_model_type_without_a_plan_has_that_of_the_type_its_class_was_written_for():
    entries = resolve_plan(GPT2LMHeadModel(Renamed(n_embd=32, n_head=4, n_layer=1)), 2).entries
    assert {(entry.site.name, entry.label, entry.source) for entry in entries} >= {
        ("transformer.h.0.attn.c_attn", "packed_colwise(3)", "package")
    }


class ScaledHead(nn.Linear):
    """An output layer of 7 tokens that scales the logit of each."""

    def __init__(self):
        super().__init__(4, 7, bias=False)
        self.scale = nn.Parameter(torch.linspace(0.5, 2, 7))

    def forward(self, hidden):
        return super().forward(hidden) * self.scale


def scaled_head():
    torch.manual_seed(0)
    return nn.ModuleDict({"head": ScaledHead()})


def scaled(model):
    logits = model["head"](torch.linspace(-1, 1, 12).view(3, 4))
    logits.square().sum().backward()
    return {"logits": logits.detach(), **full_gradients(model)}


def scaled_on_ranks():
    rules = {"head": "colwise_gather_output + local_params", "head.scale": "colwise_gather_output"}
    model = parallelize(scaled_head(), tp_mesh(), rules)
    return scaled(model), model["head"].scale.numel(), full_state_dict(model)


def test_an_output_layer_computes_with_this_ranks_part_of_a_parameter_of_its_own():
    expected = scaled(scaled_head())
    for rank, (actual, held, state) in enumerate(run_on_ranks(scaled_on_ranks, 2)):
        assert_tensors_close(actual, expected, TOLERANCE)
        assert held == (4, 3)[rank]
        assert_tensors_close(state, scaled_head().state_dict(), 0.0)


def rules_in(plan):
    """With those that hold under a condition only."""
    for rule, value in plan.items():
        yield from rules_in(value) if isinstance(value, dict) else [(rule, value)]


@pytest.mark.parametrize("model_type", model_types())
def test_a_shipped_plan_names_no_unknown_style(model_type):
    rules = list(rules_in(read_shipped(model_type)))
    assert rules
    for rule, value in rules:
        styles.get_style(value, rule)
