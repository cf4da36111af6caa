"""How long `accel-tp-ddp plan` takes for published configs, and how much memory.

    python -m benchmarks.plans [--tp 2] [--only qwen2.5-7b]

Each in a process of its own, imports included. Exit code 1 where one takes more than 60 s or 4 GiB.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

CONFIGS = Path(__file__).parent / "configs"
MOST_SECONDS = 60.0
MOST_GIB = 4.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = sorted(path.stem for path in CONFIGS.glob("*.json"))
    parser.add_argument("--tp", default="2", metavar="N")
    parser.add_argument("--only", choices=names, metavar="NAME", help=", ".join(names))
    args = parser.parse_args()
    failed = 0
    print(f"{'config':<18}{'parameters':>18}{'a rank':>12}{'plan':>9}{'sizes':>9}{'peak':>11}")
    for name in [args.only] if args.only else names:
        found, seconds, peak = _run(name, "--tp", args.tp)
        _, seconds_for_sizes, peak_for_sizes = _run(name)
        peak = max(peak, peak_for_sizes)
        number, share = found["totals"]["parameters"], found["totals"]["ranks"][0]["bytes"] / 2**30
        cells = f"{seconds:>7.1f} s{seconds_for_sizes:>7.1f} s{peak:>7.2f} GiB"
        print(f"{name:<18}{number:>18,}{share:>8.1f} GiB{cells}", flush=True)
        failed += max(seconds, seconds_for_sizes) > MOST_SECONDS or peak > MOST_GIB
    return 1 if failed else 0


def _run(name: str, *arguments: str) -> tuple[dict, float, float]:
    """What the command says, the seconds that it takes, and its peak in GiB."""
    command = [sys.executable, "-m", "accel_tp_ddp.cli", "plan", str(CONFIGS / f"{name}.json"), *arguments, "--json"]
    begin = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        printed = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{name}: exit code {process.returncode}")
    peak = usage.ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
    return json.loads(printed), time.monotonic() - begin, peak


if __name__ == "__main__":
    sys.exit(main())
