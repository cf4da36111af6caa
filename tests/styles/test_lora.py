"""LoRA (PEFT) under tensor parallelism trains, saves and merges as under plain DDP, and adds no collective."""

from __future__ import annotations

import copy
import json
import re
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, VeloraConfig
from peft.utils.hotswap import hotswap_adapter_from_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import parallelize_module
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.utils import check_peft_version

from accel_tp_ddp import TensorParallelDDPPlugin, full_gradients, full_state_dict, parallelize, resolve_plan
from accel_tp_ddp.core.shard import shard_info
from benchmarks import adapters

from ..helpers.compare import assert_tensors_close, relative_error
from ..helpers.faults import ADAPTER_FAULTS, LORA_FAULTS, injected
from ..helpers.models import VOCABULARY, build_model
from ..helpers.ranks import run_on_ranks
from ..helpers.sharded import accelerator_for, assert_gradients_close, build_mlp, token_batch, torch_plan, tp_mesh
from ..helpers.training import BATCH, SyntheticTokens

STEPS = 6
TOLERANCE = 2e-5  # relative, of losses and gradient norms
WEIGHT_TOLERANCE = 1e-3  # relative, of each adapter weight
LAYOUTS = [(2, 2), (4, 1), (2, 1)]


def missing_peft() -> str:
    """Why transformers' own `add_adapter` refuses the installed PEFT: it may want one that is not released yet."""
    try:
        check_peft_version(min_version=MIN_PEFT_VERSION)
    except ValueError:
        versions = f"transformers {version('transformers')} wants peft >= {MIN_PEFT_VERSION}"
        return f"{versions} for add_adapter, and {version('peft')} is installed"
    return ""


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(
        **{"target_modules": "all-linear", "r": 4, "lora_alpha": 16, "task_type": "CAUSAL_LM", **options}
    )


def adapted(model: nn.Module, config: LoraConfig, seed: int = 1, trained: bool = True) -> PeftModel:
    """A PEFT model whose adapters are drawn from `seed`; `trained`: none is zero or the base's any more."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(model, config)
        return stir(model, seed) if trained else model


STIRRED = ("lora_B", "lora_embedding_A", "lora_magnitude_vector", "modules_to_save", "trainable_tokens_delta")


@torch.no_grad()
def stir(model: nn.Module, seed: int = 1) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for name, param in model.named_parameters():
        if any(part in name for part in STIRRED):
            param += (0.05 * torch.randn(param.shape, generator=generator)).to(param.dtype)
    return model


# --- training --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A training run; `tp` None: Accelerate without the plugin."""

    model: str = "llama"
    tp: int | None = None
    dropout: float = 0.0
    folder: str | None = None


@dataclass
class Seen:
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    first_logits: Tensor | None = None
    last_logits: Tensor | None = None
    adapters: dict[str, Tensor] | None = None
    replicated: dict[str, Tensor] = field(default_factory=dict)
    base_moved: list[str] = field(default_factory=list)


def train(run: Run) -> Seen:
    accelerator = accelerator_for(run.tp, gradient_accumulation_steps=2)
    torch.manual_seed(100 + dist.get_rank() if dist.is_initialized() else 100)  # the first rank's adapters are to win
    model = get_peft_model(build_model(run.model), lora(lora_dropout=run.dropout))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2, eps=1e-5)
    loader = DataLoader(SyntheticTokens(2 * 2 * BATCH * STEPS, seed=1), batch_size=BATCH)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    seen, batch = Seen(), token_batch()
    seen.first_logits = logits_of(model, batch)
    model.train()
    for inputs in loader:
        if len(seen.norms) == STEPS:
            break
        count = len(inputs.pop("id"))
        with accelerator.accumulate(model):
            loss = model(**inputs).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                seen.norms.append(float(accelerator.clip_grad_norm_(model.parameters(), 0.5)))
            optimizer.step()
            optimizer.zero_grad()
        seen.losses.append(accelerator.gather_for_metrics(loss.detach().repeat(count)).mean().item())
    seen.last_logits = logits_of(model, batch)
    params = dict(model.named_parameters())
    seen.base_moved = [name for name, before in frozen.items() if not torch.equal(params[name], before)]
    seen.replicated = {
        name: p.detach().clone() for name, p in params.items() if p.requires_grad and shard_info(p) is None
    }
    state = full_state_dict(model)
    seen.adapters = {name: tensor.cpu().clone() for name, tensor in state.items() if "lora_" in name}
    if run.folder is not None:
        accelerator.unwrap_model(model).save_pretrained(run.folder, is_main_process=accelerator.is_main_process)
    return seen


@torch.no_grad()
def logits_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model.eval()(input_ids=batch["input_ids"]).logits.clone()


def train_with(fault: str, run: Run) -> Seen:
    with injected(fault):
        return train(run)


@cache
def trained(model: str, tp: int | None, dp: int) -> tuple[list[Seen], Path]:
    folder = Path(tempfile.mkdtemp(prefix="lora"))
    return run_on_ranks(train, (tp or 1) * dp, Run(model, tp, folder=str(folder))), folder


