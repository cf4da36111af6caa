"""Optimizers whose step looks at a full tensor: means over rows and columns, norms, orthogonalisation.

On a shard such a step would do something else. So every rank takes it on full tensors, one parameter at a time:
parameter and gradient are gathered, the optimizer's own step runs on them, and each rank keeps its part. The state of
such a parameter is full on every rank: small for Adafactor (a row and a column), a full momentum for Muon.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..core.collectives import on_any_rank
from ..core.shard import ShardInfo, shard_info

__all__ = ["FullTensorStep", "register_whole_step", "steps_on_full_tensors"]

_REGISTERED: set[type] = {getattr(torch.optim, name) for name in ("Adafactor", "Muon") if hasattr(torch.optim, name)}
_BY_NAME = {"transformers.optimization.Adafactor"}  # which is not imported here


def register_whole_step(kind: type[Optimizer]) -> type[Optimizer]:
    """Let optimizers of this class, and of classes derived from it, step on full tensors under tensor parallelism.

    Right for an optimizer whose update of a parameter depends on that parameter, its gradient, its state and the
    options of its group, and on no other parameter: LAMB, LARS, CAME, Shampoo and the like. It costs the gathering of
    the parameter and its gradient, and a state as large as without tensor parallelism.

    Returns:
        `kind`, so that it can be used as a decorator.

    Raises:
        TypeError: If `kind` is no class of optimizers.
    """
    if not isinstance(kind, type) or not issubclass(kind, Optimizer):
        raise TypeError(f"register_whole_step takes a subclass of torch.optim.Optimizer, not {kind!r}.")
    _REGISTERED.add(kind)
    return kind


def steps_on_full_tensors(optimizer: Optimizer) -> bool:
    """Whether an optimizer, bare or as Accelerate prepared it, steps on full tensors and keeps full states."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return any(
        kind in _REGISTERED or f"{kind.__module__}.{kind.__qualname__}" in _BY_NAME for kind in type(optimizer).__mro__
    )


class FullTensorStep:
    """Lets each step of `optimizer` take the sharded parameters as full ones first, and then all others by itself.

    By hooks, so that it also works under schedulers and scalers that have wrapped `step`. Hooks that are to see the
    gradients before the step have to be registered earlier.
    """

    def __init__(self, optimizer: Optimizer):
        self._gradients: list[tuple[nn.Parameter, Tensor]] = []
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)

    def _before(self, optimizer: Optimizer, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        self._give_back()  # what a step that raised has left
        args, kwargs = _with_closure_called(args, kwargs)
        for group, param, info in _with_gradient(optimizer):
            self._step_on_full(optimizer, group, param, info)
            if param.grad is not None:
                self._gradients.append((param, param.grad))
                param.grad = None  # the step that follows passes it over
        return args, kwargs

    def _after(self, optimizer: Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
        self._give_back()

    def _give_back(self) -> None:
        while self._gradients:
            param, grad = self._gradients.pop()
            if param.grad is None:
                param.grad = grad

    @torch.no_grad()
    def _step_on_full(self, optimizer: Optimizer, group: dict[str, Any], param: nn.Parameter, info: ShardInfo) -> None:
        full = nn.Parameter(info.full_tensor(param))
        full.grad = info.full_tensor(torch.zeros_like(param) if param.grad is None else param.grad)
        with _alone(optimizer, group, param, full):
            type(optimizer).step(optimizer)
        param.copy_(info.local_part(full))


@contextmanager
def _alone(optimizer: Optimizer, group: dict[str, Any], param: nn.Parameter, full: nn.Parameter) -> Iterator[None]:
    """Let `optimizer` have nothing but `full`, with the options and the state of `param`, and no hooks."""
    groups, state = optimizer.param_groups, optimizer.state
    hooks = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
    if param in state:
        state[full] = state.pop(param)
    # A copy: what the step counts in its group is counted by the step that follows.
    optimizer.param_groups = [{**group, "params": [full]}]
    optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        optimizer.param_groups = groups
        optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks = hooks
        if full in state:
            state[param] = state.pop(full)


def _with_gradient(optimizer: Optimizer) -> list[tuple[dict[str, Any], nn.Parameter, ShardInfo]]:
    """The sharded parameters that some rank has a gradient of, with their groups and shards; the same on all ranks."""
    sharded = [
        (group, param, info)
        for group in optimizer.param_groups
        for param in group["params"]
        if (info := shard_info(param)) is not None and info.is_sharded
    ]
    by_mesh: dict[Any, list[int]] = {}
    for index, (_, _, shard) in enumerate(sharded):
        by_mesh.setdefault(shard.mesh, []).append(index)
    found: set[int] = set()
    for mesh, indices in by_mesh.items():
        # A rank that holds nothing of a small parameter may have no gradient either.
        has = on_any_rank(mesh, [sharded[index][1].grad is not None for index in indices])
        found.update(index for index, there in zip(indices, has) if there)
    return [entry for index, entry in enumerate(sharded) if index in found]


def _with_closure_called(args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Compute the gradients now, where the step would; it gets a closure that returns the same loss."""
    closure: Callable | None = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if closure is None:
        return args, kwargs
    with torch.enable_grad():
        loss = closure()
    if "closure" in kwargs:
        return args, {**kwargs, "closure": lambda: loss}
    return (args[0], lambda: loss, *args[2:]), kwargs
