"""What is swept: tiny models in groups, and how each is built, fed and made into one loss."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from accel_tp_ddp.plans.rules import PlanLike


class NoCase(Exception):
    """Raised by `build` where there turns out to be nothing to compare: the case is left out."""


@dataclass(frozen=True)
class Case:
    """One model to compare with itself unsharded.

    Attributes:
        name: Unique in its group; the table's first column.
        build: Makes a tiny random model on the CPU. The harness seeds torch before, and moves what starts at zero or
            one after.
        inputs: Forward's keyword arguments for a model, labels included where it takes any. The harness seeds torch
            before: equally on the ranks of a replica, otherwise on another replica.
        note: What is special about it, for the table. `build` may set it on the model instead, as `case_note`.
        plan: As `parallelize` takes it.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[nn.Module], dict[str, Any]]
    note: str = ""
    plan: PlanLike = "auto"


def groups() -> dict[str, ModuleType]:
    """The modules beside this one that have cases, by name."""
    package = importlib.import_module(__package__)
    modules = {
        info.name: importlib.import_module(f"{__package__}.{info.name}")
        for info in pkgutil.iter_modules(package.__path__)
        if not info.name.startswith("_")
    }
    return {name: module for name, module in modules.items() if callable(getattr(module, "cases", None))}


def build(case: Case) -> nn.Module:
    """The case's model, equal on every rank, in evaluation mode (nothing drops out).

    What starts constant, such as norms and biases, is moved, so that it matters to the loss.
    """
    torch.manual_seed(0)
    model = case.build()
    with torch.no_grad():
        for param in model.parameters():
            constant = param.numel() > 0 and bool((param == param.flatten()[0]).all())
            if param.ndim <= 1 or constant or not param.isfinite().all():
                param.nan_to_num_(0.0, 0.0, 0.0).add_(0.1 * torch.randn_like(param))
    return model.eval()


def inputs(case: Case, model: nn.Module, replica: int) -> dict[str, Any]:
    torch.manual_seed(100 + replica)
    return case.inputs(model)


def loss_of(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """The model's own loss; else a random projection of everything floating that it returns, the same each time."""
    output = model(**batch)
    loss = getattr(output, "loss", None)
    if loss is not None:
        return loss
    generator = torch.Generator().manual_seed(7)
    terms = [(tensor.float() * torch.randn(tensor.shape, generator=generator)).mean() for tensor in floating(output)]
    return torch.stack(terms).sum()


def floating(output: Any) -> Iterator[Tensor]:
    """The floating tensors in a model's output that depend on its parameters, in order."""
    if isinstance(output, Tensor):
        if output.is_floating_point() and (output.requires_grad or not torch.is_grad_enabled()):
            yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from floating(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from floating(value)
