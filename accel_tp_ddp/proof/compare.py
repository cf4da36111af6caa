"""A small model and its sharded copy, on the ranks themselves: where they part, and what mistake it looks like.

They are compared in fp32, with nothing dropped out, forward and backward in training mode and forward in evaluation
mode. Tolerances: each tensor's difference below `TOLERANCE` of its norm. A gradient whose norm is below `FLOOR` of the
norm of all gradients together is compared with that floor instead, as it may be rounding around zero.
"""

from __future__ import annotations

import copy
import gc
import hashlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ..checkpoint.export import full_gradients
from ..core.agreement import Ranks
from ..core.shard import shard_info
from ..core.transfer import mesh_ranks
from ..model.parallelize import shard
from ..plans.plan import resolve_plan
from ..plans.rules import PlanLike
from .observe import Call, Observed, Raised, observe

__all__ = ["FLOOR", "TOLERANCE", "Compared", "CpuRanks", "Finding", "compare"]

TOLERANCE, FLOOR = 1e-3, 1e-4
#: Seconds that a rank waits in a collective for one that has raised, or has gone another way.
PATIENCE = 60.0


@dataclass(frozen=True)
class Finding:
    """Something that the sharded model does otherwise.

    Attributes:
        module: Where, by its name in the small model; "" is the model itself.
        what: What differs there.
        error: By how much, relative; infinity where it cannot be said.
        looks_like: What kind of mistake gives such a difference; "" where it cannot be told.
    """

    module: str
    what: str
    error: float = math.inf
    looks_like: str = ""


@dataclass(frozen=True)
class Row:
    """How a module compares.

    Attributes:
        module: Its name.
        output: The error of what it returned; None where that is a rank's part.
        gradient: The largest error of its parameters' gradients; None without any.
        equal: Whether the gradients of what is replicated are equal on the ranks; None without any.
    """

    module: str
    output: float | None
    gradient: float | None
    equal: bool | None


@dataclass(frozen=True)
class Compared:
    """What came of a comparison.

    Attributes:
        findings: The first module that disagrees comes first; empty where all agree.
        rows: For each module that ran, or has parameters with gradients.
        reached: The names of the modules that ran.
        draws: Whether training mode could not be compared, as it draws random numbers.
        broken: Whether the sharded model raised; the ranks are closed then.
    """

    findings: tuple[Finding, ...]
    rows: tuple[Row, ...] = ()
    reached: frozenset[str] = frozenset()
    draws: bool = False
    broken: bool = False


_numbers = itertools.count()


class CpuRanks:
    """The ranks of a mesh, on CPU, over a gloo group of their own that lives as long as the `with` block.

    A proof is about the plan, not about the device: on CPU it disturbs neither the accelerator's memory nor its
    streams, and a rank that raises does not leave the others waiting. Making it is collective over all ranks.
    """

    def __init__(self, mesh: DeviceMesh):
        mine, group = mesh_ranks(mesh), None
        for ranks in dict.fromkeys(Ranks("prove").all(mine)):
            made = dist.new_group(list(ranks), backend="gloo", timeout=timedelta(seconds=PATIENCE))
            if ranks == mine:
                group = made
        assert isinstance(group, dist.ProcessGroup), "a mesh holds its own rank"
        # Equal to no other mesh: DTensor keeps what it has worked out for an equal one, and so a group that is gone.
        self.mesh: DeviceMesh | None = DeviceMesh.from_group(group, "cpu", mesh_dim_names=(f"proof_{next(_numbers)}",))

    def __enter__(self) -> CpuRanks:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Close this rank's connections: whoever waits for it then learns at once, if nothing else holds the mesh."""
        if self.mesh is not None:
            dist.destroy_process_group(self.mesh.get_group())
            self.mesh = None
            gc.collect()


