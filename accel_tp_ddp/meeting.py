"""What every rank has to call, and a script may have left to the main process alone: find out before a collective."""

from __future__ import annotations

import time

import torch.distributed as dist

__all__ = ["PEERS_TIMEOUT", "missing_peers"]

#: Seconds that the main process waits for the others.
PEERS_TIMEOUT = 60.0
_meetings: dict[str, int] = {}


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
