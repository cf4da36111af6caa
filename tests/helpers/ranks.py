"""Run a function on n ranks: real processes, real gloo, started once and reused.

    results = run_on_ranks(train, 4, spec)      # train(spec) on ranks 0..3; the results in rank order

The function is pickled by reference, so it has to stand at the top of a module. The processes of one world size are
started at the first call and serve all later calls; between two calls Accelerate's singletons, the environment and the
seeds are put back, and only the default process group stays. With a world size of 1 there is no process group and no
rank in the environment: that is the single process of `python script.py`.

What goes wrong on a rank surfaces here: a `RanksError` carries every rank's traceback, a hang is cut after `timeout`
seconds with the stacks of the ranks that hang. After either the processes are discarded, as they may be out of step.
"""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import wait as wait_for_any
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

COLLECTIVE_TIMEOUT = timedelta(seconds=60)
CALLS_PER_POOL = 50  # every call may leave process groups behind, so a pool is renewed now and then
GRACE = 5.0  # seconds that the other ranks have to answer once one rank has raised
SETTLE_TIMEOUT = 30.0
PRELOAD = (  # imported once, in the process that the ranks are forked from
    "torch.distributed.tensor.parallel",
    "accelerate",
    "transformers",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    # What most tests import or have imported for them: a pool starts in a third of the time.
    "transformers.trainer",
    "peft",
    "datasets",
    "torchdata.stateful_dataloader",
    "torchao.float8",
    "accel_tp_ddp",
)
FOREIGN_ENVIRONMENT = ("ACCELERATE_", "ACCEL_TP_DDP_", "FSDP_", "MASTER_", "PARALLELISM_CONFIG_", "TORCHELASTIC_")
RANK_ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK")


class RanksError(RuntimeError):
    """A function failed, died or hung on at least one rank, or left the ranks out of step."""


@dataclass(frozen=True)
class Raised:
    """What one rank raised. `type_names` goes from the exception's own class up to its bases."""

    type_names: tuple[str, ...]
    message: str
    traceback: str

    @property
    def type_name(self) -> str:
        return self.type_names[0]

    @classmethod
    def of(cls, error: BaseException) -> Raised:
        names = tuple(c.__name__ for c in type(error).__mro__ if c is not object)
        return cls(names, str(error), "".join(traceback.format_exception(error)))


def run_on_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 120.0,
    expect_raise: bool = False,
    **kwargs: Any,
) -> list[Any]:
    """Call `fn(*args, **kwargs)` on every rank of `world_size` processes and return the results in rank order.

    With `expect_raise`, every rank has to raise, and the list holds a `Raised` for each rank.
    """
    pool = _pools.get(world_size)
    if pool is None or pool.calls >= CALLS_PER_POOL or not pool.alive():
        discard_pool(world_size)
        pool = _pools[world_size] = _Pool(world_size)
    pool.calls += 1
    name = f"{fn.__module__}.{fn.__qualname__} on {world_size} ranks"
    try:
        answers = pool.call((fn, args, kwargs), timeout)
        if expect_raise:
            if not all(isinstance(answer, Raised) for answer in answers):
                raise RanksError(_report(f"{name} was to raise on every rank", answers, pool.stacks()))
            discard_pool(world_size, kill=True)
            return answers
        if not all(isinstance(answer, _Value) for answer in answers):
            raise RanksError(_report(f"{name} failed", answers, pool.stacks()))
        settled = pool.call(None, SETTLE_TIMEOUT)
        if not all(isinstance(answer, _Value) for answer in settled):
            raise RanksError(_report(f"{name} left the ranks out of step", settled, pool.stacks()))
        if not all(answer.value for answer in settled):
            discard_pool(world_size)  # `end_training` has ended the process group
    except BaseException:
        discard_pool(world_size, kill=True)
        raise
    return [answer.value for answer in answers]


def discard_pool(world_size: int, kill: bool = False) -> None:
    """End the processes of one world size; the next call starts new ones."""
    if (pool := _pools.pop(world_size, None)) is not None:
        pool.close(kill)


def close_pools() -> None:
    for world_size in list(_pools):
        discard_pool(world_size)


def pids_of_pool(world_size: int) -> list[int]:
    return [process.pid for process in _pools[world_size].processes] if world_size in _pools else []


# --- in the process that asks ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Value:
    value: Any


