"""What `prepare` gives and what the accelerator then does, call by call, against plain Accelerate on dp ranks.

Wherever it says tp = None, that is Accelerate without the plugin: the reference, run by the same function.
"""

import gc
import inspect
import json
import os
import subprocess
import sys
import textwrap
import warnings
import weakref
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import (
    DDPCommunicationHookType,
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    broadcast_object_list,
    set_seed,
)
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from accel_tp_ddp import TensorParallelDDPPlugin, full_state_dict, parallelize
from accel_tp_ddp.plugin.accelerator import _Hooks
from accel_tp_ddp.training.drift import checksum
from accel_tp_ddp.training.gradients import clip_grad_norm_, full_grad_norm

from ..helpers.compare import assert_tensors_close, relative_error
from ..helpers.models import VOCABULARY, build_model
from ..helpers.ranks import run_on_ranks
from ..helpers.sharded import (
    MLP_PLAN,
    SOURCES,
    TOLERANCE,
    accelerator_for,
    assert_gradients_close,
    build_mlp,
    full_backward,
    full_gradients_of,
    shard,
    token_batch,
    tp_mesh,
)
from ..helpers.training import Spec, differences, train

REPLICAS = pytest.mark.parametrize("dp", [1, 2])


def plain_and_sharded(fn, dp, *args, **kwargs):
    """The results of plain Accelerate on dp ranks, and of tp 2 on 2 x dp ranks: `fn(tp, ...)` both times."""
    return run_on_ranks(fn, dp, None, *args, **kwargs), run_on_ranks(fn, 2 * dp, 2, *args, **kwargs)


