"""The proof: right plans pass it, wrong ones do not, and the module that it names is the wrong one."""

from __future__ import annotations

import copy
import logging
import os
import time
from contextlib import contextmanager
from types import MethodType
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from trl.trainer.utils import add_fused_lm_head

from accel_tp_ddp import PlanError, TensorParallelDDPPlugin, parallelize, resolve_plan
from accel_tp_ddp.core.errors import WrongPlanError
from accel_tp_ddp.core.shard import holds_shards
from accel_tp_ddp.proof import compare as comparing
from accel_tp_ddp.proof import ledger
from accel_tp_ddp.proof import prove as proving
from accel_tp_ddp.proof.forwards import take_over_forwards
from accel_tp_ddp.proof.prove import prove_plan
from accel_tp_ddp.styles.forward import ParallelForward
from accel_tp_ddp.styles.linear import Colwise, Rowwise

from ..helpers.models import build_model
from ..helpers.ranks import run_on_ranks
from ..helpers.sharded import tp_mesh

_ATTENTION, _MLP = "model.layers.*.self_attn", "model.layers.*.mlp"
_BLOCK = "transformer.h.*"


class RowwiseWithoutSum(Rowwise):
    def forward(self, call: ParallelForward, input: torch.Tensor) -> torch.Tensor:
        call.region.leave()
        return call.inner(input)


class RowwiseSummedTwice(Rowwise):
    def forward(self, call: ParallelForward, input: torch.Tensor) -> torch.Tensor:
        output = super().forward(call, input)
        dist.all_reduce(output, group=call.mesh.get_group())
        return output


class ColwiseWithoutCopy(Colwise):
    """The gradient of its input is not summed over the ranks."""

    enters = False

    def forward(self, call: ParallelForward, input: torch.Tensor) -> torch.Tensor:
        return call.inner(input)


class WaitsForNobody(Rowwise):
    """On one rank a collective that the others do not enter."""

    def forward(self, call: ParallelForward, input: torch.Tensor) -> torch.Tensor:
        if call.mesh.get_local_rank() == 0:
            return super().forward(call, input)
        raise RuntimeError("this rank goes another way")


#: The model, the wrong rules, the modules that may be named, and a word of the hint.
WRONG: dict[str, tuple[str, dict, tuple[str, ...], str]] = {
    "keys of all heads": ("llama", {f"{_ATTENTION}.k_proj": "replicate"}, ("o_proj", "self_attn"), ""),
    "norms of heads, gradients not summed": (
        "qwen3",
        {f"{_ATTENTION}.q_norm": "replicate", f"{_ATTENTION}.k_norm": "replicate"},
        ("q_norm", "k_norm"),
        "their sum is missing",
    ),
    "values of all heads": ("llama", {f"{_ATTENTION}.v_proj": "colwise_gather_output"}, ("o_proj", "self_attn"), ""),
    "gate and up projection cut as one": ("phi3", {f"{_MLP}.gate_up_proj": "colwise"}, ("down_proj",), ""),
    "queries, keys and values cut as one": ("gpt2", {f"{_BLOCK}.attn.c_attn": "colwise"}, ("c_proj",), ""),
    "interleaved heads cut in sections": (
        "gpt_neox",
        {"gpt_neox.layers.*.attention.query_key_value": "packed_colwise(3)"},
        ("dense",),
        "",
    ),
    "a gate cut otherwise than its partner": ("llama", {f"{_MLP}.gate_proj": "packed_colwise(2)"}, ("down_proj",), ""),
    "one partner unsharded": ("gemma2", {f"{_MLP}.up_proj": "replicate"}, ("mlp",), ""),
    "the shared key of latent attention": (
        "deepseek_v3",
        {f"{_ATTENTION}.kv_a_proj_with_mqa": "replicate"},
        ("kv_a_proj_with_mqa", "kv_a_layernorm"),
        "",
    ),
    "a sum that is missing": ("llama", {f"{_ATTENTION}.o_proj": RowwiseWithoutSum()}, ("o_proj",), "sum is missing"),
    "a sum too many": ("llama", {f"{_MLP}.down_proj": RowwiseSummedTwice()}, ("down_proj",), "2 times what"),
    "a gradient that is not summed": ("gpt2", {f"{_BLOCK}.mlp.c_fc": ColwiseWithoutCopy()}, ("c_fc", "ln_2"), ""),
}  # fmt: skip


def named_and_told(kind: str, rules: dict) -> tuple[str, str, bool]:
    model, mesh = build_model(kind), tp_mesh(2)
    with pytest.raises(WrongPlanError) as caught:
        prove_plan(model, mesh, resolve_plan(model, 2, rules), rules, "always")
    finding = caught.value.compared[0][1].findings[0]
    return finding.module, str(caught.value), holds_shards(model)


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_plan_is_refused_and_the_wrong_module_or_its_taker_is_named(name):
    kind, rules, allowed, hint = WRONG[name]
    answers = run_on_ranks(named_and_told, 2, kind, rules)
    assert len(set(answers)) == 1  # the same on every rank
    module, told, touched = answers[0]
    assert module.rpartition(".")[2] in allowed
    assert hint in told and not touched
    assert "tp_size=2" in told and "Ways on" in told


