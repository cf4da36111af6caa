"""All ranks do a thing or none does: an error on one of them is an error on every one, and nobody waits.

Each exchange gathers one object of each rank (`core/control`): where it is, how it has failed if it has, and what it
has to say.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist

from . import store
from .control import control_group, gather_objects
from .errors import CheckpointError, UpstreamError

__all__ = ["Failure", "Ranks", "await_peers"]

T = TypeVar("T")
Kind = type[Exception]
_KINDS: dict[str, Kind] = {kind.__name__: kind for kind in (ValueError, TypeError, CheckpointError, UpstreamError)}
_KEPT = (ValueError, CheckpointError, UpstreamError)


class Failure(NamedTuple):
    """An error on its way to another rank: the name of its kind, and its message."""

    kind: str
    message: str

    @classmethod
    def of(cls, error: BaseException, kept: tuple[Kind, ...] = _KEPT, otherwise: Kind = CheckpointError) -> Failure:
        """`error` as one of the kinds in `kept`; else as `otherwise`, with its own kind in the message."""
        for kind in kept:
            if isinstance(error, kind):
                return cls(kind.__name__, str(error))
        return cls(otherwise.__name__, f"{type(error).__name__}: {error}")

    def error(self) -> Exception:
        return _KINDS[self.kind](self.message)


class Ranks:
    """All ranks of a run, or this process alone where there is no process group.

    Args:
        caller: What the user called: the beginning of every message.
        group: Whose ranks these are; None: the default group. Holds all ranks in any case.
        alone: Whether it is this process alone, whatever groups there are.
        failed: What is said of a rank that has failed.
        otherwise: What an error is raised as on the other ranks, if it is neither ValueError nor CheckpointError.
        advice: What to change if the ranks are at different points of the script.

    Attributes:
        place: The folder that is worked on; named in errors once it is known.
    """

    def __init__(
        self,
        caller: str = "",
        group: dist.ProcessGroup | None = None,
        *,
        alone: bool = False,
        failed: str = "rank {rank}: {problem}",
        otherwise: Kind = CheckpointError,
        advice: str = "",
    ):
        self.caller, self.group = caller, group
        self.place: Path | None = None
        several = dist.is_initialized() and not alone
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
        self._failed, self._otherwise, self._advice = failed, otherwise, advice
        self._over = False  # the ranks know of an error, and do not expect this one any more

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def meet(self) -> None:
        """Let the main process wait for the others, and give up long before a collective would.

        Raises:
            CheckpointError: On the main process, if it was called there alone.
        """
        if self.size > 1:
            why = "Each rank holds a part of the weights and of the optimizer state"
            await_peers(self.caller, self.caller, self.size - 1, "the {count} other ranks", why)

    def all(self, value: T, point: str = "") -> list[T]:
        """The `value` of each rank, in rank order.

        Args:
            value: Can be pickled.
            point: Where this rank is in a script that may have led others elsewhere, which is an error on all of them.
        """
        return self._exchange(point, None, value)

    def together(self, step: Callable[[], T]) -> T:
        """Run `step` on every rank. If it fails on any, raise the first failing rank's error on all of them."""
        result: list[T] = []
        self.each(lambda: result.append(step()))
        return result[0]

    def each(self, step: Callable[[], T]) -> list[T]:
        """As `together`, but return what `step` returned on each rank, in rank order."""
        result, problem = None, None
        try:
            result = step()
        except Exception as error:  # whatever it is, the other ranks would wait for this one
            problem = error
        return self._exchange("", problem, result)

    def on_main(self, step: Callable[[], T]) -> T:
        """Run `step` on the main process, and return what it returned on every rank."""
        own: Callable[[], Any] = step if self.is_main else lambda: None
        return self.each(own)[0]

    def same(self, rows: Sequence[str], differ: str, point: str = "") -> None:
        """Raise on every rank unless `rows` are the same on all. Costs one small exchange if they are.

        Args:
            rows: Lines of text.
            differ: The message. Its fields: `rank` and `own`, two ranks; `theirs` and `ours`, their first rows that
                differ; `point`, as in `all`.

        Raises:
            ValueError: If they differ.
        """
        digest = hashlib.blake2b("\n".join(rows).encode(), digest_size=16).digest()
        if len(set(self.all(digest, point))) == 1:
            return
        everything = self.all(list(rows), f"{point}, in detail")
        self._over = True
        own = everything[self.rank]
        rank, other = next((rank, other) for rank, other in enumerate(everything) if other != own)
        ours, theirs = next(((a, b) for a, b in zip(own, other) if a != b), (f"{len(own)} rows", f"{len(other)} rows"))
        message = differ.format(rank=rank, own=self.rank, theirs=theirs, ours=ours, point=point)
        raise ValueError(self.named(message))

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Should the block fail on this rank, let the others raise at their next exchange instead of waiting.

        This rank's own error stays what it is. Whatever exchanges the block has, no rank is left behind in one.
        """
        try:
            yield
        except Exception as error:
            if not self._over:
                self._over = True
                with suppress(RuntimeError):  # they may be gone
                    self._gather(("", Failure.of(error, otherwise=self._otherwise), None))
            raise

    def named(self, message: str) -> str:
        """`message` with the caller and the place, where it does not name that already."""
        place = f" ({self.place})" if self.place is not None and str(self.place) not in message else ""
        return f"{self.caller}: {message}{place}" if self.caller else message

    def lost(self) -> CheckpointError:
        """The error for a collective that failed."""
        return CheckpointError(
            self.named("lost contact with another rank. What had been saved is still there, and can be loaded.")
        )

    def _exchange(self, point: str, problem: Exception | None, value: Any) -> list[Any]:
        failure = Failure.of(problem, otherwise=self._otherwise) if problem is not None else None
        reports = self._gather((point, failure, value))
        failures = {rank: failure for rank, (_, failure, _) in enumerate(reports) if failure is not None}
        if failures:
            self._over = True
            rank, failure = next(iter(failures.items()))
            message = failure.message
            if len(set(failures.values())) > 1 or len(failures) < self.size:
                message = self._failed.format(rank=rank, problem=message)
            raise failure._replace(message=self.named(message)).error() from problem
        for rank, (other, _, _) in enumerate(reports):
            if other != point:
                self._over = True
                message = f"rank {rank} has come to {other}, and rank {self.rank} to {point}. {self._advice}"
                raise CheckpointError(self.named(message))
        return [value for _, _, value in reports]

    def _gather(self, report: tuple[str, Failure | None, Any]) -> list[tuple[str, Failure | None, Any]]:
        if self.size == 1:
            return [report]
        control_group(self.group)  # what may keep the ranks from making it is no lost contact
        try:
            return gather_objects(report, self.group)
        except RuntimeError as error:  # a peer has died, or does something else
            self._over = True
            raise self.lost() from error


def await_peers(caller: str, name: str, count: int, peers: str, why: str, advice: str = "") -> None:
    """Let the main process wait for its peers (see `missing_peers`), and raise there if some do not come."""
    missing = store.missing_peers(name, count)
    if missing:
        raise CheckpointError(
            f"`{caller}` was called on the main process, but {missing} of {peers.format(count=count)} did not come "
            f"within {store.PEERS_TIMEOUT:.0f} s. {why}, so every rank has to call it: take it out of "
            f"`if accelerator.is_main_process:`{advice}."
        )
