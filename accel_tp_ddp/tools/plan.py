"""`accel-tp-ddp plan`: the plan of a model as a tree, resolved or inferred, or which sizes the model allows."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import yaml
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from ..core.errors import BadInputError, NoPlanError, PlanError
from ..plans.names import wildcards
from ..plans.plan import Plan, UnusedRule, resolve_plan
from ..plans.rules import InferredPlan, PlanLike
from ..proof.fingerprint import fingerprint
from ..proof.infer import infer_plan
from ..proof.ledger import Ledger
from ..proof.prove import prove_plan
from .ranks import on_cpu_ranks
from .target import build_target
from .tree import Node, as_tree, ranges, readable, rows, totals, walk

__all__ = ["MOST", "as_text", "show_plan", "show_sizes"]

#: The largest number of ranks that `show_sizes` tries.
MOST = 64

#: Of all that a rank holds, the share from which matrices that no rule names are worth a warning.
LARGE = 0.05


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
        `model`: its class; `tp_size`; `rules`: the style of each planned module, or of the names with `*` that were
        inferred; `tree`: see `as_tree`; `totals`: see `tree.totals`; `replicated`: for each reason `why` parameters
        are, how many `parameters` there are, their `bytes` and their `names`; `unused`: the `rule`, `style` and
        `source` of each rule that was not followed, and the one by which it is `overridden` (None: it matches
        nothing); `warnings`: sentences; `proof`: its `status` ("shipped", "cache", "proved", "unproved", "unknown", or
        "one rank") and the names of what is `unproved`; `text`: to be printed.

    Raises:
        BadInputError: If there is no such model, or no plan for it.
        PlanError: If its plan cannot be carried out, or none is found.
    """
    if infer and plan != "auto":
        raise BadInputError("--infer finds a plan, --plan gives one. Give one of the two.")
    if infer and tp_size < 2:
        raise BadInputError(f"--tp is {tp_size}; a plan is proved on two ranks or more. Give 2 or more.")
    if tp_size < 1:
        raise BadInputError(f"--tp is {tp_size}. Give 1 or more, or leave it out to see which sizes there are.")
    target = build_target(model, trust_remote_code=trust_remote_code)
    inferred = on_cpu_ranks(tp_size, _infer, model, trust_remote_code) if infer else None
    rules: PlanLike = InferredPlan(inferred["rules"]) if inferred else plan
    resolved = _resolved(target, tp_size, rules)
    tree = as_tree(target, resolved)
    result = {
        **{"model": resolved.model, "tp_size": tp_size},
        "rules": inferred["rules"] if inferred else {entry.site.name: entry.label for entry in resolved.entries},
        **{"tree": tree, "totals": totals(tree, tp_size), "replicated": _replicated(tree)},
        **{"unused": [_unused(rule) for rule in resolved.unused]},
        "proof": inferred["proof"] if inferred else _known(target, resolved),
    }
    result["warnings"] = _warnings(target, resolved, result)
    lines = _lines(resolved, result)
    if infer:  # a file for --plan, with the tree as comments
        lines = [*(f"# {line}".rstrip() for line in lines), yaml.safe_dump(result["rules"], sort_keys=False).rstrip()]
    return {**result, "text": "\n".join(lines)}


def _infer(mesh: DeviceMesh, model: str, trust_remote_code: bool) -> dict[str, Any]:
    target = build_target(model, "meta", trust_remote_code)
    rules = infer_plan(target, mesh)
    proof = prove_plan(target, mesh, resolve_plan(target, mesh.size(), rules), rules)
    return {"rules": dict(rules), "proof": {"status": proof.how, "unproved": list(proof.unproved)}}


def _resolved(target: nn.Module, tp_size: int, rules: PlanLike) -> Plan:
    try:
        return resolve_plan(target, tp_size, rules)
    except NoPlanError as error:
        raise BadInputError(
            f"{type(target).__name__} has no plan of its own and this package ships none for it. Give --infer to find "
            "one, or --plan FILE."
        ) from error


def _known(target: nn.Module, plan: Plan) -> dict[str, Any]:
    """Whether this plan is in the ledger; nothing is run."""
    if plan.tp_size == 1:
        return {"status": "one rank", "unproved": []}
    known = Ledger().known(fingerprint(target, plan))
    return {"status": known.source if known else "unknown", "unproved": list(known.unproved) if known else []}


