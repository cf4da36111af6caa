"""Wrong plans, seeded on purpose: whether the proof refuses each, and whether it names the wrong module.

    python -m benchmarks.wrong_plans [--tp 2] [--only llama ...]

Each is a right plan with some rules made wrong, over models of the sweep. For each: who refuses it (the plan's own
checks, or the proof), what is named, and whether that is a module that a wrong rule is about or the first to take its
output. Exit code 1 if any goes through, or names another. First the right plans: none of them may be refused.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from tempfile import TemporaryDirectory
from typing import Any

import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from accel_tp_ddp import PlanError, resolve_plan
from accel_tp_ddp.core.collectives import reduce_from_tp
from accel_tp_ddp.core.errors import WrongPlanError
from accel_tp_ddp.plans.names import wildcards
from accel_tp_ddp.proof.prove import prove_plan
from accel_tp_ddp.styles.forward import ParallelForward
from accel_tp_ddp.styles.linear import Colwise, Rowwise

from .sweep.cases import groups
from .sweep.processes import on_ranks


class RowwiseWithoutSum(Rowwise):
    """Each rank goes on with its own part."""

    def forward(self, call: ParallelForward, input: Tensor) -> Tensor:
        call.region.leave()
        return call.inner(input)


class RowwiseSummedTwice(Rowwise):
    def forward(self, call: ParallelForward, input: Tensor) -> Tensor:
        return reduce_from_tp(call.mesh, super().forward(call, input))


class RowwiseBiasOnEachRank(Rowwise):
    def forward(self, call: ParallelForward, input: Tensor) -> Tensor:
        call.region.leave()
        return reduce_from_tp(call.mesh, call.inner(input))


class ColwiseWithoutCopy(Colwise):
    """The gradient of its input is not summed over the ranks."""

    enters = False

    def forward(self, call: ParallelForward, input: Tensor) -> Tensor:
        return call.inner(input)


@dataclass(frozen=True)
class Wrong:
    """A wrong plan.

    Attributes:
        group, case: The model, of `benchmarks.sweep`.
        rules: What is wrong, over the model's right plan.
        takers: Names of the modules that may be blamed beside those of the rules: the first to take their output, or
            the block around them where it does by itself.
    """

    group: str
    case: str
    rules: dict[str, Any]
    takers: tuple[str, ...] = field(default=())


_ATTENTION, _MLP = "model.layers.*.self_attn", "model.layers.*.mlp"


def _q(*rules: tuple[str, Any], case: str = "llama", taker: str = "o_proj", group: str = "causal") -> Wrong:
    return Wrong(
        group, case, {f"{_ATTENTION}.{name}": style for name, style in rules}, (_ATTENTION, f"{_ATTENTION}.{taker}")
    )


def _m(*rules: tuple[str, Any], case: str = "llama", taker: str = "down_proj", group: str = "causal") -> Wrong:
    return Wrong(group, case, {f"{_MLP}.{name}": style for name, style in rules}, (_MLP, f"{_MLP}.{taker}"))


def _at(case: str, rules: dict[str, Any], *takers: str, group: str = "curated") -> Wrong:
    return Wrong(group, case, rules, takers)


_GPT2, _NEOX, _BERT = "transformer.h.*", "gpt_neox.layers.*", "bert.encoder.layer.*"
_OPT, _BLOOM, _FALCON = "model.decoder.layers.*", "transformer.h.*", "transformer.h.*"
_T5 = "encoder.block.*.layer"

WRONG: tuple[Wrong, ...] = (
    # The six that trained silently wrong before there was a proof.
    _q(("k_proj", "replicate")),
    _q(("q_norm", "replicate"), ("k_norm", "replicate"), case="qwen3"),
    _q(("v_proj", "colwise_gather_output")),
    _m(("gate_up_proj", "colwise"), case="phi3"),
    _at("gpt2", {f"{_GPT2}.attn.c_attn": "colwise"}, f"{_GPT2}.attn.c_proj"),
    _at("gpt_neox", {f"{_NEOX}.attention.query_key_value": "packed_colwise(3)"}, f"{_NEOX}.attention.dense"),
    # One partner missing.
    _q(("q_proj", "replicate")),
    _q(("v_proj", "replicate")),
    _q(("o_proj", "replicate")),
    _m(("down_proj", "replicate")),
    _m(("up_proj", "replicate")),
    _m(("gate_proj", "replicate"), case="gemma2"),
    _m(("down_proj", "replicate"), case="phi3"),
    _at("gpt2", {f"{_GPT2}.mlp.c_proj": "replicate"}),
    _at("opt", {f"{_OPT}.fc2": "replicate"}, _OPT),
    _at("bert", {f"{_BERT}.attention.self.query": "replicate"}, f"{_BERT}.attention.output.dense",
        f"{_BERT}.attention.self", group="encoders"),
    _q(("kv_b_proj", "replicate"), case="deepseek_v3"),
    _q(("q_b_proj", "replicate"), case="deepseek_v3"),
    # Row for column, and the other way round.
    _q(("o_proj", "colwise_gather_output")),
    _m(("gate_proj", "rowwise")),
    _m(("up_proj", "rowwise_split_input")),
    _m(("down_proj", "colwise_gather_output"), case="qwen2"),
    _at("gpt2", {f"{_GPT2}.mlp.c_fc": "rowwise_split_input"}, f"{_GPT2}.mlp", f"{_GPT2}.mlp.c_proj"),
    # Cut otherwise than it is used.
    _q(("q_proj", "packed_colwise(2)")),
    _q(("q_proj", "packed_colwise(2)"), case="gemma2"),
    _m(("gate_proj", "packed_colwise(2)")),
    _m(("gate_proj", "packed_colwise(2)"), ("up_proj", "packed_colwise(2)"), case="granite"),
    _m(("down_proj", "packed_rowwise(2)")),
    _q(("qkv_proj", "colwise"), case="phi3"),
    _q(("qkv_proj", "packed_colwise(2)"), case="phi3"),
    _m(("gate_up_proj", "packed_colwise(4)"), case="phi3"),
    _m(("gate_up_proj", "colwise"), ("down_proj", "rowwise"), case="glm4"),
    _at("gpt2", {f"{_GPT2}.attn.c_attn": "packed_colwise(2)"}, f"{_GPT2}.attn", f"{_GPT2}.attn.c_proj"),
    _at("gpt2", {f"{_GPT2}.mlp.c_fc": "packed_colwise(2)"}, f"{_GPT2}.mlp.c_proj"),
    _at("gpt_neox", {f"{_NEOX}.mlp.dense_h_to_4h": "packed_colwise(2)"}, f"{_NEOX}.mlp.dense_4h_to_h"),
    _at("bloom", {f"{_BLOOM}.self_attention.query_key_value": "packed_colwise(3)"},
        f"{_BLOOM}.self_attention.dense"),
    _at("opt", {f"{_OPT}.fc1": "packed_colwise(2)"}, f"{_OPT}.fc2"),
    _at("bert", {f"{_BERT}.intermediate.dense": "packed_colwise(2)"}, f"{_BERT}.output.dense", group="encoders"),
    _at("bert", {f"{_BERT}.attention.self.value": "packed_colwise(2)"}, f"{_BERT}.attention.output.dense",
        group="encoders"),
    # Experts along the wrong dimension, or their parts as one.
    _m(("experts.gate_up_proj", "colwise"), case="mixtral", taker="experts"),
    _m(("experts.down_proj", "colwise"), case="mixtral", taker="experts"),
    _m(("experts.gate_up_proj", "rowwise"), case="qwen2_moe", taker="experts"),
    _m(("experts.gate_up_proj", "replicate"), case="mixtral", taker="experts"),
    _m(("experts.gate_up_proj", "packed_rowwise"), case="gpt_oss", taker="experts"),
    _m(("experts.down_proj_bias", "replicate"), case="gpt_oss", taker="experts"),
    # Gradients that are not summed: key/value heads, norms, the shared key of latent attention.
    _q(("k_norm", "replicate"), case="qwen3"),
    _q(("q_norm", "replicate"), case="qwen3"),
    _q(("kv_a_proj_with_mqa", "replicate"), case="deepseek_v3", taker="kv_a_layernorm"),
    _q(("sinks", "replicate"), case="gpt_oss"),
    # Here it is what gave the input that takes the wrong gradient.
    _at("qwen2", {f"{_ATTENTION}.k_proj": ColwiseWithoutCopy()}, "model.layers.*.input_layernorm", group="causal"),
    _at("llama", {f"{_MLP}.up_proj": ColwiseWithoutCopy()}, "model.layers.*.post_attention_layernorm", group="causal"),
    _at("gpt2", {f"{_GPT2}.mlp.c_fc": ColwiseWithoutCopy()}, f"{_GPT2}.ln_2"),
    # Sums: none, twice, a bias in each.
    _q(("o_proj", RowwiseWithoutSum())),
    _m(("down_proj", RowwiseSummedTwice())),
    _at("opt", {f"{_OPT}.fc2": RowwiseBiasOnEachRank()}),
    _at("bert", {f"{_BERT}.output.dense": RowwiseBiasOnEachRank()}, group="encoders"),
    _at("gpt2", {f"{_GPT2}.attn.c_proj": RowwiseWithoutSum()}),
    # Norms sharded, and the ends of the model.
    Wrong("causal", "llama", {"model.layers.*.input_layernorm": "local_params",
                              "model.layers.*.input_layernorm.weight": "colwise"}),
    Wrong("causal", "llama", {"lm_head": "colwise"}, ("",)),  # the model itself makes a loss of it
    Wrong("causal", "llama", {"model.embed_tokens": "replicate", "lm_head": "rowwise"}),
    _q(("q_proj", "colwise"), ("k_proj", "colwise"), ("v_proj", "colwise"), ("o_proj", "rowwise"), case="olmo2",
       taker="q_norm"),
    _at("t5", {f"{_T5}.*.SelfAttention.relative_attention_bias": "replicate"}, f"{_T5}.*.SelfAttention",
        f"{_T5}.*.SelfAttention.o", group="encoders"),
)  # fmt: skip

# As these plans were before transformers 5.24 changed the code that they are for. On 5.23 the first is right.
OF_5_24: tuple[Wrong, ...] = (
    Wrong("causal", "codegen", {"transformer.h.*.attn": "local_sizes(num_attention_heads)"},
          ("transformer.h.*.attn.out_proj",)),
    _q(("q_norm", "replicate"), ("k_norm", "replicate"), case="sarvam_moe"),
    _m(("act_fn", "replicate"), case="apertus1p5_text"),
    Wrong("causal", "dory", {"lm_head": "colwise_gather_output", "lm_head.logit_scale": "replicate"}),
    _m(("experts.gate_up_proj", "colwise"), case="inkling2_loop_text"),
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.wrong_plans", description=__doc__)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--only", nargs="*", help="models; all by default")
    args = parser.parse_args(argv)
    newer = OF_5_24 if tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 24) else ()
    wrong = [each for each in (*WRONG, *newer) if not args.only or each.case in args.only]
    failed = 0
    for group, case in dict.fromkeys((each.group, each.case) for each in wrong):
        answer = on_ranks(refused, args.tp, 120.0, model_of(group, case), {})
        right = answer["result"] == "refused" and answer["by"] == "nobody"
        failed += not right
        print(f"{case:22} {'the right plan':52} {'accepted' if right else answer}", flush=True)
    for each in wrong:
        answer = on_ranks(refused, args.tp, 120.0, model_of(each.group, each.case), each.rules)
        by, named = answer.get("by", "nobody"), answer.get("named")
        good = by == "the plan's checks" or by == "the proof" and is_near(each, named)
        failed += not good
        rules = ", ".join(f"{name.rpartition('.')[2]}: {_label(style)}" for name, style in each.rules.items())
        verdict = "" if good else f"  WRONG {answer.get('reason', '')}"
        print(f"{each.case:22} {rules[:52]:52} {by:18} {named or '':44} {answer.get('what', '')}{verdict}", flush=True)
    print(f"{len(wrong) - failed} of {len(wrong)} as they should be")
    return int(failed > 0)


def _label(style: Any) -> str:
    return style if isinstance(style, str) else type(style).__name__


def is_near(wrong: Wrong, named: str | None) -> bool:
    """Whether the named module is one of a wrong rule, or the first to take its output."""
    allowed = {*wrong.rules, *wrong.takers}
    return named in allowed or any(rule.rpartition(".")[0] == named for rule in wrong.rules)


@cache
def model_of(group: str, case: str) -> nn.Module:
    return next(each for each in groups()[group].cases() if each.name == case).build()


def refused(model: nn.Module, rules: dict[str, Any]) -> dict[str, Any]:
    """On a rank: who refuses the plan, and what is named."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    with TemporaryDirectory() as folder:
        os.environ["ACCEL_TP_DDP_CACHE"] = folder
        try:
            plan = resolve_plan(model, mesh.size(), rules or "auto")
        except PlanError as error:
            return {"result": "refused", "by": "the plan's checks", "what": str(error)[:60]}
        try:
            proof = prove_plan(model, mesh, plan, rules or "auto", "always")
        except WrongPlanError as error:
            finding = error.compared[0][1].findings[0]
            what = f"{finding.what} {finding.looks_like}"
            return {"result": "refused", "by": "the proof", "named": wildcards(finding.module), "what": what}
    return {"result": "refused", "by": "nobody", "what": f"{proof.how} {proof.unproved}"}


if __name__ == "__main__":
    sys.exit(main())
