"""Full tensors out of shards: the unsharded state dict and gradients, and ordinary checkpoints made of them."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

from torch import Tensor, nn

from ..core import store
from ..core.agreement import Failure, Ranks, await_peers
from ..core.errors import CheckpointError
from ..core.outcome import DONE, Call
from ..core.serving import NotServed, Parts, is_served, reach, waiting
from ..core.shard import ShardInfo, restore_shards, shard_info
from ..core.slices import refuse_slices
from ..core.transfer import mesh_ranks
from ..core.wrappers import unwrap
from .deferred import DeferredTensor

__all__ = [
    "StateDict",
    "export",
    "full_gradients",
    "full_state_dict",
    "full_state_dict_of_main",
    "leave_it",
    "save_config",
    "takes_state_dict",
]

T = TypeVar("T")


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The unsharded state dict under the original names, on the CPU. Collective over the tensor-parallel group.

    Tied weights stay one tensor, as in `model.state_dict()`.

    Args:
        model: Bare model, or its DDP wrapper.
    """
    model = unwrap(model)
    refuse_slices(model, "full_state_dict")
    restore_shards(model)
    gather = _Gather()
    return {
        name: gather(value, value, shard_info(value)) if isinstance(value, Tensor) else value
        for name, value in model.state_dict(keep_vars=True).items()
    }


def full_gradients(model: nn.Module) -> dict[str, Tensor]:
    """The unsharded gradient of each parameter that has one, by name, on the CPU. Collective as `full_state_dict`."""
    model, gather = unwrap(model), _Gather()
    restore_shards(model)
    return {
        name: gather(param, param.grad, shard_info(param))
        for name, param in model.named_parameters()
        if param.grad is not None
    }


class _Gather:
    """Joins each tensor once, however many names it has."""

    def __init__(self):
        self._seen: dict[int, Tensor] = {}

    def __call__(self, key: Tensor, local: Tensor, info: ShardInfo | None) -> Tensor:
        if id(key) not in self._seen:
            full = info.full_tensor(local) if info is not None else local.detach().clone()
            self._seen[id(key)] = full.cpu()
        return self._seen[id(key)]


class StateDict:
    """The unsharded state dict, tensor by tensor, to one rank of those that hold a part of it.

    Args:
        model: Bare model.
        state: What of `model.state_dict(keep_vars=True)` is wanted; None: all of it.
    """

    def __init__(self, model: nn.Module, state: Mapping[str, Any] | None = None):
        self.state = state if state is not None else model.state_dict(keep_vars=True)
        tensors = {id(value): value for value in self.state.values() if isinstance(value, Tensor)}
        infos = {key: shard_info(tensor) for key, tensor in tensors.items()}
        self._tensors = tensors
        self.sharded = [(tensors[key], info) for key, info in infos.items() if info is not None and info.is_sharded]
        self._latest: Tensor | None = None

    def deferred(self, collect: Callable[[int], Tensor]) -> dict[str, Any]:
        """The tensors, on the CPU or deferred: `collect` gives number so and so of those that are `sharded`.

        Tied weights stay one tensor. The latest one is kept, as conversions may want its values more than once.
        """

        def join(number: int) -> Tensor:
            self._latest = None  # before there is another
            self._latest = collect(number)
            return self._latest

        made: dict[int, Tensor] = {
            id(tensor): DeferredTensor.of(info.global_shape, tensor.dtype, partial(join, number))
            for number, (tensor, info) in enumerate(self.sharded)
        }
        for key, tensor in self._tensors.items():
            if key not in made and tensor.device.type == "cpu":
                made[key] = tensor.detach()
            elif key not in made:
                made[key] = DeferredTensor.of(tensor.shape, tensor.dtype, tensor.detach().cpu)
        return {name: made.get(id(value), value) for name, value in self.state.items()}


