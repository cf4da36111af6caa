"""What is replicated over the tensor-parallel ranks stays equal there, bit by bit.

Ranks compute the gradients of replicated parameters from equal inputs, but kernels whose order of additions varies
(atomics on GPUs) give each of them other last bits, and the copies drift apart for good (pytorch#160169). Before every
optimizer step the first rank's gradients are therefore sent to its peers, in buckets as DDP's for each data type.
Those of a part that some of the ranks hold alike (of key/value heads that are fewer than the ranks) go from the first
of them to the others.
A sentinel compares parameters, buffers, optimizer state and random states now and then, for whatever else may change
one rank's copy.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from ..core.checksum import by_device, can_be_summed, checksum
from ..core.collectives import laid_out, send_first_rank, with_shared
from ..core.randomness import Generator, default_generators
from ..core.shard import ShardInfo, shard_info
from .buckets import buckets, buckets_of
from .decisions import Decisions, decisions_of

__all__ = ["DriftGuard", "checksum"]

_NONE = -(1 << 62)  # below every checksum and its negative
logger = logging.getLogger(__name__)


class DriftGuard:
    """Keeps what is replicated of some models equal over the ranks of a tensor-parallel group.

    Args:
        mesh: Tensor-parallel mesh.
        every: Steps of an optimizer between two comparisons; 0: never.
        on_drift: "heal": send the first rank's values to its peers and log the names; "raise": RuntimeError.
    """

    def __init__(self, mesh: DeviceMesh, every: int, on_drift: str):
        self.mesh = mesh
        self.every = every
        self.on_drift = on_drift
        self.generators: dict[str, Generator] = default_generators(mesh.device_type)
        self._models: list[weakref.ref[nn.Module]] = []  # weakly: a model that is no longer used is freed
        self._steps: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()

    def add(self, model: nn.Module) -> None:
        """Watch the replicated part of a bare, parallelized model."""
        self._models.append(weakref.ref(model))
        for _, decisions in decisions_of(model):
            decisions.begin(due=self.every == 1)

    def models(self) -> list[nn.Module]:
        """The models that are still in use."""
        alive = [(reference, model) for reference in self._models if (model := reference()) is not None]
        self._models = [reference for reference, _ in alive]
        return [model for _, model in alive]

    def watch(self, optimizer: Optimizer) -> bool:
        """Guard every step of `optimizer`, and tell whether it is a new one."""
        if optimizer in self._steps:
            return False
        self._steps[optimizer] = 0
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)
        return True

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.agree_on_gradients(optimizer)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._steps[optimizer] += 1
        if not self.every:
            return
        since = self._steps[optimizer] % self.every
        if since == 0:
            self.compare(optimizer)
        if since in (0, self.every - 1):
            for _, decisions in self._decisions(optimizer):
                decisions.begin(due=since == self.every - 1 or self.every == 1)

    @torch.no_grad()
    def agree_on_gradients(self, optimizer: Optimizer) -> None:
        """The gradients of what several ranks hold, as the first of them has them, in buckets of a data type each."""
        grads: list[Tensor] = []
        repeated: list[tuple[Tensor, ShardInfo]] = []
        for group in optimizer.param_groups:
            for param in group["params"]:
                if param.grad is None or param.grad.layout != torch.strided:
                    continue
                if is_replicated(param):
                    grads.append(param.grad)
                elif (info := _repeated(param)) is not None:
                    repeated.append((param.grad, info))
        for shards in buckets_of(repeated, lambda shard: shard[0]):
            send_first_holders(self.mesh, shards)
        for bucket in buckets(grads):
            if len(bucket) == 1:
                send_first_rank(self.mesh, bucket[0])
                continue
            flat = torch.cat([grad.reshape(-1) for grad in bucket])
            send_first_rank(self.mesh, flat)
            if self.mesh.get_local_rank() != 0:
                parts = flat.split([grad.numel() for grad in bucket])
                torch._foreach_copy_(bucket, [part.view_as(grad) for part, grad in zip(parts, bucket)])

    @torch.no_grad()
    def compare(self, optimizer: Optimizer | None = None) -> list[str]:
        """Compare checksums over the ranks in one small collective, and correct what has drifted.

        The host waits for the device once, for the verdict.

        Returns:
            Names of the tensors that differed.

        Raises:
            RuntimeError: On every rank, if something differs and `on_drift` is "raise".
        """
        replicated = self._replicated(optimizer)
        watched = {name: _Watched(tensor, info) for name, tensor, info in replicated if can_be_summed(tensor)}
        for device, generator in self.generators.items():
            watched[f"torch's random state ({device})"] = _Watched(generator.get_state(), generator=generator)
        for name, decisions in self._decisions(optimizer):
            watched[f"choices for {name}"] = _Watched(decisions.number(self.mesh.device_type), is_past=True)
        found = self._differing(watched)
        chosen = [name for name in found if watched[name].is_past]
        drifted = [name for name in found if not watched[name].is_past]
        steps, problems = self._steps.get(optimizer, 0) if optimizer else 0, []
        if drifted:
            problems.append(
                f"after {steps} steps {len(drifted)} of {len(watched)} things to be replicated differ over the "
                f"tensor-parallel ranks: {_some(drifted)}."
            )
        if chosen:
            problems.append(
                f"before step {steps} the tensor-parallel ranks did not choose the same for the same input: "
                f"{_some(chosen)}. They then add up parts of different experts. Let all ranks run the same kernels: "
                "no autotuning by rank (torch.compile's max-autotune, torch.backends.cudnn.benchmark)."
            )
        if problems and self.on_drift == "raise":
            changed = " Something changed them on one rank only; look for code that runs on a single rank."
            raise RuntimeError(" ".join(problems) + changed * bool(drifted))
        for name in drifted:
            self._heal(watched[name])
        if drifted:
            problems[0] += " The first rank's values were sent to the others."
        for problem in problems:
            logger.warning("%s", problem)
        return found

    def _differing(self, watched: dict[str, _Watched]) -> list[str]:
        """The names of those that any two ranks have unlike."""
        names = [name for name, each in watched.items() for _ in range(_pieces(each.info))]
        sums = [total for each in watched.values() for total in _checksums(each.tensor, each.info)]
        order, stacks = by_device(sums)
        own = torch.cat([stack.to(self.mesh.device_type) for stack in stacks])
        # max(c) and -max(-c) = min(c) differ if any two ranks do.
        bounds = torch.stack([own, torch.where(own == _NONE, own, -own)])
        dist.all_reduce(bounds, dist.ReduceOp.MAX, group=self.mesh.get_group())
        differs = (bounds[0] != -bounds[1]).tolist()
        found = {names[index] for index, differ in zip(order, differs) if differ}
        return [name for name in watched if name in found]

    def _heal(self, drifted: _Watched) -> None:
        """The first rank's value on all ranks."""
        if drifted.info is not None:
            send_first_holders(self.mesh, [(drifted.tensor, drifted.info)])
            return
        send_first_rank(self.mesh, drifted.tensor)
        if drifted.generator is not None:
            drifted.generator.set_state(drifted.tensor)

    def _decisions(self, optimizer: Optimizer | None) -> Iterator[tuple[str, Decisions]]:
        """Of the modules of all models that `optimizer` trains, with names."""
        for prefix, model in self._models_of(optimizer):
            for name, decisions in decisions_of(model):
                yield prefix + name, decisions

    def _models_of(self, optimizer: Optimizer | None) -> Iterator[tuple[str, nn.Module]]:
        """The models that `optimizer` trains something of, and what stands before the names of what is in them."""
        trained = {id(param) for group in (optimizer.param_groups if optimizer else ()) for param in group["params"]}
        for index, model in enumerate(self.models()):
            if not trained or not trained.isdisjoint(map(id, model.parameters())):
                yield f"model {index}: " if index else "", model

    def _replicated(self, optimizer: Optimizer | None) -> Iterator[tuple[str, Tensor, ShardInfo | None]]:
        """Name and value of all that several ranks hold, with the shard where it is not all of them."""
        names: dict[int, str] = {}
        for prefix, model in self._models_of(optimizer):
            params = {name: param for name, param in model.named_parameters() if _is_held_by_several(param)}
            for name, tensor in [*params.items(), *model.named_buffers()]:
                names[id(tensor)] = prefix + name
                yield names[id(tensor)], tensor.detach(), _repeated(tensor)
        # Not in the order of the states, which a rank may have made in another one.
        for param in (param for group in (optimizer.param_groups if optimizer else ()) for param in group["params"]):
            if id(param) in names:
                for key, value in optimizer.state.get(param, {}).items():
                    if isinstance(value, Tensor):
                        like_param = value.shape == param.shape
                        yield f"{names[id(param)]} ({key})", value, _repeated(param) if like_param else None


