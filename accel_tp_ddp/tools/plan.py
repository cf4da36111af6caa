"""`accel-tp-ddp plan`: which module gets which style, resolved or inferred."""

from __future__ import annotations

from typing import Any

import yaml
from torch.distributed.device_mesh import DeviceMesh

from ..core.errors import BadInputError
from ..plans.plan import resolve_plan
from ..proof.infer import infer_plan
from .ranks import on_cpu_ranks
from .target import build_target

__all__ = ["as_text", "show_plan"]


def show_plan(
    model: str, tp_size: int, plan: str = "auto", infer: bool = False, trust_remote_code: bool = False
) -> dict[str, Any]:
    """The resolved plan of a model, or rules that are inferred for it and proved, whatever plan there is.

    Args:
        model: See `build_target`.
        tp_size: Tensor-parallel ranks.
        plan: `"auto"`, or a file; see `resolve_plan`.
        infer: Whether rules are inferred, on that many local CPU ranks.
        trust_remote_code: Whether code that comes with a checkpoint may run.

    Returns:
        `rules`: the style of each planned module, or of the names with `*` that were inferred; `text`: to be printed.

    Raises:
        BadInputError: If there is no such model.
        PlanError: If its plan cannot be carried out, or none is found.
    """
    if infer:
        if tp_size < 2:
            raise BadInputError(f"--tp is {tp_size}; a plan is proved on two ranks or more. Give 2 or more.")
        return on_cpu_ranks(tp_size, _infer, model, trust_remote_code)
    if tp_size < 1:
        raise BadInputError(f"--tp is {tp_size}. Give 1 or more.")
    found = resolve_plan(build_target(model, trust_remote_code=trust_remote_code), tp_size, plan)
    return {"rules": {entry.site.name: entry.label for entry in found.entries}, "text": str(found)}


def _infer(mesh: DeviceMesh, model: str, trust_remote_code: bool) -> dict[str, Any]:
    rules = dict(infer_plan(build_target(model, "meta", trust_remote_code), mesh))
    return {"rules": rules, "text": yaml.safe_dump(rules, sort_keys=False).rstrip()}


def as_text(result: dict[str, Any]) -> str:
    """What is printed: the plan as a table, or inferred rules as YAML."""
    return str(result["text"])