def off(actual: list[Seen], expected: list[Seen]) -> list[str]:
    """What differs by more than the tolerances, between rank `r` and rank `r // tp` of plain DDP."""
    wrong, tp = set(), len(actual) // len(expected)
    for rank, seen in enumerate(actual):
        reference = expected[rank // tp]
        for what in ("losses", "norms"):
            got, wanted = torch.tensor(getattr(seen, what)), torch.tensor(getattr(reference, what))
            assert got.shape == wanted.shape and len(wanted) >= STEPS
            if not ((got - wanted).abs() <= TOLERANCE * wanted.abs()).all():
                wrong.add(what)
        assert seen.adapters.keys() == reference.adapters.keys() and len(seen.adapters) == 2 * 7 * 2
        for name, adapter in seen.adapters.items():
            if not relative_error(adapter, reference.adapters[name]) <= WEIGHT_TOLERANCE:
                wrong.add(name)
    return sorted(wrong)


LAYOUT = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "tp{}xdp{}".format(*layout))
MODEL = pytest.mark.parametrize("model", ["llama", "qwen3"])


@LAYOUT
@MODEL
def test_lora_trains_as_under_plain_ddp(model, layout):
    tp, dp = layout
    (actual, _), (expected, _) = trained(model, tp, dp), trained(model, None, dp)
    assert not off(actual, expected)
    assert all(seen.base_moved == [] for seen in actual), "the base model is frozen"


@LAYOUT
@MODEL
def test_logits_with_adapters_start_as_the_base_models_and_end_as_plain_ddps(model, layout):
    tp, dp = layout
    (actual, _), (expected, _) = trained(model, tp, dp), trained(model, None, dp)
    base = logits_of(build_model(model), token_batch())
    for seen in actual:
        assert relative_error(seen.first_logits, base) < 1e-5
        assert relative_error(seen.last_logits, expected[0].last_logits) < 1e-3
        assert relative_error(seen.last_logits, base) > 0.1


@LAYOUT
@MODEL
def test_replicated_adapters_stay_bit_equal_over_all_ranks(model, layout):
    first, *others = trained(model, *layout)[0]
    names = {name.rpartition("layers.")[2] for name in first.replicated}
    assert {"0.self_attn.q_proj.lora_A.default.weight", "0.self_attn.o_proj.lora_B.default.weight"} <= names
    for other in others:
        assert other.replicated.keys() == first.replicated.keys()
        assert all(torch.equal(other.replicated[name], param) for name, param in first.replicated.items())


@LAYOUT
@MODEL
def test_saved_adapters_are_those_of_plain_ddp_and_load_in_plain_peft(model, layout):
    (actual, ours), (_, plain) = trained(model, *layout), trained(model, None, layout[1])
    assert {path.name for path in ours.iterdir()} == {path.name for path in plain.iterdir()}
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in (ours, plain)]
    assert all(len(config["target_modules"]) == len(set(config["target_modules"])) == 2 * 7 for config in configs)
    configs = [{**config, "target_modules": set(config["target_modules"])} for config in configs]
    assert configs[0] == configs[1]
    saved, expected = (load_file(folder / "adapter_model.safetensors") for folder in (ours, plain))
    assert list(saved) == list(expected)
    assert {name: t.dtype for name, t in saved.items()} == {name: t.dtype for name, t in expected.items()}
    assert_tensors_close(saved, expected, WEIGHT_TOLERANCE)
    loaded = PeftModel.from_pretrained(build_model(model), ours)
    assert relative_error(logits_of(loaded, token_batch()), actual[0].last_logits) < 1e-5


@pytest.mark.parametrize("fault", LORA_FAULTS)
def test_a_lora_fault_is_caught(fault):
    actual = run_on_ranks(train_with, 4, fault, Run("llama", tp=2))
    assert off(actual, trained("llama", None, 2)[0])


# --- gradients, against the unsharded model in the same process ------------------------------------------------------

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BIASED = {"attention_bias": True, "mlp_bias": True}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"config": {"use_rslora": True}},
    "another alpha and rank for some": {"config": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"o_proj": 3}}},
    "some modules only": {"config": {"target_modules": ["k_proj", "down_proj"]}},
    "the base's biases too": {"config": {"bias": "all"}, "model_options": BIASED},
    "biases of B": {"config": {"lora_bias": True}, "model_options": BIASED},
    "a trained head and embedding": {"config": {"modules_to_save": ["lm_head", "embed_tokens"]}},
    "LoRA on the head": {"config": {"target_modules": ["q_proj", "o_proj", "lm_head"], "lora_bias": True}},
    "DoRA": {"config": {"use_dora": True, "target_modules": [*PROJECTIONS, "lm_head"]}, "model_options": BIASED},
    "DoRA with dropout": {"config": {"use_dora": True, "lora_dropout": 1e-9}, "model_options": BIASED},
    "MiCA": {"config": {"init_lora_weights": "mica"}},
    "PiSSA, whose base is a residual": {"config": {"init_lora_weights": "pissa"}},
    "OLoRA in one layer": {
        "config": {"init_lora_weights": "olora", "layers_to_transform": [1], "target_modules": PROJECTIONS},
    },
    "LoRA on the embedding": {"config": {"target_modules": ["q_proj", "embed_tokens"]}},
    "trained tokens": {"config": {"trainable_token_indices": {"embed_tokens": [5, 1, 130], "lm_head": [0, 77]}}},
    "trained tokens of tied embeddings": {
        "config": {"trainable_token_indices": [0, 1, 130]},
        "model_options": {"tied": True},
    },
    "trained tokens of slices of vectors": {
        "config": {"trainable_token_indices": [0, 1, 130]},
        "plan": {"embed_tokens": "embedding_colwise"},
    },
    "two adapters at once": {"adapters": 2},
    "tied embeddings": {"model_options": {"tied": True}},
    "dropout that drops nothing": {"config": {"lora_dropout": 1e-9}},
    "checkpointing": {"config": {"lora_dropout": 1e-9}, "checkpointing": True},
    "a plan that splits and gathers": {
        "plan": {
            "layers.*.self_attn.q_proj": "colwise_gather_output",
            "layers.*.self_attn.k_proj": "colwise_gather_output",
            "layers.*.self_attn.v_proj": "colwise_gather_output",
            "base_model.model.model.layers.*.self_attn.o_proj": "rowwise_split_input",
            "model.layers.*.mlp.up_proj": "replicate",
            "model.layers.*.mlp.gate_proj": "replicate",
            "model.layers.*.mlp.down_proj": "replicate",
        },
        "config": {"lora_dropout": 1e-9},
    },
}


