"""One case: its reference in this process, then the same on ranks, for each column of the table.

What a column's run has to show, all in fp32, without dropout:

* the loss (relative error below 1e-4), and every parameter's full gradient: the norm of the difference below 1e-3 of
  the gradient's own norm. A gradient below 1e-4 of the norm of all gradients together is compared with that
  instead, as it may be rounding around zero: where the reference is zero, what is there is below 1e-7 of that norm,
  each element by itself too;
* no gradient where there is none, and one wherever there is one;
* the loss after two steps of AdamW (relative error below 2e-4);
* gradients of replicated parameters, and of parts that several ranks hold, bit-equal on the ranks that hold them;
* the trained model's `save_pretrained`, read by plain `from_pretrained`: no missing, unexpected or mismatched keys,
  and the same loss.

With dp 2, each replica has its own batch, and the reference takes the mean of both losses.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from accel_tp_ddp import PlanError, Style, full_gradients, parallelize, resolve_plan
from accel_tp_ddp.plans.rules import PlanLike

from .cases import Case, NoCase, build, inputs, loss_of
from .peer import shard_built, shard_while_loading
from .processes import first_line, on_ranks

LOSS_TOLERANCE, GRADIENT_TOLERANCE, TRAINED_TOLERANCE = 1e-4, 1e-3, 2e-4
FLOOR = 1e-4  # of the norm of all gradients together
LEARNING_RATE, STEPS = 1e-3, 2


@dataclass(frozen=True)
class Column:
    """A layout to run a case in, and whose tensor parallelism it is: a key of `SHARDED_BY`."""

    tp: int
    dp: int = 1
    kind: str = "ours"

    @property
    def name(self) -> str:
        return (
            ("" if self.kind == "ours" else f"{self.kind} ")
            + f"tp {self.tp}"
            + (f" x dp {self.dp}" if self.dp > 1 else "")
        )


@dataclass(frozen=True)
class Reference:
    """What the unsharded model gives for the batches of `dp` replicas together."""

    losses: list[float]
    gradients: dict[str, Tensor]
    trained: list[float]

    @classmethod
    def of(cls, case: Case, dp: int) -> Reference:
        model = build(case)
        batches = [inputs(case, model, replica) for replica in range(dp)]

        def backward() -> list[float]:
            losses = []
            for batch in batches:
                loss = loss_of(model, batch)
                (loss / dp).backward()
                losses.append(loss.item())
            return losses

        losses = backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        train(model, backward)
        with torch.no_grad():
            trained = [loss_of(model, batch).item() for batch in batches]
        return cls(losses, gradients, trained)


def train(model: nn.Module, backward: Callable[[], Any]) -> None:
    """Optimizer steps, the first of them with the gradients that are there."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    for step in range(STEPS):
        if step:
            optimizer.zero_grad()
            backward()
        optimizer.step()


def run_case(case: Case, columns: list[Column], seconds: float) -> dict[str, dict[str, Any]]:
    """The answer for each column, by its name."""
    answers: dict[str, dict[str, Any]] = {}
    references: dict[int, Reference] = {}
    for column in columns:
        try:
            if column.dp not in references:
                references[column.dp] = Reference.of(case, column.dp)
        except NoCase:
            return {}
        except Exception as error:
            answers[column.name] = {"result": "skipped", "reason": f"does not run unsharded: {first_line(error)}"}
            continue
        with tempfile.TemporaryDirectory() as folder:
            if column.kind == "peer, loading":
                build(case).save_pretrained(folder)
            answers[column.name] = on_ranks(
                compare, column.tp * column.dp, seconds, case, column, references[column.dp], Path(folder)
            )
    return answers


def compare(case: Case, column: Column, reference: Reference, folder: Path) -> dict[str, Any]:
    """On a rank: what there is to say about a case in a column's layout."""
    mesh = init_device_mesh("cpu", (column.dp, column.tp), mesh_dim_names=("dp_replicate", "tp"))
    replica = mesh["dp_replicate"].get_local_rank()
    model = build(case)
    batch = inputs(case, model, replica)
    try:
        styles = styles_of(model, column.tp, case.plan) if column.kind == "ours" else []
        model = SHARDED_BY[column.kind](model, mesh["tp"], folder, case.plan)
    except PlanError as error:
        return {"result": "refused", "reason": first_line(error)}
    wrapped = model
    if column.dp > 1:
        wrapped = nn.parallel.DistributedDataParallel(
            model, process_group=mesh["dp_replicate"].get_group(), find_unused_parameters=True
        )
    counted = Collectives()
    with counted:
        loss = loss_of(wrapped, batch)
        forward = counted.count
        loss.backward()
        backward = counted.count - forward
    gradients = gathered_gradients(model)
    problems = [*unequal_replicas(model, mesh["tp"])]
    train(wrapped, lambda: loss_of(wrapped, batch).backward())
    with torch.no_grad():
        trained = loss_of(model, batch).item()
    problems += wrong_losses("the loss", loss.item(), reference.losses[replica], LOSS_TOLERANCE)
    problems += wrong_losses(f"the loss after {STEPS} steps", trained, reference.trained[replica], TRAINED_TOLERANCE)
    errors = gradient_errors(gradients, reference.gradients)
    wrong = {name: error for name, error in errors.items() if not error < GRADIENT_TOLERANCE}
    if wrong:
        worst = max(wrong, key=lambda name: wrong[name] if wrong[name] == wrong[name] else float("inf"))
        problems.append(f"gradients of {len(wrong)} of {len(errors)} parameters, `{worst}` by {wrong[worst]:.1e}")
    if column.dp == 1 and column.kind == "ours":
        problems += wrong_export(model, batch, trained, folder)
    answer = {
        "result": "fail" if problems else "pass",
        "reason": "; ".join(problems),
        "note": getattr(model, "case_note", ""),
        "styles": styles,
        "sharded": f"{sum(is_sharded(p) for p in model.parameters())} of {len(list(model.parameters()))}",
        "error": max((error for error in errors.values() if error == error), default=0.0),
    }
    if column.dp == 1:
        answer |= {"forward": forward, "backward": backward}
    return answer


