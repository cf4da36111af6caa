"""Prove a plan for a model before a weight of it is touched, unless it is known to be right."""

from __future__ import annotations

import hashlib
import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from ..core.agreement import Ranks
from ..core.errors import NoPlanError, PlanError, WrongPlanError
from ..plans.names import wildcards
from ..plans.plan import Plan
from ..plans.rules import InferredPlan, PlanLike
from .compare import TOLERANCE, Compared, CpuRanks, compare
from .fingerprint import fingerprint
from .ledger import Ledger
from .small import CannotShrink, Small, as_it_is, small_models

__all__ = ["MODES", "Proof", "prove_plan"]

logger = logging.getLogger(__name__)

MODES = ("auto", "always", "never")


@dataclass(frozen=True)
class Proof:
    """How it is known that a plan is right.

    Attributes:
        how: "shipped" or "cache": it was proved before, by this package's tests or by a run of the user's; "proved":
            here and now; "unproved": it is not known.
        unproved: What the proof did not reach: names of planned modules, with digits as `*`; of an unproved plan, why.
        compared: What was compared, by part of the model, where it was proved here.
        small: What was built for it.
    """

    how: str
    unproved: tuple[str, ...] = ()
    compared: tuple[tuple[Small, Compared], ...] = ()


def prove_plan(
    model: nn.Module, mesh: DeviceMesh, plan: Plan, rules: PlanLike, mode: str = "auto", full: bool = False
) -> Proof:
    """Make sure that `model` computes the same when sharded by `plan`. Collective over all ranks; touches no weight.

    A small model of the same class is built (`small_models`) and compared with its own sharded copy, on the ranks of
    the mesh. What was proved is remembered by its fingerprint (`Ledger`), and then known at once.

    Args:
        model: The bare, unsharded model; only its class, configs and structure are looked at.
        mesh: The tensor-parallel ranks of this replica.
        plan: What `rules` give for the model.
        rules: As `resolve_plan` takes them.
        mode: "auto" proves what is not known, "always" everything.
        full: Whether the model itself is compared, which it has to be small enough for; its weights are changed.

    Raises:
        PlanError: On every rank, if the sharded model does otherwise: the first module that does, and by how much.
    """
    ranks = Ranks("prove", otherwise=PlanError)
    digest = fingerprint(model, plan)
    ledger = Ledger()
    if mode == "auto" and digest is not None:
        known = ranks.on_main(lambda: ledger.known(digest))
        if known is not None:
            _refuse_unproved(plan, rules, known.unproved)
            _warn_unproved(plan, known.unproved, ranks)
            return Proof(known.source, known.unproved)
    try:
        parts = iter([as_it_is(model, plan.tp_size, rules)]) if full else small_models(model, plan, rules)
        made = _prove(parts, mesh, plan, ranks)
    except CannotShrink as error:
        _refuse_unproved(plan, rules, (str(error),))
        if ranks.is_main:
            logger.warning(
                "The tensor-parallel plan of %s was not proved: %s. If it is wrong somewhere, training may be wrong "
                "without a word. To prove it: `accel-tp-ddp verify --full` on a machine that holds the model, or a "
                'config that its class can be built from. prove="never" says that it is known to be right.',
                plan.model,
                str(error).rstrip("."),
            )
        return Proof("unproved", (str(error),))
    proof = Proof("proved", _not_reached(plan, made), tuple(made))
    _refuse_unproved(plan, rules, proof.unproved)
    if digest is not None:
        ranks.on_main(lambda: ledger.remember(digest, _described(plan, made), proof.unproved))
    _warn_unproved(plan, proof.unproved, ranks)
    return proof


def _prove(parts: Iterator[Small], mesh: DeviceMesh, plan: Plan, ranks: Ranks) -> list[tuple[Small, Compared]]:
    made = []
    with CpuRanks(mesh) as cpus:
        while (small := _next(parts, ranks)) is not None:
            ranks.same([_bits(small)], "rank {rank} has built another small model than rank {own}", "a proof")
            compared = compare(small.model, small.inputs, cpus, small.rules, plan.sequence_parallel)
            if compared.findings and not compared.broken:  # a near tie may have gone the other way by rounding
                _move(small.model)
                again = compare(small.model, small.inputs, cpus, small.rules, plan.sequence_parallel)
                compared = compared if again.findings else again
            if compared.findings:
                raise _wrong(plan, small, compared)
            made.append((small, compared))
    return made


def _next(parts: Iterator[Small], ranks: Ranks) -> Small | None:
    """The next small model on every rank, or none on any."""
    small, problem = None, None
    try:
        small = next(parts, None)
    except CannotShrink as error:
        problem = str(error)
    problems = [each for each in ranks.all(problem) if each is not None]
    if problems:
        raise CannotShrink(problems[0])
    return small