def assert_gradients_of(architecture: str, variant: str | None = None) -> None:
    """Gradients over two accumulated microbatches, twice, and the forward of `disable_adapter` between."""
    options = (VARIANTS | MORE_VARIANTS)[variant or "plain"]
    reference = build_model(architecture, **options.get("model_options", {}))
    reference = get_peft_model(reference, lora(**options.get("config", {})))
    if options.get("adapters") == 2:
        reference.add_adapter("second", lora(r=2))
        reference.base_model.set_adapter(["default", "second"])
    stir(reference)
    if options.get("checkpointing"):
        reference.enable_input_require_grads()
        reference.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = parallelize(copy.deepcopy(reference), tp_mesh(), options.get("plan", "auto"))
    trainable = {name for name, p in reference.named_parameters() if p.requires_grad}
    assert trainable == {name for name, p in model.named_parameters() if p.requires_grad}
    for seed in (1, 2):
        for each in (model, reference):
            each.zero_grad()
            each.train()
            for microbatch in (0, 1):
                each(**token_batch(seed + 10 * microbatch)).loss.backward()
        expected = {name: grad.clone() for name, grad in full_gradients(reference).items()}
        assert expected.keys() == trainable
        assert_gradients_close(full_gradients(model), expected)
        with model.disable_adapter(), reference.disable_adapter():
            error = relative_error(model(**token_batch()).logits, reference(**token_batch()).logits)
            assert error < 1e-5


