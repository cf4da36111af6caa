"""Forked processes with a time limit and a memory limit: what is imported already need not be imported again."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState

MEMORY = 12 << 30  # of addresses, for each process: a size left at its default may be that of a large model
forked = multiprocessing.get_context("fork")


def on_ranks(function: Callable[..., Any], ranks: int, seconds: float, *args: Any) -> dict[str, Any]:
    """`function(*args)` on that many ranks of a gloo group of their own; the worst of their answers.

    An answer is a dictionary with a `result`, and a `reason` where that is no "pass".
    """
    with tempfile.TemporaryDirectory() as folder:
        processes = [forked.Process(target=_rank, args=(rank, ranks, folder, function, args)) for rank in range(ranks)]
        for process in processes:
            process.start()
        deadline, waiting = time.monotonic() + seconds, list(processes)
        while waiting and time.monotonic() < deadline:
            wait([process.sentinel for process in waiting], deadline - time.monotonic())
            if any(process.exitcode for process in waiting):
                deadline = min(deadline, time.monotonic() + 5.0)  # the others wait for one that has failed
            waiting = [process for process in waiting if process.is_alive()]
        late = [process for process in processes if process.is_alive()]
        for process in late:
            process.kill()
            process.join()
        answers = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(Path(folder).glob("*.json"))]
    order = ("fail", "skipped", "refused", "pass")
    answers.sort(key=lambda answer: order.index(answer["result"]))
    if answers and (answers[0]["result"] != "pass" or len(answers) == ranks):
        return answers[0]
    return {"result": "fail", "reason": f"no answer within {seconds:.0f} s" if late else "a rank died"}


def _rank(rank: int, ranks: int, folder: str, function: Callable[..., Any], args: tuple) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
    with open(os.devnull, "w") as nowhere:  # DDP's warnings on every rank
        os.dup2(nowhere.fileno(), 2)
    AcceleratorState._reset_state(reset_partial_state=True)  # of a process that has had an Accelerator already
    GradientState._reset_state()
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    try:
        answer = function(*args)
    except Exception as error:
        answer = {"result": "fail", "reason": first_line(error), "trace": traceback.format_exc()}
    path = Path(folder, f"{rank}.json")
    path.with_suffix(".part").write_text(json.dumps(answer), encoding="utf-8")
    path.with_suffix(".part").rename(path)
    if answer["result"] != "pass":  # a peer may be elsewhere
        os._exit(1)
    dist.barrier()
    dist.destroy_process_group()


def each(tasks: dict[str, Callable[[], Any]], jobs: int, seconds: float, done: Callable[[str, Any], None]) -> None:
    """Run every task in a process of its own, `jobs` at a time, and hand over what it returned as soon as it has.

    A task that dies or is not ready in time gives `{"result": "fail", ...}`; its children end with it.
    """
    waiting, running = list(tasks.items()), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            name, task = waiting.pop(0)
            ours, theirs = forked.Pipe(duplex=False)
            process = forked.Process(target=_task, args=(theirs, task))
            process.start()
            theirs.close()
            running[name] = (process, ours, time.monotonic() + seconds)
        ends = min(deadline for _, _, deadline in running.values())
        wait([connection for _, connection, _ in running.values()], max(0.0, ends - time.monotonic()))
        for name, (process, connection, deadline) in list(running.items()):
            if connection.poll():
                try:
                    answer = connection.recv()
                except EOFError:
                    answer = {"result": "fail", "reason": "the process died"}
            elif time.monotonic() > deadline:
                answer = {"result": "fail", "reason": f"not ready within {seconds:.0f} s"}
            else:
                continue
            _end(process)
            del running[name]
            done(name, answer)


def _task(connection: Any, task: Callable[[], Any]) -> None:
    os.setsid()  # so that the whole family can be ended
    limit_process()
    connection.send(task())
    connection.close()


def _end(process: Any) -> None:
    process.join(5.0)
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        process.kill()
    process.join()


def limit_process() -> None:
    import transformers

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)


def first_line(error: Exception) -> str:
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text[:300]}"
