"""Plans that are inferred: of decoders that are in no library, and as good as those that somebody wrote."""

from __future__ import annotations

import os
import tempfile
from unittest import mock

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM

from accel_tp_ddp import full_state_dict, resolve_plan
from accel_tp_ddp.core.shard import holds_shards
from accel_tp_ddp.plans.rules import InferredPlan
from accel_tp_ddp.proof import infer as inferring
from accel_tp_ddp.proof.infer import infer_plan, propose, sharded_share

from ..helpers.compare import assert_tensors_close
from ..helpers.models import build_model
from ..helpers.ranks import run_on_ranks
from ..helpers.sharded import tp_mesh
from ..helpers.training import make_accelerator
from .strangers import build

QUILL = {
    "words": "embedding_rowwise",
    "head": "colwise_gather_output",
    "blocks.*.attention.qkv": "packed_colwise(3)",
    "blocks.*.attention.out": "rowwise",
    "blocks.*.attention": "local_sizes(width, heads)",
    "blocks.*.mlp.gate_up": "packed_colwise",
    "blocks.*.mlp.down": "rowwise",
}
HERON = {
    "tok": "embedding_rowwise",
    "output": "colwise_gather_output",
    "layers.*.mlp.0": "colwise",
    "layers.*.mlp.2": "rowwise",
    **{f"layers.*.w{name}": "colwise" for name in "qkv"},
    "layers.*.wo": "rowwise",
    "layers.*.q_norm": "replicated_with_grad_allreduce",
    "layers.*.k_norm": "replicated_with_grad_allreduce",
    "layers.*": "local_sizes(n_heads, n_kv)",
}
WREN = {
    "words": "embedding_rowwise",
    "head": "colwise_gather_output",
    "qkv": "grouped_qkv_colwise(heads)",
    "out": "rowwise",
    "up": "colwise",
    "down": "rowwise",
}


def settings(folder):
    """A cache of one's own, and the default way to prove."""
    return mock.patch.dict(os.environ, ACCEL_TP_DDP_CACHE=folder, ACCEL_TP_DDP_PROVE="auto")


def training(tp, kind):
    """Three steps of a stranger: losses, gradient norms, the weights after."""
    with tempfile.TemporaryDirectory() as folder, settings(folder):
        accelerator = make_accelerator(tp)
        model = build(kind)
        takes_labels = hasattr(model, "config")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-5)
        model, optimizer = accelerator.prepare(model, optimizer)
        sharded = holds_shards(accelerator.unwrap_model(model))
        generator = torch.Generator().manual_seed(accelerator.process_index)
        seen = []
        for _ in range(3):
            ids = torch.randint(1, 131, (4, 12), generator=generator)
            mask = torch.ones_like(ids)
            mask[0, 9:] = 0
            if takes_labels:
                loss = model(input_ids=ids, attention_mask=mask, labels=ids).loss
            else:
                loss = cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
            accelerator.backward(loss)
            seen += [float(loss), float(accelerator.clip_grad_norm_(model.parameters(), 0.5))]
            optimizer.step()
            optimizer.zero_grad()
        return seen, full_state_dict(model), sharded


@pytest.mark.parametrize("kind", ["quill", "heron", "wren", "penalized"])
def test_a_stranger_trains_as_under_plain_ddp(kind):
    plain, sharded = run_on_ranks(training, 2, None, kind), run_on_ranks(training, 4, 2, kind)
    for rank, (seen, weights, is_sharded) in enumerate(sharded):
        assert is_sharded
        assert seen == pytest.approx(plain[rank // 2][0], rel=2e-4)
        assert_tensors_close(weights, plain[rank // 2][1], 2e-4)


def inferred(kind, **sizes):
    model = build(kind, **sizes)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    state = torch.get_rng_state()
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, ACCEL_TP_DDP_CACHE=folder):
        rules = infer_plan(model, tp_mesh())
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], param) for name, param in model.named_parameters())
    plan = resolve_plan(model, tp_mesh().size(), rules)
    return dict(rules), sharded_share(plan), str(plan)