def assert_equal_per_replica(plain, sharded):
    assert [sharded[rank] for rank in range(len(sharded))] == [plain[rank // 2] for rank in range(len(sharded))]


def replica(accelerator):
    return accelerator.data_parallel_rank if accelerator.parallelism_config else accelerator.process_index


def inputs(seed, samples=4, features=8):
    return torch.randn(samples, features, generator=torch.Generator().manual_seed(seed))


# --- the wrapper -----------------------------------------------------------------------------------------------------


def wrapping():
    accelerator = accelerator_for(2)
    model = accelerator.prepare(build_model("llama"))
    wrapped = isinstance(model, DistributedDataParallel)
    return {
        "type": type(model).__name__,
        "ranks": dist.get_process_group_ranks(model.process_group) if wrapped else None,
        "mesh": (accelerator.torch_device_mesh.mesh_dim_names, accelerator.torch_device_mesh.mesh.tolist()),
        "tp": accelerator.tensor_parallel_rank,
        "dp": accelerator.data_parallel_rank,
        "processes": accelerator.num_processes,
        "tp_size": accelerator.parallelism_config.tp_size,
    }


def test_two_replicas_are_wrapped_in_ddp_over_the_replicas_only():
    ranks = run_on_ranks(wrapping, 4)
    assert [rank["type"] for rank in ranks] == ["DistributedDataParallel"] * 4
    assert [rank["ranks"] for rank in ranks] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    for rank in ranks:
        assert rank["mesh"] == (("dp_replicate", "tp"), [[0, 1], [2, 3]])
        assert (rank["processes"], rank["tp_size"]) == (4, 2)
    assert [(rank["dp"], rank["tp"]) for rank in ranks] == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_one_replica_is_the_bare_module():
    ranks = run_on_ranks(wrapping, 2)
    assert [rank["type"] for rank in ranks] == ["LlamaForCausalLM"] * 2
    assert ranks[0]["mesh"] == (("dp_replicate", "tp"), [[0, 1]])
    assert [(rank["dp"], rank["tp"]) for rank in ranks] == [(0, 0), (0, 1)]


DDP_OPTIONS = [
    {"find_unused_parameters": True},
    {"gradient_as_bucket_view": True},
    {"static_graph": True},
    {"bucket_cap_mb": 1},
    {"broadcast_buffers": False},
    {},
]


def ddp_steps(tp, options, unused):
    accelerator = accelerator_for(tp, MLP_PLAN, kwargs_handlers=[DistributedDataParallelKwargs(**options)])
    model = build_mlp()
    if unused:
        model.unused = nn.Linear(3, 3)
    model.register_buffer("counter", torch.zeros(2))
    wrapped, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    grads = []
    for step in range(3):
        loss = wrapped(inputs(10 * step + replica(accelerator))).square().mean()
        accelerator.backward(loss)
        grads.append(full_gradients_of(wrapped))
        optimizer.step()
        optimizer.zero_grad()
    settings = {
        "find_unused_parameters": wrapped.find_unused_parameters,
        "gradient_as_bucket_view": wrapped.gradient_as_bucket_view,
        "static_graph": wrapped.static_graph,
        "bucket_cap_mb": wrapped.bucket_bytes_cap // 2**20,
        "broadcast_buffers": wrapped.broadcast_buffers,
    }
    views = [param.grad is None or param.grad._is_view() for param in wrapped.parameters()]
    return grads, settings, views


@pytest.mark.parametrize("options", DDP_OPTIONS, ids=str)
def test_ddp_options_are_honoured(options):
    plain, sharded = plain_and_sharded(ddp_steps, 2, options, unused="find_unused_parameters" in options)
    for rank, (grads, settings, _) in enumerate(sharded):
        wanted, same_settings, _ = plain[rank // 2]
        assert settings == same_settings and settings.items() >= options.items()
        for got, expected in zip(grads, wanted, strict=True):
            assert_gradients_close(got, expected)


def test_an_unused_parameter_is_still_an_error_without_the_option():
    for tp, ranks in ((None, 2), (2, 4)):
        for raised in run_on_ranks(ddp_steps, ranks, tp, {}, True, expect_raise=True):
            assert "find_unused_parameters" in raised.message


# Full rank: PowerSGD then loses nothing, so that the shards' approximations and the whole's are the same. (Its batched
# form runs up to its first compressed step only: from there torch 2.13 itself raises, without tensor parallelism too.)
POWER = {"matrix_approximation_rank": 64, "start_powerSGD_iter": 2, "min_compression_rate": 0.001}
COMM_HOOKS = {
    "fp16": ({"comm_hook": DDPCommunicationHookType.FP16}, 1e-4),
    "bf16": ({"comm_hook": DDPCommunicationHookType.BF16}, 1e-3),
    "power_sgd": ({"comm_hook": DDPCommunicationHookType.POWER_SGD, "comm_state_option": POWER}, 1e-4),
    "power_sgd, late": ({"comm_hook": DDPCommunicationHookType.POWER_SGD}, TOLERANCE),
    "power_sgd in fp16, late": (
        {"comm_hook": DDPCommunicationHookType.POWER_SGD, "comm_wrapper": DDPCommunicationHookType.FP16},
        1e-4,
    ),
    "batched_power_sgd, late": ({"comm_hook": DDPCommunicationHookType.BATCHED_POWER_SGD}, TOLERANCE),
    "power_sgd in bf16, late": (
        {"comm_hook": DDPCommunicationHookType.POWER_SGD, "comm_wrapper": DDPCommunicationHookType.BF16},
        2e-3,
    ),
    "batched_power_sgd in fp16, late": (
        {"comm_hook": DDPCommunicationHookType.BATCHED_POWER_SGD, "comm_wrapper": DDPCommunicationHookType.FP16},
        1e-4,
    ),
    "fp16 in bf16": (
        {"comm_hook": DDPCommunicationHookType.FP16, "comm_wrapper": DDPCommunicationHookType.BF16},
        2e-3,
    ),
}


def comm_hook_gradients(tp, options):
    accelerator = accelerator_for(tp, MLP_PLAN, kwargs_handlers=[DistributedDataParallelKwargs(**options)])
    # torch refuses bf16 hooks without CUDA and NCCL; gloo carries them.
    with mock.patch.object(DistributedDataParallel, "_check_comm_hook"):
        model = accelerator.prepare(build_mlp(features=16))
    grads = []
    for step in range(5):
        model.zero_grad()
        accelerator.backward(model(inputs(10 * step + replica(accelerator), 8, 16)).square().mean())
        grads.append(full_gradients_of(model))
    return grads


@pytest.mark.parametrize("name", COMM_HOOKS)
def test_comm_hooks_reduce_over_the_replicas(name):
    options, tolerance = COMM_HOOKS[name]
    plain, sharded = plain_and_sharded(comm_hook_gradients, 2, options)
    for rank, grads in enumerate(sharded):
        for got, wanted in zip(grads, plain[rank // 2], strict=True):
            assert_tensors_close(got, wanted, tolerance, 1e-6)


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_comm_hooks_are_really_used(name):
    options, tolerance = COMM_HOOKS[name]
    exact = run_on_ranks(comm_hook_gradients, 4, 2, {})[0][0]
    compressed = run_on_ranks(comm_hook_gradients, 4, 2, options)[0][0]
    errors = [relative_error(compressed[key], exact[key]) for key in exact]
    assert tolerance < max(errors) < 0.01


def lossy_training(tp):
    """A rank of 1 loses most of each gradient, of a shard other parts than of the whole: no run to compare with.

    What is replicated over tensor-parallel ranks has to stay equal there all the same.
    """
    power = {"matrix_approximation_rank": 1, "start_powerSGD_iter": 2, "min_compression_rate": 0.001}
    hook = DistributedDataParallelKwargs(comm_hook=DDPCommunicationHookType.POWER_SGD, comm_state_option=power)
    accelerator = accelerator_for(tp, kwargs_handlers=[hook])
    model = build_model("qwen3")
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    losses = []
    for _ in range(8):
        loss = model(**token_batch(replica(accelerator))).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    replicated = [param for param in model.parameters() if getattr(param, "tp_shard", None) is None]
    return losses, [int(checksum(param)) for param in replicated]


def test_under_lossy_compression_replicated_parameters_stay_equal_and_it_still_learns():
    ranks = run_on_ranks(lossy_training, 4, 2)
    assert ranks[0] == ranks[1] and ranks[2] == ranks[3] and ranks[0][1] == ranks[2][1]
    assert len(ranks[0][1]) > 8
    assert ranks[0][0][-1] < 0.9 * ranks[0][0][0]


class Branches(nn.Module):
    """Which branch runs is the input's choice, so replicas may take different ones."""

    def __init__(self):
        super().__init__()
        self.first, self.second = build_mlp(1), build_mlp(2)

    def forward(self, x, branch):
        return (self.first if branch == 0 else self.second)(x)


def branching(tp):
    options = DistributedDataParallelKwargs(find_unused_parameters=True)
    plan = {f"{branch}.{name}": style for branch in ("first", "second") for name, style in MLP_PLAN.items()}
    accelerator = accelerator_for(tp, plan, kwargs_handlers=[options])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Branches()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    results = []
    for step in range(5):
        # Both replicas in the first branch, then each in one of its own, and at last in the other one.
        branch = 0 if step == 0 else (replica(accelerator) + step) % 2
        accelerator.backward(model(inputs(10 * step + replica(accelerator)), branch).square().mean())
        grads = full_gradients_of(model)
        norm = float(accelerator.clip_grad_norm_(model.parameters(), 0.1))
        optimizer.step()
        optimizer.zero_grad()
        results.append((grads, norm))
    return results, full_state_dict(model)


def test_a_parameter_without_gradient_on_some_replicas_gets_the_mean_of_the_others():
    plain, sharded = plain_and_sharded(branching, 2)
    assert len(plain[0][0][0][0]) == 6 and len(plain[0][0][1][0]) == 12, "one branch alone, then both"
    for rank, (results, weights) in enumerate(sharded):
        wanted, same = plain[rank // 2]
        for (grads, norm), (expected, other) in zip(results, wanted, strict=True):
            assert_gradients_close(grads, expected)
            assert norm == pytest.approx(other, rel=TOLERANCE)
        assert_tensors_close(weights, same, 1e-4)


def buffers_after_a_forward(options):
    accelerator = accelerator_for(2, MLP_PLAN, kwargs_handlers=[DistributedDataParallelKwargs(**options)])
    model = build_mlp()
    model.register_buffer("counter", torch.zeros(2))
    wrapped = accelerator.prepare(model)
    model.counter.fill_(accelerator.process_index)
    wrapped(inputs(0))
    return model.counter.tolist()


def test_buffers_are_broadcast_over_the_replicas_only():
    assert run_on_ranks(buffers_after_a_forward, 4, {}) == [[0, 0], [1, 1], [0, 0], [1, 1]]
    own = [[rank, rank] for rank in range(4)]
    assert run_on_ranks(buffers_after_a_forward, 4, {"broadcast_buffers": False}) == own


def transformer_steps(tp, options, checkpointing):
    """Partial gradients (q_norm), tied weights, recomputation and two microbatches, under an option of DDP."""
    accelerator = accelerator_for(
        tp,
        kwargs_handlers=[DistributedDataParallelKwargs(**options)],
        gradient_accumulation_steps=1 if "static_graph" in options else 2,  # plain DDP itself cannot do both
    )
    model = build_model("qwen3", tied=True)
    if checkpointing:
        model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": checkpointing == "reentrant"}
        )
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9))
    norms = []
    for step in range(6):
        with accelerator.accumulate(model):
            accelerator.backward(model(**token_batch(10 * step + replica(accelerator))).loss)
            if accelerator.sync_gradients:
                norms.append(float(accelerator.clip_grad_norm_(model.parameters(), 0.5)))
            optimizer.step()
            optimizer.zero_grad()
    return norms, full_state_dict(model)


@pytest.mark.parametrize(
    "options, checkpointing",
    [
        ({"static_graph": True}, "reentrant"),
        ({"static_graph": True, "gradient_as_bucket_view": True}, "non_reentrant"),
        ({"gradient_as_bucket_view": True, "bucket_cap_mb": 1}, None),
        ({"find_unused_parameters": True}, "non_reentrant"),
    ],
    ids=str,
)
def test_ddp_options_hold_on_a_transformer_with_checkpointing_and_accumulation(options, checkpointing):
    plain, sharded = plain_and_sharded(transformer_steps, 2, options, checkpointing)
    for rank, (norms, weights) in enumerate(sharded):
        wanted, same = plain[rank // 2]
        assert norms == pytest.approx(wanted, rel=TOLERANCE) and len(norms) >= 3
        assert_tensors_close(weights, same, 1e-4)


# --- gradients: norms and clipping -----------------------------------------------------------------------------------

SUBSETS = {
    "all": lambda name: True,
    "sharded": lambda name: "proj" in name or "embed" in name or "head" in name,
    "replicated": lambda name: "norm" in name,
    "mixed": lambda name: name.endswith(("up_proj.weight", "layernorm.weight", "lm_head.weight")),
    "mostly replicated": lambda name: "norm" in name or name == "model.layers.0.self_attn.k_proj.weight",
    "none": lambda name: False,
}


def check_clipping(subset, norm_type, form, tied, max_norm):
    accelerator = accelerator_for(2)
    reference = build_model("llama", tied=tied)
    full_backward(reference, token_batch())
    model = accelerator.prepare(build_model("llama", tied=tied))
    accelerator.backward(model(**token_batch()).loss)
    chosen = [name for name, _ in reference.named_parameters() if SUBSETS[subset](name)]
    ours = [param for name, param in accelerator.unwrap_model(model).named_parameters() if name in chosen]
    theirs = [param for name, param in reference.named_parameters() if name in chosen]
    assert len(ours) == len(theirs) == len(chosen)
    if form == "generator":
        ours = (param for param in ours)
    elif form == "one":
        ours, theirs = ours[0], theirs[0]
    before = torch.nn.utils.get_total_norm([param.grad for param in reference.parameters()])
    wanted = torch.nn.utils.clip_grad_norm_(theirs, max_norm, norm_type)
    norm = accelerator.clip_grad_norm_(ours, max_norm, norm_type)
    assert relative_error(norm, wanted) < TOLERANCE, (float(norm), float(wanted))
    assert_gradients_close(full_gradients_of(model), full_gradients_of(reference))
    after = torch.nn.utils.get_total_norm([param.grad for param in reference.parameters()])
    assert (after < before) == (bool(chosen) and bool(wanted > max_norm))
    return float(norm).hex()


@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("norm_type", [1, 2, 3, float("inf")], ids=str)
def test_clip_grad_norm_is_that_of_the_full_gradient(subset, norm_type):
    norms = run_on_ranks(check_clipping, 2, subset, norm_type, "list", False, 1e-3)
    assert len(set(norms)) == 1, "ranks that disagree by a bit drift apart"


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("form", ["list", "generator", "one"])
@pytest.mark.parametrize("max_norm", [0.05, 1e6], ids=["clipped", "not clipped"])
def test_clip_grad_norm_takes_what_torch_takes(form, max_norm, ranks):
    norms = run_on_ranks(check_clipping, ranks, "all", 2.0, form, True, max_norm)
    assert len(set(norms)) == 1


def check_clip_value(limit):
    accelerator = accelerator_for(2)
    reference = build_model("llama")
    full_backward(reference, token_batch())
    model = accelerator.prepare(build_model("llama"))
    accelerator.backward(model(**token_batch()).loss)
    before = full_gradients_of(model)
    torch.nn.utils.clip_grad_value_(reference.parameters(), limit)
    accelerator.clip_grad_value_(model.parameters(), limit)
    assert_gradients_close(full_gradients_of(model), full_gradients_of(reference))
    assert any((grad.abs() > limit).any() for grad in before.values())


@pytest.mark.parametrize("ranks", [2, 4])
def test_clip_grad_value_is_that_of_the_full_gradient(ranks):
    run_on_ranks(check_clip_value, ranks, 1e-3)


def check_nonfinite(rank_with_inf):
    accelerator = accelerator_for(2, MLP_PLAN)
    model = accelerator.prepare(build_mlp())
    model(inputs(1)).sum().backward()
    if accelerator.tensor_parallel_rank == rank_with_inf:
        model.up.weight.grad[0, 0] = float("inf")
    return float(accelerator.clip_grad_norm_(model.parameters(), 1.0))


@pytest.mark.parametrize("rank_with_inf", [0, 1])
def test_an_infinite_gradient_on_one_rank_is_an_infinite_norm_on_all(rank_with_inf):
    assert run_on_ranks(check_nonfinite, 2, rank_with_inf) == [float("inf")] * 2


def check_norm_options(foreach):
    """Bare parameters, of several data types, in the order that torch is given them too."""
    mesh = tp_mesh()
    models = {which: build_mlp() for which in ("sharded", "whole")}
    parallelize(models["sharded"], mesh, MLP_PLAN)
    for model in models.values():
        model.up.to(torch.bfloat16)
        model.head.to(torch.float64)
        for index, param in enumerate(model.parameters()):
            info, generator = getattr(param, "tp_shard", None), torch.Generator().manual_seed(index)
            whole = torch.randn(info.global_shape if info else param.shape, generator=generator).to(param.dtype)
            param.grad = info.local_part(whole) if info else whole
    ours, theirs = (list(model.parameters()) for model in models.values())
    results = []
    for params, norm, clip in (
        (ours, full_grad_norm, clip_grad_norm_),
        (
            theirs,
            lambda params, **kw: torch.nn.utils.get_total_norm([p.grad for p in params], **kw),
            torch.nn.utils.clip_grad_norm_,
        ),
    ):
        with mock.patch.object(torch, "_foreach_norm", wraps=torch._foreach_norm) as spy:
            total = norm(params, foreach=foreach)
            used = spy.called
            clipped = clip(params, 0.5, foreach=foreach)
        results.append((used, total.dtype, relative_error(total, clipped), float(total)))
    assert results[0][:3] == results[1][:3]
    assert results[0][0] == (foreach is True or foreach is None and results[1][0])
    assert results[0][3] == pytest.approx(results[1][3], rel=1e-2)  # bf16, and torch rounds its sum to that
    for (name, param), other in zip(models["sharded"].named_parameters(), theirs):
        full = param.tp_shard.full_tensor(param.grad) if param.tp_shard else param.grad
        assert relative_error(full, other.grad) < 1e-2, name
    if mesh.get_local_rank() == 1:
        ours[0].grad.view(-1)[0] = float("nan")
    for call in (full_grad_norm, lambda params, **options: clip_grad_norm_(params, 1.0, **options)):
        assert torch.isnan(call(ours, foreach=foreach))
        with pytest.raises(RuntimeError, match="error_if_nonfinite=False"):
            call(ours, error_if_nonfinite=True, foreach=foreach)
    return results[0]


@pytest.mark.parametrize("foreach", [None, True, False])
def test_foreach_and_error_if_nonfinite_are_those_of_torch(foreach):
    first, second = run_on_ranks(check_norm_options, 2, foreach)
    assert first == second


def test_the_accelerators_clipping_takes_what_accelerates_takes():
    assert inspect.signature(_Hooks.clip_grad_norm_).parameters.keys() == (
        inspect.signature(Accelerator.clip_grad_norm_).parameters.keys()
    )


# --- learning rates --------------------------------------------------------------------------------------------------


def learning_rates(tp, kind, accumulation=1, split_batches=False, step_with_optimizer=True, adjust=True):
    accelerator = accelerator_for(
        tp,
        MLP_PLAN,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=accumulation, adjust_scheduler=adjust),
        step_scheduler_with_optimizer=step_with_optimizer,
        dataloader_config=DataLoaderConfiguration(split_batches=split_batches),
    )
    model = build_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    if kind == "lambda":
        scheduler = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    else:
        # 12 are not enough, which Accelerate forgives where it steps several times.
        scheduler = OneCycleLR(optimizer, max_lr=1.0, total_steps=40 if split_batches else 12)
    loader = DataLoader(list(inputs(0, samples=22)), batch_size=4)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    rates = []
    for _ in range(3):
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(batch).square().mean())
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            rates.append(scheduler.get_last_lr()[0])
    return rates, scheduler.scheduler._step_count


@REPLICAS
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulation": 2},
        {"accumulation": 3, "adjust": False},
        {"step_with_optimizer": False},
        {"split_batches": True},
        {"split_batches": True, "accumulation": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["lambda", "one_cycle"])
def test_schedulers_step_as_under_plain_ddp(kind, options, dp):
    if kind == "one_cycle" and options.get("step_with_optimizer") is False:
        pytest.skip("OneCycleLR itself refuses to go beyond its end")
    plain, sharded = plain_and_sharded(learning_rates, dp, kind, **options)
    assert len(set(plain[0][0])) > 3
    assert_equal_per_replica(plain, sharded)


# --- evaluation ------------------------------------------------------------------------------------------------------


class Indexed:
    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return {"id": index, "row": torch.tensor([index, -index]), "flag": torch.tensor(index % 2 == 0)}


def gathered(tp, samples, even_batches=True):
    accelerator = accelerator_for(tp, MLP_PLAN, dataloader_config=DataLoaderConfiguration(even_batches=even_batches))
    _, loader = accelerator.prepare(build_mlp(), DataLoader(Indexed(samples), batch_size=4))
    found = {kind: [] for kind in ("tensor", "nested", "strings", "pairs", "forced", "tuple", "flags", "scalars")}
    for batch in loader:
        ids = batch["id"]
        found["tensor"] += accelerator.gather_for_metrics(ids).tolist()
        nested = accelerator.gather_for_metrics({"a": {"b": batch["row"]}, "c": [ids, (ids + 1,)]})
        assert nested["c"][1][0].tolist() == (nested["c"][0] + 1).tolist()
        found["nested"] += nested["a"]["b"].tolist()
        found["strings"] += accelerator.gather_for_metrics([f"sample {index}" for index in ids.tolist()])
        found["pairs"] += accelerator.gather_for_metrics([{"id": i, "half": i / 2} for i in ids.tolist()])
        found["forced"] += [int(t) for t in accelerator.gather_for_metrics(list(ids), use_gather_object=True)]
        predictions, labels = accelerator.gather_for_metrics((batch["row"].float().requires_grad_(), ids))
        found["tuple"] += list(zip(predictions.tolist(), labels.tolist()))
        found["flags"] += accelerator.gather_for_metrics(batch["flag"]).tolist()
        found["scalars"].append(accelerator.gather_for_metrics(ids.float().mean()).numel())
    return found


@REPLICAS
@pytest.mark.parametrize("samples", [11, 16, 9, 3])
def test_each_sample_is_gathered_once_and_in_order(samples, dp):
    plain, sharded = plain_and_sharded(gathered, dp, samples)
    for found in sharded:
        assert found["tensor"] == list(range(samples))
        assert found["strings"] == [f"sample {index}" for index in range(samples)]
        found.pop("scalars")
    for found in plain:
        found.pop("scalars")
    assert_equal_per_replica(plain, sharded)


def world_wide(tp):
    accelerator = accelerator_for(tp, MLP_PLAN)
    scalar = torch.tensor(float(accelerator.process_index))
    one = torch.tensor(1.0)
    row = torch.tensor([accelerator.process_index])
    return {
        "processes": accelerator.num_processes,
        "scalar": accelerator.gather_for_metrics(scalar).tolist(),
        "gather": accelerator.gather(row).tolist(),
        "gather scalar": accelerator.gather(scalar).tolist(),
        "sum": float(accelerator.reduce(one, reduction="sum")),
        "mean": float(accelerator.reduce(scalar, reduction="mean")),
        "normalised": float(accelerator.gather(one).sum()) / accelerator.num_processes,
    }


@pytest.mark.parametrize("ranks", [2, 4])
def test_scalars_gather_and_reduce_are_world_wide(ranks):
    for found in run_on_ranks(world_wide, ranks, 2):
        everyone = list(range(ranks))
        assert found == {
            "processes": ranks,
            "scalar": everyone,
            "gather": everyone,
            "gather scalar": everyone,
            "sum": ranks,
            "mean": sum(everyone) / ranks,
            "normalised": 1.0,
        }


def gathered_objects(tp):
    accelerator = accelerator_for(tp, MLP_PLAN)
    return [
        accelerator.gather_for_metrics(("a", "b")),
        accelerator.gather_for_metrics({"text": ["a", "b"], "more": ["c", "d"]}),
    ]


def gathered_from_stream(tp, samples):
    accelerator = accelerator_for(tp, MLP_PLAN)
    loader = accelerator.prepare(DataLoader(Stream(samples), batch_size=4))
    return sum((accelerator.gather_for_metrics(batch).tolist() for batch in loader), [])


@REPLICAS
@pytest.mark.parametrize("samples", [11, 16, 22])
def test_each_sample_of_an_iterable_dataset_is_gathered_once(samples, dp):
    plain, sharded = plain_and_sharded(gathered_from_stream, dp, samples)
    assert plain == [list(range(samples))] * dp
    assert sharded == [list(range(samples))] * 2 * dp


@REPLICAS
def test_objects_come_back_as_under_plain_ddp_whatever_their_type(dp):
    assert_equal_per_replica(*plain_and_sharded(gathered_objects, dp))


# --- data loaders ----------------------------------------------------------------------------------------------------


class Stream(IterableDataset):
    def __init__(self, count):
        self.count = count

    def __iter__(self):
        return iter(range(self.count))


def make_loader(kind, samples):
    data = list(range(samples))
    if kind == "shuffled":
        return DataLoader(data, batch_size=4, shuffle=True)
    if kind == "in order":
        return DataLoader(data, batch_size=4)
    if kind == "drop_last":
        return DataLoader(data, batch_size=4, shuffle=True, drop_last=True)
    if kind == "with generator":
        return DataLoader(data, batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(5))
    if kind == "batch_sampler":
        return DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data), 4, drop_last=False))
    if kind == "batch_sampler in order":
        return DataLoader(data, batch_sampler=BatchSampler(range(samples), 4, drop_last=False))
    if kind == "weighted":
        return DataLoader(data, batch_size=4, sampler=WeightedRandomSampler([1.0] * samples, samples, False))
    if kind == "subset":
        return DataLoader(data, batch_size=4, sampler=SubsetRandomSampler(data))
    if kind == "iterable":
        return DataLoader(Stream(samples), batch_size=4)
    raise KeyError(kind)


