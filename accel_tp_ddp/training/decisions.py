"""What a module is told to do with replicated inputs, such as which experts take which token, is alike on all ranks.

A router computes it on every rank from equal inputs. Where a rank has tuned its own kernels the last bits differ,
and now and then a choice does: the ranks then sum parts of different experts. Nothing shows that, so the choices are
hashed in the forwards before a comparison is due (see `drift`), and compared with everything else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..core.checksum import can_be_summed, checksum

__all__ = ["Decisions", "decisions_of", "note_decisions", "watch_decisions"]

_NAME = "_tp_decisions"
_FACTOR = 0x9E3779B1  # odd, so that the order of what is noted counts


class Decisions:
    """The decisions that one module was given since they were last compared: one number, however many they are.

    Attributes:
        due: Whether a comparison comes up. If not, nothing is noted.
    """

    def __init__(self) -> None:
        self.due = False
        self._number: Tensor | None = None

    @torch.no_grad()
    def note(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            before = 0 if self._number is None else self._number
            self._number = checksum(tensor).add(tensor.numel()) + before * _FACTOR

    def number(self, device_type: str) -> Tensor:
        return torch.zeros((), dtype=torch.int64, device=device_type) if self._number is None else self._number

    def begin(self, due: bool) -> None:
        """Forget what was noted."""
        self.due, self._number = due, None

    def __getstate__(self) -> dict[str, Any]:
        return {"due": False, "_number": None}


def watch_decisions(module: nn.Module) -> None:
    """Let `module` keep what `note_decisions` is told."""
    module.__dict__[_NAME] = Decisions()


def note_decisions(module: nn.Module, *values: Any) -> None:
    """Those of `values` that are tensors of integers or of flags, if a comparison is due. Costs nothing if not."""
    if torch.compiler.is_compiling():  # a flag that changes would be a graph more
        return
    decisions = module.__dict__.get(_NAME)
    if decisions is not None and decisions.due:
        decisions.note(value for value in values if _decides(value))


def _decides(value: Any) -> bool:
    if not isinstance(value, Tensor) or value.is_floating_point() or value.is_complex():
        return False
    return can_be_summed(value)


def decisions_of(model: nn.Module) -> Iterator[tuple[str, Decisions]]:
    """Of each watched module in `model`, with its name."""
    for name, module in model.named_modules():
        if (decisions := module.__dict__.get(_NAME)) is not None:
            yield name, decisions
