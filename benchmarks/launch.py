"""What benchmarks start: ranks of themselves, and a command of this package in a process that is measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["CONFIGS", "Ran", "run_command", "start_ranks"]

CONFIGS = Path(__file__).parent / "configs"


def start_ranks(module: str, count: int, arguments: Sequence[str]) -> int:
    """Run `python -m MODULE ARGUMENTS` on so many CPU ranks; the exit code."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(count)]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", module, *arguments]
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    return subprocess.run(command, env={"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": path}).returncode


@dataclass(frozen=True)
class Ran:
    """What a command said, and what it took: seconds of the clock and of the processor, and GiB at its peak."""

    found: dict[str, Any]
    clock: float
    processor: float
    peak: float


def run_command(command: str, name: str, *arguments: str) -> Ran:
    """`accel-tp-ddp COMMAND` on the published config of that name, or another model, in a process of its own."""
    path = CONFIGS / f"{name}.json"
    model = str(path) if path.exists() else name
    line = [sys.executable, "-m", "accel_tp_ddp.cli", command, model, *arguments, "--json"]
    begin = time.monotonic()
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        printed = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{name}: exit code {process.returncode}")
    peak = usage.ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
    return Ran(json.loads(printed), time.monotonic() - begin, usage.ru_utime + usage.ru_stime, peak)