def batches(tp, kind, samples, seeding, split_batches=False, with_model=False, seedable=False):
    """Sample ids of each batch of two epochs. `seeding` "by rank": no two ranks have the same random state."""
    accelerator = accelerator_for(
        tp,
        MLP_PLAN,
        dataloader_config=DataLoaderConfiguration(split_batches=split_batches, use_seedable_sampler=seedable),
    )
    set_seed(11 if seeding == "alike" else 100 + accelerator.process_index)
    loader = make_loader(kind, samples)
    if with_model:
        _, loader = accelerator.prepare(build_mlp(), loader)
    else:
        loader = accelerator.prepare(loader)
    if seeding != "alike":
        set_seed(200 + accelerator.process_index)
    return [[torch.as_tensor(batch).tolist() for batch in loader] for _ in range(2)]


IN_ORDER = ("in order", "batch_sampler in order", "iterable")
SHUFFLED = ("shuffled", "drop_last", "with generator", "batch_sampler", "weighted", "subset")


@REPLICAS
@pytest.mark.parametrize("split_batches", [False, True], ids=["", "split"])
@pytest.mark.parametrize("kind", [*IN_ORDER, *SHUFFLED])
def test_seeded_loaders_give_the_batches_of_plain_ddp(kind, split_batches, dp):
    assert_equal_per_replica(*plain_and_sharded(batches, dp, kind, 22, "alike", split_batches))


