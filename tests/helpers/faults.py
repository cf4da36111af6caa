"""Wrong answers of the kinds that tensor parallelism invites, to be injected into the package on a rank.

    with injected("local clip norm"): ...

A test that passes with one of them in place has no teeth. Nothing here makes a run fail by itself: each fault gives
losses, weights and norms that look like any other's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from importlib import import_module
from typing import Any
from unittest import mock

import accelerate.accelerator
import accelerate.scheduler
import torch
import torch.distributed as dist
from torch import Tensor

from accel_tp_ddp.checkpoint import dcp, deferred, load, state
from accel_tp_ddp.core import collectives, randomness, serving
from accel_tp_ddp.core.layout import Layout, chunk_ranges
from accel_tp_ddp.core.shard import ShardInfo, shard_info
from accel_tp_ddp.model import apply, generation, methods
from accel_tp_ddp.model.dtensor import _ReconstructHook
from accel_tp_ddp.plans import plan
from accel_tp_ddp.plugin import accelerator, ddp, replica_view
from accel_tp_ddp.styles import (
    around,
    base,
    embedding,
    experts,
    forward,
    fused_qkv,
    latent_attention,
    linear,
    packed,
    region,
    replicated,
)
from accel_tp_ddp.styles.peft import experts as peft_experts
from accel_tp_ddp.styles.peft import lora
from accel_tp_ddp.training import drift, gradients, zero1

from .training import Record, Spec, train


@contextmanager
def injected(fault: str | None) -> Iterator[None]:
    """Run with `fault` in the package; with None, as it is."""
    with ExitStack() as stack:
        every = {
            **{**_FAULTS, **_MORE_FAULTS, **_STYLE_FAULTS, **_LORA_FAULTS, **_ADAPTER_FAULTS},
            **{**_STEP_FAULTS, **_RESUME_FAULTS, **_ENCODER_FAULTS, **_CURATED_FAULTS, **_EXPORT_FAULTS},
            **_ZERO1_FAULTS,
        }
        for owner, name, wrong in every[fault] if fault else ():
            stack.enter_context(mock.patch.object(owner, name, wrong))
        yield


def train_with(fault: str | None, spec: Spec) -> Record:
    with injected(fault):
        return train(spec)


def _over_the_world(self: ddp._OverReplicas) -> dict[str, Any]:
    return {**self.handler.to_kwargs(), "init_sync": False}  # or the start would be wrong already


def _unclipped(parameters: Any, max_norm: float, norm_type: float = 2) -> Tensor:
    return gradients.full_grad_norm(list(parameters), norm_type)


def _norm_counting_replicated_by_rank(parameters: Any, *args: Any) -> Tensor:
    parameters = [p for p in parameters if p.grad is not None]
    mesh = next(info.mesh for p in parameters if (info := shard_info(p)) is not None)
    total = torch.stack([p.grad.square().sum() for p in parameters]).sum()
    dist.all_reduce(total, group=mesh.get_group())
    return total.sqrt()


def _bias_on_every_rank(self: linear.Rowwise, call: forward.ParallelForward, input: Tensor) -> Tensor:
    call.region.leave()
    return collectives.reduce_from_tp(call.mesh, call.inner(input))


def _unmasked_lookup(self: embedding.EmbeddingRowwise, call: forward.ParallelForward, input: Tensor) -> Tensor:
    ((start, stop),) = call.shards["weight"].layout.ranges[call.mesh.get_local_rank()]
    elsewhere = (input < start) | (input >= stop)
    return collectives.reduce_from_tp(call.mesh, call.inner((input - start).masked_fill(elsewhere, 0)))


def _sum_what_has_accumulated(self: Any, module: torch.nn.Module, region: region.Region, *args: Any) -> None:
    group = region.mesh.get_group()
    for param in module.parameters():
        param.register_post_accumulate_grad_hook(lambda p: dist.all_reduce(p.grad, group=group))


def _mean(mesh: Any, tensors: Any, first_as_view: bool = False) -> list[Tensor | None]:
    return [None if t is None else collectives._all_reduce(mesh, t) / mesh.size() for t in tensors]


def _mean_of_one(mesh: Any, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    return tuple(_mean(mesh, grads))


@staticmethod
def _sum_then_slice(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    summed = collectives._all_reduce(ctx.mesh, grad)
    return None, collectives._own_slice(ctx.mesh, summed, ctx.dim, ctx.sizes), None, None


def _reduce_with_a_summed_gradient(mesh: Any, tensor: Tensor, fresh: bool = False) -> Tensor:
    return _reduce_from_tp(mesh, *collectives.copy_to_tp(mesh, tensor))


def _reduce_into_a_copy(mesh: Any, tensor: Tensor, fresh: bool = False) -> Tensor:
    return _reduce_from_tp(mesh, tensor)


def _not_copied(mesh: Any, *tensors: Tensor, shared: Any = ()) -> tuple[Tensor, ...]:
    return tensors


def _first_copied(mesh: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
    return *collectives.copy_to_tp(mesh, tensors[0]), *tensors[1:]


def _heads_in_reverse(self: linear.Colwise, site: Any, name: str) -> Layout:
    layout = _bare_layout(self, site, name)
    return Layout(layout.dim, layout.ranges[::-1])


def _heads_of_another_rank(self: embedding.EmbeddingHeads, site: Any) -> dict[str, Layout]:
    layouts = _own_heads(self, site)
    return {name: Layout(layout.dim, layout.ranges[::-1]) for name, layout in layouts.items()}


def _by_rank(*args: Any, **kwargs: Any) -> Any:
    counts = {"num_processes": dist.get_world_size(), "process_index": dist.get_rank()}
    return _prepare_data_loader(*args, **{**kwargs, **counts})


def _among_ranks(self: replica_view._AmongReplicas, name: str) -> Any:
    return _gathered_over_the_world if name == "all_gather" else _among_replicas(self, name)


def _gathered_over_the_world(outputs: list[Tensor], tensor: Tensor) -> None:
    everyone = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, tensor)
    for output, found in zip(outputs, everyone):
        output.copy_(found)


class _Ranks:
    num_processes = property(lambda self: dist.get_world_size())


def _dropped_sum(mesh: Any, tensor: Tensor) -> Tensor:
    result = tensor.clone()  # which keeps the strides, so that `contiguous` makes another copy
    dist.all_reduce(result.contiguous(), group=mesh.get_group())
    return result


def _sum_over_the_world(mesh: Any, tensor: Tensor) -> Tensor:
    result = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(result)
    return result


def _with_its_padding(mesh: Any, tensor: Tensor, dim: int, sizes: tuple[int, ...]) -> Tensor:
    padding = list(tensor.shape)
    padding[dim] = max(sizes) - tensor.size(dim)
    tensor = torch.cat([tensor, tensor.new_zeros(padding)], dim).contiguous()
    parts = [torch.empty_like(tensor) for _ in sizes]
    dist.all_gather(parts, tensor, group=mesh.get_group())
    return torch.cat(parts, dim)


def _untie(self: Any, site: Any, region: Any) -> None:
    for name in self.layouts(site):
        param = site.module._parameters[name]
        if getattr(param, "tp_shard", None) is not None:
            copy = torch.nn.Parameter(param.detach().clone())
            copy.tp_shard = param.tp_shard
            site.module._parameters[name] = copy
    _apply(self, site, region)


def _matrices_only(parameters: Any, *args: Any, **kwargs: Any) -> Tensor:
    parameters = [p for p in parameters if p.ndim > 1 or getattr(p, "tp_shard", None) is None]
    return _full_grad_norm(parameters, *args, **kwargs)


def _of_every_rank(self: accelerate.Accelerator, tensor: Tensor) -> Tensor:
    return _gather(self, tensor).repeat_interleave(self.torch_device_mesh["tp"].size())


def _heads_as_they_were(self: packed.PackedQKVColwise, site: Any, region: Any) -> None:
    linear.Colwise.apply(self, site, region)


def _global_padding_idx(module: Any, start: int, stop: int) -> Any:
    return nullcontext()


class _NoStream:
    def __init__(self, index: int, device_type: str):
        pass

    def enter(self) -> None:
        pass

    leave = enter


class _StreamThatGoesOn(randomness.RandomStream):
    """Starts once and not from where the stream around it stands."""

    def enter(self) -> None:
        if self._around is None:
            self._around = (torch.get_rng_state(), None)
            torch.set_rng_state(self.kept) if hasattr(self, "kept") else torch.manual_seed(self.own % (1 << 63))

    def leave(self) -> None:
        if self._around is not None:
            self.kept = torch.get_rng_state()
            super().leave()


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass


_reduce_from_tp = collectives.reduce_from_tp
_bare_layout = linear.Colwise.bare_layout
_own_heads = embedding.EmbeddingHeads.layouts
_apply = base.Style.apply
_parallelize = import_module("accel_tp_ddp.model.parallelize")
_full_grad_norm = gradients.full_grad_norm
_gather = accelerate.Accelerator.gather
_among_replicas = replica_view._AmongReplicas.__getattr__
_prepare_data_loader = accelerate.accelerator.prepare_data_loader
_FAULTS: dict[str, list[tuple[Any, str, Any]]] = {
    "local clip norm": [(accelerator, "clip_grad_norm_", torch.nn.utils.clip_grad_norm_)],
    "norm without clipping": [(accelerator, "clip_grad_norm_", _unclipped)],
    "replicated parameters counted by every rank": [(gradients, "full_grad_norm", _norm_counting_replicated_by_rank)],
    "DDP over the world": [(ddp._OverReplicas, "to_kwargs", _over_the_world)],
    "row bias on every rank": [(linear.Rowwise, "forward", _bias_on_every_rank)],
    "partial gradients not summed": [(forward.ParallelForward, "partial_names", lambda self: [])],
    "partial gradients summed again": [
        (replicated.ReplicatedWithGradAllReduce, "install", _sum_what_has_accumulated),
    ],
    "copy without its backward": [(region, "copy_to_tp", _not_copied)],
    "copy with a mean for its sum": [
        (collectives, "_all_reduce_together", _mean),
        (collectives, "_sum_gradient", _mean_of_one),
    ],
    "gather with a sum in its backward": [(collectives._GatherFromTP, "backward", _sum_then_slice)],
    "reduce with a sum in its backward": [(linear, "reduce_from_tp", _reduce_with_a_summed_gradient)],
    "packed weights cut as one": [
        (packed, "packed_ranges", lambda sections, parts, copies=(): chunk_ranges(sum(sections), parts)),
    ],
    "lookup not masked": [(embedding.EmbeddingRowwise, "forward", _unmasked_lookup)],
    "scheduler steps for every process": [(accelerate.scheduler, "AcceleratorState", _Ranks)],
    "metrics with duplicates": [(replica_view._AmongReplicas, "__getattr__", _among_ranks)],
    "peers on different batches": [
        (accelerate.accelerator, "prepare_data_loader", _by_rank),
        (accelerator, "watch_batches", lambda *args: None),  # which would raise
    ],
    "shared heads counted by every rank": [(ShardInfo, "counted", lambda self, local: [local])],
}
# Those that a plain training run does not meet, or does not show; each is tried where it can be seen.
_MORE_FAULTS: dict[str, list[tuple[Any, str, Any]]] = {
    # Without the guard too, whose broadcast before each step would wait for the rank that skips it.
    "overflow on one rank": [
        (accelerator._Hooks, "_agree_on_overflow", _nothing),
        (drift.DriftGuard, "agree_on_gradients", _nothing),
    ],
    "parameters left as DTensors after a forward": [(_ReconstructHook, "localize", _nothing)],
    "parameters never localized": [(_parallelize, "localize_with_map", lambda model, keep=None: {})],
    "bare parameters left out of the norm": [(gradients, "full_grad_norm", _matrices_only)],
    "replicated gradients not agreed on": [(drift.DriftGuard, "agree_on_gradients", _nothing)],
    "drift not looked for": [(drift.DriftGuard, "compare", _nothing)],
    "sum into a copy that is dropped": [(collectives, "_all_reduce", _dropped_sum)],
    "sum over all meshes": [
        (collectives, "_all_reduce", _sum_over_the_world),
        (linear, "reduce_from_tp", _reduce_into_a_copy),
    ],
    "padding kept in a gather": [(collectives, "gather_whole", _with_its_padding)],
    "head counts of the whole model": [
        (linear, "show_local_heads", _nothing),
        (packed.PackedQKVColwise, "apply", _heads_as_they_were),
    ],
    "tied weights untied": [(base.Style, "apply", _untie)],
    "counts of every rank": [(accelerate.Accelerator, "gather", _of_every_rank)],
    "flos of every rank": [(replica_view, "MODULES", replica_view.MODULES[:1])],
    "ranks that count themselves": [(replica_view, "_count", _nothing)],
    "shuffles and dispatching without replicas": [(accelerator, "serve_replicas", lambda loader, mesh: loader)],
    "one random stream for all heads": [(region, "RandomStream", _NoStream)],
    "random streams by process": [
        (accelerator, "draw_by_replica", _nothing),
        (accelerator, "agree_as_processes", _nothing),
    ],
    "random streams that go on": [(region, "RandomStream", _StreamThatGoesOn)],
    "optimizer left behind": [(accelerator, "follow_model", _nothing), (accelerator, "take_full_state", _nothing)],
    "a plan that shards nothing": [(plan, "refuse_empty", _nothing)],
    "padding row by its number in the whole": [(embedding, "local_padding_idx", _global_padding_idx)],
    "initialisation of each part by itself": [(methods, "INITIALIZING", ())],
    "parts of another step are sent": [
        (serving._Service, "_differs", lambda self, ranks, wanted: None),
        (serving._Model, "version", lambda self, number: "the same"),
    ],
    "generation draws by itself": [(generation, "agree_on_randomness", _nothing)],
}
FAULTS = tuple(_FAULTS)
MORE_FAULTS = tuple(_MORE_FAULTS)

# Those of single styles, which show in the gradients of one backward pass.
_STYLE_FAULTS: dict[str, list[tuple[Any, str, Any]]] = {
    "shared rotary keys not summed": [(latent_attention, "copy_to_tp", _not_copied)],
    "shared heads not summed": [
        (
            forward.ParallelForward,
            "is_partial",
            lambda self, name: name not in self.shards and self.style.partial_gradients,
        )
    ],
    "shared heads summed over all ranks": [(forward.ParallelForward, "shared", lambda self, name: None)],
    # Queries too, which no other rank has.
    "shared sections summed as a whole": [(forward.ParallelForward, "shared", lambda self, name: None)],
    "sinks of other heads": [(linear.Colwise, "bare_layout", _heads_in_reverse)],
    "expert bias on every rank": [(experts, "add_share", lambda mesh, tensor: tensor)],
    "expert bias with a divided gradient": [(experts, "add_share", lambda mesh, tensor: tensor / mesh.size())],
    "experts' input gradients not summed": [(experts, "copy_to_tp", _not_copied)],
    "routing weights' gradients not summed": [(experts, "copy_to_tp", _first_copied)],
    "identity expert on every rank": [
        (experts.IdentityExpert, "forward", lambda self, call, *args: call.inner(*args)),
    ],
    "cached head counts left as they were": [(linear, "show_local_heads", _nothing)],
}
STYLE_FAULTS = tuple(_STYLE_FAULTS)

# Shown by styles/test_lora.py.
_LORA_FAULTS: dict[str, list[tuple[Any, str, Any]]] = {
    "LoRA A not summed": [(lora.PartialAdapter, "forward", lambda self, call, input: call.inner(input))],
    "LoRA A drawn by each rank": [
        (apply, "send_first_rank", _nothing),
        (drift.DriftGuard, "agree_on_gradients", lambda self, optimizer: None),
    ],
}
LORA_FAULTS = tuple(_LORA_FAULTS)


def _unsummed_magnitude(self, call, input, **kwargs):
    return call.inner(input, **kwargs) if kwargs else _partial_forward(self, call, input)


def _norm_of_a_part(self, weight, lora_weight, scaling, adapter_name=None):
    return torch.linalg.norm((weight + scaling * lora_weight).detach(), dim=1)


_partial_forward = lora.PartialAdapter.forward
# Those of what plain LoRA does not have, which show in the gradients of one backward pass, in styles/test_lora.py.
_ADAPTER_FAULTS: dict[str, list[tuple[Any, str, Any]]] = {
    "DoRA's norms of parts": [(lora.WeightNorm, "__call__", _norm_of_a_part)],
    "DoRA's magnitudes not summed": [(lora.PartialAdapter, "forward", _unsummed_magnitude)],
    "experts' factors not summed": [
        (peft_experts.ExpertsLora, "forward", lambda self, call, *args, **kwargs: call.inner(*args, **kwargs)),
    ],
}
ADAPTER_FAULTS = tuple(_ADAPTER_FAULTS)


def _state_of_the_first_peer(value: Tensor, info: ShardInfo | None) -> dcp.Part:
    with mock.patch.object(dcp, "own_ranges", lambda info: info.layout.ranges[0]):
        return dcp.Part(value, info)


# Shown by training/test_full_tensor_step.py.
_STEP_FAULTS: dict[str, list[tuple[Any, str, Any]]] = {
    "matrices stepped on by parts": [(accelerator, "FullTensorStep", _nothing)],
}
STEP_FAULTS = tuple(_STEP_FAULTS)

# Shown by training/test_zero1.py.
_ZERO1_FAULTS: dict[str, list[tuple[Any, str, Any]]] = {
    "ranges not gathered": [(zero1._Rows, "gather", _nothing)],
}

# These show when a run is resumed; the tests of `checkpoint/test_checkpoint.py` inject them.
_RESUME_FAULTS: dict[str, list[tuple[Any, str, Any]]] = {
    "optimizer state of the first peer": [(state, "state_part", _state_of_the_first_peer)],
    "random states not loaded": [(load._Sharded, "random_state_of", lambda self: -1)],
    "random states of the first rank": [(load._Sharded, "random_state_of", lambda self: 0)],
    "scheduler not loaded": [(accelerate.scheduler.AcceleratedScheduler, "load_state_dict", lambda self, state: None)],
}
RESUME_FAULTS = tuple(_RESUME_FAULTS)

# Shown by plans/test_encoder_plans.py.
_ENCODER_FAULTS: dict[str, list[tuple[Any, str, Any]]] = {
    "position bias of other heads": [(embedding.EmbeddingHeads, "layouts", _heads_of_another_rank)],
    "a dropout mask a rank for what is replicated": [
        (replicated.ReplicatedDropout, "forward", lambda self, call, input: call.inner(input)),
    ],
}


def _heads_of_the_first_rank(mesh: Any, tensor: Tensor, dim: int, count: int) -> Tensor:
    return tensor.narrow(dim, 0, count)


def _as_on_the_first_rank(forward: Callable) -> Callable:
    def wrong(self: Any, call: forward.ParallelForward, *args: Any) -> Any:
        with mock.patch.object(type(call.mesh), "get_local_rank", lambda mesh: 0):
            return forward(self, call, *args)

    return wrong


# Of the styles that plans of this package name; `plans/test_curated_plans.py` injects them.
_CURATED_FAULTS: dict[str, list[tuple[Any, str, Any]]] = {
    "bias kept in a row-parallel layer": [(linear, "no_bias", lambda call: call.held("bias"))],
    "biases of other heads": [(around, "heads_of_this_rank", _heads_of_the_first_rank)],
    "norms of other heads": [(around.LocalModules, "forward", _as_on_the_first_rank(around.LocalModules.forward))],
    "gradients of a list of norms not summed": [(around, "copy_to_tp", _not_copied)],
    "gathered keys without their gradients' sum": [(fused_qkv, "copy_to_tp", _not_copied)],
    "keys of another group": [
        (fused_qkv.GroupedQKVColwise, "forward", _as_on_the_first_rank(fused_qkv.GroupedQKVColwise.forward)),
    ],
    "input sections cut as one": [(packed.PackedRowwise, "input_layout", linear.Rowwise.input_layout)],
}
CURATED_FAULTS = tuple(_CURATED_FAULTS)


def _joined_as_they_came(self: ShardInfo, local: Tensor, ask: Callable[[], None]) -> Tensor:
    full = _collect(self, local, ask)
    return full.roll(1, self.layout.dim) if len(self.layout.ranges[0]) > 1 else full


def _storage_of_its_own(self: deferred.DeferredTensor) -> Any:
    return mock.Mock(data_ptr=lambda: id(self), nbytes=lambda: self.numel() * self.element_size())


_collect = ShardInfo.collect
# These show in the files of an export; the tests of `checkpoint/test_export.py` inject them.
_EXPORT_FAULTS: dict[str, list[tuple[Any, str, Any]]] = {
    "conversions see this rank's shapes": [(methods, "_full_parameters", lambda model: nullcontext())],
    "parts joined in the order they came": [(ShardInfo, "collect", _joined_as_they_came)],
    "every view a storage of its own": [(deferred.DeferredTensor, "untyped_storage", _storage_of_its_own)],
}
