"""`accel-tp-ddp verify`: a plan proved on CPU ranks of this machine, before there is a GPU."""

from __future__ import annotations

import os
import pickle
import socket
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.distributed.device_mesh import init_device_mesh

from ..core.errors import BadInputError, CheckpointError, PlanError, WrongPlanError
from ..plans.plan import resolve_plan
from ..proof.compare import TOLERANCE, Compared
from ..proof.prove import prove_plan
from ..proof.small import Small
from .target import build_target

__all__ = ["as_table", "verify"]


def verify(model: str, tp_size: int, plan: str = "auto", full: bool = False, trust_remote_code: bool = False) -> Any:
    """Prove a plan on `tp_size` local CPU ranks.

    Args:
        model: See `build_target`.
        tp_size: Tensor-parallel ranks; at least two.
        plan: `"auto"`, or a file; see `resolve_plan`.
        full: Whether the model itself is compared, as large as it is, with random weights; else a small one.
        trust_remote_code: Whether code that comes with a checkpoint may run.

    Returns:
        `ok`, `error` where it is not, `how` it was tried, `unproved`: what was not reached, and `modules`: for each
        its name, the `forward` error (None: a rank's part, which cannot be compared), the largest `gradient` error of
        its parameters, and whether the ranks hold equal gradients of what is `replicated`.

    Raises:
        BadInputError: If there is no such model, or its plan cannot be carried out.
    """
    if tp_size < 2:
        raise BadInputError(f"--tp is {tp_size}; with one rank there is nothing to prove. Give 2 or more.")
    target = build_target(model, trust_remote_code=trust_remote_code)
    resolve_plan(target, tp_size, plan)  # what is wrong without running anything, said once
    del target
    with tempfile.TemporaryDirectory() as folder:
        args = (tp_size, folder, model, plan, full, trust_remote_code)
        method = "fork" if "fork" in torch.multiprocessing.get_all_start_methods() else "spawn"  # imports once
        torch.multiprocessing.start_processes(_rank, args, tp_size, start_method=method)
        answer = pickle.loads(Path(folder, "answer").read_bytes())
    if "traceback" in answer:
        raise CheckpointError(f"the proof itself failed: {answer['traceback']}")
    return answer


def _rank(rank: int, size: int, folder: str, model: str, plan: str, full: bool, trust_remote_code: bool) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // size))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", _loopback())
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    try:
        answer = _answer(model, size, plan, full, trust_remote_code)
    except PlanError as error:
        answer = {"ok": False, "error": str(error), "how": "", "unproved": [], "modules": []}
    except Exception:
        answer = {"traceback": traceback.format_exc()}
    if rank == 0:
        part = Path(folder, "part")
        part.write_bytes(pickle.dumps(answer))
        part.rename(Path(folder, "answer"))
    dist.barrier()
    dist.destroy_process_group()


def _loopback() -> str:
    names = [name for _, name in socket.if_nameindex() if name.startswith("lo")]
    return names[0] if names else ""


def _answer(model: str, tp_size: int, plan: str, full: bool, trust_remote_code: bool) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (tp_size,), mesh_dim_names=("tp",))
    target = build_target(model, "cpu" if full else "meta", trust_remote_code)
    error: str | None = None
    unproved: Sequence[str] = ()
    made: Sequence[tuple[Small, Compared]] = ()
    try:
        proof = prove_plan(target, mesh, resolve_plan(target, tp_size, plan), plan, "always", full)
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
    how = "; ".join(small.how for small, _ in made)
    return {"ok": error is None, "error": error, "how": how, "unproved": list(unproved), "modules": rows}


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
    if answer["unproved"]:
        lines.append(f"not reached, and so not proved: {', '.join(answer['unproved'])}")
    lines.append("the plan is right" if answer["ok"] else answer["error"])
    return "\n".join(lines)


def _cell(error: float | None, otherwise: str) -> str:
    if error is None:
        return otherwise
    return f"{error:.0e}" + (" WRONG" if not error < TOLERANCE else "")