def shard_ours(model: nn.Module, mesh: DeviceMesh, folder: Path, plan: PlanLike) -> nn.Module:
    return parallelize(model, mesh, plan)


#: By a column's kind.
SHARDED_BY: dict[str, Callable[[nn.Module, DeviceMesh, Path, PlanLike], nn.Module]] = {
    "ours": shard_ours,
    "peer, loading": shard_while_loading,
    "peer, built": shard_built,
}


def styles_of(model: nn.Module, tp_size: int, plan: PlanLike) -> list[str]:
    """The classes of the styles in the model's plan."""
    found: list[Style] = []
    for entry in resolve_plan(model, tp_size, plan).entries:
        found += [*getattr(entry.style, "styles", [entry.style]), *entry.site.bare.values()]
    return sorted({type(style).__name__ for style in found})


def is_sharded(param: nn.Parameter) -> bool:
    if isinstance(param, DTensor):
        return any(placement.is_shard() for placement in param.placements)
    return getattr(param, "tp_shard", None) is not None


def gathered_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Full gradients by name; also of a model made of DTensors."""
    if not any(isinstance(param, DTensor) for param in model.parameters()):
        return full_gradients(model)
    gradients = {name: param.grad for name, param in model.named_parameters() if param.grad is not None}
    return {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in gradients.items()}


def gradient_errors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """The error of each parameter's gradient, as a share of what the module's docstring says."""
    floor = FLOOR * torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    errors = {}
    for name in expected.keys() | actual.keys():
        want = expected.get(name)
        got = actual.get(name)
        if want is None or got is None:  # a gradient that is zero is as good as none
            present = got if want is None else want
            errors[name] = float(present.norm() / floor)
        elif want.shape != got.shape:
            errors[name] = float("inf")
        else:
            where_zero = torch.where(want == 0, got, 0).abs().max() / floor if want.numel() else torch.zeros(())
            errors[name] = float(torch.maximum((got - want).norm() / want.norm().clamp(min=floor), where_zero))
    return errors


def wrong_losses(what: str, actual: float, expected: float, tolerance: float) -> list[str]:
    off = abs(actual - expected) / max(abs(expected), 1e-3)
    return [] if off < tolerance else [f"{what} off by {off:.1e}"]


def unequal_replicas(model: nn.Module, mesh: DeviceMesh) -> list[str]:
    """The first of the parameters whose gradients differ on ranks that hold the same."""
    own = {}
    for name, param in model.named_parameters():
        if param.grad is None or isinstance(param, DTensor):
            continue
        info = getattr(param, "tp_shard", None)
        held = info.layout.ranges[mesh.get_local_rank()] if info is not None and info.layout else "all"
        own[name] = (str(held), hashlib.sha1(param.grad.detach().contiguous().numpy().tobytes()).hexdigest())
    everyone: list[Any] = [None] * mesh.size()
    dist.all_gather_object(everyone, own, group=mesh.get_group())
    unequal = []
    for name in own:
        held = {other.get(name) for other in everyone}
        if len(held) != len({part for part, _ in filter(None, held)}):
            unequal.append(name)
    return [f"replicated gradients differ over the ranks, first of {len(unequal)}: `{unequal[0]}`"] if unequal else []


def wrong_export(model: nn.Module, batch: dict[str, Any], loss: float, folder: Path) -> list[str]:
    """What is wrong with the checkpoint that `save_pretrained` writes. Collective."""
    if not hasattr(type(model), "from_pretrained"):
        return []
    path = folder / "export"
    model.save_pretrained(path)
    if dist.get_rank() != 0:
        return []
    # Not in the checkpoint, and some models' implementations do not agree with each other.
    config = getattr(model, "config", None)
    eager = getattr(config, "_attn_implementation", None) == "eager"
    options = {"attn_implementation": "eager"} if eager else {}
    loaded, keys = type(model).from_pretrained(path, output_loading_info=True, dtype=torch.float32, **options)
    if getattr(config, "_experts_implementation", None) is not None:
        loaded.config._experts_implementation = config._experts_implementation
    with torch.no_grad():
        again = loss_of(loaded.eval(), batch).item()
    wrong = {what: sorted(map(str, keys[what])) for what in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    problems = [f"export: {what.replace('_', ' ')} {names[:3]}" for what, names in wrong.items() if names]
    return problems + wrong_losses("export: the loss", again, loss, LOSS_TOLERANCE)


class Collectives(TorchDispatchMode):
    """Counts the collectives that are called in it, in the backward too."""

    KNOWN = ("c10d", "_c10d_functional", "c10d_functional")

    def __init__(self):
        super().__init__()
        self.count = 0
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        if func.namespace in self.KNOWN and "wait_tensor" not in func.__name__:
            self.count += 1
            self.names[func.__name__] += 1
        return func(*args, **(kwargs or {}))