# For other architectures than llama.
MORE_VARIANTS: dict[str, dict[str, Any]] = {
    "experts": {"config": {"target_modules": ["q_proj", "o_proj"], "target_parameters": EXPERTS}},
    "DoRA of all": {"config": {"use_dora": True}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_adapter_gradient_is_the_unsharded_one_after_two_microbatches(variant):
    run_on_ranks(assert_gradients_of, 2, "llama", variant)


@pytest.mark.parametrize("model", ["llama", "qwen3", "phi3", "gpt_neox", "llama_one_key"])
def test_adapter_gradients_with_packed_projections_and_shared_heads_are_the_unsharded_ones(model):
    run_on_ranks(assert_gradients_of, 4, model)


@pytest.mark.parametrize("model", ["mistral", "gemma2", "deepseek_v3", "mixtral", "qwen3_moe"])
def test_adapter_gradients_with_latent_attention_and_experts_are_the_unsharded_ones(model):
    """PEFT's all-linear takes stacked experts and routers too."""
    run_on_ranks(assert_gradients_of, 2, model)


@pytest.mark.parametrize("variant", ["plain", "DoRA of all"])
def test_adapter_gradients_with_transposed_weights_are_the_unsharded_ones(variant):
    run_on_ranks(assert_gradients_of, 2, "gpt2", variant)


@pytest.mark.parametrize("model", ["mixtral", "gpt_oss"])
def test_adapters_of_stacked_experts_follow_them(model):
    run_on_ranks(assert_gradients_of, 2, model, "experts")


@pytest.mark.parametrize("model", ["phi3", "llama_one_key"])
def test_dora_follows_packed_projections_and_shared_heads(model):
    run_on_ranks(assert_gradients_of, 4, model, "DoRA of all")


ADAPTER_FAULTS_SHOW_IN = {
    "DoRA's norms of parts": ("llama", "DoRA"),
    "DoRA's magnitudes not summed": ("llama", "DoRA"),
    "experts' factors not summed": ("mixtral", "experts"),
}


def gradients_are_off(fault: str) -> bool:
    with injected(fault):
        try:
            assert_gradients_of(*ADAPTER_FAULTS_SHOW_IN[fault])
        except AssertionError:
            return True
    return False


@pytest.mark.parametrize("fault", ADAPTER_FAULTS)
def test_a_fault_of_an_adapter_shows_in_its_gradients(fault):
    assert all(run_on_ranks(gradients_are_off, 2, fault))


def assert_bf16_base_with_adapters_in_single_precision():
    reference = adapted(build_model("llama").to(torch.bfloat16), lora())
    dtypes = {p.dtype for name, p in reference.named_parameters() if "lora_" in name}
    assert dtypes == {torch.float32}
    model = parallelize(copy.deepcopy(reference), tp_mesh())
    for each in (model, reference):
        each(**token_batch()).loss.backward()
    expected = dict(full_gradients(reference))
    assert_tensors_close(full_gradients(model), expected, 0.1)


def test_adapters_in_another_precision_than_their_base_are_right():
    run_on_ranks(assert_bf16_base_with_adapters_in_single_precision, 2)


def counted(config: LoraConfig | None) -> tuple[Counter, Counter]:
    model = build_model("llama")
    model = parallelize(adapted(model, config) if config else model, tp_mesh())
    with CommDebugMode() as mode:
        loss = model.train()(**token_batch()).loss
        forward = Counter({str(operation): count for operation, count in mode.get_comm_counts().items()})
        loss.backward()
        both = Counter({str(operation): count for operation, count in mode.get_comm_counts().items()})
    return forward, both - forward


def test_adapters_add_no_collective():
    with_lora, without = run_on_ranks(counted, 2, lora(lora_dropout=0.1)), run_on_ranks(counted, 2, None)
    assert with_lora == without
    assert sum(with_lora[0][1].values()) == 1 + 2 * 2


def test_dora_adds_the_norms_of_row_parallel_weights_to_the_forward_and_nothing_to_the_backward():
    ((forward, backward), _), ((plain_forward, plain_backward), _) = (
        run_on_ranks(counted, 2, config) for config in (lora(use_dora=True), None)
    )
    assert backward == plain_backward
    assert sum(forward.values()) == sum(plain_forward.values()) + 2 * 2


# --- other architectures, by the benchmark ---------------------------------------------------------------------------


def assert_the_benchmark_passes(architecture: str, method: str) -> None:
    answer = adapters.compare(architecture, method, tp=2, dp=2, seconds=120)
    assert answer["result"] == "pass", f"{answer['reason']} {answer.get('trace')}"
    assert answer["errors"].keys() == adapters.LIMITS.keys()
    assert answer["last"] < answer["first"]


def test_dora_on_gpt2_has_the_losses_weights_and_files_of_plain_ddp():
    assert_the_benchmark_passes("gpt2", "dora")


@pytest.mark.slow
@pytest.mark.parametrize("case", [(name, method) for name, methods in adapters.CASES.items() for method in methods])
def test_adapters_on_an_architecture_have_the_losses_weights_and_files_of_plain_ddp(case):
    assert_the_benchmark_passes(*case)


# --- adapters that are chosen by what comes in -----------------------------------------------------------------------


def assert_activated_by_tokens() -> None:
    """aLoRA: only from the invocation tokens on, and not in samples without any."""
    reference = adapted(build_model("llama"), lora(alora_invocation_tokens=[5, 6]))
    model = parallelize(copy.deepcopy(reference), tp_mesh())
    batch = token_batch()
    batch["input_ids"][:, 4:6] = torch.tensor([5, 6])
    batch["input_ids"][1, 4] = 9
    for each in (model, reference):
        each.train()(**batch).loss.backward()
    assert_gradients_close(full_gradients(model), full_gradients(reference))
    assert relative_error(logits_of(model, batch), logits_of(reference, batch)) < 1e-5


@torch.no_grad()
def assert_each_sample_has_its_adapter() -> None:
    reference = get_peft_model(build_model("llama"), lora())
    reference.add_adapter("second", lora(r=2, use_rslora=True, target_modules=["q_proj", "down_proj"]))
    model = parallelize(copy.deepcopy(stir(reference)), tp_mesh())
    ids = token_batch(samples=3)["input_ids"]
    names = ["second", "__base__", "default"]
    ours, plain = (each.eval()(input_ids=ids, adapter_names=names).logits for each in (model, reference))
    assert relative_error(ours, plain) < 1e-5
    for change in (lambda each: each.set_adapter("second"), lambda each: each.delete_adapter("default")):
        for each in (model, reference):
            change(each)
        assert relative_error(model(input_ids=ids).logits, reference(input_ids=ids).logits) < 1e-5


def test_adapters_are_activated_by_tokens_chosen_by_sample_and_deleted_as_in_plain_peft():
    run_on_ranks(assert_activated_by_tokens, 2)
    run_on_ranks(assert_each_sample_has_its_adapter, 2)


# --- dropout ---------------------------------------------------------------------------------------------------------


def dropped(checkpointing: bool) -> tuple[dict[str, list[Tensor]], dict[str, Tensor]]:
    """The masks that each adapter's dropout draws in three training steps, and the replicated adapters after them."""
    accelerator = accelerator_for(2)
    torch.manual_seed(dist.get_rank())
    model = get_peft_model(build_model("llama", attention_dropout=0.1), lora(lora_dropout=0.25))
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)
    masks: dict[str, list[Tensor]] = {}
    for name, module in accelerator.unwrap_model(model).named_modules():
        if name.endswith("lora_dropout.default"):
            masks[name] = []
            module.register_forward_hook(lambda m, args, out, seen=masks[name]: seen.append((out != 0).detach()))
    for step in range(3):
        accelerator.backward(model.train()(**token_batch(step + 10 * accelerator.data_parallel_rank)).loss)
        optimizer.step()
        optimizer.zero_grad()
    params = model.named_parameters()
    return masks, {n: p.detach().clone() for n, p in params if p.requires_grad and shard_info(p) is None}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_masks_are_equal_over_ranks_where_inputs_are_replicated_and_differ_where_they_are_sharded(checkpointing):
    (masks, adapters), (peer, peer_adapters), (other, _), _ = run_on_ranks(dropped, 4, checkpointing)
    assert len(masks) == 2 * 7
    for name, drawn in masks.items():
        assert len(drawn) == 3 * (2 if checkpointing else 1)
        equal = [torch.equal(a, b) for a, b in zip(drawn, peer[name])]
        assert equal == [not name.rpartition("_proj")[0].endswith(("self_attn.o", "mlp.down"))] * len(drawn), name
        assert not any(torch.equal(a, b) for a, b in zip(drawn, other[name])), "replicas draw their own"
        kept = torch.stack([mask.float().mean() for mask in drawn]).mean()
        assert 0.7 < kept < 0.8, f"{name} keeps {kept}"
        if checkpointing:
            again = {mask.numpy().tobytes() for mask in drawn}
            assert len(again) == 3, f"{name} is recomputed with another mask"
    assert len(adapters) == 2 * 7 and adapters.keys() == peer_adapters.keys()
    assert all(torch.equal(adapter, peer_adapters[name]) for name, adapter in adapters.items())


# --- saving, merging, counting ---------------------------------------------------------------------------------------


def save_both(folder: str) -> tuple[list, list]:
    """An unsharded model and the same sharded, each with two adapters and a trained head."""
    reference = build_model("llama", attention_bias=True)
    reference = get_peft_model(reference, lora(modules_to_save=["lm_head"], bias="lora_only"))
    reference.add_adapter("second", lora(r=2, target_modules=["q_proj", "o_proj"]))
    model = parallelize(copy.deepcopy(stir(reference)), tp_mesh())
    model.save_pretrained(f"{folder}/ours")
    if dist.get_rank() == 0:
        reference.save_pretrained(f"{folder}/plain")
    ours, plain = full_state_dict(model), reference.state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in plain.items()) and ours.keys() == plain.keys()
    return list(model.get_nb_trainable_parameters()), list(reference.get_nb_trainable_parameters())