def _replicated(tree: Node) -> list[dict[str, Any]]:
    """What every rank holds, by why it does, the largest part first."""
    found: dict[str, dict[str, Any]] = {}
    for node, param in walk(tree):
        if param["replicated"] and not param["tied"]:
            part = found.setdefault(param["replicated"], {"parameters": 0, "bytes": 0, "names": []})
            part["parameters"] += node["count"]
            part["bytes"] += param["bytes"]
            part["names"].append(f"{node['name']}.{param['name']}".lstrip("."))
    return sorted(({"why": why, **part} for why, part in found.items()), key=lambda part: -part["bytes"])


def _unused(rule: UnusedRule) -> dict[str, Any]:
    by = rule.overridden
    overridden = {"rule": by.name, "style": by.style, "source": by.source} if by is not None else None
    return {"rule": rule.name, "style": rule.style, "source": rule.source, "overridden": overridden}


def _warnings(target: nn.Module, plan: Plan, result: Mapping[str, Any]) -> list[str]:
    found = []
    if plan.unmatched:
        found.append(f"rules of the model's own plan match nothing: {', '.join(plan.unmatched)}")
    quantized = getattr(getattr(target, "config", None), "quantization_config", None)
    if quantized:
        method = quantized.get("quant_method", "?") if isinstance(quantized, dict) else type(quantized).__name__
        found.append(
            f"the config says that the weights are quantized ({method}); only unquantized ones can be sharded"
        )
    uneven, shared = [], []
    for node, param in walk(result["tree"]):
        name = f"{node['name']}.{param['name']}".lstrip(".")
        if any(local != param["local"][0] for local in param["local"]):
            uneven.append(name)
        if not param["replicated"] and param["ranks"] > 1:
            shared.append(f"{name} on {param['ranks']}")
    if uneven:
        found.append(f"ranks hold parts of different size of {', '.join(uneven)}")
    if shared:
        found.append(f"ranks hold some of the same, as there are more of them than heads: {', '.join(shared)}")
    large, size = _large_without_rule(result["tree"])
    held = result["totals"]["ranks"][0]["bytes"]
    if plan.tp_size > 1 and size > LARGE * held:
        found.append(f"no rule names {', '.join(large)}: {size / held:.1%} of what a rank holds, on each rank")
    if result["proof"]["unproved"]:
        found.append(f"the proof has not reached {', '.join(result['proof']['unproved'])}")
    return found


def _large_without_rule(tree: Node) -> tuple[list[str], int]:
    """Matrices that no rule names."""
    names, size = [], 0
    for node, param in walk(tree):
        if node["style"] is None and param["replicated"] and not param["tied"] and len(param["full"]) > 1:
            names.append(f"{node['name']}.{param['name']}".lstrip("."))
            size += param["bytes"]
    return names, size


# ------------------------------------------------------------------------------------------------------------- as text


def as_text(result: dict[str, Any]) -> str:
    """What is printed: the plan, or inferred rules as YAML, or the sizes."""
    return str(result["text"])


_PROOFS = {
    "shipped": "this plan is proved: by the tests of this package, for this code",
    "cache": "this plan is proved: by an earlier run, for this code",
    "proved": "this plan was proved just now, on a small model of the same class",
    "unknown": "this plan is not known to be right: `prepare` proves it before it touches a weight, and "
    "`accel-tp-ddp verify` does so now",
    "unproved": "this plan is not proved",
    "one rank": "there is nothing to prove: with one rank nothing is sharded",
}


def _lines(plan: Plan, result: Mapping[str, Any]) -> list[str]:
    sums = result["totals"]
    first, largest = sums["ranks"][0]["bytes"], max(rank["bytes"] for rank in sums["ranks"])
    dtypes = ", ".join(sorted({param["dtype"] for _, param in walk(result["tree"])}))
    most = f" (most: {readable(largest)})" if largest != first else ""
    lines = [
        plan.headline,
        f"weights in {dtypes}: {readable(sums['bytes'])} in all, {readable(first)} on the first rank{most}, of which "
        f"{readable(sums['replicated'])} ({sums['replicated_share']:.1%}) are on every rank",
        *("", *rows(result["tree"]), ""),
    ]
    for part in result["replicated"] if plan.tp_size > 1 else ():
        lines.append(f"replicated, {readable(part['bytes'])}, since {part['why']}: {', '.join(part['names'])}")
    lines += _unused_lines(result["unused"])
    lines += [f"warning: {warning}" for warning in result["warnings"]]
    return [*lines, _PROOFS[result["proof"]["status"]]]