def is_replicated(param: nn.Parameter) -> bool:
    info = shard_info(param)
    return info is None or not info.is_sharded


def _repeated(tensor: Tensor) -> ShardInfo | None:
    info = shard_info(tensor)
    return info if info is not None and info.is_repeated else None


def _is_held_by_several(param: nn.Parameter) -> bool:
    return is_replicated(param) or _repeated(param) is not None


class _Watched(NamedTuple):
    """What several ranks hold.

    Attributes:
        tensor: Its value.
        info: The shard, where it is not all of a tensor that they hold.
        generator: The generator whose state it is.
        is_past: Whether it is something that has been, and cannot be healed.
    """

    tensor: Tensor
    info: ShardInfo | None = None
    generator: Generator | None = None
    is_past: bool = False


def _some(names: list[str]) -> str:
    return f"{', '.join(names[:10])}{', ...' if len(names) > 10 else ''}"


def _pieces(info: ShardInfo | None) -> int:
    return 1 if info is None or info.layout is None else len(info.layout.repeated)


def _checksums(tensor: Tensor, info: ShardInfo | None) -> list[Tensor]:
    """The checksum of what several ranks hold; one for each piece, if it is not all of the tensor.

    Pieces that this rank does not hold have the lowest number there is.
    """
    if info is None or info.layout is None:
        return [checksum(tensor)]
    sums = [torch.full((), _NONE, dtype=torch.int64, device=tensor.device) for _ in info.layout.repeated]
    for piece in info.shared.pieces:
        sums[piece.number] = checksum(tensor.narrow(info.layout.dim, piece.start, piece.length))
    return sums


def send_first_holders(mesh: DeviceMesh, parts: list[tuple[Tensor, ShardInfo]]) -> None:
    """Overwrite what several ranks hold of tensors of one data type by what the first of them has; one collective."""
    rank, buffers = mesh.get_local_rank(), []
    for tensor, info in parts:
        shared, layout = info.shared, info.layout
        first = [piece for piece in shared.pieces if layout.holds_first(rank, layout.repeated[piece.number])]
        buffers.append(laid_out(tensor, shared._replace(pieces=tuple(first))))
    flat = torch.cat([buffer.reshape(-1) for buffer in buffers]).to(mesh.device_type)
    dist.all_reduce(flat, group=mesh.get_group())  # to all others it adds nothing but zeros
    for (tensor, info), sent, buffer in zip(parts, flat.split([b.numel() for b in buffers]), buffers):
        tensor.copy_(with_shared(tensor, sent.view_as(buffer), info.shared))