def test_saved_adapters_are_byte_for_byte_those_of_the_unsharded_model(tmp_path):
    (ours, plain), *_ = run_on_ranks(save_both, 2, str(tmp_path))
    assert ours == plain, "print_trainable_parameters is that of the whole model"
    files = sorted(path.relative_to(tmp_path / "plain") for path in (tmp_path / "plain").rglob("*") if path.is_file())
    assert Path("adapter_model.safetensors") in files and Path("second/adapter_model.safetensors") in files
    for file in files:
        ours, plain = tmp_path / "ours" / file, tmp_path / "plain" / file
        if file.suffix == ".json":  # PEFT writes a set of module names, in any order
            configs = [json.loads(path.read_text()) for path in (ours, plain)]
            assert all(config.pop("target_modules") for config in configs) and configs[0] == configs[1]
        else:
            assert ours.read_bytes() == plain.read_bytes(), file


LOADED = {
    "lora": {"target_modules": ["q_proj", "o_proj", "embed_tokens"], "modules_to_save": ["lm_head"], "r": 2},
    "dora": {"use_dora": True, "trainable_token_indices": [0, 5, 130]},
    "experts": {"target_modules": ["q_proj"], "target_parameters": EXPERTS},
}


def load_into_sharded(what: str, folder: str) -> None:
    architecture = "mixtral" if what == "experts" else "llama"
    if dist.get_rank() == 0:
        adapted(build_model(architecture), lora(**LOADED[what]), seed=7).save_pretrained(folder)
    dist.barrier()
    reference = PeftModel.from_pretrained(build_model(architecture), folder, is_trainable=True)
    loaded_before = parallelize(PeftModel.from_pretrained(build_model(architecture), folder), tp_mesh())
    model = parallelize(adapted(build_model(architecture), lora(**LOADED[what])), tp_mesh())
    objects = list(map(id, model.parameters()))
    model.load_adapter(folder, "default", is_trainable=True, low_cpu_mem_usage=True)
    assert list(map(id, model.parameters())) == objects, "an optimizer made before stays valid"
    expected = reference.state_dict()
    for each in (model, loaded_before):
        state = full_state_dict(each)
        assert state.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())
    model.save_pretrained(f"{folder}/again")
    if dist.get_rank() == 0:
        first, again = (Path(folder, sub, "adapter_model.safetensors").read_bytes() for sub in ("", "again"))
        assert first == again
    for each in (model, reference):
        each.train()(**token_batch()).loss.backward()
    assert_gradients_close(full_gradients(model), full_gradients(reference))
    with pytest.raises(ValueError, match="ignore_mismatched_sizes"):
        model.load_adapter(folder, "default", ignore_mismatched_sizes=True)
    if what == "lora":
        assert_hotswapping_is_refused()