def compare(
    model: nn.Module, inputs: Mapping[str, Any], cpus: CpuRanks, rules: PlanLike, sequence_parallel: bool = False
) -> Compared:
    """Whether `model` computes the same when sharded by `rules`. Collective over all ranks, each mesh by itself.

    Args:
        model: A small one on CPU, fp32, the same on every rank of the mesh. Its gradients are made.
        inputs: Forward's keyword arguments, the same on every rank.
        cpus: The ranks; closed, if the sharded model raises on any.
        rules: As `resolve_plan` takes them.
        sequence_parallel: Whether the sequence is spread, too.

    Raises:
        Raised: If the model does not run unsharded; on every rank.
    """
    ranks = Ranks("prove")
    with _plainly():
        state = torch.get_rng_state()
        expected = observe(copy.deepcopy(model), inputs)
        torch.set_rng_state(state)
        outcome = _sharded_run(copy.deepcopy(model), inputs, cpus, rules, expected, sequence_parallel)
    if isinstance(outcome, _Problem):
        cpus.close()
    problems = [problem for problem in ranks.all(outcome if isinstance(outcome, _Problem) else None) if problem]
    if problems:
        cpus.close()
        first = min(problems, key=lambda problem: problem.lost)
        text = "the ranks wait in different collectives" if first.lost else f"it raises {first.text}"
        finding = Finding(first.module, f"in {first.mode} {text}")
        return Compared((finding,), draws=expected.draws, broken=True)
    assert not isinstance(outcome, _Problem) and cpus.mesh is not None
    return _differences(model, *outcome, expected, cpus.mesh)


class _Problem(NamedTuple):
    """An exception without its frames, which hold the mesh; `lost`: another rank did not come to a collective."""

    module: str
    mode: str
    text: str
    lost: bool


def _sharded_run(
    model: nn.Module,
    inputs: Mapping[str, Any],
    cpus: CpuRanks,
    rules: PlanLike,
    expected: Observed,
    sequence_parallel: bool,
) -> tuple[nn.Module, Observed] | _Problem:
    assert cpus.mesh is not None
    plan = resolve_plan(model, cpus.mesh.size(), rules)
    shard(model, cpus.mesh, replace(plan, sequence_parallel=sequence_parallel))
    try:
        return model, observe(model, inputs, expected)
    except Raised as error:
        return _Problem(error.module, error.mode, str(error), _by_collective(error.__cause__))


@contextmanager
def _plainly() -> Iterator[None]:
    """Within the block, torch computes in fp32 as exactly as it can, whatever the script has set."""
    dtype, precision = torch.get_default_dtype(), torch.get_float32_matmul_precision()
    torch.set_default_dtype(torch.float32)
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
            with torch.autocast("cpu", enabled=False), torch.device("cpu"):
                torch.manual_seed(0)
                yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_float32_matmul_precision(precision)


def _by_collective(error: BaseException | None) -> bool:
    """Whether it was raised as another rank did not come, and not of this one's own doing."""
    return isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "Timed out", "peer"))


# ------------------------------------------------------------------------------------------------------ what differs


def _differences(
    model: nn.Module, sharded: nn.Module, actual: Observed, expected: Observed, mesh: DeviceMesh
) -> Compared:
    group = mesh.get_group()
    owners = {name: name.rpartition(".")[0] for name, _ in model.named_parameters(remove_duplicate=False)}
    outputs = _pairs(expected.calls, actual.calls)
    want = expected.gradients
    got = full_gradients(sharded)
    own: dict[str, Any] = {
        "outputs": [_output_error(first, second) for first, second in outputs],
        "training": _output_error(expected.training, actual.training, missing=math.inf),
        "evaluation": _output_error(expected.evaluation, actual.evaluation, missing=math.inf),
        "gradients": _gradient_errors(got, want),
        "held": _held(sharded, mesh),
    }
    all_own: list[Any] = [None] * mesh.size()
    dist.all_gather_object(all_own, own, group=group)
    errors = [_worst(each) for each in zip(*(one["outputs"] for one in all_own))]
    gradients = {name: max(one["gradients"][name] for one in all_own) for name in own["gradients"]}
    findings = []
    mode = "evaluation mode" if expected.draws else "training mode"
    if _is_wrong(max(one["training"] for one in all_own)):
        number = _culprit(expected.calls, errors)
        module = expected.calls[number].module
        parts = _gathered([_only(outputs[number][1])], group)
        hint = looks_like([part[0] for part in parts], _only(outputs[number][0]), _bias(model, module))
        findings.append(Finding(module, f"its output in {mode}", errors[number] or math.inf, hint))
    wrong = [name for name, error in gradients.items() if _is_wrong(error)]
    if wrong and not findings:
        name = _last(wrong, owners, expected.calls)
        parts = _gathered([got.get(name)], group)
        hint = looks_like([part[0] for part in parts], want.get(name))
        others = f", and of {len(wrong) - 1} other parameters" if len(wrong) > 1 else ""
        leaf = name.rpartition(".")[2]
        findings.append(Finding(owners[name], f"the gradient of its `{leaf}`{others}", gradients[name], hint))
    unequal = _unequal([one["held"] for one in all_own])
    if unequal and not findings:
        name = _last(unequal, owners, expected.calls)
        what = f"the gradient of its `{name.rpartition('.')[2]}`, which is replicated, is not the same on all ranks"
        findings.append(Finding(owners[name], what, gradients.get(name, math.inf), "a sum in another order on each"))
    if not findings and _is_wrong(worst := max(one["evaluation"] for one in all_own)):
        findings.append(Finding("", "its output in evaluation mode, though right in training mode", worst))
    rows = _rows(expected.calls, errors, gradients, unequal, owners)
    return Compared(tuple(findings), rows, frozenset(call.module for call in expected.calls), expected.draws)