def export(
    model: nn.Module,
    caller: str,
    write: Callable[[dict[str, Any]], T],
    place: str | os.PathLike | None = None,
    state: Mapping[str, Any] | None = None,
) -> T | None:
    """Let the main process `write` the unsharded state dict while its replica's other ranks send it their parts.

    They do so wherever they are (`core/serving`), so the main process may call it alone. A rank that calls it too
    waits for the end; those of other replicas hold nothing. Ranks of the main process's replica need no memory worth
    mentioning, and the main process what `write` holds of the deferred tensors (see `DeferredTensor`), beside one
    more tensor.

    Args:
        model: Bare model, or its DDP wrapper.
        caller: What the user called, for messages.
        write: Called on the main process, with tensors on the CPU, deferred ones among them.
        place: The folder, for messages.
        state: See `StateDict`.

    Returns:
        What `write` returned, on the main process; elsewhere None.

    Raises:
        CheckpointError: On the main process, if a peer does not have the same weights as it has in time. On every
            rank that calls it, if writing fails; ValueError or TypeError, where that is what `write` raised.
    """
    model = unwrap(model)
    restore_shards(model)
    is_main = Ranks(caller).is_main
    tensors = StateDict(model, state)
    meshes = {info.mesh for param in model.parameters() if (info := shard_info(param)) is not None and info.is_sharded}
    if not meshes:
        return write(tensors.deferred(_nobody)) if is_main else None
    peers = sorted({mesh_ranks(mesh) for mesh in meshes})
    if len(peers) > 1:
        raise ValueError(f"{caller}: this {type(model).__name__} is cut over several groups of ranks: {peers}.")
    mesh = meshes.pop()
    call = Call(caller, mesh, place, tensors.sharded)
    if call.among_peers and not is_served(mesh):  # a model that was sharded in another process
        _meet_main_process(peers[0], caller)
        reach(mesh)
    if not is_main:
        with waiting(call.id, tensors.sharded):
            _raise_unless_done(call.outcome())
        return None
    parts = Parts(call.id if call.outermost is call else None, mesh, tensors.sharded)

    def collect(number: int) -> Tensor:
        call.outermost.sign()
        return parts.collect(number)

    try:
        with call.under_way():
            if write is not leave_it:
                parts.start(store.PEERS_TIMEOUT)
            result = write(tensors.deferred(collect))
            parts.finish()
    except NotServed as error:
        failure = Failure(CheckpointError.__name__, _not_served(caller, error))
        call.end(": ".join(failure))
        raise failure.error() from None
    except BaseException as error:
        failure = _failure(error, caller, place)
        call.end(": ".join(failure))
        if isinstance(error, Exception):
            raise failure.error() from error
        raise
    call.end(DONE)
    return result


def _not_served(caller: str, error: NotServed) -> str:
    return (
        f"`{caller}` was called on the main process, but of its tensor-parallel peers {error} within "
        f"{store.PEERS_TIMEOUT:.0f} s. Each of them holds a part of the weights, and sends it wherever it is in the "
        "script, as long as its weights are at the same step. Where they are not, every rank has to call it: take it "
        "out of `if accelerator.is_main_process:`, and pass `is_main_process=accelerator.is_main_process` where it "
        "takes that."
    )


def _failure(error: BaseException, caller: str, place: str | os.PathLike | None) -> Failure:
    failure = Failure.of(error, kept=(ValueError, TypeError))  # the user's
    if failure.kind != CheckpointError.__name__:
        return failure
    files = f" {os.fspath(place)} may hold incomplete files." if place is not None else ""
    return failure._replace(message=f"{caller}: {failure.message}.{files}")


def _raise_unless_done(message: str) -> None:
    if message != DONE:
        raise Failure(*message.split(": ", 1)).error()


def _nobody(number: int) -> Tensor:
    raise AssertionError("nothing is sharded")


def _own_copy(value: Any) -> Any:
    if isinstance(value, DeferredTensor):
        return value.materialize()
    return value.clone() if isinstance(value, Tensor) else value


def full_state_dict_of_main(model: nn.Module, caller: str) -> dict[str, Any]:
    """`full_state_dict` on the main process, and an empty one elsewhere. Collective as `export`."""

    def write(state: dict[str, Any]) -> dict[str, Any]:
        made = {key: _own_copy(value) for key, value in {id(value): value for value in state.values()}.items()}
        return {name: made[id(value)] for name, value in state.items()}

    return export(model, caller, write) or {}


def leave_it(state: dict[str, Any]) -> None:
    """For a main process that is not to write."""


def takes_state_dict(model: nn.Module) -> bool:
    """Whether the model has a `save_pretrained` that writes the state dict it is given, as in transformers."""
    method = getattr(type(model), "save_pretrained", None)
    return method is not None and "state_dict" in inspect.signature(method).parameters


def _meet_main_process(peers: tuple[int, ...], caller: str) -> None:
    """Let the ranks of a replica meet, before what a script may have left to the main process alone."""
    why = "Each of them holds a part of the weights"
    advice = ", and pass `is_main_process=accelerator.is_main_process` where it takes that"
    await_peers(caller, f"{caller}/{peers}", len(peers) - 1, "its {count} tensor-parallel peers", why, advice)


def save_config(model: nn.Module, save_directory: str | os.PathLike) -> None:
    """Write the configs that a checkpoint needs for `from_pretrained`, where the model has them."""
    for name in ("config", "generation_config"):
        config = getattr(model, name, None)
        if hasattr(config, "save_pretrained"):
            config.save_pretrained(save_directory)