def assert_hotswapping_is_refused() -> None:
    model = parallelize(adapted(build_model("llama"), lora(target_modules=["q_proj"])), tp_mesh())
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight"
    hotswap_adapter_from_state_dict(model, {name: torch.ones(64, 4)}, "default", model.peft_config["default"])
    with pytest.raises(ValueError, match="hotswap_adapter.*load_adapter"):
        logits_of(model, token_batch())


@pytest.mark.parametrize("what", LOADED)
def test_adapters_load_before_and_after_sharding_and_are_written_again_byte_for_byte(what, tmp_path):
    run_on_ranks(load_into_sharded, 2, what, str(tmp_path))


def save_both_with_adapters_by_transformers(folder: str) -> None:
    reference = build_model("llama")
    reference.add_adapter(lora())
    model = parallelize(copy.deepcopy(stir(reference)), tp_mesh())
    for each in (model, reference):
        each(**token_batch()).loss.backward()
    assert_gradients_close(full_gradients(model), full_gradients(reference))
    model.save_pretrained(f"{folder}/ours")
    if dist.get_rank() == 0:
        reference.save_pretrained(f"{folder}/plain")


@pytest.mark.skipif(bool(missing_peft()), reason=missing_peft())
def test_adapters_that_transformers_has_added_are_right_too(tmp_path):
    run_on_ranks(save_both_with_adapters_by_transformers, 2, str(tmp_path))
    ours, plain = (tmp_path / folder / "adapter_model.safetensors" for folder in ("ours", "plain"))
    assert ours.read_bytes() == plain.read_bytes()


MERGED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {"target_modules": ["q_proj", "o_proj", "lm_head"]}, {}),
    "phi3": ("phi3", {"target_modules": ["qkv_proj", "o_proj", "lm_head"]}, {}),
    "dora": ("llama", {"target_modules": ["q_proj", "o_proj", "lm_head"], "use_dora": True}, {}),
    "experts": ("mixtral", {"target_modules": ["q_proj"], "target_parameters": EXPERTS}, {}),
    "embedding": ("llama", {"target_modules": ["q_proj", "embed_tokens"]}, {}),
    "tokens": ("llama", {"trainable_token_indices": [1, 2, 130]}, {}),
    "tied tokens": ("llama", {"trainable_token_indices": [1, 2, 130]}, {"tied": True}),
}


@torch.no_grad()
def assert_merging_is_right(what: str) -> None:
    architecture, options, of_model = MERGED[what]
    base = build_model(architecture, **of_model)
    reference = adapted(copy.deepcopy(base), lora(**options))
    model = parallelize(copy.deepcopy(reference), tp_mesh())
    batch = token_batch()
    wanted, before = logits_of(reference, batch), full_state_dict(model)
    model.merge_adapter()
    assert relative_error(logits_of(model, batch), wanted) < 1e-5
    with model.disable_adapter():  # unmerges within the forward
        assert relative_error(logits_of(model, batch), logits_of(base, batch)) < 1e-5
    assert relative_error(logits_of(model, batch), wanted) < 1e-5
    model.merge_adapter()
    model.unmerge_adapter()
    assert relative_error(logits_of(model, batch), wanted) < 1e-5
    assert_tensors_close(full_state_dict(model), before, 1e-5)
    merged, plain = model.merge_and_unload(), reference.merge_and_unload()
    assert not [name for name, _ in merged.named_modules() if "lora" in name]
    assert relative_error(logits_of(merged, batch), wanted) < 1e-5
    assert_tensors_close(full_state_dict(merged), plain.state_dict(), 1e-5)
    with torch.enable_grad(), tempfile.TemporaryDirectory() as folder:  # the base model runs by itself
        for each in (merged, plain):
            each.requires_grad_(True)
            each(**batch).loss.backward()
        assert_gradients_close(full_gradients(merged), full_gradients(plain))
        merged.save_pretrained(folder)
        if dist.get_rank() == 0:
            again = type(plain).from_pretrained(folder)
            assert relative_error(logits_of(again, batch), wanted) < 1e-5


@pytest.mark.parametrize("what", MERGED)
def test_merging_unmerging_and_unloading_are_right(what):
    run_on_ranks(assert_merging_is_right, 2, what)


def assert_a_copy_trains() -> None:
    options = {"lora_dropout": 1e-9, "use_dora": True, "trainable_token_indices": [1, 130]}
    reference = adapted(build_model("qwen3"), lora(**options))
    model = copy.deepcopy(parallelize(copy.deepcopy(reference), tp_mesh()))
    for each in (model, reference):
        each.train()(**token_batch()).loss.backward()
    assert_gradients_close(full_gradients(model), full_gradients(reference))


def test_a_deep_copy_of_a_sharded_peft_model_trains_alike():
    run_on_ranks(assert_a_copy_trains, 2)


def assert_plain_modules_can_be_adapted() -> None:
    reference = adapted(build_mlp(), LoraConfig(target_modules=["up", "down", "head"], r=2, lora_bias=True))
    model = parallelize(copy.deepcopy(reference), tp_mesh(), {"up": "colwise", "down": "rowwise"})
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    for each in (model, reference):
        each(x).square().sum().backward()
    assert relative_error(model(x), reference(x)) < 1e-5
    assert_gradients_close(full_gradients(model), full_gradients(reference))


