"""Dropout under tensor parallelism: alike on all ranks where activations are replicated, different where sharded.

The ranks of a group share one random stream, the user's. A model's forward draws from a stream of its replica, and
inside a tensor-parallel region, between the first column-parallel and the next row-parallel module, from a stream of
its rank. Where a stream starts follows from where the one around it stands, so recomputation under activation
checkpointing, which puts that one back, draws the same again.
"""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from .collectives import send_first_rank
from .control import gather_objects

__all__ = [
    "RandomStream",
    "agree_as_processes",
    "agree_on_randomness",
    "draw_by_replica",
    "draws_dropout",
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


def agree_as_processes(mesh: DeviceMesh) -> None:
    """The random streams of process `r` on all ranks of replica `r`, if the ranks of a replica differ in theirs.

    Seeds that a script has set by process (`set_seed(device_specific=True)`) give every replica then what they give
    process `r` of plain DDP. Collective over all ranks.

    Args:
        mesh: Two-dimensional mesh of replicas and tensor-parallel ranks, in rank order.
    """
    on_gpu = mesh.device_type == "cuda"
    own: tuple[Any, ...] = (random.getstate(), np.random.get_state(), torch.get_rng_state().numpy().tobytes())
    own += (torch.cuda.get_rng_state().numpy().tobytes(),) if on_gpu else ()
    states = gather_objects(pickle.dumps(own))
    tp_size = mesh.size(1)
    if all(state == states[rank - rank % tp_size] for rank, state in enumerate(states)):
        return
    python, numpy, cpu, *gpu = pickle.loads(states[mesh.get_local_rank(0)])
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(torch.frombuffer(bytearray(cpu), dtype=torch.uint8))
    if on_gpu:
        torch.cuda.set_rng_state(torch.frombuffer(bytearray(gpu[0]), dtype=torch.uint8))


def agree_on_randomness(mesh: DeviceMesh) -> None:
    """The first rank's random streams on all ranks of a tensor-parallel group. Replicas keep their own."""
    state = torch.get_rng_state()
    send_first_rank(mesh, state)
    torch.set_rng_state(state)
    if mesh.device_type == "cuda":
        state = torch.cuda.get_rng_state()
        send_first_rank(mesh, state)
        torch.cuda.set_rng_state(state)
