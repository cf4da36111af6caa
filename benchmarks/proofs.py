"""Proofs of every architecture's plan with an empty ledger, and the ledger that the package ships.

    python -m benchmarks.proofs --tp 2 --group causal curated          # the small models of the sweep
    python -m benchmarks.proofs --tp 2 4 --group default               # default configs, as large as they are
    python -m benchmarks.proofs --tp 2 4 --group default --ledger      # and write what was proved into the package

For each: "proved", and on what small model; "partly", where planned modules were not reached; "unproved", where no
small model could be built; "refused"; "no plan". With the seconds that it took on these ranks. A case of the sweep of
which not all is reached is compared as the sweep feeds it: "fed". Exit code 1 if a plan is refused.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from accel_tp_ddp import PlanError, resolve_plan
from accel_tp_ddp.core.errors import WrongPlanError
from accel_tp_ddp.plans.shipped import model_types
from accel_tp_ddp.proof.compare import CpuRanks, compare
from accel_tp_ddp.proof.fingerprint import fingerprint
from accel_tp_ddp.proof.ledger import read_shipped, write_shipped
from accel_tp_ddp.proof.prove import prove_plan

from .sweep import cases, causal
from .sweep.processes import each, first_line, on_ranks

DEFAULT = "default"


def main(argv: Sequence[str] | None = None) -> int:
    groups = cases.groups()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.proofs", description=__doc__)
    parser.add_argument("--group", nargs="*", choices=[*sorted(groups), DEFAULT], default=[*sorted(groups), DEFAULT])
    parser.add_argument("--only", nargs="*", help="names of cases; all by default")
    parser.add_argument("--tp", type=int, nargs="*", default=[2])
    parser.add_argument("--jobs", type=int, default=1, help="models at a time")
    parser.add_argument("--seconds", type=float, default=180.0, help="for each model and tp")
    parser.add_argument("--ledger", action="store_true", help="write what is proved into the package's ledger")
    args = parser.parse_args(argv)
    counts: Counter[str] = Counter()
    proved = dict(read_shipped()) if args.ledger else {}
    seconds: list[float] = []
    for group in args.group:
        found = dict(defaults()) if group == DEFAULT else {case.name: case for case in groups[group].cases()}
        tasks = {
            f"{group}: {name} tp {tp}": partial(one, case, tp, args.seconds)
            for name, case in found.items()
            if not args.only or name in args.only
            for tp in args.tp
        }

        def done(name: str, answer: dict[str, Any]) -> None:
            verdict = answer.get("verdict", answer["result"])
            counts[f"{name.partition(':')[0]}: {verdict}"] += 1
            if answer.get("fingerprint") and answer["result"] == "pass":
                proved[answer["fingerprint"]] = name
            if "seconds" in answer:
                seconds.append(answer["seconds"])
            took = f"{answer['seconds']:5.1f} s" if "seconds" in answer else " " * 7
            print(f"{name:58} {verdict:8} {took} {answer.get('reason', '')}", flush=True)

        each(tasks, args.jobs, args.seconds + 60.0, done)
        if args.ledger:
            write_shipped(proved)  # after each group: a run that is ended keeps what it has proved
    print(*(f"{name} {count}" for name, count in sorted(counts.items())), sep="\n")
    if seconds:
        ordered = sorted(seconds)
        median, late = (ordered[int(len(ordered) * share)] for share in (0.5, 0.95))
        print(f"seconds: median {median:.1f}, 95 % {late:.1f}, most {ordered[-1]:.1f}")
    return int(any(name.endswith((": refused", ": fail")) for name in counts))


def defaults() -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """Causal language models of every type that has a plan, of its default config, on the meta device."""
    types = {*causal.architectures(), *(set(model_types()) & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))}
    for name in sorted(types):
        yield name, partial(default_model, name)


def default_model(model_type: str) -> nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type]())


def one(case: Any, tp: int, seconds: float) -> dict[str, Any]:
    try:
        model = case.build() if isinstance(case, cases.Case) else case()
    except cases.NoCase:
        return {"result": "none", "reason": ""}
    except Exception as error:
        return {"result": "skipped", "reason": f"cannot be built: {first_line(error)}"}
    return on_ranks(proof, tp, seconds, model, case if isinstance(case, cases.Case) else None)


def proof(model: nn.Module, case: cases.Case | None) -> dict[str, Any]:
    """On a rank: what came of it."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    rules = case.plan if case is not None else "auto"
    try:
        plan = resolve_plan(model, mesh.size(), rules)
    except PlanError as error:
        return {"result": "skipped", "verdict": "no plan", "reason": first_line(error)}
    started = time.monotonic()
    with TemporaryDirectory() as folder:
        os.environ["ACCEL_TP_DDP_CACHE"] = folder
        try:
            made = prove_plan(model, mesh, plan, rules, "always")
        except WrongPlanError as error:
            return {"result": "fail", "verdict": "refused", "reason": first_line(error)}
    took = time.monotonic() - started
    answer = {"fingerprint": fingerprint(model, plan), "seconds": took}
    how = "; ".join(small.how for small, _ in made.compared)
    if made.how == "proved" and not made.unproved:
        return {**answer, "result": "pass", "verdict": "proved", "reason": how}
    missed = f"not reached: {', '.join(made.unproved)}" if made.how == "proved" else f"not small: {made.unproved[0]}"
    if case is None:
        verdict = "partly" if made.how == "proved" else "unproved"
        return {**answer, "result": "skipped", "verdict": verdict, "reason": missed}
    with CpuRanks(mesh) as cpus:
        found = cases.build(case)
        compared = compare(found, cases.inputs(case, found, 0), cpus, rules)
    if compared.findings:
        return {
            "result": "fail",
            "verdict": "refused",
            "reason": f"{missed}; as the sweep feeds it: {compared.findings[0]}",
        }
    return {**answer, "result": "pass", "verdict": "fed", "reason": f"as the sweep feeds it; {missed}"}


if __name__ == "__main__":
    sys.exit(main())
