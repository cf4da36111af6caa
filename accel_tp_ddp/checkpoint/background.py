"""A save that runs beside training: one at a time, in a thread of its own, over a process group of its own.

The thread is no daemon, so a process that ends waits for it. Its collectives go over a gloo group that nothing else
uses, so they cannot get between those of training.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ..core.agreement import Ranks
from ..core.control import patience
from ..core.errors import CheckpointError
from .dcp import HostBuffers

__all__ = ["buffers", "finish_background_save", "group_of_its_own", "run_in_background", "wait_for_save"]

logger = logging.getLogger(__name__)


class _BackgroundSave:
    def __init__(self, place: Path, work: Callable[[], None]):
        self.place = place
        self._work = work
        self._problem: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=f"save {place.name}", daemon=False)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:  # it is raised where the run next asks
            self._problem = error
            logger.error("the save in the background to %s has failed: %s", self.place, error)

    def wait(self) -> None:
        """Wait for the end of it.

        Raises:
            CheckpointError: If it has failed.
        """
        self._thread.join()
        if self._problem is not None:
            raise CheckpointError(
                f"the save in the background to {self.place} has failed, and what was there before is still there: "
                f"{self._problem}"
            ) from self._problem


_pending: _BackgroundSave | None = None
buffers = HostBuffers()  # one save at a time has them
_group: tuple[Any, Any] | None = None  # with the default group that it was made beside


def run_in_background(place: Path, work: Callable[[], None]) -> None:
    """Start `work`, which saves to `place`. Whatever was started before has to be finished."""
    global _pending
    assert _pending is None, "a second save has to wait for the first"
    _pending = _BackgroundSave(place, work)


def finish_background_save(ranks: Ranks) -> None:
    """Wait for the save in the background, if there is one. Collective over all ranks.

    Raises:
        CheckpointError: The same on every rank, if it has failed on any. It is raised once.
    """
    global _pending
    if _pending is None:  # so on all ranks, as all of them start and finish it together
        return
    pending, _pending = _pending, None
    ranks.together(pending.wait)


def wait_for_save() -> None:
    """Wait until the state that is being saved in the background is there. Every rank has to call it.

    `save_state`, `load_state` and `end_training` do this by themselves, and so does a process that ends.

    Raises:
        CheckpointError: The same on every rank, if the save has failed on any of them.
    """
    ranks = Ranks("wait_for_save")
    if _pending is not None:
        ranks.meet()
    finish_background_save(ranks)


def group_of_its_own(timeout: timedelta | None) -> dist.ProcessGroup | None:
    """A gloo group of all ranks that nothing but saving in the background uses; None without ranks. Collective."""
    global _group
    if not dist.is_initialized():
        return None
    if _group is None or _group[0] is not dist.group.WORLD:
        longer = max(timeout, patience()) if timeout is not None else patience()
        made: Any = dist.new_group(backend="gloo", timeout=longer)  # whose type counts ranks outside it in
        _group = (dist.group.WORLD, made)
    return _group[1]