def outcome(kind: str, tp: int) -> tuple[str, tuple[str, ...]]:
    model = build_model(kind)
    proof = prove_plan(model, tp_mesh(tp), resolve_plan(model, tp), "auto", "always")
    return proof.how, proof.unproved


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize(
    "kind", ["llama", "qwen3", "phi3", "gemma2", "mixtral", "gpt_oss", "deepseek_v3", "gpt2", "falcon_two_keys", "mpt"]
)
def test_a_right_plan_is_proved(kind, tp):
    assert set(run_on_ranks(outcome, tp, kind, tp)) == {("proved", ())}


# --- in prepare ------------------------------------------------------------------------------------------------------

BAD = {f"{_ATTENTION}.k_proj": "replicate"}


@contextmanager
def cache(folder: str):
    """A cache of one's own, and nothing shipped."""
    with mock.patch.dict(os.environ, ACCEL_TP_DDP_CACHE=folder), mock.patch.object(ledger, "read_shipped", dict):
        yield


def prepare(prove: str, folder: str, plan="auto"):
    """Whether it was proved here, whether the model is sharded, and what `prepare` raised."""
    with cache(folder), mock.patch.object(proving, "compare", wraps=comparing.compare) as compared:
        accelerator = Accelerator(parallelism_config=TensorParallelDDPPlugin(tp_size=2, tp_plan=plan, prove=prove))
        model = build_model("llama")
        try:
            accelerator.prepare(model)
            told = ""
        except PlanError as error:
            told = str(error)
    return compared.call_count, holds_shards(model), told


def test_what_was_proved_once_is_known_afterwards(tmp_path):
    folder = str(tmp_path)
    assert set(run_on_ranks(prepare, 4, "auto", folder)) == {(1, True, "")}
    assert set(run_on_ranks(prepare, 4, "auto", folder)) == {(0, True, "")}
    assert set(run_on_ranks(prepare, 4, "always", folder)) == {(1, True, "")}


def test_a_wrong_plan_is_one_error_on_every_rank_and_touches_nothing(tmp_path):
    answers = run_on_ranks(prepare, 4, "auto", str(tmp_path), BAD)
    assert len(set(answers)) == 1
    _, sharded, told = answers[0]
    assert not sharded and "model.layers.*.self_attn" in told and "(yours)" in told
    assert not list(tmp_path.rglob("*.json"))  # and is not remembered
    assert run_on_ranks(prepare, 4, "never", str(tmp_path), BAD)[0] == (0, True, "")


def test_the_proof_leaves_nothing_behind(tmp_path):
    run_on_ranks(leaves_as_it_was, 2, str(tmp_path))


def leaves_as_it_was(folder: str):
    torch.manual_seed(5)
    model, mesh = build_model("llama"), tp_mesh(2)
    torch.set_default_dtype(torch.bfloat16)
    try:
        states = torch.get_rng_state(), __import__("random").getstate(), torch.get_float32_matmul_precision()
        groups = len(dist.distributed_c10d._world.pg_map)
        hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
        with cache(folder), torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            plan = resolve_plan(model, 2)
            assert prove_plan(model, mesh, plan, "auto", "always").how == "proved"
            assert not torch.is_grad_enabled() and torch.is_autocast_enabled("cpu")
        assert torch.equal(states[0], torch.get_rng_state())
        assert states[1:] == (__import__("random").getstate(), torch.get_float32_matmul_precision())
        assert torch.get_default_dtype() == torch.bfloat16
        assert groups == len(dist.distributed_c10d._world.pg_map)
        assert hooks == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
        assert all(param.grad is None for param in model.parameters()) and not holds_shards(model)
    finally:
        torch.set_default_dtype(torch.float32)


def one_goes_another_way(folder: str):
    started = time.monotonic()
    told = named_and_told("llama", {f"{_MLP}.down_proj": WaitsForNobody()})[1]
    assert dist.get_world_size() == 2 and torch.ones(1).item() == 1
    dist.barrier()  # the script's own group works on
    return told, time.monotonic() - started


def test_ranks_that_part_are_told_and_do_not_hang(tmp_path):
    answers = run_on_ranks(one_goes_another_way, 2, str(tmp_path))
    assert len({told for told, _ in answers}) == 1
    assert "this rank goes another way" in answers[0][0] and "down_proj" in answers[0][0]
    assert all(seconds < comparing.PATIENCE for _, seconds in answers)


@pytest.mark.parametrize("value", ["sometimes", True])
def test_another_value_is_an_error(value):
    with pytest.raises(ValueError, match='has to be "auto", "always" or "never"'):
        TensorParallelDDPPlugin(tp_size=2, prove=value)


# --- what cannot be proved -------------------------------------------------------------------------------------------


