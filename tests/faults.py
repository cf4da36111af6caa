"""Wrong answers of the kinds that tensor parallelism invites, to be injected into the package on a rank.

    with injected("local clip norm"): ...

A test that passes with one of them in place has no teeth. Nothing here makes a run fail by itself: each fault gives
losses, weights and norms that look like any other's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import accelerate.accelerator
import accelerate.scheduler
import torch
import torch.distributed as dist
from torch import Tensor

from accel_tp_ddp import collectives, gradients, prepare, region
from accel_tp_ddp.checkpoint import load, objects, tensors
from accel_tp_ddp.shard import chunk_ranges, shard_info
from accel_tp_ddp.styles import embedding, linear, packed, replicated

from .training import Record, Spec, train


@contextmanager
def injected(fault: str | None) -> Iterator[None]:
    """Run with `fault` in the package; with None, as it is."""
    with ExitStack() as stack:
        for owner, name, wrong in {**_FAULTS, **_RESUME_FAULTS}[fault] if fault else ():
            stack.enter_context(mock.patch.object(owner, name, wrong))
        yield


def train_with(fault: str | None, spec: Spec) -> Record:
    with injected(fault):
        return train(spec)


def _over_the_world(self: prepare._OverReplicas) -> dict[str, Any]:
    return {**self.handler.to_kwargs(), "init_sync": False}  # or the start would be wrong already


def _unclipped(parameters: Any, max_norm: float, norm_type: float = 2) -> Tensor:
    return gradients.full_grad_norm(list(parameters), norm_type)


def _norm_counting_replicated_by_rank(parameters: Any, *args: Any) -> Tensor:
    parameters = [p for p in parameters if p.grad is not None]
    mesh = next(info.mesh for p in parameters if (info := shard_info(p)) is not None)
    total = torch.stack([p.grad.square().sum() for p in parameters]).sum()
    dist.all_reduce(total, group=mesh.get_group())
    return total.sqrt()


def _bias_on_every_rank(self: linear.Rowwise, call: region.ParallelForward, input: Tensor) -> Tensor:
    call.region.leave()
    return collectives.reduce_from_tp(call.mesh, call.inner(input))


def _unmasked_lookup(self: embedding.EmbeddingRowwise, call: region.ParallelForward, input: Tensor) -> Tensor:
    ((start, stop),) = call.shards["weight"].layout.ranges[call.mesh.get_local_rank()]
    elsewhere = (input < start) | (input >= stop)
    return collectives.reduce_from_tp(call.mesh, call.inner((input - start).masked_fill(elsewhere, 0)))


def _sum_what_has_accumulated(self: Any, module: torch.nn.Module, region: region.Region, shards: dict) -> None:
    group = region.mesh.get_group()
    for param in module.parameters():
        param.register_post_accumulate_grad_hook(lambda p: dist.all_reduce(p.grad, group=group))


def _mean(mesh: Any, tensors: Any) -> list[Tensor | None]:
    return [None if t is None else collectives._all_reduce(mesh, t) / mesh.size() for t in tensors]


@staticmethod
def _sum_then_slice(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    summed = collectives._all_reduce(ctx.mesh, grad)
    return None, collectives._own_slice(ctx.mesh, summed, ctx.dim, ctx.sizes), None, None


def _reduce_with_a_summed_gradient(mesh: Any, tensor: Tensor) -> Tensor:
    return _reduce_from_tp(mesh, *collectives.copy_to_tp(mesh, tensor))


def _without_the_mesh(*args: Any, **kwargs: Any) -> Any:
    return _prepare_data_loader(*args, **{**kwargs, "torch_device_mesh": None})


def _stock(name: str) -> Callable:
    return lambda self, *args, **kwargs: self.stock[name](*args, **kwargs)


_reduce_from_tp = collectives.reduce_from_tp
_prepare_data_loader = accelerate.accelerator.prepare_data_loader
_FAULTS: dict[str, list[tuple[Any, str, Any]]] = {
    "local clip norm": [(prepare, "clip_grad_norm_", torch.nn.utils.clip_grad_norm_)],
    "norm without clipping": [(prepare, "clip_grad_norm_", _unclipped)],
    "replicated parameters counted by every rank": [(gradients, "full_grad_norm", _norm_counting_replicated_by_rank)],
    "DDP over the world": [(prepare._OverReplicas, "to_kwargs", _over_the_world)],
    "row bias on every rank": [(linear.Rowwise, "forward", _bias_on_every_rank)],
    "partial gradients not summed": [(region.ParallelForward, "partial_names", lambda self: [])],
    "partial gradients summed again": [
        (replicated.ReplicatedWithGradAllReduce, "install", _sum_what_has_accumulated),
    ],
    "copy without its backward": [(region, "copy_to_tp", lambda mesh, *tensors: tensors)],
    "copy with a mean for its sum": [(collectives, "_all_reduce_together", _mean)],
    "gather with a sum in its backward": [(collectives._GatherFromTP, "backward", _sum_then_slice)],
    "reduce with a sum in its backward": [(linear, "reduce_from_tp", _reduce_with_a_summed_gradient)],
    "packed weights cut as one": [
        (packed, "packed_ranges", lambda sections, parts: chunk_ranges(sum(sections), parts)),
    ],
    "lookup not masked": [(embedding.EmbeddingRowwise, "forward", _unmasked_lookup)],
    "scheduler steps for every process": [(prepare._Hooks, "prepare_scheduler", _stock("prepare_scheduler"))],
    "metrics with duplicates": [(prepare._Hooks, "gather_for_metrics", _stock("gather_for_metrics"))],
    "peers on different batches": [
        (accelerate.accelerator, "prepare_data_loader", _without_the_mesh),
        (prepare, "watch_batches", lambda *args: None),  # which would raise
    ],
}
FAULTS = tuple(_FAULTS)


def _state_of_the_first_peer(value: Tensor, param: torch.nn.Parameter) -> tensors.Part:
    with mock.patch.object(tensors, "own_ranges", lambda info: info.layout.ranges[0]):
        return tensors.Part(value, shard_info(param))


# These show when a run is resumed; the tests of `test_checkpoint.py` inject them.
_RESUME_FAULTS: dict[str, list[tuple[Any, str, Any]]] = {
    "optimizer state of the first peer": [(objects, "state_part", _state_of_the_first_peer)],
    "random states not loaded": [(load._Sharded, "random_state_of", lambda self: -1)],
    "random states of the first rank": [(load._Sharded, "random_state_of", lambda self: 0)],
    "scheduler not loaded": [(accelerate.scheduler.AcceleratedScheduler, "load_state_dict", lambda self, state: None)],
}
RESUME_FAULTS = tuple(_RESUME_FAULTS)
