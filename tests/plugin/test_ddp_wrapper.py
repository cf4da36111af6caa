"""Prepared models are wrapped in DDP over the replicas, whose options and hooks do what they do under plain DDP."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from accelerate.utils import DDPCommunicationHookType, DistributedDataParallelKwargs
from torch import nn
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

from accel_tp_ddp import full_state_dict
from accel_tp_ddp.training.drift import checksum

from ..helpers.compare import assert_tensors_close, relative_error
from ..helpers.models import build_model
from ..helpers.prepared import inputs, plain_and_sharded, replica
from ..helpers.ranks import run_on_ranks
from ..helpers.sharded import (
    MLP_PLAN,
    TOLERANCE,
    accelerator_for,
    assert_gradients_close,
    build_mlp,
    full_gradients_of,
    token_batch,
)


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
        assert (rank["processes"], rank["tp_size"]) == (2, 1)
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
    model.counter.fill_(dist.get_rank())
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


# --- bucket views ----------------------------------------------------------------------------------------------------


def steps_in_views(tp, options, optimizer, set_to_none=True):
    """Two steps of two micro-batches each: gradients, what hooks have seen, and what of DDP's can be counted."""
    handlers = [] if options is None else [DistributedDataParallelKwargs(**options)]
    accelerator = accelerator_for(tp, MLP_PLAN, kwargs_handlers=handlers, gradient_accumulation_steps=2)
    model = build_mlp()
    if optimizer == "Muon":
        made = torch.optim.Muon([param for param in model.parameters() if param.ndim == 2], lr=0.1)
    else:
        made = torch.optim.AdamW(model.parameters(), lr=0.1)
    wrapped, prepared = accelerator.prepare(model, made)
    seen = []
    for name, param in model.named_parameters():
        param.register_hook(lambda grad, name=name: seen.append((name, "hook")))
        param.register_post_accumulate_grad_hook(lambda param, name=name: seen.append((name, "accumulated")))
    grads, counts = [], []
    for step in range(4):
        with CommDebugMode() as mode:
            with accelerator.accumulate(wrapped):
                loss = wrapped(inputs(10 * step + replica(accelerator))).square().mean()
                accelerator.backward(loss)
                counts.append({op.__name__: count for op, count in mode.get_comm_counts().items()})
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(wrapped.parameters(), 0.5)
                    grads.append(full_gradients_of(wrapped))
                prepared.step()
                prepared.zero_grad(set_to_none=set_to_none)
    accelerator.backward(wrapped(inputs(7)).square().mean())
    buckets = [int(size) for size in wrapped._get_ddp_logging_data()["rebuilt_bucket_sizes"].split(", ")]
    return {
        "grads": [*grads, full_state_dict(wrapped)],
        "seen": sorted(seen),
        "counts": counts,
        "views": wrapped.gradient_as_bucket_view,
        "storages": len({p.grad.untyped_storage().data_ptr() for p in wrapped.parameters()}),
        "buckets": buckets,
    }


@pytest.mark.parametrize("optimizer, set_to_none", [("AdamW", True), ("AdamW", False), ("Muon", True)])
def test_gradients_are_views_of_the_buckets_and_nothing_else_changes(optimizer, set_to_none):
    plain = run_on_ranks(steps_in_views, 2, None, None, optimizer, set_to_none)
    without = run_on_ranks(steps_in_views, 4, 2, {}, optimizer, set_to_none)
    views = run_on_ranks(steps_in_views, 4, 2, None, optimizer, set_to_none)
    for rank, (own, other) in enumerate(zip(views, without)):
        assert own["views"] and not other["views"] and not plain[rank // 2]["views"]
        assert own["storages"] == len(own["buckets"]) < other["storages"]
        assert own["counts"] == other["counts"]  # of collectives, with and without
        assert own["seen"] == other["seen"] == plain[rank // 2]["seen"]
        for got, same, expected in zip(own["grads"], other["grads"], plain[rank // 2]["grads"], strict=True):
            assert_tensors_close(got, same, 0.0)
            assert_gradients_close(got, expected)