class Scale(nn.Module):
    """Without a config: nothing says what a smaller one would be, or that its forward takes two signals of one."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, signals):
        first, second = signals["first"], signals["second"]
        return self.down(self.up(first).relu()) * second


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, signal):
        return self.down(self.up(signal).relu())


@pytest.mark.parametrize("down", ["rowwise", "replicate"])
def test_a_small_module_without_a_config_is_proved_as_it_is(down):
    answers = run_on_ranks(outcome_of_mlp, 2, down)
    assert answers == ["proved" if down == "rowwise" else "down"] * 2


def outcome_of_mlp(down: str) -> str:
    model, mesh, rules = Mlp(), tp_mesh(2), {"up": "colwise", "down": down}
    before = {name: param.clone() for name, param in model.named_parameters()}
    try:
        return prove_plan(model, mesh, resolve_plan(model, 2, rules), rules, "always").how
    except WrongPlanError as error:
        return error.compared[0][1].findings[0].module
    finally:
        assert all(torch.equal(param, before[name]) for name, param in model.named_parameters())


def prepare_scale(folder: str, before: bool):
    """Whether it is sharded, and what is said of it; `prepare` is called twice."""
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logging.getLogger("accel_tp_ddp").addHandler(handler)
    try:
        with cache(folder):
            rules = {"up": "colwise", "down": "rowwise"}
            model = parallelize(Scale(), tp_mesh(2), rules) if before else Scale()
            accelerator = Accelerator(
                parallelism_config=TensorParallelDDPPlugin(tp_size=2, tp_plan=rules, prove="auto")
            )
            for _ in range(2):
                model = accelerator.unwrap_model(accelerator.prepare(model))
    finally:
        logging.getLogger("accel_tp_ddp").removeHandler(handler)
    return holds_shards(model), [record for record in records if "not proved" in record]


@pytest.mark.parametrize("before", [False, True])
def test_what_cannot_be_proved_is_said_by_name(tmp_path, before):
    answers = run_on_ranks(prepare_scale, 2, str(tmp_path), before)
    assert all(sharded for sharded, _ in answers)
    assert "Scale" in answers[0][1][0] and "accel-tp-ddp verify" in answers[0][1][0]
    assert [len(told) for _, told in answers] == [1, 0]  # the main process says it


# --- torch's own styles ----------------------------------------------------------------------------------------------


def train_after_proofs() -> list[float]:
    """DTensor keeps what it has worked out for a mesh, and uses it for an equal one: whose group has to be there."""
    losses = []
    for _ in range(2):
        torch.manual_seed(0)
        model, mesh = Mlp(), tp_mesh(2)
        rules = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        assert prove_plan(model, mesh, resolve_plan(model, 2, rules), rules, "always").how == "proved"
        losses.append(parallelize(model, mesh, rules)(torch.ones(2, 8)).square().mean().item())
    return losses


def test_a_proof_leaves_torchs_styles_as_they_are():
    first, second = run_on_ranks(train_after_proofs, 2)
    assert first == second


# --- forwards that a program has set ---------------------------------------------------------------------------------


def with_a_fused_head(name):
    model = build_model(name)
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    return model


def proved_with_a_fused_head(name, folder):
    """How the plan is proved the first time, and what is known of it afterwards."""
    os.environ[ledger.CACHE_VARIABLE] = folder
    found = []
    for _ in range(2):
        model = with_a_fused_head(name)
        forward = model.forward
        found.append(prove_plan(model, tp_mesh(), resolve_plan(model, 2), "auto", "auto").how)
        assert model.forward is forward
    return found


@pytest.mark.parametrize("model", ["llama", "mixtral"])
def test_a_forward_that_a_trainer_of_trls_has_set_is_run_by_the_small_model(model, tmp_path):
    assert run_on_ranks(proved_with_a_fused_head, 2, model, str(tmp_path)) == [["proved", "cache"]] * 2


class Doubled:
    """Sets a forward that closes over the model itself, and over a function that closes over the first."""

    @staticmethod
    def on(model):
        original = model.forward

        def scaled(value):
            return value * (2 if model.training else 2)

        def forward(self, *args, **kwargs):
            output = original(*args, **kwargs)
            return {**output, "logits": scaled(output["logits"])}

        model.forward = MethodType(forward, model)
        return model


def runs_on_its_own():
    full, small = Doubled.on(build_model("llama")), build_model("llama", layers=1, hidden_size=32)
    plain = copy.deepcopy(small)
    take_over_forwards(full, small)
    assert small.forward.__self__ is small and full.forward.__self__ is full
    ids = torch.ones(1, 4, dtype=torch.long)
    with torch.no_grad():
        for param in full.parameters():
            param.fill_(float("nan"))
        assert torch.equal(small(input_ids=ids)["logits"], 2 * plain(input_ids=ids).logits)
    return True


def test_a_forward_that_is_taken_over_runs_the_small_model():
    assert run_on_ranks(runs_on_its_own, 1) == [True]
