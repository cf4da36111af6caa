"""One model run for another to be compared with: what each module gave, and each parameter's gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Call", "Observed", "Raised", "observe", "tensors_in"]


@dataclass
class Call:
    """One run of a module's forward.

    Attributes:
        module: Its name.
        parent: The number of the call that it was made in; None for the model itself.
        tensors: The floating tensors that it returned; None while it has not returned.
    """

    module: str
    parent: int | None
    tensors: list[Tensor] | None = None


class Raised(Exception):
    """A forward or backward that raised.

    Attributes:
        module: The innermost module whose forward was running, or had run last.
        mode: "training mode", "evaluation mode" or "the backward".
    """

    def __init__(self, module: str, mode: str, error: Exception):
        super().__init__(f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}")
        self.module, self.mode = module, mode


@dataclass
class Observed:
    """What there is to compare of a model.

    Attributes:
        calls: Of the forward in training mode (or in evaluation mode, where `draws`), in the order they began.
        training: The floating tensors of its output.
        evaluation: Those in evaluation mode.
        gradients: Of each parameter that has one, as the rank holds it.
        draws: Whether training mode draws random numbers, though nothing drops out; then it is not compared.
    """

    calls: list[Call] = field(default_factory=list)
    training: list[Tensor] = field(default_factory=list)
    evaluation: list[Tensor] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    draws: bool = False


def observe(model: nn.Module, inputs: Mapping[str, Any], like: Observed | None = None) -> Observed:
    """Run forward and backward in training mode, then forward in evaluation mode. Gradients are left in `.grad`.

    What is derived is the model's own loss, where it has one, and a random projection of each floating tensor that it
    returns: an error in any of them shows, and is not averaged away.

    Args:
        model: Of which each module, once hooked, runs as before.
        inputs: Forward's keyword arguments.
        like: What the unsharded model gave: what does not have the same shape here stays out of the loss.

    Raises:
        Raised: If the model raises.
    """
    seen = Observed(draws=like.draws if like is not None else _draws(model, inputs))
    mode = "evaluation mode" if seen.draws else "training mode"
    model.train(not seen.draws)
    model.zero_grad()
    with _watched(model, seen.calls) as running:
        output = _run(lambda: model(**inputs), running, mode)
    seen.training = [tensor.detach() for tensor in tensors_in(output)]
    loss = _loss(output, [tensor.shape for tensor in like.training] if like is not None else None)
    _run(loss.backward, [seen.calls[-1].module], "the backward")
    seen.gradients = {name: param.grad for name, param in model.named_parameters() if param.grad is not None}
    model.eval()
    with torch.no_grad(), _watched(model, []) as running:
        seen.evaluation = list(tensors_in(_run(lambda: model(**inputs), running, "evaluation mode")))
    return seen


def _draws(model: nn.Module, inputs: Mapping[str, Any]) -> bool:
    """Whether forward draws random numbers in training mode."""
    model.train()
    before = torch.get_rng_state()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with torch.no_grad(), _watched(model, []) as running:
        _run(lambda: model(**inputs), running, "training mode")
        for name, buffer in model.named_buffers():
            if name in buffers and buffers[name].shape == buffer.shape:
                buffer.copy_(buffers[name])
    drawn = not torch.equal(before, torch.get_rng_state())
    torch.set_rng_state(before)
    return drawn


def _run(step: Callable[[], Any], running: list[str], mode: str) -> Any:
    try:
        return step()
    except Exception as error:
        raise Raised(running[-1] if running else "", mode, error) from error


@contextmanager
def _watched(model: nn.Module, calls: list[Call]) -> Iterator[list[str]]:
    """Within the block, write down the calls of the model's modules. Gives the names of those that are running."""
    running: list[str] = []
    numbers: list[int] = []

    def enter(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            calls.append(Call(name, numbers[-1] if numbers else None))
            running.append(name)
            numbers.append(len(calls) - 1)

        return hook

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        running.pop()
        calls[numbers.pop()].tensors = [tensor.detach().clone() for tensor in tensors_in(output)]

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            hooks.callback(module.register_forward_pre_hook(enter(name)).remove)
            hooks.callback(module.register_forward_hook(leave).remove)
        yield running


def tensors_in(output: Any) -> Iterator[Tensor]:
    """The floating tensors in what a module returned, in order."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors_in(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from tensors_in(value)


def _loss(output: Any, shapes: list[torch.Size] | None) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    terms = []
    own = getattr(output, "loss", None)
    if isinstance(own, Tensor) and own.requires_grad:
        terms.append(own.float().sum())
    for number, tensor in enumerate(tensors_in(output)):
        wanted = shapes[number] if shapes is not None and number < len(shapes) else tensor.shape
        weights = torch.randn(wanted, generator=generator)
        if tensor.requires_grad and tensor.shape == wanted and tensor is not own:
            finite = torch.where(tensor.isfinite(), tensor, 0.0).float()
            terms.append((finite * weights).sum() / math.sqrt(max(weights.numel(), 1)))
    if not terms:
        raise ValueError("its output does not depend on its parameters")
    return torch.stack(terms).sum()
