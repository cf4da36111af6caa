"""How a step of this package grows: with the layers, and with the tokens of a sequence beyond attention.

Both are to be linear: each further layer, and each further token, costs what the last one did.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .contenders import ours
from .rounds import enter, interleave, spread
from .sizes import HEADS, KEY_VALUE_HEADS, Setting, Step

__all__ = ["LAYERS", "TOKENS", "growth_rows"]

LAYERS = (4, 8, 12, 16)
TOKENS = (128, 1024, 2048, 3072, 4096)
WITHIN = 0.10


def growth_rows(setting: Setting, rounds: int, budget: float, control: dist.ProcessGroup) -> list[str]:
    """A table of both: the cost of a further layer or token from each size to the next, and how it varies."""
    rows = [
        "| what grows | sizes | step, ms | each further one, ms, between sizes | furthest from their median | linear within 10 % |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    deeper = {f"{layers} layers": replace(setting.size, layers=layers) for layers in LAYERS}
    longer = {f"{length} tokens": replace(setting.size, length=length, layers=2) for length in TOKENS}
    for what, sizes, counts, apart in (
        ("layers", deeper, LAYERS, None),
        ("tokens of a sequence, without attention", longer, TOKENS, attention_alone),
    ):
        steps: dict[str, Callable[[Setting], Step]] = {name: ours for name in sizes}
        if apart is not None:
            steps |= {f"attention, {name}": apart for name in sizes}
        entrants = [
            enter(name, partial(_at, replace(setting, size=sizes[name.removeprefix("attention, ")]), build), control)
            for name, build in ((name, partial(_build, build)) for name, build in steps.items())
        ]
    return rows