class _Pool:
    def __init__(self, world_size: int):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(PRELOAD))
        self.calls = 0
        self.folder = Path(tempfile.mkdtemp(prefix="ranks-"))
        self.store = None
        if world_size > 1:
            self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        port = self.store.port if self.store else None
        self.processes, self.connections = [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, rank, world_size, port, str(self._stack_file(rank))), daemon=True
            )
            process.start()
            theirs.close()
            self.processes.append(process)
            self.connections.append(ours)

    def alive(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def call(self, request: Any, timeout: float) -> list[_Value | Raised | None]:
        """One answer a rank; None from a rank that did not answer in time."""
        message = pickle.dumps(request)
        for connection in self.connections:
            connection.send_bytes(message)
        answers: list[_Value | Raised | None] = [None] * len(self.connections)
        waiting = dict(zip(self.connections, range(len(self.connections))))
        deadline = time.monotonic() + timeout
        while waiting and (left := deadline - time.monotonic()) > 0:
            for connection in wait_for_any(list(waiting), left):
                rank = waiting.pop(connection)
                try:
                    answers[rank] = pickle.loads(connection.recv_bytes())
                except EOFError:
                    self.processes[rank].join(GRACE)
                    message = f"the process ended with exit code {self.processes[rank].exitcode}"
                    answers[rank] = Raised(("EOFError",), message, message)
                if isinstance(answers[rank], Raised):
                    deadline = min(deadline, time.monotonic() + GRACE)
        self.silent: list[int] = list(waiting.values())
        return answers

    def stacks(self) -> dict[int, str]:
        """Where the ranks that gave no answer are."""
        for rank in self.silent:
            os.kill(self.processes[rank].pid, signal.SIGUSR1)
        if self.silent:
            time.sleep(0.5)
        return {rank: self._stack_file(rank).read_text() for rank in self.silent}

    def close(self, kill: bool) -> None:
        for connection in self.connections:
            connection.close()  # a rank that waits for a request takes this as the end
        for process in self.processes:
            if not kill:
                process.join(GRACE)
            if process.is_alive():
                process.kill()
            process.join()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _stack_file(self, rank: int) -> Path:
        return self.folder / f"rank{rank}.stacks"


_pools: dict[int, _Pool] = {}


def _report(headline: str, answers: list[_Value | Raised | None], stacks: dict[int, str]) -> str:
    lines = [headline]
    for rank, answer in enumerate(answers):
        if isinstance(answer, Raised):
            lines += [f"--- rank {rank} raised {answer.type_name}", answer.traceback.rstrip()]
        elif answer is None:
            lines += [f"--- rank {rank} did not answer in time", stacks.get(rank, "").rstrip()]
        else:
            lines += [f"--- rank {rank} returned"]
    return "\n".join(lines)


# --- on a rank -------------------------------------------------------------------------------------------------------


def _serve(connection: Any, rank: int, world_size: int, port: int | None, stack_file: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    stacks = open(stack_file, "w")
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=False)
    _set_environment(rank, world_size, port)
    torch.set_num_threads(1)
    if world_size > 1:
        store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=COLLECTIVE_TIMEOUT)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=COLLECTIVE_TIMEOUT)
    environment = dict(os.environ)
    gc.freeze()  # what was imported before the fork need not be searched between calls
    while True:
        try:
            request = connection.recv_bytes()
        except EOFError:
            break
        connection.send_bytes(_answer(request, environment))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def _set_environment(rank: int, world_size: int, port: int | None) -> None:
    prove = os.environ.get("ACCEL_TP_DDP_PROVE", "never")  # see conftest.py
    for name in list(os.environ):
        if name.startswith(FOREIGN_ENVIRONMENT) or name in RANK_ENVIRONMENT:
            del os.environ[name]
    os.environ.update(ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", ACCEL_TP_DDP_PROVE=prove)
    if world_size > 1:
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(world_size),
            LOCAL_WORLD_SIZE=str(world_size),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )


def _answer(request: bytes, environment: dict[str, str]) -> bytes:
    try:
        call = pickle.loads(request)
        if call is None:
            return pickle.dumps(_Value(_settle(environment)))
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        fn, args, kwargs = call
        return pickle.dumps(_Value(fn(*args, **kwargs)))
    except BaseException as error:
        return pickle.dumps(Raised.of(error))


def _settle(environment: dict[str, str]) -> bool:
    """Put back what a call may have left; the barrier shows at once whether the ranks are still in step.

    False if the process group is gone, which the next call would need.
    """
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    os.environ.clear()
    os.environ.update(environment)
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    gc.collect()
    if dist.is_initialized():
        dist.barrier()
    return dist.is_initialized() or "WORLD_SIZE" not in environment