@REPLICAS
@pytest.mark.parametrize("options", [{}, {"with_model": True}], ids=str)
@pytest.mark.parametrize("kind", [*IN_ORDER, *SHUFFLED])
def test_unseeded_loaders_give_one_batch_to_a_replica_and_others_to_the_next(kind, options, dp):
    ranks = run_on_ranks(batches, 2 * dp, 2, kind, 16, "by rank", **options)
    assert ranks[0::2] == ranks[1::2], "peers of a replica saw different batches"
    for epoch in range(2):
        shares = [sorted(sum(rank[epoch], [])) for rank in ranks[::2]]
        assert sorted(sum(shares, [])) == list(range(16)), "every sample once"
    if kind in SHUFFLED:
        assert ranks[0][0] != ranks[0][1], "shuffled again in the second epoch"


@REPLICAS
@pytest.mark.parametrize("kind", ["shuffled", "weighted"])
def test_peers_see_the_same_batches_from_a_seedable_sampler_too(kind, dp):
    """Over replicas plain DDP itself needs the same seed everywhere; within a replica nobody should have to know."""
    ranks = run_on_ranks(batches, 2 * dp, 2, kind, 16, "by rank", seedable=True)
    assert ranks[0::2] == ranks[1::2], "peers of a replica saw different batches"


def dispatched(tp, split_batches):
    config = DataLoaderConfiguration(dispatch_batches=True, split_batches=split_batches)
    accelerator = accelerator_for(tp, dataloader_config=config)
    loader = accelerator.prepare(DataLoader(torch.arange(22), batch_size=4, shuffle=False))
    seen = [(batch.tolist(), accelerator.gather_for_metrics(batch).tolist()) for batch in loader]
    rest = [batch.tolist() for batch in accelerator.skip_first_batches(loader, 2)]
    return seen, rest


@pytest.mark.parametrize("split_batches", [False, True])
def test_dispatched_batches_are_those_of_plain_ddp(split_batches):
    plain = run_on_ranks(dispatched, 2, None, split_batches)
    assert plain[0] != plain[1] and [sample for _, batch in plain[0][0] for sample in batch] == list(range(22))
    assert run_on_ranks(dispatched, 4, 2, split_batches) == [plain[0], plain[0], plain[1], plain[1]]