@pytest.mark.parametrize(("kind", "wanted"), [("quill", QUILL), ("heron", HERON), ("wren", WREN)])
def test_the_whole_of_a_stranger_is_cut(kind, wanted):
    for rules, share, table in run_on_ranks(inferred, 2, kind):
        assert rules == wanted
        assert share > 0.9
        assert " inferred " in table


def test_fewer_key_value_heads_than_ranks_are_gathered():
    """Its attention does not state how many queries share a key, so no rank can be shown its part."""
    for rules, _, _ in run_on_ranks(inferred, 4, "heron", n_kv_heads=2):
        assert {rules[f"layers.*.w{name}"] for name in "qkv"} == {"colwise_gather_output"}
        assert rules["layers.*.wo"] == "rowwise_split_input" and rules["layers.*.mlp.2"] == "rowwise"


def test_a_rule_that_the_comparison_refuses_is_left_out():
    for rules, _, _ in run_on_ranks(inferred, 2, "penalized"):
        kept = {name: style for name, style in QUILL.items() if "mlp" not in name}
        assert kept.items() <= rules.items()
        assert rules.get("blocks.*.mlp.down") != "rowwise"


def all_first(model, tp_size=2):
    """What is tried first, on this process alone."""
    _, blocks = propose(model, tp_size)
    return InferredPlan({name: style for block in blocks if block.options for name, style in block.options[0].items()})


@pytest.mark.parametrize(
    "name", ["llama", "qwen3", "phi3", "gpt2", "bloom", "mpt", "mixtral", "gpt_oss", "deepseek_v3"]
)
def test_what_is_inferred_is_cut_as_somebody_has_planned_it(name):
    model = build_model(name)
    got, want = resolve_plan(model, 2, all_first(model)).layouts, resolve_plan(model, 2).layouts
    assert {parameter: got.get(parameter) for parameter in want} == want


def test_a_norm_over_all_heads_leaves_the_projections_to_be_gathered():
    config = AutoConfig.for_model("olmo2", hidden_size=32, num_attention_heads=4, vocab_size=99, intermediate_size=48)
    rules = all_first(AutoModelForCausalLM.from_config(config))
    attention = {name: style for name, style in rules.items() if "self_attn" in name}
    assert set(attention.values()) == {"colwise_gather_output", "rowwise_split_input"}
    assert rules["model.layers.*.mlp.down_proj"] == "rowwise"


def twice(kind):
    """The second time nothing is searched."""
    with tempfile.TemporaryDirectory() as folder:
        shared = [folder]
        torch.distributed.broadcast_object_list(shared)
        with mock.patch.dict(os.environ, ACCEL_TP_DDP_CACHE=shared[0]):
            first = infer_plan(build(kind), tp_mesh())
            with mock.patch.object(inferring, "propose", side_effect=AssertionError("searched again")):
                return first == infer_plan(build(kind, depth=5), tp_mesh())


def test_an_inferred_plan_is_kept():
    assert all(run_on_ranks(twice, 2, "quill"))


def preparing(what, prove):
    with mock.patch.dict(os.environ, ACCEL_TP_DDP_PROVE=prove):
        accelerator = make_accelerator(2)
    accelerator.prepare(build("quill") if what == "quill" else torch.nn.Sequential(torch.nn.Linear(8, 8)))


@pytest.mark.parametrize(
    ("what", "prove", "said"),
    [
        ("quill", "never", 'With prove="auto", `prepare` infers a plan and proves it'),
        ("a layer", "auto", "none could be inferred: no two layers feed each other"),
    ],
)
def test_without_a_plan_every_rank_says_so(what, prove, said):
    for answer in run_on_ranks(preparing, 2, what, prove, expect_raise=True):
        assert "PlanError" in answer.type_names or "ValueError" in answer.type_names
        assert "has no plan of its own" in answer.message and said in answer.message
