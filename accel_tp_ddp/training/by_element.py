"""Whether an optimizer steps element by element: found out by letting it step on something small.

A list of names would be short of the user's own, and of those that a library has changed since.
"""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["likeness", "steps_by_element"]

_SHAPES = ((64, 129), (96, 70))  # large enough for states of 8 bits, which small tensors do not get
_CUT = 3001
_STEPS = 3
_TOLERANCE = 1e-3  # a kernel may round otherwise at the end of a tensor
_OF_A_SCALER = ("grad_scale", "found_inf")


def likeness(group: dict[str, Any]) -> str:
    """Equal for groups that the optimizer steps on likewise: how large a rate is makes no difference."""
    rows = {
        key: bool(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value
        for key, value in group.items()
        if key not in ("params", "lr", "initial_lr", "name")
    }
    return repr(sorted(rows.items()))


def steps_by_element(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    """Whether the step of `optimizer` on a parameter of `group` is the same if it is given in pieces.

    Raises:
        ValueError: If what it does to a parameter depends on others, or if it does not step on something small.
    """
    device = next((param.device for param in group["params"]), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    # Of other sizes at each place, so that means and norms differ from piece to piece.
    starts = [torch.randn(shape, generator=generator) * _rising(shape, 1 + 4 * n) for n, shape in enumerate(_SHAPES)]
    grads = [
        [torch.randn(shape, generator=generator) * _rising(shape, 2 + 9 * n) for n, shape in enumerate(_SHAPES)]
        for _ in range(_STEPS)
    ]
    starts = [start.to(device) for start in starts]
    grads = [[grad.to(device) for grad in of_step] for of_step in grads]
    first = [of_step[:1] for of_step in grads]
    name = type(optimizer).__name__
    try:
        (together, _), _ = _moved(optimizer, group, starts, grads)
        (alone,), _ = _moved(optimizer, group, starts[:1], first)
    except Exception as error:
        raise ValueError(
            f"zero1 cannot find out how the optimizer {name} steps: on a parameter of size {_SHAPES[0]} it raises "
            f"{type(error).__name__}: {error}. If its update of a parameter depends on no other parameter, say so by "
            f"`accel_tp_ddp.register_whole_step({name})`; else set zero1=False."
        ) from error
    if not _same(together, alone):
        raise ValueError(
            f"the step of the optimizer {name} on a parameter depends on other parameters too, and with zero1 each "
            "replica steps on a part of them. Use one that steps parameter by parameter, or set zero1=False."
        )
    try:
        pieces, fitting = _moved(
            *(optimizer, group),
            [piece for start in starts[:1] for piece in _cut(start)],
            [[piece for grad in of_step for piece in _cut(grad)] for of_step in first],
        )
    except Exception:  # it wants matrices, or the like
        return False
    return fitting and bool(alone.any()) and _same(torch.cat(pieces).view_as(alone), alone)


def _rising(shape: tuple[int, int], most: int) -> Tensor:
    return torch.linspace(0.1, most, shape[0] * shape[1]).view(shape)


def _cut(tensor: Tensor) -> tuple[Tensor, Tensor]:
    flat = tensor.reshape(-1)
    return flat[:_CUT], flat[_CUT:]


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=_TOLERANCE, atol=_TOLERANCE * other.abs().mean().item())


def _moved(
    optimizer: Optimizer, group: dict[str, Any], starts: list[Tensor], grads: list[list[Tensor]]
) -> tuple[list[Tensor], bool]:
    """How far a stand-in of `optimizer` moves these parameters, and whether its states are of their shapes."""
    params = [nn.Parameter(start.clone()) for start in starts]
    stand_in = object.__new__(type(optimizer))
    stand_in.__dict__.update({key: value for key, value in vars(optimizer).items() if key not in _OF_A_SCALER})
    options = copy.deepcopy({key: value for key, value in group.items() if key != "params"})
    if "lr" in options:  # which is 0 at the beginning of a warm-up
        options["lr"] = torch.full_like(options["lr"], 0.01) if isinstance(options["lr"], Tensor) else 0.01
    stand_in.param_groups = [{**options, "params": params}]
    stand_in.state = defaultdict(dict)
    stand_in._optimizer_step_pre_hooks, stand_in._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
    devices = [] if params[0].device.type == "cpu" else [params[0].device]
    with torch.random.fork_rng(devices, device_type=params[0].device.type if devices else "cuda"):
        for of_step in grads:
            for param, grad in zip(params, of_step):
                param.grad = grad.clone()
            type(optimizer).step(stand_in)
    fitting = all(
        value.numel() == 1 or value.shape == param.shape
        for param in params
        for value in stand_in.state[param].values()
        if isinstance(value, Tensor)
    )
    return [param.detach() - start for param, start in zip(params, starts)], fitting