class InPairs:
    """A batch sampler of a user's own: each index together with its mirror image."""

    batch_size, drop_last = 4, False

    def __init__(self, samples):
        self.samples = samples

    def __iter__(self):
        order = [index for pair in zip(range(self.samples), reversed(range(self.samples))) for index in pair]
        order = order[: self.samples]
        return iter([order[start : start + 4] for start in range(0, self.samples, 4)])

    def __len__(self):
        return -(-self.samples // 4)


def uneven_batches(tp, options):
    accelerator = accelerator_for(tp, MLP_PLAN, dataloader_config=DataLoaderConfiguration(**options))
    accelerator.prepare(build_mlp())
    seen = {}
    for samples in (18, 22, 3):
        set_seed(11)
        for kind, loader in {
            "own": DataLoader(range(samples), batch_sampler=InPairs(samples)),
            "shuffled": DataLoader(range(samples), batch_size=4, shuffle=True),
            "drop_last": DataLoader(range(max(samples, 8)), batch_size=4, drop_last=True),
        }.items():
            loader = accelerator.prepare(loader)
            epochs = [[batch.tolist() for batch in loader] for _ in range(2)]
            rest = [batch.tolist() for batch in accelerator.skip_first_batches(loader, 1)]
            seen[kind, samples] = epochs, len(loader), rest
    return seen


@REPLICAS
@pytest.mark.parametrize("split_batches", [False, True], ids=["", "split"])
@pytest.mark.parametrize("even_batches", [False, True], ids=["uneven", "even"])
def test_uneven_and_own_batches_are_those_of_plain_ddp(even_batches, split_batches, dp):
    options = {"even_batches": even_batches, "split_batches": split_batches}
    plain, sharded = plain_and_sharded(uneven_batches, dp, options)
    assert_equal_per_replica(plain, sharded)
    if dp == 2 and not split_batches:
        first, second = (rank["own", 18][0][0] for rank in plain)
        assert (len(first) == len(second)) == even_batches


def stateful(tp):
    """All batches; and what a loader made anew gives that has the state after two of them."""
    options = {"dataloader_config": DataLoaderConfiguration(use_stateful_dataloader=True)}
    accelerator = accelerator_for(tp, **options)
    first = accelerator.prepare(DataLoader(range(20), batch_size=2))
    seen, state = [], None
    for index, batch in enumerate(first):
        seen.append(batch.tolist())
        if index == 1:
            state = first.state_dict()
    second = accelerator.prepare(DataLoader(range(20), batch_size=2))
    second.load_state_dict(state)
    return seen, [batch.tolist() for batch in second]


@REPLICAS
def test_a_stateful_loader_goes_on_where_it_was(dp):
    pytest.importorskip("torchdata.stateful_dataloader")
    plain, sharded = plain_and_sharded(stateful, dp)
    assert_equal_per_replica(plain, sharded)
    for seen, resumed in plain:
        assert resumed == seen[2:] and len(resumed) > 2


def joined(tp, even_batches, as_on_gpus):
    """One replica has a batch more than the other; with DDP's join that takes no one to wait for."""
    accelerator = accelerator_for(tp, MLP_PLAN)
    samples = 14 if even_batches is None else 18
    model = build_mlp()
    loader = DataLoader(list(inputs(0, samples=samples)), batch_size=4)
    model, optimizer, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), loader)
    on_gpus = mock.patch.object(Accelerator, "multi_device", True) if as_on_gpus else nullcontext()
    losses = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with on_gpus, accelerator.join_uneven_inputs([model], even_batches=even_batches):
            for batch in loader:
                loss = model(batch).square().mean()
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 0.1)
                optimizer.step()
                optimizer.zero_grad()
                losses.append(float(loss))
    told = any("join_uneven_inputs` will have no effect" in str(warning.message) for warning in caught)
    return losses, full_state_dict(model), told