def _pairs(expected: list[Call], actual: list[Call]) -> list[tuple[list[Tensor] | None, list[Tensor] | None]]:
    """What each call returned in both, by the module's name and which of its calls it was."""
    later: dict[str, Iterator[Call]] = {}
    by_name: dict[str, list[Call]] = {}
    for call in actual:
        by_name.setdefault(call.module, []).append(call)
    pairs = []
    for call in expected:
        other = next(later.setdefault(call.module, iter(by_name.get(call.module, []))), None)
        pairs.append((call.tensors, other.tensors if other is not None else None))
    return pairs


def _output_error(want: list[Tensor] | None, got: list[Tensor] | None, missing: float | None = None) -> float | None:
    """The largest error of the tensors; `missing` where the shapes are others, as those of a rank's part are.

    Attention weights of a rank's heads may come beside an output that can be compared.
    """
    if want is None or got is None or len(want) != len(got):
        return missing
    alike = [(first, second) for first, second in zip(want, got) if first.shape == second.shape]
    if len(alike) < len(want) and (missing is not None or not alike):
        return missing
    return max((relative_error(second, first) for first, second in alike), default=0.0)


def relative_error(got: Tensor, want: Tensor) -> float:
    """The norm of the difference as a share of that of `want`; infinity if they are not finite at the same places."""
    if not want.numel():
        return 0.0
    finite = want.isfinite()
    if not torch.equal(finite, got.isfinite()):
        return math.inf
    want, got = want.double().where(finite, 0.0), got.double().where(finite, 0.0)
    return float((got - want).norm() / want.norm().clamp(min=1e-6 * math.sqrt(want.numel())))


