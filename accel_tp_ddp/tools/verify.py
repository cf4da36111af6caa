"""`accel-tp-ddp verify`: a plan proved on CPU ranks of this machine, before there is a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.distributed.device_mesh import DeviceMesh

from ..core.errors import BadInputError, NoPlanError, WrongPlanError
from ..plans.plan import resolve_plan
from ..plans.rules import PlanLike
from ..proof.compare import TOLERANCE, Compared
from ..proof.infer import infer_plan
from ..proof.prove import prove_plan
from ..proof.small import Small
from .ranks import on_cpu_ranks
from .target import build_target

__all__ = ["as_table", "verify"]


def verify(model: str, tp_size: int, plan: str = "auto", full: bool = False, trust_remote_code: bool = False) -> Any:
    """Prove a plan on `tp_size` local CPU ranks; one that is inferred, where there is none.

    Args:
        model: See `build_target`.
        tp_size: Tensor-parallel ranks; at least two.
        plan: `"auto"`, or a file; see `resolve_plan`.
        full: Whether the model itself is compared, as large as it is, with random weights; else a small one.
        trust_remote_code: Whether code that comes with a checkpoint may run.

    Returns:
        `ok`, `error` where it is not, `how` it was tried, `unproved`: what was not reached, `inferred`: the rules
        where there was no plan, and `modules`: for each its name, the `forward` error (None: a rank's part, which
        cannot be compared), the largest `gradient` error of its parameters, and whether the ranks hold equal gradients
        of what is `replicated`.

    Raises:
        BadInputError: If there is no such model.
        PlanError: If its plan cannot be carried out.
    """
    if tp_size < 2:
        raise BadInputError(f"--tp is {tp_size}; with one rank there is nothing to prove. Give 2 or more.")
    target, inferred = build_target(model, trust_remote_code=trust_remote_code), False
    try:
        resolve_plan(target, tp_size, plan)  # what is wrong without running anything, said once
    except NoPlanError:
        inferred = True
    del target
    return on_cpu_ranks(tp_size, _verify, model, plan, full, trust_remote_code, inferred)


def _verify(
    mesh: DeviceMesh, model: str, plan: str, full: bool, trust_remote_code: bool, inferred: bool
) -> dict[str, Any]:
    target = build_target(model, "cpu" if full else "meta", trust_remote_code)
    found = infer_plan(target, mesh) if inferred else None
    rules: PlanLike = plan if found is None else found
    error: str | None = None
    unproved: Sequence[str] = ()
    made: Sequence[tuple[Small, Compared]] = ()
    try:
        proof = prove_plan(target, mesh, resolve_plan(target, mesh.size(), rules), rules, "always", full)
        made, unproved = proof.compared, proof.unproved
        if proof.how == "unproved":
            error, unproved = f"not proved: {unproved[0]}", ()
    except WrongPlanError as wrong:
        error, made = str(wrong), wrong.compared
    rows = []
    for small, compared in made:
        for row in compared.rows:
            name = ".".join(part for part in (small.prefix, row.module) if part)
            rows.append({"module": name, "forward": row.output, "gradient": row.gradient, "replicated": row.equal})
    return {
        **{"ok": error is None, "error": error, "how": "; ".join(small.how for small, _ in made)},
        **{"unproved": list(unproved), "inferred": None if found is None else dict(found), "modules": rows},
    }


def as_table(answer: dict[str, Any]) -> str:
    """The answer as text: a line for each module, and the verdict last."""
    rows = [("module", "forward", "gradient", "replicated")]
    for row in answer["modules"]:
        equal = {None: "", True: "equal", False: "DIFFERS"}[row["replicated"]]
        rows.append((row["module"] or "(the model)", _cell(row["forward"], "part"), _cell(row["gradient"], ""), equal))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    if answer["how"]:
        lines.append(f"tried on {answer['how']}; relative errors, below {TOLERANCE:g} is rounding")
    if answer["inferred"]:
        lines += [
            "there is no plan for this model; inferred:",
            *(f"  {n}: {s}" for n, s in answer["inferred"].items()),
        ]
    if answer["unproved"]:
        lines.append(f"not reached, and so not proved: {', '.join(answer['unproved'])}")
    lines.append("the plan is right" if answer["ok"] else answer["error"])
    return "\n".join(lines)


def _cell(error: float | None, otherwise: str) -> str:
    if error is None:
        return otherwise
    return f"{error:.0e}" + (" WRONG" if not error < TOLERANCE else "")
