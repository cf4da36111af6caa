"""All ranks do a thing or none does: an error on one of them is the same error on every one, and nobody waits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from . import store
from .errors import CheckpointError
from .store import missing_peers

__all__ = ["Ranks"]

T = TypeVar("T")


class Ranks:
    """All ranks of a run, or this process alone where there is no process group.

    Args:
        caller: What the user called, for messages.
        group: What the collectives go over; None: the default group. Holds all ranks in any case.

    Attributes:
        place: The folder that is worked on; named in errors once it is known.
    """

    def __init__(self, caller: str, group: dist.ProcessGroup | None = None):
        self.caller = caller
        self.group = group
        self.place: Path | None = None
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.size = dist.get_world_size() if dist.is_initialized() else 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def meet(self) -> None:
        """Let the main process wait for the others, and give up long before a collective would.

        Raises:
            CheckpointError: On the main process, if it was called there alone.
        """
        if self.size == 1:
            return
        missing = missing_peers(self.caller, self.size - 1)
        if missing:
            raise CheckpointError(
                f"`{self.caller}` was called on the main process, but {missing} of the {self.size - 1} other ranks "
                f"did not come within {store.PEERS_TIMEOUT:.0f} s. Each rank holds a part of the weights and of the "
                "optimizer state, so every rank has to call it: take it out of `if accelerator.is_main_process:`."
            )

    def together(self, step: Callable[[], T]) -> T:
        """Run `step` on every rank. If it fails on any, raise the first failing rank's error on all of them."""
        result, problem = None, None
        try:
            result = step()
        except Exception as error:  # whatever it is, the other ranks would wait for this one
            problem = error
        told = None
        if problem is not None:
            told = (isinstance(problem, ValueError), _describe(problem))
        reports = self.all(told)
        failed = [(rank, report) for rank, report in enumerate(reports) if report is not None]
        if failed:
            rank, (is_value_error, message) = failed[0]
            if len({report for _, report in failed}) > 1 or len(failed) < self.size:
                message = f"rank {rank}: {message}"
            raise (ValueError if is_value_error else CheckpointError)(self.told(message)) from problem
        return result

    def on_main(self, step: Callable[[], T]) -> T:
        """Run `step` on the main process, and return what it returned on every rank."""
        return self.all(self.together(step if self.is_main else lambda: None))[0]

    def all(self, value: T) -> list[T]:
        """The `value` of each rank, in rank order."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(values, value, group=self.group)
        except RuntimeError as error:  # a peer has died, or does something else
            raise self.lost() from error
        return values

    def lost(self) -> CheckpointError:
        """The error for a collective that failed."""
        return CheckpointError(
            self.told("lost contact with another rank. What had been saved is still there, and can be loaded.")
        )

    def told(self, message: str) -> str:
        """`message` with the caller and the place, where it does not name that already."""
        place = f" ({self.place})" if self.place is not None and str(self.place) not in message else ""
        return f"{self.caller}: {message}{place}"


def _describe(error: Exception) -> str:
    if isinstance(error, (CheckpointError, ValueError)):
        return str(error)
    return f"{type(error).__name__}: {error}"