@REPLICAS
@pytest.mark.parametrize("even_batches", [None, False])
def test_joining_uneven_inputs_trains_as_under_plain_ddp(even_batches, dp):
    """On GPUs. Accelerate asks for the kind of device only, and DDP's join works on the CPU as well."""
    plain = run_on_ranks(joined, dp, None, even_batches, dp > 1)
    sharded = run_on_ranks(joined, 2 * dp, 2, even_batches, True)
    if dp == 2:
        assert [len(losses) for losses, *_ in plain] == ([2, 2] if even_batches is None else [3, 2])
    for rank, (losses, weights, told) in enumerate(sharded):
        assert losses == pytest.approx(plain[rank // 2][0], rel=TOLERANCE) and not told
        if even_batches is None or dp == 1:
            assert_tensors_close(weights, plain[rank // 2][1], 1e-4)


def test_joining_has_no_effect_on_the_cpu_and_says_so_as_accelerate_does():
    plain, sharded = run_on_ranks(joined, 2, None, None, False), run_on_ranks(joined, 4, 2, None, False)
    assert all(told for *_, told in [*plain, *sharded])
    for rank, (losses, *_) in enumerate(sharded):
        assert losses == pytest.approx(plain[rank // 2][0], rel=TOLERANCE)


def gathered_structures(tp):
    accelerator = accelerator_for(tp, MLP_PLAN)
    own = replica(accelerator)
    row = torch.tensor([[own, 10 * own]])
    nested = {"a": [row, (row + 1,)], "b": {"scalar": torch.tensor(float(own))}}
    gathered = accelerator.gather(nested)
    reduced = accelerator.reduce(nested["b"], "mean")
    padded = accelerator.pad_across_processes({"x": [torch.ones(own + 1, 2)]}, dim=0, pad_index=7)["x"][0]
    sent = broadcast_object_list([own, {"text": "a" * (own + 1)}])
    return {
        "rows": gathered["a"][0].tolist(),
        "nested": gathered["a"][1][0].tolist(),
        "scalars": gathered["b"]["scalar"].tolist(),
        "mean": reduced["scalar"].item(),
        "padded": padded.tolist(),
        "sent": sent,
    }


def test_nested_structures_are_gathered_padded_and_sent_world_wide():
    plain, sharded = plain_and_sharded(gathered_structures, 2)
    for rank, found in enumerate(sharded):
        wanted = plain[rank // 2]
        for name in ("rows", "nested", "scalars"):
            assert found.pop(name) == [item for item in wanted[name] for _ in range(2)], "each replica's twice"
            assert name in wanted
        assert found.items() <= wanted.items()


# --- several models, and the order of preparing ----------------------------------------------------------------------


def two_models(tp, calls):
    """Two models that train on each other's output."""
    accelerator = accelerator_for(tp, MLP_PLAN)
    first, second = build_mlp(seed=1), build_mlp(seed=2)
    optimizers = [torch.optim.AdamW(each.parameters(), lr=0.01) for each in (first, second)]
    if calls == "one":
        first, second, *optimizers = accelerator.prepare(first, second, *optimizers)
    elif calls == "a call for each":
        first, optimizers[0] = accelerator.prepare(first, optimizers[0])
        second, optimizers[1] = accelerator.prepare(second, optimizers[1])
    else:
        first, second = accelerator.prepare(first), accelerator.prepare(second)
        optimizers = list(accelerator.prepare(*optimizers))
    losses = []
    for step in range(4):
        x = inputs(10 * step + replica(accelerator))
        hidden = first(x)
        loss = second(torch.cat([hidden, x[:, 3:]], 1)).square().mean() + hidden.mean()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_([*first.parameters(), *second.parameters()], 0.1)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(loss))
    return losses, full_state_dict(first), full_state_dict(second)


@REPLICAS
@pytest.mark.parametrize("calls", ["one", "a call for each", "models, then optimizers"])
def test_two_models_train_as_under_plain_ddp(calls, dp):
    plain, sharded = plain_and_sharded(two_models, dp, calls)
    for rank, (losses, first, second) in enumerate(sharded):
        wanted = plain[rank // 2]
        assert losses == pytest.approx(wanted[0], rel=TOLERANCE)
        assert_tensors_close(first, wanted[1], 1e-4)
        assert_tensors_close(second, wanted[2], 1e-4)


def ordered(tp, order):
    accelerator = accelerator_for(tp, MLP_PLAN)
    model = build_mlp()
    if order == "model alone, its optimizer later":
        model = accelerator.prepare(model)
        optimizer = accelerator.prepare(torch.optim.AdamW(model.parameters(), lr=0.01))
    elif order == "model alone, an earlier optimizer later":
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        model = accelerator.prepare(model)
        optimizer = accelerator.prepare(optimizer)
    elif order == "optimizer first":
        optimizer = accelerator.prepare(torch.optim.AdamW(model.parameters(), lr=0.01))
        model = accelerator.prepare(model)
    elif order == "optimizer before model in one call":
        optimizer, model = accelerator.prepare(torch.optim.AdamW(model.parameters(), lr=0.01), model)
    elif order == "prepare_model":
        model = accelerator.prepare_model(model)
        optimizer = accelerator.prepare_optimizer(torch.optim.AdamW(model.parameters(), lr=0.01))
    elif order == "evaluation first":
        model = accelerator.prepare_model(model, evaluation_mode=True)
        model.eval()
        with torch.no_grad():
            model(inputs(3))
        model.train()
        optimizer = accelerator.prepare(torch.optim.AdamW(model.parameters(), lr=0.01))
    else:  # one after the other
        former = accelerator.prepare(build_mlp(seed=5))
        accelerator.backward(former(inputs(1)).sum())
        alive = weakref.ref(accelerator.unwrap_model(former))
        (former,) = accelerator.free_memory(former)
        gc.collect()
        assert alive() is None, "the first model is still held"
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        model, optimizer = accelerator.prepare(model, optimizer)
    losses = []
    # Under plain DDP an evaluation model is never wrapped, so replicas are given the same there.
    offset = 0 if order == "evaluation first" else replica(accelerator)
    for step in range(4):
        loss = model(inputs(10 * step + offset)).square().mean()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses, full_state_dict(model)


@REPLICAS
@pytest.mark.parametrize(
    "order",
    [
        "model alone, its optimizer later",
        "model alone, an earlier optimizer later",
        "optimizer first",
        "optimizer before model in one call",
        "prepare_model",
        "evaluation first",
        "one after the other",
    ],
)
def test_any_order_of_preparing_trains_as_under_plain_ddp(order, dp):
    plain, sharded = plain_and_sharded(ordered, dp, order)
    for rank, (losses, weights) in enumerate(sharded):
        wanted, same = plain[rank // 2]
        assert losses == pytest.approx(wanted, rel=TOLERANCE)
        assert_tensors_close(weights, same, 1e-4)


def foreign_optimizer():
    accelerator = accelerator_for(2, MLP_PLAN)
    accelerator.prepare(build_mlp(), torch.optim.SGD(build_mlp().parameters(), lr=0.1))


def test_an_optimizer_of_another_model_is_refused():
    for raised in run_on_ranks(foreign_optimizer, 2, expect_raise=True):
        assert raised.type_name == "ValueError" and "SGD" in raised.message


# --- optimizers ------------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01, eps=1e-5),
    "amsgrad": lambda groups: torch.optim.AdamW(groups, lr=0.01, eps=1e-5, amsgrad=True),
    "foreach": lambda groups: torch.optim.AdamW(groups, lr=0.01, eps=1e-5, foreach=True),
    "fused": lambda groups: torch.optim.AdamW(groups, lr=0.01, eps=1e-5, fused=True),
    "momentum": lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=0.01, eps=1e-3),
    "adagrad": lambda groups: torch.optim.Adagrad(groups, lr=0.01, eps=1e-3),
}


def make_groups(model):
    decayed = [param for param in model.parameters() if param.ndim > 1]
    return [
        {"params": decayed, "weight_decay": 0.1, "name": "decayed"},
        {"params": [param for param in model.parameters() if param.ndim == 1], "lr": 0.02, "weight_decay": 0.0},
    ]


def optimizer_steps(model, optimizer, seeds):
    for seed in seeds:
        model(inputs(seed)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def check_continues(kind, steps_before):
    """Steps in one process, then prepared, against one process all along."""
    model, reference = build_mlp(), build_mlp()
    optimizer, other = (OPTIMIZERS[kind](make_groups(each)) for each in (model, reference))
    optimizer_steps(model, optimizer, range(steps_before))
    params = [id(param) for group in optimizer.param_groups for param in group["params"]]
    options = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    accelerator = accelerator_for(2, MLP_PLAN)
    model, prepared = accelerator.prepare(model, optimizer)
    assert prepared.optimizer is optimizer
    assert [id(param) for group in optimizer.param_groups for param in group["params"]] == params
    assert [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups] == options
    optimizer_steps(model, prepared, range(10, 14))
    optimizer_steps(reference, other, [*range(steps_before), *range(10, 14)])
    assert_tensors_close(full_state_dict(model), reference.state_dict(), 2e-5)
    for param in model.parameters():
        for value in optimizer.state[param].values():
            assert not torch.is_tensor(value) or value.numel() == 1 or value.shape == param.shape


@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_an_optimizer_built_before_prepare_goes_on_as_in_one_process(kind, steps_before, ranks):
    run_on_ranks(check_continues, ranks, kind, steps_before)


def factored_state():
    model = build_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[model.up.weight]["row"] = torch.zeros(model.up.weight.shape[0])
    accelerator_for(2, MLP_PLAN).prepare(model, optimizer)


def test_optimizer_state_that_cannot_be_cut_is_refused():
    for raised in run_on_ranks(factored_state, 2, expect_raise=True):
        assert raised.type_name == "ValueError" and "`row`" in raised.message


FROZEN = {
    "embedding": lambda name: "embed" in name,
    "all but norms": lambda name: "norm" not in name,
    "first layer and embedding": lambda name: "embed" in name or "layers.0." in name,
    "all but one sharded": lambda name: name != "model.layers.0.mlp.down_proj.weight",
    "norms": lambda name: "norm" in name,
}


def frozen_run(tp, which):
    accelerator = accelerator_for(tp)
    model = build_model("qwen3")
    for name, param in model.named_parameters():
        param.requires_grad_(not FROZEN[which](name))
    optimizer = torch.optim.SGD([param for param in model.parameters() if param.requires_grad], lr=0.3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model, optimizer = accelerator.prepare(model, optimizer)
    losses, norms = [], []
    for step in range(3):
        loss = model(**token_batch(10 * step + replica(accelerator))).loss
        accelerator.backward(loss)
        norms.append(float(accelerator.clip_grad_norm_(model.parameters(), 1.0)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    state = full_state_dict(model)
    for name in state:
        assert torch.equal(state[name], before[name]) == FROZEN[which](name), name
    return losses, norms, state


@REPLICAS
@pytest.mark.parametrize("which", FROZEN)
def test_frozen_parameters_stay_and_the_others_train_as_under_plain_ddp(which, dp):
    plain, sharded = plain_and_sharded(frozen_run, dp, which)
    for rank, (losses, norms, state) in enumerate(sharded):
        wanted = plain[rank // 2]
        assert losses == pytest.approx(wanted[0], rel=TOLERANCE)
        assert norms == pytest.approx(wanted[1], rel=TOLERANCE)
        assert_tensors_close(state, wanted[2], 1e-4)


def frozen_model():
    accelerator = accelerator_for(2)
    model = build_model("llama").requires_grad_(False)
    reference = build_model("llama")(**token_batch()).logits
    prepared = accelerator.prepare_model(model, evaluation_mode=True)
    assert prepared is model, "nothing to average"
    return relative_error(prepared(**token_batch()).logits, reference)


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_wholly_frozen_model_computes_rightly(ranks):
    assert max(run_on_ranks(frozen_model, ranks)) < TOLERANCE


# --- saving ----------------------------------------------------------------------------------------------------------


def saved(tp, way, tied, folder, shard_size):
    accelerator = accelerator_for(tp)
    model = accelerator.prepare(build_model("llama", tied=tied))
    unwrapped = accelerator.unwrap_model(model)
    if way == "save_model":
        accelerator.save_model(model, folder, max_shard_size=shard_size)
    elif way == "save_model as pickle":
        accelerator.save_model(model, folder, max_shard_size=shard_size, safe_serialization=False)
    elif way == "save_pretrained":
        unwrapped.save_pretrained(folder, is_main_process=accelerator.is_main_process, max_shard_size=shard_size)
    elif way == "save_pretrained everywhere":
        unwrapped.save_pretrained(folder, max_shard_size=shard_size)
    else:
        unwrapped.save_pretrained(
            folder,
            is_main_process=accelerator.is_main_process,
            save_function=accelerator.save,
            state_dict=accelerator.get_state_dict(model),
            max_shard_size=shard_size,
        )
    accelerator.wait_for_everyone()
    return model(**token_batch()).logits.detach() if tp else None


def saved_after_localizing_by_hand(source, folder):
    accelerator = accelerator_for(2)
    model = shard(build_model("llama"), accelerator.torch_device_mesh["tp"], source)
    model = accelerator.prepare(model)
    accelerator.unwrap_model(model).save_pretrained(folder, is_main_process=accelerator.is_main_process)
    accelerator.wait_for_everyone()


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("source", SOURCES)
def test_a_model_sharded_by_hand_and_then_prepared_saves_full_weights(source, ranks, tmp_path):
    from safetensors.torch import load_file

    run_on_ranks(saved_after_localizing_by_hand, ranks, source, str(tmp_path))
    state, wanted = load_file(tmp_path / "model.safetensors"), build_model("llama").state_dict()
    assert {name: tensor.shape for name, tensor in state.items()} == {n: t.shape for n, t in wanted.items()}
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in state.items())


@pytest.mark.parametrize("shard_size", ["10GB", "60KB"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("way", ["save_model", "save_pretrained", "save_pretrained with state_dict"])
def test_a_saved_model_is_plain_ddps_byte_for_byte_and_loads(way, tied, shard_size, tmp_path):
    from transformers import AutoModelForCausalLM

    run_on_ranks(saved, 2, None, way, tied, str(tmp_path / "plain"), shard_size)
    logits = run_on_ranks(saved, 4, 2, way, tied, str(tmp_path / "sharded"), shard_size)
    plain, sharded = (
        {path.name: path.read_bytes() for path in (tmp_path / which).iterdir()} for which in ("plain", "sharded")
    )
    configs = {"config.json", "generation_config.json"} if way == "save_model" else set()
    assert sharded.keys() - configs == plain.keys()
    assert {name for name in plain if sharded[name] != plain[name]} == set()
    weights = [name for name in sharded if name.endswith(".safetensors")]
    assert (len(weights) > 2) == (shard_size == "60KB")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "sharded")
    wanted = build_model("llama", tied=tied).state_dict()
    assert loaded.state_dict().keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in loaded.state_dict().items())
    assert relative_error(logits[0], loaded(**token_batch()).logits) < TOLERANCE


@pytest.mark.parametrize("way", ["save_model as pickle", "save_pretrained everywhere"])
def test_less_usual_ways_of_saving_write_the_full_weights(way, tmp_path):
    run_on_ranks(saved, 2, 2, way, False, str(tmp_path), "10GB")
    if way == "save_model as pickle":
        state = torch.load(tmp_path / "pytorch_model.bin")
    else:
        from safetensors.torch import load_file

        state = load_file(tmp_path / "model.safetensors")
    wanted = build_model("llama").state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in state.items())


def check_state_dict(tied):
    accelerator = accelerator_for(2)
    model = accelerator.prepare(build_model("llama", tied=tied))
    wanted = build_model("llama", tied=tied).state_dict()
    state = accelerator.get_state_dict(model)
    wrapped = accelerator.get_state_dict(model, unwrap=False)
    of_the_bare_model = accelerator.get_state_dict(accelerator.unwrap_model(model))
    if not accelerator.is_main_process:
        assert state == wrapped == of_the_bare_model == {}
        return
    assert list(state) == list(of_the_bare_model) == list(wanted)
    for name in wanted:
        assert torch.equal(state[name], wanted[name]) and state[name].dtype == wanted[name].dtype
        assert type(state[name]) is torch.Tensor
    same = state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr()
    assert same == tied
    prefix = "module." if isinstance(model, DistributedDataParallel) else ""
    assert list(wrapped) == [prefix + name for name in wanted]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_get_state_dict_is_the_unsharded_models_on_the_main_process_and_empty_elsewhere(tied, ranks):
    run_on_ranks(check_state_dict, ranks, tied)


# --- Trainer ---------------------------------------------------------------------------------------------------------


def trainer_run(tp, folder, evaluate_first):
    from transformers import Trainer, TrainingArguments

    set_seed(0)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, VOCABULARY, (16,), generator=generator) for _ in range(27)]
    data = [{"input_ids": row, "labels": row} for row in rows]
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        max_steps=4,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        learning_rate=1e-3,
        max_grad_norm=0.5,
        parallelism_config=TensorParallelDDPPlugin(tp_size=tp) if tp else None,
    )
    trainer = Trainer(build_model("llama"), arguments, train_dataset=data, eval_dataset=data)
    before = trainer.evaluate()["eval_loss"] if evaluate_first else None
    trainer.train()
    metrics = trainer.evaluate()
    names = ("loss", "grad_norm", "learning_rate")
    logs = [[row[name] for name in names] for row in trainer.state.log_history if "loss" in row]
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    return logs, before, metrics["eval_loss"], {name: tensor.clone() for name, tensor in weights.items()}


@pytest.mark.parametrize("evaluate_first", [False, True], ids=["", "evaluated before"])
@REPLICAS
def test_trainer_logs_what_it_logs_under_plain_ddp(dp, evaluate_first, tmp_path):
    if evaluate_first and dp > 1:
        pytest.skip("plain DDP itself never wraps a model that was evaluated first")
    plain, sharded = plain_and_sharded(trainer_run, dp, str(tmp_path), evaluate_first)
    logs, before, loss, weights = plain[0]
    assert len(logs) == 4
    ours = sharded[0]
    assert [row[2] for row in ours[0]] == [row[2] for row in logs]
    assert torch.allclose(torch.tensor(ours[0]), torch.tensor(logs), rtol=1e-4, atol=0)  # Trainer rounds what it logs
    assert ours[1] == (pytest.approx(before, rel=TOLERANCE) if evaluate_first else None)
    assert ours[2] == pytest.approx(loss, rel=TOLERANCE)
    assert_tensors_close(ours[3], weights, 1e-4)


# --- the plugin ------------------------------------------------------------------------------------------------------


@pytest.fixture
def environment(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("PARALLELISM_CONFIG_", "ACCEL_TP_DDP_")):
            monkeypatch.delenv(name)
    return monkeypatch


def test_plugin_defaults_are_plain_ddp(environment):
    plugin = TensorParallelDDPPlugin()
    assert (plugin.tp_size, plugin.tp_plan, plugin.replica_check_steps) == (1, "auto", 100)
    assert (plugin.loss_parallel, plugin.sequence_parallel) == (False, False)


def test_plugin_reads_what_the_launcher_sets(environment):
    environment.setenv("PARALLELISM_CONFIG_TP_SIZE", "2")
    environment.setenv("PARALLELISM_CONFIG_DP_REPLICATE_SIZE", "3")
    environment.setenv("ACCEL_TP_DDP_PLAN", "plan.yaml")
    environment.setenv("ACCEL_TP_DDP_REPLICA_CHECK_STEPS", "7")
    plugin = TensorParallelDDPPlugin()
    assert (plugin.tp_size, plugin.dp_replicate_size, plugin.tp_plan) == (2, 3, "plan.yaml")
    assert plugin.replica_check_steps == 7


def test_arguments_beat_the_environment(environment):
    environment.setenv("PARALLELISM_CONFIG_TP_SIZE", "2")
    environment.setenv("PARALLELISM_CONFIG_DP_REPLICATE_SIZE", "3")
    environment.setenv("ACCEL_TP_DDP_PLAN", "plan.yaml")
    environment.setenv("ACCEL_TP_DDP_REPLICA_CHECK_STEPS", "7")
    plugin = TensorParallelDDPPlugin(tp_size=4, dp_replicate_size=1, tp_plan={"a": "colwise"}, replica_check_steps=0)
    assert (plugin.tp_size, plugin.dp_replicate_size, plugin.tp_plan) == (4, 1, {"a": "colwise"})
    assert plugin.replica_check_steps == 0


def test_plugin_prints_its_sizes(environment, capsys):
    print(TensorParallelDDPPlugin(tp_size=2))
    print(TensorParallelDDPPlugin(tp_size=2, dp_replicate_size=3, tp_plan={"up": "colwise"}))
    first, second = capsys.readouterr().out.splitlines()
    assert first == "TensorParallelDDPPlugin(tp_size=2, dp_replicate_size=world size / tp_size, tp_plan='auto')"
    assert second == "TensorParallelDDPPlugin(tp_size=2, dp_replicate_size=3, tp_plan={'up': 'colwise'})"
    assert repr(TensorParallelDDPPlugin(tp_size=2)) == first == str(TensorParallelDDPPlugin(tp_size=2))


@pytest.mark.parametrize(
    "name, value",
    [("tp_size", 0), ("tp_size", "two"), ("tp_size", True), ("dp_replicate_size", 0), ("replica_check_steps", -1)]
    + [("loss_parallel", "perhaps"), ("cp_size", 2), ("dp_shard_size", 2), ("loss_parallel", True)],
)
def test_a_value_out_of_range_is_refused_by_name(environment, name, value):
    with pytest.raises(ValueError, match=name):
        TensorParallelDDPPlugin(**{name: value})


def test_an_environment_value_out_of_range_names_its_variable(environment):
    environment.setenv("PARALLELISM_CONFIG_TP_SIZE", "many")
    with pytest.raises(ValueError, match="PARALLELISM_CONFIG_TP_SIZE"):
        TensorParallelDDPPlugin()


def sizes_in_accelerator(variables, options):
    os.environ.update(variables)
    accelerator = Accelerator(parallelism_config=TensorParallelDDPPlugin(**options))
    config = accelerator.parallelism_config
    return config.tp_size, config.dp_replicate_size, repr(config)


@pytest.mark.parametrize(
    "variables, options, sizes",
    [
        ({}, {"tp_size": 2}, (2, 2)),
        ({}, {"tp_size": 4}, (4, 1)),
        ({}, {"tp_size": 2, "dp_replicate_size": 2}, (2, 2)),
        ({"PARALLELISM_CONFIG_TP_SIZE": "2"}, {}, (2, 2)),
        ({"PARALLELISM_CONFIG_TP_SIZE": "2", "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2"}, {}, (2, 2)),
        ({"PARALLELISM_CONFIG_TP_SIZE": "2", "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "1"}, {"tp_size": 4}, (4, 1)),
        ({}, {}, (1, 4)),
    ],
    ids=str,
)
def test_replicas_follow_from_the_world_size(variables, options, sizes):
    for tp, dp, text in run_on_ranks(sizes_in_accelerator, 4, variables, options):
        assert (tp, dp) == sizes
        assert f"tp_size={tp}" in text and (f"dp_replicate_size={dp}" in text or "world size" in text)


@pytest.mark.parametrize("options", [{"tp_size": 3}, {"tp_size": 2, "dp_replicate_size": 3}], ids=str)
def test_sizes_that_do_not_fit_the_world_are_refused(options):
    for raised in run_on_ranks(sizes_in_accelerator, 4, {}, options, expect_raise=True):
        assert raised.type_name == "ValueError" and "tp_size" in raised.message and "4" in raised.message


# --- what stays as it was --------------------------------------------------------------------------------------------

IMPORT_TWICE = """
    import inspect, json, sys
    import torch, torch.distributed.tensor.parallel, torch.nn.utils, torch.optim, torch.amp
    import accelerate, accelerate.accelerator, accelerate.data_loader, accelerate.optimizer, accelerate.scheduler
    import accelerate.parallelism_config, accelerate.state, accelerate.utils.operations
    import transformers, transformers.trainer, transformers.modeling_utils, transformers.training_args
    import transformers.models.llama.modeling_llama

    def members():
        found = {}
        for module in [
            accelerate, accelerate.accelerator, accelerate.data_loader, accelerate.optimizer, accelerate.scheduler,
            accelerate.parallelism_config, accelerate.state, accelerate.utils, accelerate.utils.operations,
            torch, torch.distributed, torch.distributed.distributed_c10d, torch.nn, torch.nn.utils,
            torch.nn.functional, torch.optim, torch.distributed.tensor, torch.distributed.tensor.parallel,
            torch.nn.parallel, torch.amp, torch.autograd,
            transformers.trainer, transformers.modeling_utils, transformers.training_args,
            transformers.models.llama.modeling_llama,
        ]:
            for name, value in list(vars(module).items()):
                found[module.__name__, name] = id(value)
                if inspect.isclass(value):
                    for key, member in list(vars(value).items()):
                        if not key.startswith("__abc") and key not in ("_abc_impl", "__dict__", "__weakref__"):
                            found[module.__name__, name, key] = id(member)
        return found

    before = members()
    assert ("accelerate.accelerator", "Accelerator", "prepare") in before
    assert ("torch.nn", "Module", "__call__") in before
    assert ("transformers.trainer", "Trainer", "train") in before
    environment = dict(__import__("os").environ)
    import accel_tp_ddp
    from accel_tp_ddp import TensorParallelDDPPlugin
    after = members()
    changed = [key for key in before if after.get(key) != before[key]]
    added = [key for key in after if key not in before]
    print(json.dumps({"changed": changed, "added": added,
                      "environment": environment == dict(__import__("os").environ), "members": len(before)}))
"""


def test_importing_the_package_changes_nothing_elsewhere():
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(IMPORT_TWICE)], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["members"] > 3000 and found["environment"]
    assert found["changed"] == []
    # What importing a submodule binds in its parent is a lazy import, not a change.
    assert [key for key in found["added"] if len(key) > 2] == []


def overrides(tp):
    accelerator = accelerator_for(tp)
    return sorted(name for name in vars(accelerator) if callable(getattr(type(accelerator), name, None)))


def test_only_an_accelerator_with_the_plugin_has_methods_of_its_own():
    assert run_on_ranks(overrides, 2, None) == [[]] * 2
    # For states that were saved at another tp_size, or in the background.
    assert run_on_ranks(overrides, 2, 1) == [["end_training", "load_state", "save_state"]] * 2
    assert run_on_ranks(overrides, 2, 2) == [sorted(_Hooks.REPLACED)] * 2


def two_accelerators():
    """Beside a hooked accelerator, one without the plugin is not hooked."""
    from accelerate.state import AcceleratorState

    accelerator_for(2)
    AcceleratorState._reset_state()
    other = Accelerator()
    model = other.prepare(build_mlp())
    return sorted(name for name in vars(other) if name in _Hooks.REPLACED), dist.get_process_group_ranks(
        model.process_group
    )


def test_an_accelerator_without_the_plugin_stays_plain_after_one_with_it():
    assert run_on_ranks(two_accelerators, 2) == [([], [0, 1])] * 2


def untouched_model():
    accelerator = accelerator_for(1)
    model = build_model("llama")
    before = {name: id(module.forward.__func__) for name, module in model.named_modules()}
    prepared = accelerator.prepare(model)
    assert isinstance(prepared, DistributedDataParallel)
    assert {name: id(module.forward.__func__) for name, module in model.named_modules()} == before
    for module in model.modules():
        assert not module._forward_pre_hooks and not module._forward_hooks and "forward" not in vars(module)
    assert not any(hasattr(param, "tp_shard") for param in model.parameters())
    return sorted(vars(model).keys() & {"save_pretrained", "forward"})


def test_tp_size_one_touches_no_module():
    assert run_on_ranks(untouched_model, 2) == [[]] * 2


@REPLICAS
def test_tp_size_one_is_plain_ddp_bit_for_bit(dp):
    plain, sized = run_on_ranks(train, dp, Spec("llama")), run_on_ranks(train, dp, Spec("llama", tp=1))
    assert set(differences(sized, plain).values()) == {0.0}
