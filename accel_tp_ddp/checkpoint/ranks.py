"""All ranks do a thing or none does: an error on one of them is the same error on every one, and nobody waits."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from ..errors import CheckpointError

__all__ = ["PEERS_TIMEOUT", "Ranks"]

T = TypeVar("T")

#: Seconds that the main process waits for the other ranks to come to `save_state` or `load_state`.
PEERS_TIMEOUT = 60.0
_visits: dict[str, int] = {}


class Ranks:
    """All ranks of a run, or this process alone where there is no process group.

    Args:
        caller: What the user called, for messages.

    Attributes:
        place: The folder that is worked on; named in errors once it is known.
    """

    def __init__(self, caller: str):
        self.caller = caller
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
        visit = _visits.get(self.caller, 0) + 1
        store = dist.distributed_c10d._get_default_store()
        key = f"accel_tp_ddp/{self.caller}/{visit}"
        arrived, deadline = store.add(key, int(not self.is_main)), time.monotonic() + PEERS_TIMEOUT
        while self.is_main and arrived < self.size - 1:
            if time.monotonic() > deadline:
                raise CheckpointError(
                    f"`{self.caller}` was called on the main process, but {self.size - 1 - arrived} of the "
                    f"{self.size - 1} other ranks did not come within {PEERS_TIMEOUT:.0f} s. Each rank holds a part "
                    "of the weights and of the optimizer state, so every rank has to call it: take it out of "
                    "`if accelerator.is_main_process:`."
                )
            time.sleep(0.005)
            arrived = store.add(key, 0)
        _visits[self.caller] = visit

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
            dist.all_gather_object(values, value)
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
