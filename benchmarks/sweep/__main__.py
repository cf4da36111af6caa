"""Run groups of cases, save the results as they come, and write the table. Exit code 1 if a case of ours fails."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from . import table
from .cases import groups
from .compare import Column, run_case
from .processes import each

DOCUMENT = Path("docs/ARCHITECTURES.md")


def main(argv: Sequence[str] | None = None) -> int:
    known = groups()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep", description=__doc__)
    parser.add_argument("--group", nargs="*", choices=sorted(known), default=[], help="all by default")
    parser.add_argument("--only", nargs="*", help="names of cases; all by default. Shows tracebacks")
    parser.add_argument("--tp", type=int, nargs="*", default=[2])
    parser.add_argument("--dp", type=int, help="also replicas: with the first tp, inside DDP")
    parser.add_argument("--peer", action="store_true", help="also transformers' own tensor parallelism, first tp")
    parser.add_argument("--jobs", type=int, default=1, help="cases at a time")
    parser.add_argument("--seconds", type=float, default=90.0, help="for each case and layout")
    parser.add_argument("--resume", action="store_true", help="leave out what there are saved results of")
    parser.add_argument("--results", type=Path, default=table.RESULTS, help="folder of the saved results")
    parser.add_argument("--table", action="store_true", help=f"run nothing, only write {DOCUMENT}")
    args = parser.parse_args(argv)
    failed = False
    if not args.table:
        columns = [Column(tp) for tp in args.tp] + ([Column(args.tp[0], args.dp)] if args.dp else [])
        columns += [Column(args.tp[0], kind=kind) for kind in ("peer, loading", "peer, built") if args.peer]
        for group in args.group or sorted(known):
            failed |= run_group(group, known[group].cases(), columns, args)
    else:
        DOCUMENT.write_text(table.document(known, args.results), encoding="utf-8")
    return int(failed)


def run_group(group: str, cases: list[Any], columns: list[Column], args: argparse.Namespace) -> bool:
    """Whether one of ours has failed."""
    answers = table.load(group, args.results)
    if args.only:
        missing = set(args.only) - {case.name for case in cases}
        if missing:
            print(f"{group} has no case {', '.join(sorted(missing))}")
        cases = [case for case in cases if case.name in args.only]
    tasks, failed = {}, False
    for case in cases:
        left = [column for column in columns if not (args.resume and column.name in answers.get(case.name, {}))]
        if left:
            tasks[case.name] = partial(run_case, case, left, args.seconds)

    def done(name: str, answer: dict[str, Any]) -> None:
        nonlocal failed
        if "result" in answer:  # of the process as a whole
            answer = {column.name: answer for column in columns}
        traces = {column: own.pop("trace") for column, own in answer.items() if "trace" in own}
        if args.only:
            print("".join(trace for column, trace in traces.items() if column.startswith("tp")), end="")
        if not answer:
            return
        answers.setdefault(name, {}).update(answer)
        table.save(group, answers, args.results)
        failed |= any(own["result"] == "fail" for column, own in answer.items() if column.startswith("tp"))
        for column, own in answer.items():
            print(f"{name:28} {column:18} {own['result']:8} {own['reason']}", flush=True)

    each(tasks, args.jobs, args.seconds * (len(columns) + 1), done)
    return failed


if __name__ == "__main__":
    sys.exit(main())
