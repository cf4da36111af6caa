"""How a step of this package grows: with the layers, and with the tokens of a sequence beyond attention.

Both are to be linear: each further layer, and each further token, costs what the others do. Tokens with loss_parallel:
full logits cost more a token the more there are (presumably memory that large, asked of the system anew in each step).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .contenders import ours
from .rounds import Entrant, enter, interleave, spread
from .sizes import HEADS, KEY_VALUE_HEADS, Setting, Step

__all__ = ["growth"]

LAYERS = (4, 8, 12, 16)
TOKENS = (128, 1024, 2048, 4096)
LAYERS_FOR_TOKENS = 2
WITHIN = 0.10


def growth(setting: Setting, rounds: int, budget: float, control: dist.ProcessGroup) -> list[str]:
    """A table of both: the cost of a further layer or token from each size to the next, and how it varies."""
    columns = ["what grows", "sizes", "step of the smallest and the largest, ms", "a further one, ms, by interval"]
    columns += ["furthest from the whole way's", "linear within 10 %"]
    rows = [f"| {' | '.join(columns)} |", f"| {' | '.join('---' for _ in columns)} |"]

    def layered(layers: int) -> Setting:
        return replace(setting, size=replace(setting.size, layers=layers))

    def long(length: int) -> Setting:
        return replace(setting, size=replace(setting.size, length=length, layers=LAYERS_FOR_TOKENS, batch=1))

    found = _times({layers: (ours, layered(layers)) for layers in LAYERS}, rounds, budget / 2, control)
    rows += [_row(f"layers, {clock}", LAYERS, times) for clock, times in found.items()]
    found = _times(
        {("step", length): (partial(ours, loss_parallel=True), long(length)) for length in TOKENS}
        | {("attention", length): (attention_alone, long(length)) for length in TOKENS},
        rounds,
        budget / 2,
        control,
    )
    for clock, both in found.items():
        beyond = {
            length: [step - part for step, part in zip(both["step", length], both["attention", length])]
            for length in TOKENS
        }
        rows.append(_row(f"tokens of a sequence, beyond attention, {clock}", TOKENS, beyond))
    return rows


def attention_alone(setting: Setting) -> Step:
    """Forward and backward of the attention of one rank's heads in all layers, and nothing else."""
    size = setting.size
    shape = (size.batch, HEADS // setting.tp, size.length, size.hidden // HEADS)
    query = torch.randn(shape, requires_grad=True)
    key, value = (
        torch.randn(shape[0], KEY_VALUE_HEADS // setting.tp, *shape[2:], requires_grad=True) for _ in range(2)
    )

    def step() -> Tensor:
        total = torch.zeros(())
        for _ in range(size.layers):
            out = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).sum()
            out.backward()
            total += out.detach()
        query.grad = key.grad = value.grad = None
        return total

    return step


def _times(
    builds: dict[Any, tuple[Callable[[Setting], Step], Setting]],
    rounds: int,
    budget: float,
    control: dist.ProcessGroup,
) -> dict[str, dict[Any, list[float]]]:
    """Seconds by round, under the keys of `builds`: on the clock, and on the processors of all ranks."""
    entrants: list[Entrant] = []
    for key, (build, setting) in builds.items():
        entrants.append(enter(str(key), build, setting, control))
        if entrants[-1].error:
            raise RuntimeError(f"{key}: {entrants[-1].error}")
    times = interleave(entrants, rounds, budget, control)
    kinds = {"time": times.steps, "CPU time": times.steps_cpu}
    return {clock: {key: own[str(key)] for key in builds} for clock, own in kinds.items()}


def _row(what: str, sizes: Sequence[int], times: dict[int, list[float]]) -> str:
    def slope(smaller: int, larger: int) -> float:
        return spread([(b - a) / (larger - smaller) for a, b in zip(times[smaller], times[larger])])[1]

    each = [slope(*pair) for pair in pairwise(sizes)]
    whole = slope(sizes[0], sizes[-1])
    furthest = max(abs(own / whole - 1) for own in each)
    ends = " and ".join(f"{spread(times[size])[1] * 1000:.0f}" for size in (sizes[0], sizes[-1]))
    return (
        f"| {what} | {', '.join(map(str, sizes))} | {ends} | {', '.join(f'{own * 1000:.3g}' for own in each)} "
        f"| {furthest:.0%} | {'yes' if furthest <= WITHIN else 'no'} |"
    )