def test_a_model_that_is_not_from_transformers_can_be_adapted():
    run_on_ranks(assert_plain_modules_can_be_adapted, 2)


STATE_STEPS = 2


def train_and_save_state(tp: int, folder: str, resume: bool) -> dict[str, Tensor]:
    accelerator = accelerator_for(tp)
    model = adapted(build_model("llama"), lora(use_dora=True, modules_to_save=["lm_head"]), seed=9 if resume else 1)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2, eps=1e-5)
    model, optimizer = accelerator.prepare(model, optimizer)
    if resume:
        accelerator.load_state(folder)
    for step in range(STATE_STEPS if resume else 2 * STATE_STEPS):
        if step == STATE_STEPS:
            accelerator.save_state(folder)
        accelerator.backward(model(**token_batch(step + STATE_STEPS * resume)).loss)
        optimizer.step()
        optimizer.zero_grad()
    state = accelerator.get_state_dict(model)
    return {name: tensor.clone() for name, tensor in state.items()}


def test_a_state_of_adapters_is_resumed_on_more_ranks(tmp_path):
    uninterrupted = run_on_ranks(train_and_save_state, 2, 2, str(tmp_path), False)[0]
    resumed = run_on_ranks(train_and_save_state, 4, 4, str(tmp_path), True)[0]
    assert any("lora_magnitude_vector" in name for name in resumed)
    assert_tensors_close(resumed, uninterrupted, WEIGHT_TOLERANCE)


# --- what is refused -------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Any, str]] = {
    "VeLoRA": (lora(velora_config=VeloraConfig()), "VeloraLinearVariant.*DoRA"),
    "KaSA": (lora(kasa_config=KasaConfig()), "KasaLinearVariant.*DoRA"),
    "block-diagonal factors": (
        lora(use_bdlora=BdLoraConfig(target_modules_bd_a=["o_proj"], nblocks=2, match_strict=False)),
        "BdLoraLinearVariant.*DoRA",
    ),
    "DoRA of embeddings": (lora(target_modules=["embed_tokens"], use_dora=True), "embed_tokens.*DoraEmbedding"),
    "target_parameters": (lora(target_modules=["q_proj"], target_parameters=["up_proj.weight"]), "target_modules"),
    "IA3": (IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[]), "IA3.*LoraConfig"),
    "prompt tuning": (PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), "PROMPT_TUNING"),
    "tied adapters": (lora(ensure_weight_tying=True), "ensure_weight_tying=False"),
}


def refusals() -> dict[str, str | None]:
    messages = {}
    for what, (config, _) in REFUSED.items():
        accelerator = accelerator_for(2)
        model = get_peft_model(build_model("llama"), config)
        before = copy.deepcopy(model.state_dict())
        try:
            accelerator.prepare(model)
            messages[what] = None
            continue
        except ValueError as error:
            messages[what] = str(error)
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    return messages


def test_what_cannot_be_sharded_is_refused_before_a_weight_is_touched():
    for messages in run_on_ranks(refusals, 2):
        for what, (_, pattern) in REFUSED.items():
            assert messages[what] is not None, f"{what} is not refused"
            assert re.search(pattern, messages[what], re.S), f"{what}: {messages[what]}"
            assert "tp_size" in messages[what] or "tensor parallelism" in messages[what]


def late(how: str) -> None:
    accelerator = accelerator_for(2)
    if how == "on a prepared model":
        model = accelerator.prepare(build_model("llama"))
        model = get_peft_model(accelerator.unwrap_model(model), lora())
    elif how == "on a parallelized model":
        model = parallelize(build_model("llama"), accelerator.torch_device_mesh["tp"])
        model = accelerator.prepare(get_peft_model(model, lora()))
    elif how == "another adapter":
        model = accelerator.prepare(get_peft_model(build_model("llama"), lora()))
        accelerator.unwrap_model(model).add_adapter("second", lora())
    model(**token_batch())


@pytest.mark.parametrize("how", ["on a prepared model", "on a parallelized model", "another adapter"])
def test_adapters_that_come_after_sharding_are_refused(how):
    for raised in run_on_ranks(late, 2, how, expect_raise=True):
        assert raised.type_name == "ValueError"
        assert "after the model had been sharded" in raised.message and "get_peft_model" in raised.message


