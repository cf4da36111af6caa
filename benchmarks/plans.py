"""How long `accel-tp-ddp plan` takes for published configs, and how much memory.

    python -m benchmarks.plans [--tp 2] [--only qwen2.5-7b]

Each in a process of its own, imports included. Exit code 1 where one takes more than 60 s or 4 GiB.
"""

from __future__ import annotations

import argparse
import sys

from .launch import CONFIGS, run_command

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
        tree, sizes = run_command("plan", name, "--tp", args.tp), run_command("plan", name)
        peak, found = max(tree.peak, sizes.peak), tree.found
        number, share = found["totals"]["parameters"], found["totals"]["ranks"][0]["bytes"] / 2**30
        cells = f"{tree.clock:>7.1f} s{sizes.clock:>7.1f} s{peak:>7.2f} GiB"
        print(f"{name:<18}{number:>18,}{share:>8.1f} GiB{cells}", flush=True)
        failed += max(tree.clock, sizes.clock) > MOST_SECONDS or peak > MOST_GIB
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
