"""Run programs under plain DDP and at tp x dp, and print a row for each. Exit code 1 if one differs.

python -m benchmarks.programs --programs DIR --only "accelerate multi*" "trl rloo"

DIR holds copies of huggingface/accelerate, huggingface/peft, huggingface/trl (their `examples`) and of
huggingface/transformers (`examples/pytorch`), under these names. Programs that are installed need none.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

import torch

from . import standins
from .catalog import PROGRAMS
from .compare import DOUBLE_SCALE, differences
from .run import ProgramFailed, missing, preload, run_program


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.programs", description=__doc__)
    parser.add_argument("--programs", type=Path, help="folder of repositories")
    parser.add_argument("--only", nargs="*", default=["*"], help="names, with * for anything; all by default")
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--dp", type=int, default=2)
    parser.add_argument("--plain", action="store_true", help="run plain DDP alone: whether the programs run here")
    parser.add_argument("--launcher", action="store_true", help="by `accelerate launch`, as users do: slower")
    parser.add_argument("--double", action="store_true", help="in double precision, at a millionth of the tolerance")
    parser.add_argument("--seconds", type=float, default=420.0, help="for each run")
    parser.add_argument("--keep", type=Path, help="folder for what the runs leave")
    parser.add_argument("--most", type=int, default=6, help="differences shown of a program")
    args = parser.parse_args(argv)
    kept = args.keep or Path(tempfile.mkdtemp(prefix="programs-"))
    if not args.launcher:
        preload()
    wrong = 0
    print("| program | compared | result |\n| --- | --- | --- |")
    for program in PROGRAMS:
        if not any(fnmatchcase(program.name, pattern) for pattern in args.only):
            continue
        reason = missing(program, args.programs)
        if reason:
            print(f"| {program.name} | | not run: {reason} |", flush=True)
            continue
        folder = kept / program.name.replace(" ", "_").replace(",", "")
        double = args.double or program.double
        models = kept / ("standins-double" if double else "standins")
        if not models.is_dir():
            standins.build(models, torch.float64 if double else torch.float32)
        started = time.monotonic()
        where = "plain DDP"
        try:
            run = partial(run_program, program, seconds=args.seconds, launcher=args.launcher, double=double)
            shared = (models, args.programs)
            try:
                plain = run(folder / "plain", *shared, 1, args.dp)
            except ProgramFailed as error:  # now and then torch hangs as plain DDP's ranks end
                print(f"{program.name}, plain DDP, is run again: {error}", file=sys.stderr, flush=True)
                plain = run(folder / "plain", *shared, 1, args.dp)
            where = f"tp {args.tp} x dp {args.dp}"
            ours = plain if args.plain else run(folder / "tp", *shared, args.tp, args.dp)
            compared, found = differences(ours, plain, program.own, DOUBLE_SCALE if double else 1.0)
            left = len(found) - args.most
            result = "; ".join(text[:200] for text in found[: args.most]) + (f" and {left} more" if left > 0 else "")
        except ProgramFailed as error:
            compared, found, result = [], ["failed"], f"{where}: {error}"
        wrong += bool(found)
        spent = f"({time.monotonic() - started:.0f} s)"
        print(f"| {program.name} | {', '.join(compared)} | {result or 'equal'} | {spent}", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