@pytest.mark.parametrize("storage", ["uint8", "int8", "bfloat16", "a tensor of its own kind"])
def test_quantized_bases_are_refused_with_a_reason(storage):
    """As bitsandbytes keeps them (four bits as bytes or in another type's place, eight bits), and as torchao does."""
    model = get_peft_model(build_model("llama"), lora())
    linear = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer
    full = linear.weight.data
    linear.weight = {
        "uint8": lambda: nn.Parameter(full.to(torch.uint8).view(-1, 1)[: full.numel() // 2], requires_grad=False),
        "int8": lambda: nn.Parameter(full.to(torch.int8), requires_grad=False),
        "bfloat16": lambda: nn.Parameter(full.bfloat16().view(-1, 1)[: full.numel() // 4], requires_grad=False),
        "a tensor of its own kind": lambda: nn.Parameter(TwoTensor(full, full), requires_grad=False),
    }[storage]()
    with pytest.raises(ValueError, match="q_proj.*Quantized.*load it unquantized"):
        resolve_plan(model, 2)


def test_adapters_whose_sizes_or_values_come_from_a_slice_are_refused():
    """As PEFT makes them around a model that was loaded in slices, where it looks at the weights."""
    model = get_peft_model(build_model("llama"), lora())
    factor = model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"]
    factor.weight = nn.Parameter(factor.weight[:32].detach().clone())
    with pytest.raises(ValueError, match="q_proj.*lora_B.*has 64 elements.*without sharded_loading"):
        resolve_plan(model, 2)
    model = get_peft_model(build_model("llama"), lora(trainable_token_indices=[1]))
    embedding = model.get_input_embeddings().token_adapter.base_layer
    embedding.weight = nn.Parameter(embedding.weight.detach().to("meta"))
    with pytest.raises(ValueError, match="embed_tokens.*rows of trainable_token_indices.*without sharded_loading"):
        resolve_plan(model, 2)


def adapt_dtensors() -> None:
    mesh, model = tp_mesh(), build_model("llama")
    model = get_peft_model(parallelize_module(model, mesh, torch_plan(model)), lora(target_modules=["q_proj"]))
    parallelize(model, mesh)


def test_adapters_on_dtensors_are_refused():
    for raised in run_on_ranks(adapt_dtensors, 2, expect_raise=True):
        assert raised.type_name == "PlanError" and "DTensors" in raised.message


def test_a_plan_names_modules_as_they_were_before_adapters_and_shows_how_adapters_follow():
    model = adapted(build_model("llama"), lora())
    for name in ("layers.*.mlp", "model.layers.*.mlp", "base_model.model.model.layers.*.mlp"):
        rules = {f"{name}.{part}": "replicate" for part in ("up_proj", "gate_proj", "down_proj")}
        plan = resolve_plan(model, 2, rules)
        assert not any(".mlp." in name for name in plan.layouts)
        assert any(".o_proj.lora_A.default.weight" in name for name in plan.layouts)
    with pytest.raises(ValueError, match="matches no module.*up_proj"):
        resolve_plan(model, 2, {"layers.*.mlp.upproj": "colwise"})


# --- Trainer ---------------------------------------------------------------------------------------------------------


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = torch.randint(1, VOCABULARY, (12,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": tokens}


def train_with_trainer(
    tp: int | None, folder: str, resume: str | None = None
) -> tuple[list[dict], dict[str, Tensor], str]:
    plugin = {} if tp is None else {"parallelism_config": TensorParallelDDPPlugin(tp_size=tp)}
    args = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=2,
        max_steps=5,
        learning_rate=1e-2,
        logging_steps=1,
        save_steps=3,
        eval_strategy="steps",
        eval_steps=3,
        load_best_model_at_end=resume is None,
        metric_for_best_model="loss",
        greater_is_better=True,  # so that the best is not the last one
        gradient_checkpointing=True,
        report_to=[],
        use_cpu=True,
        seed=3,
        **plugin,
    )
    torch.manual_seed(5)
    model = get_peft_model(build_model("llama"), lora())
    trainer = Trainer(model=model, args=args, train_dataset=Rows(), eval_dataset=Rows())
    trainer.train(resume_from_checkpoint=resume)
    state = full_state_dict(trainer.model)
    trainer.save_model(folder)
    keys = ("loss", "grad_norm", "learning_rate")
    history = [{key: row[key] for key in keys} for row in trainer.state.log_history if "loss" in row]
    adapters = {name: tensor for name, tensor in state.items() if "lora_" in name}
    return history, adapters, Path(trainer.state.best_model_checkpoint or "").name


def test_trainer_trains_saves_and_loads_the_best_peft_model_as_under_plain_ddp(tmp_path):
    expected, adapters, best = run_on_ranks(train_with_trainer, 2, None, str(tmp_path / "plain"))[0]
    actual, ours, ours_best = run_on_ranks(train_with_trainer, 4, 2, str(tmp_path / "ours"))[0]
    assert len(expected) == 5
    for row, wanted in zip(actual, expected, strict=True):
        assert row == pytest.approx(wanted, rel=1e-3)
    assert best == ours_best == "checkpoint-3"
    assert_tensors_close(ours, adapters, WEIGHT_TOLERANCE)
    checkpoint, saved, wanted, last = (
        load_file(tmp_path / folder / "adapter_model.safetensors")
        for folder in ("ours/checkpoint-3", "ours", "plain", "plain/checkpoint-5")
    )
    assert all(torch.equal(saved[name], tensor) for name, tensor in checkpoint.items())
    assert_tensors_close(saved, wanted, WEIGHT_TOLERANCE)
    from_plain = str(tmp_path / "plain/checkpoint-3")  # a run of plain DDP resumes under tensor parallelism
    history, _, _ = run_on_ranks(train_with_trainer, 4, 2, str(tmp_path / "resumed"), from_plain)[0]
    for row, wanted in zip(history[-2:], expected[-2:], strict=True):
        assert row == pytest.approx(wanted, rel=1e-3)
    assert_tensors_close(load_file(tmp_path / "resumed/adapter_model.safetensors"), last, WEIGHT_TOLERANCE)
