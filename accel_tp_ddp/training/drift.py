"""What is replicated over the tensor-parallel ranks stays equal there, bit by bit.

Ranks compute the gradients of replicated parameters from equal inputs, but kernels whose order of additions varies
(atomics on GPUs) give each of them other last bits, and the copies drift apart for good (pytorch#160169). Before every
optimizer step the first rank's gradients are therefore sent to its peers, in one fused collective for each data type.
Those of a part that some of the ranks hold alike (of key/value heads that are fewer than the ranks) go from the first
of them to the others.
A sentinel compares parameters, buffers and optimizer state now and then, for whatever else may change one rank's copy.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from ..core.collectives import laid_out, send_first_rank, with_shared
from ..core.shard import ShardInfo, shard_info

__all__ = ["DriftGuard", "checksum"]

_RANDOM_STATE = "torch's random state"
_PIECE = 1 << 20
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
        self._models: list[weakref.ref[nn.Module]] = []  # weakly: a model that is no longer used is freed
        self._steps: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()

    def add(self, model: nn.Module) -> None:
        """Watch the replicated part of a bare, parallelized model."""
        self._models.append(weakref.ref(model))

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
        if self.every and self._steps[optimizer] % self.every == 0:
            self.compare(optimizer)

    @torch.no_grad()
    def agree_on_gradients(self, optimizer: Optimizer) -> None:
        """The gradients of what several ranks hold, as the first of them has them: two collectives for a data type."""
        grads: dict[torch.dtype, list[Tensor]] = {}
        repeated: dict[torch.dtype, list[tuple[Tensor, ShardInfo]]] = {}
        for group in optimizer.param_groups:
            for param in group["params"]:
                if param.grad is None or param.grad.layout != torch.strided:
                    continue
                if is_replicated(param):
                    grads.setdefault(param.grad.dtype, []).append(param.grad)
                elif (info := _repeated(param)) is not None:
                    repeated.setdefault(param.grad.dtype, []).append((param.grad, info))
        for shards in repeated.values():
            send_first_holders(self.mesh, shards)
        for same_dtype in grads.values():
            flat = torch.cat([grad.reshape(-1) for grad in same_dtype])
            send_first_rank(self.mesh, flat)
            if self.mesh.get_local_rank() != 0:
                parts = flat.split([grad.numel() for grad in same_dtype])
                torch._foreach_copy_(same_dtype, [part.view_as(grad) for part, grad in zip(parts, same_dtype)])

    @torch.no_grad()
    def compare(self, optimizer: Optimizer | None = None) -> list[str]:
        """Compare checksums over the ranks in one small collective, and correct what has drifted.

        Returns:
            Names of the tensors that differed.

        Raises:
            RuntimeError: On every rank, if something differs and `on_drift` is "raise".
        """
        named = {name: (tensor, info) for name, tensor, info in self._replicated(optimizer)}
        named[_RANDOM_STATE] = (torch.get_rng_state(), None)
        sums = [_checksums(tensor, info) for tensor, info in named.values()]
        # max(c) and -max(-c) = min(c) differ if any two ranks do.
        bounds = torch.cat([*(c for c, _ in sums), *(negative for _, negative in sums)]).to(self.mesh.device_type)
        dist.all_reduce(bounds, dist.ReduceOp.MAX, group=self.mesh.get_group())
        highest, lowest = bounds.cpu().chunk(2)
        differs = (highest != -lowest).split([len(c) for c, _ in sums])
        drifted = [name for name, pieces in zip(named, differs) if pieces.any()]
        if drifted:
            steps = self._steps[optimizer] if optimizer else 0
            message = (
                f"after {steps} steps {len(drifted)} of {len(named)} things to be replicated differ over the "
                f"tensor-parallel ranks: {', '.join(drifted[:10])}{', ...' if len(drifted) > 10 else ''}."
            )
            if self.on_drift == "raise":
                raise RuntimeError(
                    f"{message} Something changed them on one rank only; look for code that runs on a single rank."
                )
            for name in drifted:
                tensor, info = named[name]
                if info is None:
                    send_first_rank(self.mesh, tensor)
                else:
                    send_first_holders(self.mesh, [(tensor, info)])
            if _RANDOM_STATE in drifted:
                torch.set_rng_state(named[_RANDOM_STATE][0])
            logger.warning("%s The first rank's values were sent to the others.", message)
        return drifted

    def _replicated(self, optimizer: Optimizer | None) -> Iterator[tuple[str, Tensor, ShardInfo | None]]:
        """Name and value of all that several ranks hold, with the shard where it is not all of them."""
        trained = {id(param) for group in (optimizer.param_groups if optimizer else ()) for param in group["params"]}
        names: dict[int, str] = {}
        for index, model in enumerate(self.models()):
            params = {name: param for name, param in model.named_parameters() if _is_held_by_several(param)}
            if trained and trained.isdisjoint(map(id, model.parameters())):
                continue  # another optimizer's model
            prefix = f"model {index}: " if index else ""
            for name, tensor in [*params.items(), *model.named_buffers()]:
                names[id(tensor)] = prefix + name
                yield names[id(tensor)], tensor.detach(), _repeated(tensor)
        for param, state in (optimizer.state if optimizer else {}).items():
            if id(param) in names:
                for key, value in state.items():
                    if isinstance(value, Tensor):
                        like_param = value.shape == param.shape
                        if value.dim() and not like_param and _repeated(param) is not None:
                            continue  # with zero1, a range of the elements of which the ranks share some
                        yield f"{names[id(param)]} ({key})", value, _repeated(param) if like_param else None


def is_replicated(param: nn.Parameter) -> bool:
    info = shard_info(param)
    return info is None or not info.is_sharded


def _repeated(tensor: Tensor) -> ShardInfo | None:
    info = shard_info(tensor)
    return info if info is not None and info.is_repeated else None


def _is_held_by_several(param: nn.Parameter) -> bool:
    return is_replicated(param) or _repeated(param) is not None


def _checksums(tensor: Tensor, info: ShardInfo | None) -> tuple[Tensor, Tensor]:
    """The checksum of what several ranks hold, and its negative; one for each piece, if it is not all of the tensor.

    Pieces that this rank does not hold have the lowest number there is.
    """
    if info is None:
        total = checksum(tensor).view(1)
        return total, -total
    both = torch.full((2, len(info.layout.repeated)), _NONE, dtype=torch.int64)
    for piece in info.shared.pieces:
        total = checksum(tensor.narrow(info.layout.dim, piece.start, piece.length))
        both[:, piece.number] = torch.stack([total, -total])
    return both[0], both[1]


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


def checksum(tensor: Tensor) -> Tensor:
    """An integer made of the bits of `tensor`, on the CPU: equal for equal bits, hardly ever for others."""
    bits = tensor.detach().contiguous().view(-1).view(torch.uint8)
    bits = bits.view(torch.int32) if bits.numel() % 4 == 0 else bits
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for index, piece in enumerate(bits.split(_PIECE)):  # the sums need eight bytes an element
        position = torch.arange(index * _PIECE, index * _PIECE + piece.numel(), device=bits.device)
        total += (piece.to(torch.int64) * (2 * position + 1)).sum()  # odd, so that a change of one bit shows
    return (total % (1 << 61)).cpu()  # small enough for its negative to be exact
