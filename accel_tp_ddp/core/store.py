"""Ranks that wait for one another through the store: no collective, so no collective's timeout runs meanwhile.

Whether the main process is alone with what every rank has to call is found out here, before a collective; and here it
lets the others know, step by step, what it does by itself. What nobody is to wait for is put on a board.
"""

from __future__ import annotations

import json
import time
from typing import Any

import torch.distributed as dist

__all__ = ["Board", "Channel", "PEERS_TIMEOUT", "SILENCE", "missing_peers"]

#: Seconds that the main process waits for the others.
PEERS_TIMEOUT = 60.0
#: Seconds without a sign of life after which the others give the main process up. It may be writing a large file.
SILENCE = 3600.0
_meetings: dict[str, int] = {}
_channels: dict[str, int] = {}


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


class Channel:
    """Messages of the main process, one after the other, to any number of ranks.

    Args:
        name: The same on all ranks; each opens a channel of a name as often as the others.
    """

    def __init__(self, name: str):
        number = _channels[name] = _channels.get(name, 0) + 1
        self._name = f"accel_tp_ddp/channel/{name}"
        self._prefix = f"{self._name}/{number}"
        self._count = 0
        self._store = dist.distributed_c10d._get_default_store()

    def send(self, message: str) -> None:
        self._store.set(f"{self._prefix}/{self._count}", message)
        self.sign()
        self._count += 1

    def sign(self) -> None:
        """Let those who wait know that the main process is alive."""
        self._store.add(f"{self._name}/signs", 1)

    def announce(self) -> None:
        """Let those who wait know that there will be a message."""
        self._store.add(f"{self._prefix}/announced", 1)

    def is_announced(self, seconds: float) -> bool:
        """Whether within so many seconds the main process has announced another message than were received."""
        deadline = time.monotonic() + seconds
        while self._store.add(f"{self._prefix}/announced", 0) <= self._count:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.005)
        return True

    def receive(self) -> str:
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


class Board:
    """Where ranks put up what the others may look at when they come by; no call waits for another rank.

    Args:
        name: The same on all ranks, and no other board's.
    """

    def __init__(self, name: str):
        self._prefix = f"accel_tp_ddp/board/{name}"

    def post(self, topic: str, value: Any) -> None:
        """Add this rank's `value` to `topic`, once. Anything JSON can hold; all ranks can see it when this returns."""
        store: Any = dist.distributed_c10d._get_default_store()
        key = f"{self._prefix}/{topic}"
        store.append(key, json.dumps([dist.get_rank(), value]) + "\n")
        store.check([key])  # is answered, which an append is not

    def read(self, topic: str) -> dict[int, Any]:
        """What is there by now, by rank."""
        store = dist.distributed_c10d._get_default_store()
        # `get` waits for what is not there. This changes nothing, and gives what is there, or else what it is told.
        found = store.compare_set(f"{self._prefix}/{topic}", "[]", "[]").decode()
        return dict(json.loads(line) for line in found.splitlines() if line != "[]")

    def leave(self, topic: str) -> bool:
        """This rank has seen enough of `topic`, which the last one removes; whether that was this one."""
        store = dist.distributed_c10d._get_default_store()
        is_last = store.add(f"{self._prefix}/{topic}/left", 1) == dist.get_world_size()
        if is_last:
            self.remove(topic)
        return is_last

    def remove(self, topic: str) -> None:
        store = dist.distributed_c10d._get_default_store()
        for key in (f"{self._prefix}/{topic}", f"{self._prefix}/{topic}/left"):
            store.delete_key(key)