def _bits(small: Small) -> str:
    """Equal on two ranks only if they have built the same."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in [*small.model.named_parameters(), *small.model.named_buffers()]:
        digest.update(name.encode())
        digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def _move(model: nn.Module) -> None:
    """Other weights of the same size, the same on all ranks."""
    generator = torch.Generator().manual_seed(1)
    for param in model.parameters():
        if param.is_floating_point() and param.numel() > 1:
            param.add_(0.2 * param.std() * torch.randn(param.shape, generator=generator))


# ---------------------------------------------------------------------------------------------------- what is said


def _wrong(plan: Plan, small: Small, compared: Compared) -> WrongPlanError:
    finding = compared.findings[0]
    module = ".".join(part for part in (small.prefix, finding.module) if part)
    place = f"`{wildcards(module)}`" if module else f"the {plan.model} itself"
    off = f" is off by {finding.error:.2g} (relative; rounding stays below {TOLERANCE:g})"
    problem = f"{finding.what}{'' if finding.error == float('inf') else off}"
    hint = f", which looks like this: {finding.looks_like}" if finding.looks_like else ""
    block = _rules_around(plan, module)
    return WrongPlanError(
        f"tensor-parallel plan: sharded by it, {plan.model} would not train as it does unsharded (tp_size="
        f"{plan.tp_size}). That was tried on {small.how}, before a weight was touched. The first module that differs "
        f"is {place}: {problem}{hint}.{block} {_ways_on(plan, module)}",
        ((small, compared),),
    )


def _rules_around(plan: Plan, module: str) -> str:
    """The rules of the block that a module stands in: the wrong one may be another's, whose output it takes."""
    block = module.rpartition(".")[0]
    near = [entry for entry in plan.entries if entry.site.name == module or entry.site.name.startswith(f"{block}.")]
    rows = dict.fromkeys(f"`{wildcards(entry.site.name)}: {entry.label}` ({_SOURCES[entry.source]})" for entry in near)
    if not rows or len(rows) > 12:
        return ""
    return f" The rules there: {', '.join(rows)}."


_SOURCES = {
    "user": "yours",
    "package": "of this package",
    "model": "of the model",
    "inferred": "inferred",
    "tied": "as it is tied",
    "adapter": "as its base layer",
}


def _ways_on(plan: Plan, module: str) -> str:
    sources = {entry.source for entry in plan.entries}
    library = type(plan.entries[0].site.module).__module__.partition(".")[0]
    for entry in plan.entries:
        found = type(entry.site.parent).__module__.partition(".")[0]
        if found not in ("torch", "builtins"):
            library = found
            break
    version = getattr(sys.modules.get(library), "__version__", None)
    ways = ["set sequence_parallel=False"] if plan.sequence_parallel else []
    if "user" in sources:
        ways.append("correct your rules")
    if version is not None and library not in ("__main__", "accel_tp_ddp"):
        ways.append(f"install another version of {library} (this is {version}) than that, whose code the plan fits")
    block = wildcards(module).rpartition(".")[0] or wildcards(module)
    ways.append(f'leave its block unsharded (`"{block}.NAME": "replicate"` for each rule there)')
    ways.append("`register_style` for a module that computes in a way of its own")
    return f"Ways on: {'; '.join(ways)}."


def _not_reached(plan: Plan, made: Sequence[tuple[Small, Compared]]) -> tuple[str, ...]:
    """What no proof has shown: planned modules that shard something and did not run."""
    reached = {
        wildcards(".".join(part for part in (small.prefix, name) if part))
        for small, compared in made
        for name in compared.reached
    }
    ran = [entry for entry in plan.entries if wildcards(entry.site.name) in reached]
    used = {id(param) for entry in ran for param in entry.site.module.parameters()}  # by a module that it is tied to
    missed: dict[str, None] = {}
    for entry in plan.entries:
        held = dict(entry.site.module.named_parameters(remove_duplicate=False)) if entry.layouts else {}
        if any(id(held.get(name)) not in used for name in entry.layouts):
            missed[wildcards(entry.site.name)] = None
    draws = ["training mode, in which it draws random numbers" for _, compared in made if compared.draws]
    return tuple(dict.fromkeys([*(name for name in missed if name not in reached), *draws]))


def _refuse_unproved(plan: Plan, rules: PlanLike, unproved: Sequence[str]) -> None:
    """A plan that nobody wrote is used only if all of it is proved."""
    if unproved and isinstance(rules, InferredPlan):
        raise NoPlanError(
            f"tensor-parallel plan: {plan.model} has no plan, and the one that was inferred for it is not proved for "
            f"{', '.join(f'`{name}`' for name in unproved)}. If it is right, pass it as tp_plan: {dict(rules)}"
        )


def _warn_unproved(plan: Plan, names: Iterable[str], ranks: Ranks) -> None:
    names = tuple(names)
    if names and ranks.is_main:
        logger.warning(
            "The tensor-parallel plan of %s was proved but for %s, which the inputs that were tried do not show. If "
            "it is wrong there, training may be wrong without a word.",
            plan.model,
            ", ".join(names),
        )


def _described(plan: Plan, made: Sequence[tuple[Small, Compared]]) -> str:
    return f"{plan.model}, tp_size={plan.tp_size}, on {'; '.join(small.how for small, _ in made)}"
