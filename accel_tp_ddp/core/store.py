"""Ranks that wait for one another through the store: no collective, so no collective's timeout runs meanwhile.

What every rank has to call, and a script may have left to the main process alone, is found out before a collective;
and what the main process does by itself, it can tell the others of, step by step.
"""

from __future__ import annotations

import time

import torch.distributed as dist

__all__ = ["Line", "PEERS_TIMEOUT", "SILENCE", "missing_peers"]

#: Seconds that the main process waits for the others.
PEERS_TIMEOUT = 60.0
#: Seconds without a sign of life after which the others give the main process up. It may be writing a large file.
SILENCE = 3600.0
_meetings: dict[str, int] = {}
_lines: dict[str, int] = {}
_spoken: dict[str, tuple[str, int]] = {}


def missing_peers(name: str, peers: int) -> int:
    """Let the main process wait until its `peers` have arrived, and give up long before a collective would.

    Only this way round: the peers have nothing else to do, the main process may well be late.

    Args:
        name: What is called, and by whom: the same on all ranks that meet, as often as they do.
        peers: How many ranks are to meet the main process.

    Returns:
        On the main process how many have not come within `PEERS_TIMEOUT`; elsewhere, at once, 0.
    """
    number = _meetings.get(name, 0) + 1
    key = f"accel_tp_ddp/{name}/{number}"
    store, is_main = dist.distributed_c10d._get_default_store(), dist.get_rank() == 0
    arrived, deadline = store.add(key, int(not is_main)), time.monotonic() + PEERS_TIMEOUT
    while is_main and arrived < peers:
        if time.monotonic() > deadline:
            return peers - arrived
        time.sleep(0.005)
        arrived = store.add(key, 0)
    _meetings[name] = number  # one that has failed may be tried again
    return 0


class Line:
    """What the main process says, one message after the other, and any number of ranks hear.

    Args:
        name: The same on all ranks; each opens a line of a name as often as the others.
    """

    def __init__(self, name: str):
        number = _lines[name] = _lines.get(name, 0) + 1
        self._name = f"accel_tp_ddp/line/{name}"
        self._prefix = f"{self._name}/{number}"
        self._count = 0
        self._store = dist.distributed_c10d._get_default_store()

    def forget_earlier(self) -> None:
        """On the main process, when all who heard the lines before are known to have heard them to the end."""
        prefix, count = _spoken.pop(self._name, ("", 0))
        for index in range(count):
            self._store.delete_key(f"{prefix}/{index}")

    def say(self, message: str) -> None:
        self._store.set(f"{self._prefix}/{self._count}", message)
        self._store.add(f"{self._name}/signs", 1)
        self._count += 1
        _spoken[self._name] = self._prefix, self._count

    def hear(self) -> str:
        """The next message; waits for it.

        Raises:
            RuntimeError: If the main process gives no sign of life for `SILENCE` seconds.
        """
        key, pause = f"{self._prefix}/{self._count}", 0.0002
        signs, deadline = 0, time.monotonic() + SILENCE
        while not self._store.check([key]):
            if time.monotonic() > deadline:
                signs, before = self._store.add(f"{self._name}/signs", 0), signs
                if signs == before:
                    raise RuntimeError(
                        f"the main process has been silent for {SILENCE:.0f} s: it has ended, or hangs."
                    )
                deadline = time.monotonic() + SILENCE
            time.sleep(pause)
            pause = min(2 * pause, 0.02)
        self._count += 1
        return self._store.get(key).decode()
