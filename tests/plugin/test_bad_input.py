"""Bad input is a ValueError that says what to change: on every rank, at once, and before anything has been touched.

The cases run one after the other in the same processes and, from `prepare` on, on the same accelerator; after all of
them it prepares and trains a correct model.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from accel_tp_ddp import TensorParallelDDPPlugin, full_gradients, parallelize

from ..helpers.compare import assert_tensors_close
from ..helpers.models import VOCABULARY, build_model
from ..helpers.ranks import COLLECTIVE_TIMEOUT, Raised, run_on_ranks

AT_ONCE = COLLECTIVE_TIMEOUT.total_seconds() / 2  # nobody has waited for a timeout, however busy the machine is


@dataclass
class Here:
    """What a case finds on its rank."""

    folder: Path
    accelerator: Accelerator | None = None
    plan: Any = "auto"

    @property
    def rank(self) -> int:
        return dist.get_rank() if dist.is_initialized() else 0


@dataclass(frozen=True)
class Case:
    run: Any  # (here) -> for `prepare` cases, what is to be prepared
    says: tuple[str, ...]


@dataclass
class Outcome:
    raised: Raised | None
    seconds: float
    touched: list[str] = field(default_factory=list)


CONSTRUCT: dict[str, Case] = {}  # on 4 ranks
PREPARE: dict[str, Case] = {}  # at tp 2 x dp 2
PREPARE_TP4: dict[str, Case] = {}  # at tp 4


def case(group, *says):
    def register(function):
        group[function.__name__] = Case(function, says)
        return function

    return register


# --- the plugin and the accelerator ----------------------------------------------------------------------------------


def construct(name, *says, environment=None, options=None, **fields):
    def run(here):
        os.environ.update(environment or {})
        made = {key: make() for key, make in (options or {}).items()}
        Accelerator(parallelism_config=TensorParallelDDPPlugin(**fields), **made)

    CONSTRUCT[name] = Case(run, says)


TP, DP = "PARALLELISM_CONFIG_TP_SIZE", "PARALLELISM_CONFIG_DP_REPLICATE_SIZE"
WHOLE = "has to be a whole number of at least 1"

construct("tp_that_does_not_divide_the_world", "tp_size=3", "4 processes", "one of [1, 2, 4]", tp_size=3)
construct("tp_larger_than_the_world", "tp_size=8", "Launch a multiple of 8", "one of [1, 2, 4]", tp_size=8)
construct("too_many_replicas", "8 processes, but 4", "Set dp_replicate_size=2", tp_size=2, dp_replicate_size=4)
construct("too_few_replicas", "2 processes, but 4", "Set dp_replicate_size=2", tp_size=2, dp_replicate_size=1)
construct("tp_zero", "tp_size is 0", WHOLE, tp_size=0)
construct("tp_negative", "tp_size is -2", WHOLE, tp_size=-2)
construct("tp_in_words", "tp_size is 'two'", WHOLE, tp_size="two")
construct("tp_a_string", "tp_size is '2'", WHOLE, tp_size="2")
construct("tp_true", "tp_size is True", WHOLE, tp_size=True)
construct("tp_a_float", "tp_size is 2.0", WHOLE, tp_size=2.0)
construct("dp_zero", "dp_replicate_size is 0", WHOLE, tp_size=2, dp_replicate_size=0)
construct("dp_true", "dp_replicate_size is True", WHOLE, tp_size=4, dp_replicate_size=True)
construct("dp_shard", "dp_shard_size=2", "Set dp_shard_size=1", tp_size=2, dp_shard_size=2)
construct("cp", "cp_size=2", "Set cp_size=1", tp_size=2, cp_size=2)
construct("sp", "sp_size=2", "Set sp_size=1", tp_size=2, sp_size=2)
construct("sequence_parallel", "sequence_parallel is 'auto'", "true or false", tp_size=2, sequence_parallel="auto")
construct("loss_parallel_perhaps", "loss_parallel is 'perhaps'", "true or false", tp_size=2, loss_parallel="perhaps")
construct("check_steps_negative", "replica_check_steps is -1", "at least 0", tp_size=2, replica_check_steps=-1)
construct("tp_in_words_in_the_environment", TP, "'two'", WHOLE, environment={TP: "two"})
construct("tp_a_fraction_in_the_environment", TP, "'2.5'", WHOLE, environment={TP: "2.5"})
construct("tp_zero_in_the_environment", TP, "is 0", WHOLE, environment={TP: "0"})
construct("tp_that_does_not_divide_in_the_environment", "tp_size=3", "one of [1, 2, 4]", environment={TP: "3"})
construct("dp_negative_in_the_environment", DP, "is -1", WHOLE, tp_size=2, environment={DP: "-1"})
construct("too_many_replicas_in_the_environment", "Set dp_replicate_size=2", environment={TP: "2", DP: "4"})
construct(
    "cp_in_the_environment", "cp_size=2", "Set cp_size=1", tp_size=2, environment={"PARALLELISM_CONFIG_CP_SIZE": "2"}
)
construct(
    "loss_parallel_in_the_environment",
    "loss_parallel is 'maybe'",
    '"auto", true or false',
    tp_size=2,
    environment={"ACCEL_TP_DDP_LOSS_PARALLEL": "maybe"},
)
construct(
    "sequence_parallel_perhaps_in_the_environment",
    "ACCEL_TP_DDP_SEQUENCE_PARALLEL",
    "true or false",
    tp_size=2,
    environment={"ACCEL_TP_DDP_SEQUENCE_PARALLEL": "perhaps"},
)
construct(
    "check_steps_in_words_in_the_environment",
    "ACCEL_TP_DDP_REPLICA_CHECK_STEPS",
    "'often'",
    "at least 0",
    tp_size=2,
    environment={"ACCEL_TP_DDP_REPLICA_CHECK_STEPS": "often"},
)
construct("tp_with_two_signs_in_the_environment", TP, "'--2'", WHOLE, environment={TP: "--2"})
construct("fsdp_plugin", "FSDP", "Leave out", tp_size=2, options={"fsdp_plugin": FullyShardedDataParallelPlugin})
construct("fsdp_in_the_environment", "FSDP", "Leave out", tp_size=2, environment={"ACCELERATE_USE_FSDP": "true"})


# --- plans -----------------------------------------------------------------------------------------------------------


@case(PREPARE, "unknown style `colwize`", "model.layers.*.mlp.up_proj", "Nearest names that exist: colwise")
def unknown_style(here):
    here.plan = {"model.layers.*.mlp.up_proj": "colwize"}
    return (build_model("llama"),)


@case(
    PREPARE,
    "model.layer.*.mlp.up_proj",
    "matches no",
    "Nearest names that exist: model.layers.*.mlp.up_proj",
    "tp_size=2",
)
def pattern_that_matches_nothing(here):
    here.plan = {"model.layer.*.mlp.up_proj": "colwise"}
    return (build_model("llama"),)


@case(PREPARE, "`layers.7.mlp.up_proj", "matches no", "layers.1.mlp.up_proj", "Correct the name")
def layer_that_does_not_exist(here):
    here.plan = {"layers.7.mlp.up_proj": "colwise"}
    return (build_model("llama"),)


@case(PREPARE, "there is no file", "plans.yaml", "plan.yaml", "every rank can read")
def plan_file_missing(here):
    (here.folder / "plan.yaml").write_text("lm_head: replicate\n")
    here.plan = str(here.folder / "plans.yaml")
    return (build_model("llama"),)


@case(PREPARE, "there is no file", 'Give "auto", or the path')
def plan_in_a_word(here):
    here.plan = "automatic"
    return (build_model("llama"),)


@case(PREPARE, "there is no file", 'Give "auto", or the path')
def plan_as_the_text_of_a_file(here):
    here.plan = "model.layers.*.mlp.up_proj: colwise\n" * 20
    return (build_model("llama"),)


@case(PREPARE, "there is no file")
def plan_file_is_a_folder(here):
    here.plan = here.folder
    return (build_model("llama"),)


def plan_file(name, text, *says):
    def run(here):
        path = here.folder / f"{here.rank}_{name}"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        here.plan = str(path)
        return (build_model("llama"),)

    PREPARE[f"plan_file_{name}"] = Case(run, (name, *says))


plan_file("unclosed.yaml", "model.layers: [colwise\n", "cannot be read as YAML", "one `name: style` per line")
plan_file("tabs.yaml", "lm_head:\n\t- x\n", "cannot be read as YAML", "one `name: style` per line")
plan_file("unquoted_star.yaml", "*.mlp.up_proj: colwise\n", "cannot be read as YAML")
plan_file("comma.json", '{"lm_head": "replicate",}', "cannot be read as JSON")
plan_file("latin1.yaml", "lm_head: réplique\n".encode("latin1"), "cannot be read as YAML")
plan_file(
    "list.yaml", "- lm_head\n- model.embed_tokens\n", "holds a list, not a mapping", "one `name: style` per line"
)
plan_file("list.json", json.dumps(["lm_head"]), "holds a list, not a mapping")
plan_file("empty.yaml", "", "not a mapping", "one `name: style` per line")
plan_file("date.yaml", "lm_head: 2001-99-99\n", "cannot be read as YAML", "one `name: style` per line")
plan_file("number.yaml", "lm_head: 3\n", "'lm_head': 3", "maps a module or parameter name to a style")
plan_file(
    "nested.yaml", "model:\n  embed_tokens: replicate\n", "'model': {", "maps a module or parameter name to a style"
)
plan_file("nothing.yaml", "lm_head:\n", "'lm_head': None", "maps a module or parameter name to a style")
plan_file("name.yaml", "3: replicate\n", "3: 'replicate'", "maps a module or parameter name to a style")


@case(PREPARE, "got a list", 'Give "auto", a mapping')
def plan_a_list(here):
    here.plan = ["model.layers.*.mlp.up_proj"]
    return (build_model("llama"),)


@case(PREPARE, "'lm_head': <class", "maps a module or parameter name to a style")
def style_a_class(here):
    here.plan = {"lm_head": ColwiseParallel}
    return (build_model("llama"),)


@case(PREPARE, "shards no parameter", "LlamaForCausalLM", "tp_size=2", "Name at least one module")
def plan_that_shards_nothing(here):
    here.plan = dict.fromkeys(["lm_head", "embed_tokens", "layers.*.mlp.*", "layers.*.self_attn.*"], "replicate")
    return (build_model("llama"),)


def toy(features=8):
    return nn.Sequential(nn.Embedding(12, features), nn.LayerNorm(features), nn.Linear(features, 8))


@case(PREPARE, "Sequential has no plan", "Pass `tp_plan=")
def model_without_a_plan(here):
    return (toy(),)


@case(PREPARE, "`1: colwise`", "is a LayerNorm", "takes torch.nn.Linear", "or `replicate`")
def colwise_of_a_norm(here):
    here.plan = {"1": "colwise"}
    return (toy(),)


@case(PREPARE, "`1: ColwiseParallel`", "is a LayerNorm", "or `replicate`")
def torch_colwise_of_a_norm(here):
    here.plan = {"1": ColwiseParallel()}
    return (toy(),)


@case(PREPARE, "`0: rowwise`", "is a Embedding", "or `replicate`")
def rowwise_of_an_embedding(here):
    here.plan = {"0": "rowwise"}
    return (toy(),)


@case(PREPARE, "`0.weight` of size (12, 8)", "max_norm=1.0", "Build the embedding without max_norm")
def rowwise_embedding_with_max_norm(here):
    model = toy()
    model[0].max_norm = 1.0
    here.plan = {"0": "embedding_rowwise", "2": "colwise_gather_output"}
    return (model,)


@case(PREPARE, "`0.norm.weight` of size (8,)", "further parameter of the embedding", "`replicate`")
def embedding_with_a_norm_inside(here):
    model = toy()
    model[0].norm = nn.LayerNorm(8)
    here.plan = {"0": "embedding_rowwise", "2": "colwise_gather_output"}
    return (model,)


@case(PREPARE, "`0.weight` of size (12, 8)", "sparse=True", "Build the embedding without sparse")
def colwise_embedding_with_sparse_gradients(here):
    model = toy()
    model[0].sparse = True
    here.plan = {"0": "embedding_colwise", "2": "colwise_gather_output"}
    return (model,)


@case(PREPARE, "`model.layers.0.mlp: moe_tp_experts`", "is not sharded", "all of its parameters to `replicate`")
def experts_that_are_none(here):
    here.plan = {"model.layers.*.mlp": "moe_tp_experts"}
    return (build_model("llama"),)


@case(
    PREPARE,
    "`model.layers.*.mlp.experts.gate_up_proj: packed_colwise`",
    "`model.layers.0.mlp.experts: replicate`",
    "to `replicate` too",
)
def experts_sharded_without_their_style(here):
    here.plan = {"layers.*.mlp.experts": "replicate"}
    return (build_model("mixtral"),)


@case(PREPARE, "experts.down_proj` of size (4, 64, 96) is not sharded", "`shared_bias`")
def experts_partly_sharded(here):
    here.plan = {"layers.*.mlp.experts.down_proj": "replicate"}
    return (build_model("mixtral"),)


@case(PREPARE, "experts.gate_up_proj_bias` of size (4, 64)", "dimension 0, which counts the experts", "`rowwise`")
def experts_cut_by_expert(here):
    here.plan = {"layers.*.mlp.experts.gate_up_proj_bias": "colwise"}
    return (build_model("gpt_oss"),)


@case(
    PREPARE,
    "experts.down_proj` of size (4, 64, 12)",
    "6 of dimension 2, 24 bytes",
    'experts_implementation="batched_mm"',
)
def experts_too_narrow_for_the_grouped_product(here):
    return (build_model("mixtral", intermediate_size=12),)


@case(PREPARE, "`model.norm: sequence_parallel`", "not supported yet", "to `replicate`")
def model_with_a_style_to_come(here):
    model = build_model("llama")
    model._tp_plan = {**model._tp_plan, "model.norm": "sequence_parallel"}
    return (model,)


@case(
    PREPARE,
    "`model.layers.0.self_attn.q_proj.weight` of size (64, 64)",
    "how many (qk_rope_head_dim=None)",
    "replicate",
)
def latent_attention_that_is_none(here):
    here.plan = {"layers.*.self_attn.q_proj": "mla_kv_a_proj"}
    return (build_model("llama"),)


@case(PREPARE, "`model.layers.0.self_attn.sinks` of size (8,)", "is planned as", "to `local_params`")
def sinks_sharded_without_their_module(here):
    here.plan = {"layers.*.self_attn": "replicate"}
    return (build_model("gpt_oss"),)


@case(PREPARE, "experts.gate_up_proj` of size (4, 64, 64)", "gate and up in turns", "`rowwise`")
def experts_in_turns_cut_as_packed(here):
    here.plan = {"layers.*.mlp.experts.gate_up_proj": "packed_rowwise"}
    return (build_model("gpt_oss"),)


@case(PREPARE, "experts.gate_up_proj` of size (4, 192, 64)", "gate and up one after the other", "`packed_colwise`")
def packed_experts_cut_as_one(here):
    here.plan = {"layers.*.mlp.experts.gate_up_proj": "colwise"}
    return (build_model("mixtral"),)


@case(PREPARE, "`2.weight` of size (8, 8) has dtype torch.int8", "load it unquantized")
def quantized_weight(here):
    model = toy()
    model[2].weight = nn.Parameter(torch.ones(8, 8, dtype=torch.int8), requires_grad=False)
    here.plan = {"2": "colwise_gather_output"}
    return (model,)


@case(PREPARE, f"`lm_head.weight` of size ({VOCABULARY}, 64)", "is not 2 equal sections", "colwise_gather_output")
def packed_weight_of_an_odd_size(here):
    here.plan = {"lm_head": "packed_colwise"}
    return (build_model("llama"),)


@case(PREPARE, "`lm_head.weight` of size", "not divisible by tp_size", "tp_size=2", "or set the style to `replicate`")
def odd_vocabulary_that_has_to_be_even(here):
    here.plan = {"lm_head": "colwise"}
    return (build_model("llama"),)


@case(PREPARE, "`2.bias` of size (8,)", "one of several", "Name the module `2` instead")
def one_parameter_of_two(here):
    here.plan = {"2.bias": "colwise"}
    return (toy(),)


@case(PREPARE, "is tied to a weight of", "(131, 64)", "cuts the same dimension")
def tied_weights_cut_differently(here):
    here.plan = {"lm_head": "replicate"}
    return (build_model("llama", tied=True),)


@case(PREPARE_TP4, "`model.layers.0.self_attn.q_proj.weight` of size (96, 96)", "6", "tp_size=4", "divides 6")
def six_heads(here):
    return (build_model("llama", hidden_size=96, num_attention_heads=6, num_key_value_heads=6),)


@case(
    PREPARE_TP4,
    "`model.layers.0.self_attn.",
    ".weight` of size (",
    "key value heads = 3",
    "tp_size=4",
    "divides 3 or is a multiple of 3",
    "`replicate`",
)
def three_key_value_heads(here):
    return (build_model("llama", hidden_size=96, num_attention_heads=12, num_key_value_heads=3),)


@case(PREPARE_TP4, "q_b_proj.weight` of size (72, 24)", "attention heads = 6", "tp_size=4", "divides 6")
def six_heads_of_latent_attention(here):
    return (build_model("deepseek_v3", num_attention_heads=6, num_key_value_heads=6),)


@case(PREPARE_TP4, "`model.layers.0.self_attn.q_proj.weight`", "key value heads = 2", "tp_size=4", "divides 2.")
def two_key_value_heads_of_a_module_that_does_not_say_so(here):
    model = build_model("llama", num_key_value_heads=2)
    for layer in model.model.layers:
        del layer.self_attn.num_key_value_groups
    return (model,)


@case(
    PREPARE_TP4, "`model.layers.0.mlp.gate_proj.weight` of size (5, 64)", "without a part", "tp_size=4", "`replicate`"
)
def intermediate_size(here):
    return (build_model("llama", intermediate_size=5),)


@case(PREPARE_TP4, "`model.layers.0.self_attn.", "key value heads = 3", "tp_size=4", "`replicate`")
def three_key_value_heads_packed(here):
    return (build_model("phi3", hidden_size=96, num_attention_heads=12, num_key_value_heads=3),)


@case(PREPARE_TP4, "`model.embed_tokens.weight` of size (5, 64)", "leaves ranks without a part", "smaller tp_size")
def vocabulary_smaller_than_the_ranks_need(here):
    return (build_model("llama", vocab_size=5),)


# --- models and optimizers -------------------------------------------------------------------------------------------


@case(
    PREPARE,
    "in no model given to `prepare`",
    "number 1 of group 0, of size (64, 64)",
    "model.layers",
    "Build the optimizer",
)
def optimizer_of_another_model(here):
    model = build_model("llama")
    own, foreign = model.lm_head.weight, build_model("llama").model.layers[0].self_attn.q_proj.weight
    return model, torch.optim.SGD([own, foreign], lr=0.1)


@case(PREPARE, "device_map over several devices", "'lm_head': 1", "without device_map")
def model_over_several_devices(here):
    model = build_model("llama")
    model.hf_device_map = {"model": 0, "lm_head": 1}
    return (model,)


@case(PREPARE, "device_map over several devices", "'lm_head': 1", "without device_map")
def submodule_over_several_devices(here):
    model = build_model("llama")
    model.model.hf_device_map = {"layers.0": 0, "lm_head": 1}
    return (model,)


@case(PREPARE, "wrapped in DistributedDataParallel already", "Pass the bare model")
def model_in_ddp(here):
    return (nn.parallel.DistributedDataParallel(build_model("llama")),)


@case(PREPARE, "`model.embed_tokens.weight` of size", "meta device", "Load the weights")
def model_without_data(here):
    with torch.device("meta"):
        return (build_model("llama"),)


@case(PREPARE, "`0.weight` of size (8, 8)", "over 4 ranks", "tp_size=2", "Parallelize the model with")
def dtensors_of_another_tp_size(here):
    model = nn.Sequential(nn.Linear(8, 8))
    parallelize_module(model[0], init_device_mesh("cpu", (4,), mesh_dim_names=("tp",)), ColwiseParallel())
    return (model,)


@case(PREPARE, "`0.weight`", "one-dimensional `tp` mesh", "without FSDP")
def dtensors_on_a_mesh_of_two_dimensions(here):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    model = nn.Sequential(nn.Linear(8, 8))
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("tp", "other"))
    model[0].weight = nn.Parameter(distribute_tensor(model[0].weight.detach(), mesh, [Shard(0), Replicate()]))
    return (model,)


@case(PREPARE, "would shard otherwise than rank", "Build the same model and give the same plan on every rank")
def fewer_layers_on_the_last_rank(here):
    return (build_model("llama", layers=1 if here.rank == 3 else 2),)


@case(PREPARE, "would shard otherwise than rank", "96", "128", "Build the same model")
def another_width_on_the_first_rank(here):
    return (build_model("llama", intermediate_size=96 if here.rank == 0 else 128),)


@case(PREPARE, "would shard otherwise than rank", "lm_head", "give the same plan on every rank")
def another_plan_on_one_rank(here):
    here.plan = {"lm_head": "replicate"} if here.rank == 1 else "auto"
    return (build_model("llama"),)


@case(PREPARE, "there is no file", "one.yaml", "every rank can read")
def plan_file_on_one_rank_only(here):
    path = here.folder / f"one.yaml of rank {here.rank}"
    if here.rank == 0:
        path.write_text("lm_head: replicate\n")
    here.plan = str(path)
    return (build_model("llama"),)


@case(PREPARE, "in no model given to `prepare`", "Build the optimizer")
def foreign_optimizer_on_one_rank_only(here):
    model, other = build_model("llama"), build_model("llama")
    return model, torch.optim.SGD((other if here.rank == 2 else model).parameters(), lr=0.1)


@case(
    PREPARE,
    "optimizer SGD holds a state `momentum_buffer` of size (3, 3)",
    "(131, 64)",
    "cannot be cut",
    "Prepare the model",
)
def optimizer_state_of_another_size(here):
    model = build_model("llama")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer.state[model.lm_head.weight]["momentum_buffer"] = torch.zeros(3, 3)
    return model, optimizer


@case(PREPARE, "the optimizer LBFGS", "Use one that works element by element")
def optimizer_that_looks_at_matrices(here):
    model = build_model("llama")
    return model, torch.optim.LBFGS(model.parameters())


@case(PREPARE, "`0.weight` of size (8, 8)", "mesh", "`tp`")
def dtensors_over_the_replicas(here):
    model = nn.Sequential(nn.Linear(8, 8))
    parallelize_module(model[0], here.accelerator.torch_device_mesh["dp_replicate"], ColwiseParallel())
    return (model,)


@case(PREPARE, "no.such.name")
def plan_for_a_model_of_dtensors(here):
    model = nn.Sequential(nn.Linear(8, 8))
    parallelize_module(model[0], here.accelerator.torch_device_mesh["tp"], ColwiseParallel())
    here.plan = {"no.such.name": "colwise"}
    return (model,)


@case(PREPARE, "sharded already", "Prepare a model once")
def parallelized_twice(here):
    model, mesh = build_model("llama"), here.accelerator.torch_device_mesh["tp"]
    parallelize(parallelize(model, mesh), mesh)


@case(PREPARE, "no dimension named `tp`", "Pass a one-dimensional mesh")
def mesh_without_a_tensor_parallel_dimension(here):
    parallelize(build_model("llama"), init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "columns")))


@case(PREPARE, "norm_type is 0", "greater than 0, or inf")
def norm_of_order_zero(here):
    model = here.accelerator.prepare(build_model("llama"))
    model(input_ids=torch.ones(1, 4, dtype=torch.long), labels=torch.ones(1, 4, dtype=torch.long)).loss.backward()
    here.accelerator.clip_grad_norm_(model.parameters(), 1.0, norm_type=0)


# --- running them ----------------------------------------------------------------------------------------------------


def attempt(action):
    start = time.monotonic()
    try:
        action()
        raised = None
    except BaseException as error:
        raised = Raised.of(error)
    return Outcome(raised, time.monotonic() - start)


def look(objects):
    """Everything about models and optimizers that a refused `prepare` has to leave alone."""
    seen = {}
    for index, obj in enumerate(objects):
        if isinstance(obj, nn.Module):
            for name, param in obj.named_parameters(remove_duplicate=False):
                local = param._local_tensor if isinstance(param, DTensor) else param
                values = None if param.is_meta else local.detach().clone()
                seen[f"{index}.{name}"] = (id(param), tuple(param.shape), type(param).__name__, values)
            for name, module in obj.named_modules():
                hooks = len(module._forward_pre_hooks), len(module._forward_hooks)
                seen[f"{index}.{name} itself"] = (id(module), "forward" in module.__dict__, hooks, None)
        elif isinstance(obj, torch.optim.Optimizer):
            ids = [[id(param) for param in group["params"]] for group in obj.param_groups]
            seen[f"{index} groups"] = (ids, None)
    return seen


def differences(before, after):
    assert before.keys() == after.keys()
    names = []
    for name, (*fixed, values) in before.items():
        *fixed_after, values_after = after[name]
        if fixed != fixed_after or (values is not None and not torch.equal(values, values_after)):
            names.append(name)
    return names


def refused_constructions(folder):
    outcomes = {}
    for name, case in CONSTRUCT.items():
        environment = dict(os.environ)
        outcomes[name] = attempt(lambda: case.run(Here(Path(folder))))
        os.environ.clear()
        os.environ.update(environment)
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        dist.barrier()
    return outcomes, gradient_errors(Accelerator(parallelism_config=TensorParallelDDPPlugin(tp_size=2)))


def refused_preparations(folder, tp_size):
    accelerator = Accelerator(parallelism_config=TensorParallelDDPPlugin(tp_size=tp_size))
    plugin = accelerator.parallelism_config
    outcomes = {}
    for name, case in (PREPARE if tp_size == 2 else PREPARE_TP4).items():
        here = Here(Path(folder), accelerator)
        objects, before = (), {}

        def run():
            nonlocal objects, before
            objects = case.run(here) or ()
            before = look(objects)
            plugin.tp_plan = here.plan
            accelerator.prepare(*objects)

        outcomes[name] = attempt(run)
        if name != "bare_model_prepared_twice":
            outcomes[name].touched = differences(before, look(objects))
        plugin.tp_plan = "auto"
        dist.barrier()
    return outcomes, gradient_errors(accelerator)


def gradient_errors(accelerator):
    """Prepare and train a correct model: the gradients have to be those of the unsharded one."""
    model, plain = build_model("llama"), build_model("llama")
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    ids = torch.randint(0, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(3))
    accelerator.backward(model(input_ids=ids, labels=ids).loss)
    plain(input_ids=ids, labels=ids).loss.backward()
    expected = {name: param.grad for name, param in plain.named_parameters()}
    gradients = full_gradients(model)
    norm = float(accelerator.clip_grad_norm_(model.parameters(), 1e9))
    optimizer.step()
    return gradients, expected, norm


def assert_recovered(results):
    for _, (gradients, expected, norm) in results:
        assert_tensors_close(gradients, expected, 1e-5)
        full = torch.cat([gradient.flatten() for gradient in expected.values()]).norm().item()
        assert norm == pytest.approx(full, rel=1e-5)


@pytest.fixture(scope="module")
def constructions(tmp_path_factory):
    return run_on_ranks(refused_constructions, 4, str(tmp_path_factory.mktemp("construct")))


@pytest.fixture(scope="module")
def preparations(tmp_path_factory):
    return run_on_ranks(refused_preparations, 4, str(tmp_path_factory.mktemp("prepare")), 2)


@pytest.fixture(scope="module")
def preparations_tp4(tmp_path_factory):
    return run_on_ranks(refused_preparations, 4, str(tmp_path_factory.mktemp("prepare")), 4)


def assert_refused(results, name, says):
    for rank, (outcomes, _) in enumerate(results):
        outcome = outcomes[name]
        assert outcome.raised is not None, f"rank {rank} raised nothing"
        assert "ValueError" in outcome.raised.type_names, f"rank {rank}: {outcome.raised.traceback}"
        missing = [part for part in says if part not in outcome.raised.message]
        assert not missing, f"rank {rank}: {missing} not in: {outcome.raised.message}"
        assert outcome.seconds < AT_ONCE, f"rank {rank} took {outcome.seconds} s"
        assert not outcome.touched, f"rank {rank} has touched {outcome.touched}"


@pytest.mark.parametrize("name", CONSTRUCT)
def test_an_impossible_configuration_is_refused_on_every_rank(constructions, name):
    assert_refused(constructions, name, CONSTRUCT[name].says)


@pytest.mark.parametrize("name", PREPARE)
def test_what_cannot_be_prepared_is_refused_on_every_rank_and_left_as_it_was(preparations, name):
    assert_refused(preparations, name, PREPARE[name].says)


@pytest.mark.parametrize("name", PREPARE_TP4)
def test_sizes_that_do_not_divide_are_refused_on_every_rank(preparations_tp4, name):
    assert_refused(preparations_tp4, name, PREPARE_TP4[name].says)


def test_after_refused_configurations_a_correct_one_works(constructions):
    assert_recovered(constructions)


def test_after_refused_preparations_the_same_accelerator_prepares_a_correct_model(preparations, preparations_tp4):
    assert_recovered(preparations)
    assert_recovered(preparations_tp4)


def one_process():
    TensorParallelDDPPlugin(tp_size=1)
    Accelerator(parallelism_config=TensorParallelDDPPlugin(tp_size=2))


def test_tensor_parallelism_in_one_process_is_refused():
    (raised,) = run_on_ranks(one_process, 1, expect_raise=True)
    assert "ValueError" in raised.type_names
    assert "tp_size=2" in raised.message and "accelerate launch --num_processes" in raised.message


def prepare_with_a_plan_that_only_rank_one_lacks(folder):
    path = Path(folder) / "plan.yaml"
    if dist.get_rank() == 0:
        path.write_text("lm_head: replicate\n")
    dist.barrier()
    plan = path if dist.get_rank() == 0 else Path(folder) / "plam.yaml"
    plugin = TensorParallelDDPPlugin(tp_size=2, tp_plan=plan)
    Accelerator(parallelism_config=plugin).prepare(build_model("llama"))


def test_no_rank_is_left_waiting_for_one_that_cannot_read_the_plan(tmp_path):
    start = time.monotonic()
    first, second = run_on_ranks(prepare_with_a_plan_that_only_rank_one_lacks, 2, str(tmp_path), expect_raise=True)
    assert time.monotonic() - start < COLLECTIVE_TIMEOUT.total_seconds()
    assert first.message.startswith("rank 1 cannot prepare: ") and second.message in first.message
    assert first.type_name == "ValueError" and second.type_name == "PlanError"
    assert "plam.yaml" in second.message and "plan.yaml" in second.message


class BreaksOnItsRank(dict):
    def items(self):
        raise KeyError("this plan cannot be read")


def prepare_what_one_rank_cannot_prepare():
    plan = BreaksOnItsRank() if dist.get_rank() == 1 else "auto"
    Accelerator(parallelism_config=TensorParallelDDPPlugin(tp_size=2, tp_plan=plan)).prepare(build_model("llama"))


def prepare_another_dtype_on_one_rank():
    model = build_model("llama").to(torch.bfloat16 if dist.get_rank() == 1 else torch.float32)
    Accelerator(parallelism_config=TensorParallelDDPPlugin(tp_size=2)).prepare(model)


def prepare_an_optimizer_with_an_odd_state_on_one_rank():
    model = build_model("llama")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    if dist.get_rank() == 1:
        optimizer.state[model.lm_head.weight]["momentum_buffer"] = torch.zeros(3, 3)
    Accelerator(parallelism_config=TensorParallelDDPPlugin(tp_size=2)).prepare(model, optimizer)


def prepare_what_has_been_parallelized_over_more_ranks():
    model = build_model("llama")
    parallelize(model, init_device_mesh("cpu", (4,), mesh_dim_names=("tp",)))
    Accelerator(parallelism_config=TensorParallelDDPPlugin(tp_size=2)).prepare(model)


def test_no_rank_is_left_waiting_whatever_goes_wrong_on_one():
    first, second = run_on_ranks(prepare_what_one_rank_cannot_prepare, 2, expect_raise=True)
    assert second.type_name == "KeyError"
    assert first.type_name == "ValueError" and "rank 1 cannot prepare" in first.message
    assert "this plan cannot be read" in first.message


def assert_all_are_told(fn, world, *says):
    for raised in run_on_ranks(fn, world, timeout=60, expect_raise=True):
        assert "ValueError" in raised.type_names and all(part in raised.message for part in says), raised.traceback


def test_another_data_type_on_one_rank_is_refused():
    assert_all_are_told(prepare_another_dtype_on_one_rank, 2, "would shard otherwise", "bfloat16", "float32")


def test_an_optimizer_state_that_one_rank_cannot_cut_is_refused_on_all():
    assert_all_are_told(prepare_an_optimizer_with_an_odd_state_on_one_rank, 2, "momentum_buffer", "cannot be cut")


def test_a_model_parallelized_over_another_number_of_ranks_is_refused():
    assert_all_are_told(prepare_what_has_been_parallelized_over_more_ranks, 4, "4 ranks", "tp_size=2")


@pytest.mark.parametrize("engine", ["FSDP", "DEEPSPEED", "MEGATRON_LM", "XLA"])
def test_another_engine_is_refused_with_a_hint(engine):
    accelerator = SimpleNamespace(distributed_type=DistributedType[engine])
    with pytest.raises(ValueError, match=f"runs {engine}. Leave out the FSDP, DeepSpeed, Megatron-LM or TPU settings"):
        TensorParallelDDPPlugin(tp_size=2)._validate_accelerator(accelerator)
