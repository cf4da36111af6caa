"""Parts of sharded weights for the main process, whatever the script does on the ranks that hold them.

What the main process saves by itself (`if accelerator.is_main_process: model.save_pretrained(...)`) it cannot gather
by a collective: its peers are elsewhere in the script. A thread on each of them sends the parts. It sleeps on the
store until it is asked, and what it sends goes over connections of its own (`core/transfer`): a step costs nothing,
and no collective of the script is disturbed.

The parts have to be of the same moment as the main process's own. A peer cannot finish another step, as that takes
collectives with the main process; but it may be a little behind, or have changed its weights by itself since. So the
main process says how often each of its parameters has been changed in place (`_version`), and what the bits of its
replicated ones are, which are equal on all ranks of a replica. A peer sends once it has the same, and looks again
afterwards; one that does not get there in time says so. The bits also tell what versions do not: changes by `.data`.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from . import store as channels
from .shard import ShardInfo, shard_info
from .transfer import Link, mesh_ranks

__all__ = [
    *("Address", "NotServed", "Parts", "addresses", "is_served", "names_of_service", "reach", "serve", "stop_serving"),
    "waiting",
]

_STOP = "stop"
_SENDING = "sending"
_INSIDE, _HELD, _DONE = "inside", "held", "done"
_LONG = timedelta(days=20)  # the longest that a store waits
_MARGIN = 2.0  # seconds that a thread may take to answer beyond what it was given


class NotServed(RuntimeError):
    """A peer that does not send its parts, and why."""


class Address(NamedTuple):
    """What the ranks of a mesh call a sharded parameter: of which model, in the order they were sharded, and which."""

    model: int
    number: int


class _Model:
    """The parameters of a sharded model, weakly: they are the same objects for good."""

    def __init__(self, model: nn.Module):
        self._params = [(weakref.ref(param), _changes(param)) for param in model.parameters()]

    def __iter__(self) -> Iterator[Tensor | None]:
        return (reference() for reference, _ in self._params)

    def __getitem__(self, number: int) -> Tensor | None:
        return self._params[number][0]()

    def version(self, number: int) -> str:
        """How often a parameter was changed since it was sharded, and what it is."""
        reference, before = self._params[number]
        param = reference()
        if param is None:
            return "0 gone"
        info = shard_info(param)
        size = (info.global_shape if info is not None else param.shape).numel()
        return f"{_changes(param) - before} {param.dtype} {size}"

    def versions(self) -> list[str]:
        return [self.version(number) for number in range(len(self._params))]

    def bits(self, settled: Callable[[Tensor], Tensor]) -> int:
        """A sum over the bits of all that is replicated."""
        total = 0
        for param in self:
            info = shard_info(param) if param is not None else None
            if param is not None and param.numel() and (info is None or not info.is_sharded):
                bits = settled(param).contiguous().view(-1).view(torch.uint8)
                bits = bits.view(torch.int32) if bits.numel() % 4 == 0 else bits
                total += int(bits.sum(dtype=torch.int64))
        return total


def _changes(param: Tensor) -> int:
    return 0 if param.is_inference() else param._version


def _total(versions: Iterable[str]) -> int:
    return sum(int(version.split()[0]) for version in versions)


class _Service:
    """What one rank knows of the others that hold parts of the same weights, and the thread that serves them."""

    def __init__(self, epoch: int):
        self.world = dist.group.WORLD
        self.rank = dist.get_rank()
        self.names = f"accel_tp_ddp/serving/{epoch}"
        self.store = dist.distributed_c10d._get_default_store()
        self.links: dict[tuple[int, ...], Link] = {}
        self.models: dict[tuple[int, ...], list[_Model]] = {}
        self.addresses: dict[int, tuple[weakref.ref[Tensor], tuple[int, ...], Address]] = {}
        self.waiting: list[tuple[str, Sequence[tuple[Tensor, ShardInfo]]]] = []
        self.steps = _Steps()
        self.pid = os.getpid()
        self._thread: threading.Thread | None = None
        self._latest = 0.0  # when it was last asked

    # ------------------------------------------------------------------------------------------------ what is served

    def add(self, model: nn.Module, mesh: DeviceMesh) -> None:
        self.addresses = {key: each for key, each in self.addresses.items() if each[0]() is not None}
        ranks = mesh_ranks(mesh)
        known = self.models.setdefault(ranks, [])
        for number, param in enumerate(model.parameters()):
            info = shard_info(param)
            if info is not None and info.is_sharded:
                self.addresses[id(param)] = weakref.ref(param), ranks, Address(len(known), number)
        known.append(_Model(model))
        if 0 in ranks:
            self.open(mesh)

    def open(self, mesh: DeviceMesh) -> None:
        """Let the ranks of `mesh` reach one another. Collective over it, the first time."""
        ranks = mesh_ranks(mesh)
        if ranks not in self.links:
            self.links[ranks] = Link(f"{self.names}/link {ranks}", ranks)
        self.steps.watch(mesh.device_type)
        if self._thread is None and self.rank != 0:
            self._thread = threading.Thread(target=self._run, name="accel_tp_ddp serving", daemon=True)
            self._thread.start()

    def address(self, param: Tensor) -> Address | None:
        reference, _, address = self.addresses.get(id(param), (None, (), None))
        return address if reference is not None and reference() is param else None

    # --------------------------------------------------------------------------------------------------- the thread

    def stop(self) -> None:
        """End the thread; the main process, whose store it may be that they sleep on, those of the others."""
        if self.pid != os.getpid():  # a fork
            return
        with suppress(Exception):  # the store may be gone, and the threads with it
            others = {rank for ranks in self.models for rank in ranks if 0 in ranks} if self.rank == 0 else set()
            for rank in (others | {self.rank}) - {0}:
                self._post(rank, _STOP)
        if self._thread is not None:
            with suppress(Exception):
                self.store.set(f"{self.names}/gone/{self.rank}", "")
            self._thread.join(_MARGIN)
            self._thread = None

    def linger(self) -> None:
        """At the end of a script: until the main process has come to its end too, or asks for nothing any more."""
        failed = getattr(sys, "last_value", None) is not None  # others are to know at once
        if self._thread is not None and self.pid == os.getpid() and dist.is_initialized() and not failed:
            self._latest = time.monotonic()
            while self._thread.is_alive() and time.monotonic() - self._latest < channels.PEERS_TIMEOUT:
                self._thread.join(0.1)

    def _run(self) -> None:
        number = 0
        with suppress(Exception):  # the store is gone: so is the main process, or this one ends
            shared: Any = self.store
            store = shared.clone()  # a client waits for one thing at a time
            while True:
                key = f"{self.names}/mail/{self.rank}/{number}"
                store.wait([key], _LONG)
                message = store.get(key).decode()
                store.delete_key(key)
                if message == _STOP:
                    return
                self._answer(store, number, json.loads(message))
                self._latest = time.monotonic()
                number += 1

    def _answer(self, store: dist.Store, number: int, request: dict[str, Any]) -> None:
        key = f"{self.names}/reply/{self.rank}/{number}"
        try:
            if request["kind"] == "part":
                send = self._sender(request)
                store.set(key, _SENDING)
                send()
                store.set(f"{key}/after", self._unchanged(request))
            else:
                store.set(key, self._agreed(request))
        except Exception as error:  # whatever it is, the main process waits for an answer
            for answer in (key, f"{key}/after"):
                store.set(answer, f"cannot send its part: {type(error).__name__}: {error}")

    @torch.no_grad()
    def _sender(self, request: dict[str, Any]) -> Callable[[], None]:
        ranks = tuple(request["ranks"])
        if request["mode"] == _INSIDE:
            param, info = self._inside(request)
        else:
            param = self._param(request)
            held = shard_info(param)
            if held is None or self._unchanged(request) != _DONE:
                raise RuntimeError("its weights have moved on")
            info = held
        return partial(info.send_part, self.steps.settled(param), 0, self.links[ranks])

    def _inside(self, request: dict[str, Any]) -> tuple[Tensor, ShardInfo]:
        """What is wanted, of the call that this rank waits in; between two calls, and after them, of the model."""
        deadline = time.monotonic() + channels.PEERS_TIMEOUT
        while time.monotonic() < deadline:
            for call, wanted in list(self.waiting):
                if call == request["call"]:
                    return wanted[request["wanted"]]
            if "version" in request and self._model(request).version(request["number"]) == request["version"]:
                param = self._param(request)
                info = shard_info(param)
                if info is not None:
                    return param, info
            time.sleep(0.001)
        raise RuntimeError("it has left the call that the main process is in")

    def _param(self, request: dict[str, Any]) -> Tensor:
        param = self._model(request)[request["number"]]
        if param is None:
            raise RuntimeError("the model is gone")
        return param

    def _model(self, request: dict[str, Any]) -> _Model:
        return self.models[tuple(request["ranks"])][request["model"]]

    def _unchanged(self, request: dict[str, Any]) -> str:
        if request["mode"] == _INSIDE or self._model(request).version(request["number"]) == request["version"]:
            return _DONE
        return "has changed its weights while they were being sent"

    @torch.no_grad()
    def _agreed(self, request: dict[str, Any]) -> str:
        """`_INSIDE` what the main process is in, or `_HELD` at the same weights; else what differs."""
        deadline = time.monotonic() + request["seconds"]
        while True:
            if any(call == request["call"] for call, _ in self.waiting):
                return _INSIDE
            problem = self._differs(tuple(request["ranks"]), request["models"])
            if problem is None:
                return _HELD
            if time.monotonic() > deadline:
                return problem
            time.sleep(0.01)

    def _differs(self, ranks: tuple[int, ...], wanted: dict[str, list[Any]] | None) -> str | None:
        if wanted is None:
            return "did not come"
        models = self.models[ranks]
        for number, (versions, bits) in wanted.items():
            if int(number) >= len(models):  # it is still sharding it: `parallelize` ends on each rank by itself
                return "did not come, and has not sharded this model yet"
            model = models[int(number)]
            own = model.versions()
            if own != versions:
                ahead = _total(own) - _total(versions)
                if not ahead:
                    return "did not come, and has other weights"
                word = "more" if ahead > 0 else "fewer"
                return f"did not come, and has changed its weights {abs(ahead)} times {word} than the main process"
            if model.bits(self.steps.settled) != bits:
                return "did not come, and its weights have other values than the main process's"
        return None

    # --------------------------------------------------------------------------------------------- the one that asks

    def _post(self, rank: int, message: str) -> int:
        """Put `message` into the box of `rank`; returns its number there."""
        number = self.store.add(f"{self.names}/mail/{rank}", 1) - 1
        self.store.set(f"{self.names}/mail/{rank}/{number}", message)
        return number

    def ask(self, rank: int, request: dict[str, Any]) -> int:
        return self._post(rank, json.dumps(request))

    def reply(self, rank: int, number: int, seconds: float, after: bool = False) -> str:
        """The answer to request `number`; raises NotServed where there is none in time."""
        key = f"{self.names}/reply/{rank}/{number}{'/after' if after else ''}"
        deadline, pause = time.monotonic() + seconds, 0.0001
        while not self.store.check([key]):
            if time.monotonic() > deadline:
                raise NotServed(f"rank {rank} did not answer")
            if pause == 0.01 and self.store.check([f"{self.names}/gone/{rank}"]):
                raise NotServed(f"rank {rank} has come to the end of its script, and did not answer")
            time.sleep(pause)
            pause = min(2 * pause, 0.01)
        answer = self.store.get(key).decode()
        self.store.delete_key(key)
        return answer


class _Steps:
    """When the weights of this rank hold the values that they will keep until somebody changes them again.

    On a GPU the stream that has the latest step's kernels may be held up behind them by a collective that waits for
    the main process. So a thread reads on a stream of its own, after what was launched up to the latest step's end.
    """

    def __init__(self) -> None:
        self._watched = False
        self._latest: Any = None

    def watch(self, device_type: str) -> None:
        if device_type == "cuda" and not self._watched:
            self._watched = True
            torch.optim.optimizer.register_optimizer_step_post_hook(self._after_step)

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        params = [param for group in optimizer.param_groups for param in group["params"] if param.is_cuda]
        event = torch.cuda.Event()
        event.record()
        self._latest = event, {id(param): param._version for param in params}

    def settled(self, tensor: Tensor) -> Tensor:
        """The values of `tensor`, on the CPU."""
        if not tensor.is_cuda:
            return tensor.detach().cpu()
        with torch.cuda.device(tensor.device):
            self._wait_for(tensor)
            with torch.cuda.stream(torch.cuda.Stream()):
                return tensor.detach().cpu()

    def _wait_for(self, tensor: Tensor) -> None:
        everything = torch.cuda.Event()
        everything.record(torch.cuda.default_stream())
        deadline = time.monotonic() + 1.0
        while not everything.query():
            if time.monotonic() > deadline:
                event, versions = self._latest or (None, dict[int, int]())
                if event is None or versions.get(id(tensor), tensor._version) != tensor._version:
                    raise RuntimeError("its weights may still be changing: its stream is held up by a collective")
                event.synchronize()
                return
            time.sleep(0.001)


_service: _Service | None = None
_epoch = 0


def _current() -> _Service:
    """The service beside the default group that there is now."""
    global _service, _epoch
    if _service is None or _service.world is not dist.group.WORLD:
        if _service is not None:
            _service.stop()
        _epoch += 1
        _service = _Service(_epoch)
    return _service


def serve(model: nn.Module, mesh: DeviceMesh) -> None:
    """Send parts of a bare, sharded model to the main process from now on. Collective over `mesh`."""
    _current().add(model, mesh)


def names_of_service() -> str:
    """What the keys in the store begin with: the same on all ranks, and another one beside another default group."""
    return _current().names


def addresses(wanted: Iterable[tuple[Tensor, ShardInfo]]) -> list[Address | None]:
    """What the ranks call some sharded tensors; None: one that only whoever is in the same call can find."""
    return [_current().address(tensor) for tensor, _ in wanted]


def is_served(mesh: DeviceMesh) -> bool:
    """Whether the ranks of `mesh` can reach one another; `reach` lets them."""
    return mesh_ranks(mesh) in _current().links


def reach(mesh: DeviceMesh) -> None:
    """Let the ranks of `mesh` reach one another. Collective over it."""
    _current().open(mesh)


@atexit.register
def _at_exit() -> None:
    """A script may end on the others while the main process is still saving, and it may be the last thing it does."""
    if _service is None:
        return
    _service.linger()
    # In a thread of its own: where the host of the store cannot be reached any more, its client waits without end.
    ending = threading.Thread(target=stop_serving, name="accel_tp_ddp ending", daemon=True)
    ending.start()
    ending.join(2 * _MARGIN)


def stop_serving() -> None:
    """End the thread. It starts again with the next model that is sharded."""
    global _service
    if _service is not None:
        _service.stop()
        _service = None


@contextmanager
def waiting(call: str, wanted: Sequence[tuple[Tensor, ShardInfo]]) -> Iterator[None]:
    """Within the block, this rank waits for the main process, which is in `call`, and wants these sharded tensors."""
    service = _current()
    service.waiting.append((call, wanted))
    try:
        yield
    finally:
        service.waiting.pop()


class Parts:
    """How the main process has parts sent to it.

    Args:
        call: What it is in; a peer that waits for the end of it sends without further questions. None: it is in
            another call within that.
        mesh: The ranks that hold parts.
        wanted: The sharded tensors, in an order that is the same on peers that are in `call` too.
    """

    def __init__(self, call: str | None, mesh: DeviceMesh, wanted: Sequence[tuple[Tensor, ShardInfo]]):
        self._service = _current()
        self._ranks = mesh_ranks(mesh)
        self._call, self._wanted = call, wanted
        self._addresses = addresses(wanted)
        self._modes: dict[int, str] = {}

    def start(self, seconds: float) -> None:
        """Let the peers come to where they can send.

        Raises:
            NotServed: With the first peer that does not within `seconds`.
        """
        self._modes = self._agree(seconds)

    def finish(self) -> None:
        """Make sure that what was sent was all of one moment."""
        if any(mode == _HELD for mode in self._modes.values()):
            self._agree(channels.PEERS_TIMEOUT)

    def _agree(self, seconds: float) -> dict[int, str]:
        numbers = {each.model for each in self._addresses if each is not None}
        models = {number: self._service.models[self._ranks][number] for number in sorted(numbers)}
        state = {number: (each.versions(), each.bits(_on_cpu)) for number, each in models.items()}
        request = {
            **{"kind": "start", "call": self._call, "ranks": self._ranks, "seconds": seconds},
            "models": state if None not in self._addresses else None,
        }
        asked = {rank: self._service.ask(rank, request) for rank in self._ranks if rank != self._service.rank}
        modes = {rank: self._service.reply(rank, number, seconds + _MARGIN) for rank, number in asked.items()}
        for rank, mode in modes.items():
            if mode not in (_INSIDE, _HELD):
                raise NotServed(f"rank {rank} {mode}")
        return modes

    def collect(self, number: int) -> Tensor:
        """The unsharded tensor `number` of those that are wanted, on the CPU."""
        tensor, info = self._wanted[number]
        asked: dict[int, int] = {}

        def ask() -> Link:
            for rank, mode in self._modes.items():
                asked[rank] = self._service.ask(rank, self._request(number, mode))
            for rank, request in asked.items():
                self._expect(rank, self._service.reply(rank, request, channels.PEERS_TIMEOUT), _SENDING)
            return self._service.links[self._ranks]

        full = info.collect(tensor, ask)
        for rank, request in asked.items():
            self._expect(rank, self._service.reply(rank, request, channels.PEERS_TIMEOUT, after=True), _DONE)
        return full

    def _request(self, number: int, mode: str) -> dict[str, Any]:
        request = {"kind": "part", "mode": mode, "ranks": self._ranks, "call": self._call, "wanted": number}
        address = self._addresses[number]
        if address is None:
            assert mode == _INSIDE, "elsewhere a peer agrees to addresses only"
            return request
        version = self._service.models[self._ranks][address.model].version(address.number)
        return {**request, "version": version, **address._asdict()}

    def _expect(self, rank: int, answer: str, expected: str) -> None:
        if answer != expected:
            raise NotServed(f"rank {rank} {answer}")


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu()
