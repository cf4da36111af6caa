"""Start a program on ranks, in a folder of its own, and read what it left.

Ranks are forked from this process, which has imported what programs import, into the environment that `accelerate
launch` gives; `launcher=True` takes the launcher itself, which imports everything anew on each rank.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch.distributed as dist

from .catalog import DRIVERS, Program
from .compare import Run, read_run

__all__ = ["ProgramFailed", "missing", "preload", "run_program"]

ROOT = Path(__file__).parents[2]
FOLDER = "PROGRAM_RECORD"  # environment variable: where each rank writes its record
DOUBLE = "PROGRAM_DOUBLE"  # likewise: in double precision
CONFIG = """
distributed_type: MULTI_GPU
num_machines: 1
num_processes: {processes}
main_process_port: 0
mixed_precision: 'no'
"""
SIZES = """
parallelism_config:
  parallelism_config_tp_size: {tp}
  parallelism_config_dp_replicate_size: {dp}
"""
FOREIGN = ("ACCELERATE_", "ACCEL_TP_DDP_", "MASTER_", "PARALLELISM_CONFIG_", "TORCHELASTIC_")
PRELOADED = ("accelerate", "datasets", "transformers.trainer", "transformers.models.llama.modeling_llama")
PRELOADED += ("transformers.models.bert.modeling_bert", "torch.distributed.tensor.parallel", "peft")

ERROR = re.compile(r"(\[rank\d+\]: )?[\w.]*(Error|Exception|Exit)\b")


class ProgramFailed(RuntimeError):
    """A program ended with an error, or did not end."""


def preload() -> None:
    """Import what most programs import, once for all ranks that are forked."""
    for name in PRELOADED:
        importlib.import_module(name)
    if find_spec("trl"):
        importlib.import_module("trl.trainer.grpo_trainer")
    gc.collect()
    gc.freeze()  # what is here before the ranks are forked need not be searched by them


def missing(program: Program, repositories: Path | None) -> str | None:
    """Why a program cannot be run here."""
    absent = [name for name in program.needs if find_spec(name) is None]
    if absent:
        return f"{', '.join(absent)} not installed"
    if program.is_file and not (repositories and (repositories / program.target).is_file()):
        return f"no {program.target} in --programs"
    return None


def run_program(
    program: Program,
    folder: Path,
    standins: Path,
    repositories: Path | None,
    tp: int,
    dp: int,
    *,
    seconds: float = 420.0,
    launcher: bool = False,
    double: bool = False,
) -> Run:
    """Run it on `tp x dp` CPU ranks; at tp 1 that is plain DDP, without this package."""
    shutil.rmtree(folder, ignore_errors=True)
    work, records = folder / "work", folder / "records"
    shutil.copytree(standins, work)
    records.mkdir()
    before = {str(path.relative_to(work)) for path in work.rglob("*") if path.is_file()}
    environment = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    environment |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", FOLDER: str(records)}
    environment |= {"HF_HOME": str(folder / "cache"), "HF_DATASETS_CACHE": str(folder / "cache")}
    if double:
        # Weights are then loaded where `record.Double` sees it, not by other threads.
        environment |= {DOUBLE: "1", "HF_DEACTIVATE_ASYNC_LOAD": "1"}
    arguments = _command(program, repositories)
    output = folder / "output.txt"
    start = _launch if launcher else _fork
    with output.open("w") as file:
        failed = start(arguments, tp, dp, work, environment, file.fileno(), seconds)
    if failed:
        raise ProgramFailed(f"{failed}: {_last_error(output.read_text())}")
    return read_run(records, work, before)


def _command(program: Program, repositories: Path | None) -> list[str]:
    if program.is_file:
        assert repositories is not None
        return [str((repositories / program.target).resolve()), *program.args]
    if program.target.endswith(".py"):
        return [str(DRIVERS / program.target), *program.args]
    return ["-m", program.target, *program.args]


def _launch(
    arguments: list[str], tp: int, dp: int, work: Path, environment: dict[str, str], output: int, seconds: float
) -> str | None:
    """Why it failed, or None."""
    config = work.parent / "config.yaml"
    config.write_text(CONFIG.format(processes=tp * dp) + (SIZES.format(tp=tp, dp=dp) if tp > 1 else ""))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += ["-m", "accel_tp_ddp.launch"] if tp > 1 else []
    command += ["-m", "benchmarks.programs.record", *arguments]
    process = subprocess.Popen(
        command, env=environment, cwd=work, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        code = process.wait(seconds)
        return None if code == 0 else f"exit code {code}"
    except subprocess.TimeoutExpired:
        return f"no end in {seconds:.0f} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _fork(
    arguments: list[str], tp: int, dp: int, work: Path, environment: dict[str, str], output: int, seconds: float
) -> str | None:
    """Why it failed, or None."""
    world = tp * dp
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
    # As under torchrun: the store is the one that started the ranks.
    shared |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    if tp > 1:
        shared |= {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": tp}
        shared |= {"PARALLELISM_CONFIG_DP_REPLICATE_SIZE": dp}
    environment = {**environment, **{name: str(value) for name, value in shared.items()}}
    ranks = {}
    for rank in range(world):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "ROLE_RANK": str(rank)}
        ranks[_forked(lambda: _be_rank(arguments, tp > 1, work, {**environment, **own}, output))] = rank
    deadline = time.monotonic() + seconds
    failed = None
    while ranks and failed is None:
        for pid in list(ranks):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended and (code := os.waitstatus_to_exitcode(status)) != 0:
                failed = f"rank {ranks[pid]} ended with exit code {code}"
            if ended:
                del ranks[pid]
        if time.monotonic() > deadline:
            failed = f"no end in {seconds:.0f} s, of rank {sorted(ranks.values())}"
        time.sleep(0.1)
    for pid in ranks:
        os.kill(pid, signal.SIGUSR1)  # where they are: into stacks.txt
    time.sleep(0.5 if ranks else 0.0)
    for pid in ranks:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return failed


def _forked(call: Callable[[], None]) -> int:
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        call()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _be_rank(
    arguments: list[str], tensor_parallel: bool, work: Path, environment: dict[str, str], output: int
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(work)
    faulthandler.register(signal.SIGUSR1, open("../stacks.txt", "a"), all_threads=True)
    import datasets.config

    datasets.config.HF_DATASETS_CACHE = Path(environment["HF_DATASETS_CACHE"])  # read at import
    if tensor_parallel:
        from accel_tp_ddp.launch import main

        main(["-m", "benchmarks.programs.record", *arguments])
    else:
        from .record import main as record

        sys.argv = ["record.py", *arguments]
        record()


def _last_error(output: str) -> str:
    """The last exception that is not about a rank that has gone."""
    found = [line for line in output.splitlines() if ERROR.match(line) and "gloo" not in line]
    return found[-1][:300] if found else output[-300:]
