"""Dropout under tensor parallelism: alike on all ranks where activations are replicated, different where sharded.

The ranks of a group share one random stream, the user's. A model's forward draws from a stream of its replica, and
inside a tensor-parallel region, between the first column-parallel and the next row-parallel module, from a stream of
its rank. Where a stream starts follows from where the one around it stands, so recomputation under activation
checkpointing, which puts that one back, draws the same again.
"""

from __future__ import annotations

import hashlib
import pickle
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from .collectives import send_first_rank
from .control import gather_objects

__all__ = [
    "DeviceGenerator",
    "Generator",
    "RandomStream",
    "agree_as_processes",
    "agree_on_randomness",
    "default_generators",
    "draw_by_replica",
    "draws_dropout",
    "random_digest",
]

_GOLDEN = 0x9E3779B97F4A7C15  # an odd constant that spreads rank numbers over 64 bits
_JUMP = 1 << 34  # more random numbers than one region of one layer can draw


class RandomStream:
    """A random stream of one rank or replica, which the default generators can go over to and come back from.

    Args:
        index: Which of the streams that start at the same place: tensor-parallel or data-parallel rank.
        device_type: Where the model computes; the CPU's generator is switched in any case.
    """

    def __init__(self, index: int, device_type: str):
        self.own = _GOLDEN * (index + 1)
        self.device_type = device_type
        self._around: tuple | None = None

    def enter(self) -> None:
        """Go over to this stream; nothing if there already."""
        if self._around is not None:
            return
        draw = int(torch.empty((), dtype=torch.int64).random_())
        state, device = torch.get_rng_state(), None
        torch.default_generator.manual_seed((draw ^ self.own) % (1 << 63))
        if self.device_type == "cuda":
            generator = torch.cuda.default_generators[torch.cuda.current_device()]
            seed, offset = generator.initial_seed(), generator.get_offset()
            device = (generator, seed, offset + _JUMP)
            generator.manual_seed((seed ^ self.own) % (1 << 63))
            generator.set_offset(offset)
        self._around = (state, device)

    def leave(self) -> None:
        """Go back to the stream around it, to a place that does not depend on what was drawn from this one."""
        if self._around is None:
            return
        state, device = self._around
        self._around = None
        torch.set_rng_state(state)
        if device is not None:
            generator, seed, offset = device
            generator.manual_seed(seed)
            generator.set_offset(offset)

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Draw from this stream for a while, for something sharded; wherever the generators stand."""
        before = self._around is not None
        self.enter()
        try:
            yield
        finally:
            if not before:
                self.leave()

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Draw from the stream around for a while, for something replicated; wherever the generators stand."""
        before = self._around is not None
        self.leave()
        try:
            yield
        finally:
            if before:
                self.enter()

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_around": None}


def draw_by_replica(model: nn.Module, replica: int, device_type: str) -> None:
    """Let the forwards of `model` in training mode draw from a stream of its replica, whatever the seeds."""
    if draws_dropout(model):
        stream = RandomStream(replica, device_type)
        model.register_forward_pre_hook(_EnterStream(stream), prepend=True)
        model.register_forward_hook(_LeaveStream(stream), always_call=True)


class _EnterStream:
    def __init__(self, stream: RandomStream):
        self.stream = stream

    def __call__(self, model: nn.Module, args: tuple) -> None:
        if model.training:
            self.stream.enter()


class _LeaveStream(_EnterStream):
    def __call__(self, model: nn.Module, args: tuple, output: Any = None) -> None:
        self.stream.leave()


def draws_dropout(model: nn.Module) -> bool:
    """Whether any module of `model` drops out anything: by a dropout layer or by a rate that it keeps."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            return True
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float) and value > 0:
                return True
    return False


class Generator(Protocol):
    """A random generator, as `torch.Generator` is one."""

    def get_state(self) -> Tensor: ...

    def set_state(self, state: Tensor, /) -> Any: ...


class DeviceGenerator:
    """The default generator of the current device, by the functions that every accelerator's module has.

    Args:
        module: Such as `torch.cuda`.
    """

    def __init__(self, module: Any):
        self.module = module

    def get_state(self) -> Tensor:
        return self.module.get_rng_state()

    def set_state(self, state: Tensor) -> None:
        self.module.set_rng_state(state)


def default_generators(device_type: str) -> dict[str, Generator]:
    """What this process draws from by default, by device type: the CPU's, and that of the device it computes on."""
    found: dict[str, Generator] = {"cpu": torch.default_generator}
    if device_type != "cpu":
        found[device_type] = DeviceGenerator(torch.get_device_module(device_type))
    return found


def agree_as_processes(mesh: DeviceMesh) -> None:
    """The random streams of process `r` on all ranks of replica `r`, if the ranks of a replica differ in theirs.

    Seeds that a script has set by process (`set_seed(device_specific=True)`) give every replica then what they give
    process `r` of plain DDP. Collective over all ranks.

    Args:
        mesh: Two-dimensional mesh of replicas and tensor-parallel ranks, in rank order.
    """
    generators = default_generators(mesh.device_type).values()
    own: tuple[Any, ...] = (random.getstate(), np.random.get_state())
    own += tuple(generator.get_state().numpy().tobytes() for generator in generators)
    states = gather_objects(pickle.dumps(own))
    tp_size = mesh.size(1)
    if all(state == states[rank - rank % tp_size] for rank, state in enumerate(states)):
        return
    python, numpy, *drawn = pickle.loads(states[mesh.get_local_rank(0)])
    random.setstate(python)
    np.random.set_state(numpy)
    for generator, state in zip(generators, drawn):
        generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))


def random_digest(device_type: str) -> str:
    """Where the random streams of this process stand."""
    digest = hashlib.blake2b(digest_size=16)
    for generator in default_generators(device_type).values():
        digest.update(generator.get_state().numpy().tobytes())
    return digest.hexdigest()


def agree_on_randomness(mesh: DeviceMesh) -> None:
    """The first rank's random streams on all ranks of a tensor-parallel group. Replicas keep their own."""
    for generator in default_generators(mesh.device_type).values():
        state = generator.get_state()
        send_first_rank(mesh, state)
        generator.set_state(state)