def _gradient_errors(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> dict[str, float]:
    floor = (
        FLOOR * float(torch.stack([gradient.double().norm() for gradient in want.values()]).norm()) if want else 1.0
    )
    errors = {}
    for name in sorted(want.keys() | got.keys()):
        first, second = want.get(name), got.get(name)
        if first is None or second is None:  # a gradient that is zero is as good as none
            present = first if second is None else second
            assert present is not None
            errors[name] = float(present.double().norm()) / max(floor, 1e-30)
        elif first.shape != second.shape or not bool(second.isfinite().all()):
            errors[name] = math.inf
        else:
            off = float((second.double() - first.double()).norm())
            errors[name] = off / max(float(first.double().norm()), floor, 1e-30)
    return errors


def _held(sharded: nn.Module, mesh: DeviceMesh) -> dict[str, tuple[str, str]]:
    """Which part of each gradient this rank holds, and its bits."""
    held = {}
    for name, param in sharded.named_parameters():
        if param.grad is not None:
            info = shard_info(param)
            part = info.layout.ranges[mesh.get_local_rank()] if info is not None and info.layout is not None else "all"
            bits = param.grad.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            held[name] = str(part), hashlib.blake2b(bits, digest_size=16).hexdigest()
    return held


def _unequal(held: list[dict[str, tuple[str, str]]]) -> list[str]:
    """The parameters whose gradients differ on ranks that hold the same part of them."""
    unequal = []
    for name in held[0]:
        found = {each[name] for each in held if name in each}
        if len(found) != len({part for part, _ in found}):
            unequal.append(name)
    return unequal


def _worst(errors: Sequence[float | None]) -> float | None:
    known = [error for error in errors if error is not None]
    return max(known) if known else None


def _is_wrong(error: float | None) -> bool:
    return error is not None and not error < TOLERANCE


def _culprit(calls: list[Call], errors: list[float | None]) -> int:
    """The number of the innermost call that is wrong first: from the model on down, the first wrong one at each level.

    Not simply the first of all: what a module inside a block returns may be a rank's part by design (a projection of
    an adapter, experts that are summed later), where the block is right.
    """
    number = 0
    while True:
        inside = [each for each, call in enumerate(calls) if call.parent == number]
        wrong = [each for each in inside if _is_wrong(errors[each])]
        if not wrong and errors[number] is None:  # of another shape, which then came from the latest such one inside
            wrong = [each for each in inside if errors[each] is None][-1:]
        if not wrong:
            return number
        number = wrong[0]


def _last(names: list[str], owners: Mapping[str, str], calls: list[Call]) -> str:
    """The parameter whose module ran last: a wrong gradient is passed on to all that ran before."""
    order = {call.module: number for number, call in enumerate(calls)}
    return max(names, key=lambda name: order.get(owners[name], -1))


def _rows(
    calls: list[Call],
    errors: list[float | None],
    gradients: Mapping[str, float],
    unequal: list[str],
    owners: Mapping[str, str],
) -> tuple[Row, ...]:
    outputs: dict[str, float | None] = {}
    for call, error in zip(calls, errors):
        outputs[call.module] = _worst([outputs.get(call.module), error])
    by_module: dict[str, float | None] = {}
    for name, error in gradients.items():
        by_module[owners[name]] = _worst([by_module.get(owners[name]), error])
    differs = {owners[name] for name in unequal}
    names = [*outputs, *(name for name in by_module if name not in outputs)]
    return tuple(
        Row(name, outputs.get(name), by_module.get(name), name not in differs if name in by_module else None)
        for name in names
    )


# ------------------------------------------------------------------------------------------- what it looks like


def looks_like(parts: Sequence[Tensor | None], want: Tensor | None, bias: Tensor | None = None) -> str:
    """What kind of mistake makes `parts`, those of the ranks, of `want`."""
    got = [part for part in parts if part is not None]
    if want is None or len(got) != len(parts) or any(part.shape != want.shape for part in got) or not want.numel():
        return ""
    ranks = len(got)

    def alike(made: Tensor, wanted: Tensor = want) -> bool:
        return relative_error(made, wanted) < TOLERANCE

    if alike(torch.stack(got).sum(0)):
        return "each rank has its own part: their sum is missing"
    if alike(got[0] / ranks):
        return f"summed over the ranks once too often: {ranks} times what it should be"
    if alike(got[0] * ranks):
        return f"divided by the ranks once too often: one {ranks}th of what it should be"
    if bias is not None and bias.shape[-1:] == want.shape[-1:] and alike(got[0] - (ranks - 1) * bias):
        return f"its bias is added {ranks} times"
    if alike(got[0].flatten().sort()[0], want.flatten().sort()[0]):
        return "the right numbers in another order: cut otherwise than it is used"
    if len(got) > 1 and relative_error(got[1], got[0]) > TOLERANCE:
        return "not the same on all ranks: a part where the full tensor was expected, or cut otherwise than it is used"
    return ""


def _bias(model: nn.Module, module: str) -> Tensor | None:
    bias = getattr(model.get_submodule(module), "bias", None)
    return bias.detach() if isinstance(bias, Tensor) else None


def _only(tensors: list[Tensor] | None) -> Tensor | None:
    return tensors[0] if tensors else None


def _gathered(values: list[Any], group: dist.ProcessGroup) -> list[list[Any]]:
    everyone: list[Any] = [None] * group.size()
    dist.all_gather_object(everyone, values, group=group)
    return everyone