def _unused_lines(unused: Iterable[Mapping[str, Any]]) -> list[str]:
    """Rules that were not followed: those of the model one by one, and how many marked ones found no such part."""
    of: dict[str, list[str]] = {}
    for rule in unused:
        by = rule["overridden"]
        if by is not None:
            of.setdefault(f"overridden by those of the {by['source']}", []).append(_spelled(rule))
        elif rule["source"] == "model":
            of.setdefault("as they match nothing", []).append(_spelled(rule))
        else:
            of.setdefault("as there is no such part here", []).append(_spelled(rule))
    return [f"rules unused, {why}: {', '.join(rules)}" for why, rules in of.items()]


def _spelled(rule: Mapping[str, Any]) -> str:
    return f"{rule['rule']} ({rule['source']})"


# ------------------------------------------------------------------------------------------------------ without a size


def show_sizes(model: str, plan: str = "auto", trust_remote_code: bool = False) -> dict[str, Any]:
    """Which numbers of tensor-parallel ranks a plan allows, of those up to `MOST`, and why not the others.

    Args:
        model: See `build_target`.
        plan: `"auto"`, or a file; see `resolve_plan`.
        trust_remote_code: Whether code that comes with a checkpoint may run.

    Returns:
        `model`: its class; `sizes`: for each `tp_size` whether it is `allowed`; where it is, the first rank's `bytes`
        of weights, their `share` of all, the `replicated_share` of them and how many `ranks_per_head` hold the same
        key/value head; where not, `why`; `text`: to be printed.

    Raises:
        BadInputError: If there is no such model, or no plan for it.
        PlanError: If the plan cannot be carried out at any size.
    """
    target = build_target(model, trust_remote_code=trust_remote_code)
    _resolved(target, 1, plan)
    sizes: list[dict[str, Any]] = []
    for tp_size in range(1, MOST + 1):
        try:
            resolved = resolve_plan(target, tp_size, plan)
        except PlanError as error:
            sizes.append({"tp_size": tp_size, "allowed": False, "why": _why_not(error)})
            continue
        tree = as_tree(target, resolved)
        sums = totals(tree, tp_size)
        shared = max((param["ranks"] for _, param in walk(tree) if not param["replicated"]), default=1)
        sizes.append(
            {
                **{"tp_size": tp_size, "allowed": True, "share": sums["share"], "bytes": sums["ranks"][0]["bytes"]},
                **{"replicated_share": sums["replicated_share"], "ranks_per_head": shared},
            }
        )
    result = {"model": type(target).__name__, "sizes": sizes}
    return {**result, "text": "\n".join(_size_lines(result))}


def _why_not(error: PlanError) -> str:
    """The problem, without what differs from size to size and without what to change."""
    problem = str(error).removeprefix("tensor-parallel plan: ")
    problem = re.sub(r" with tp_size=\d+|,? ?\(?tp_size=\d+\)?", "", problem)
    return wildcards(re.split(r" (?:Choose|Use|Set|Name) ", problem)[0].rstrip("."))


def _size_lines(result: Mapping[str, Any]) -> list[str]:
    lines = [f"{result['model']}: --tp may be, of 1 to {MOST},"]
    refused: dict[str, list[int]] = {}
    for size in result["sizes"]:
        if not size["allowed"]:
            refused.setdefault(size["why"], []).append(size["tp_size"])
            continue
        several = f", {size['replicated_share']:.1%} of it on every rank" if size["tp_size"] > 1 else ""
        few = f", each key/value head on {size['ranks_per_head']} ranks" if size["ranks_per_head"] > 1 else ""
        held = f"{readable(size['bytes'])} of weights a rank, {size['share']:.2%} of all"
        lines.append(f"  {size['tp_size']:>2}: {held}{several}{few}")
    return [*lines, *(f"not {ranges(sizes)}: {why}" for why, sizes in refused.items())]
