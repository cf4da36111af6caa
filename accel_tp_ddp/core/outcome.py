"""How what the main process does by itself has ended, for the ranks that wait for it.

It may do so many times for each time that the others wait: what it saves alone, it saves while they are elsewhere. So
it says with each outcome where in the script it was, by the number of collectives so far, which ranks at the same
place agree on; and the others pass over what they were not there for.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .control import collectives
from .serving import addresses, names_of_service
from .shard import ShardInfo
from .store import Channel
from .transfer import mesh_ranks

__all__ = ["DONE", "Call"]

DONE = "done"
#: Seconds that ranks wait for a further outcome where one seems to be earlier, or is of another folder.
EARLIER, OTHER_PLACE = 60.0, 2.0
_channels: dict[str, Channel] = {}
_under_way: list[Call] = []


class Call:
    """One call of a function that the main process carries out, perhaps alone.

    Args:
        caller: What the user called.
        mesh: The ranks of a replica.
        place: The folder.
        wanted: The sharded tensors.
    """

    def __init__(
        self,
        caller: str,
        mesh: DeviceMesh,
        place: str | os.PathLike | None,
        wanted: Sequence[tuple[Tensor, ShardInfo]],
    ):
        self.caller = caller
        self.place = os.fspath(place) if place is not None else None
        group, ranks = mesh.get_group(), mesh_ranks(mesh)
        self.among_peers = 0 in ranks
        self._peers, self._others = f"{caller} to {group.group_name}", f"{caller} of {len(ranks)} ranks"
        self._at = collectives(group), collectives(dist.group.WORLD)
        # Not the folder: each rank may have one of its own for what the main process alone writes.
        self.id = f"{self._peers}, {self._at[0]}, {addresses(wanted)}"

    @property
    def outermost(self) -> Call:
        """The call that this one is made in, if it is made in one."""
        return _under_way[0] if _under_way else self

    @contextmanager
    def under_way(self) -> Iterator[None]:
        """Within the block, the main process carries it out."""
        if not _under_way:
            for channel in self._channels():
                channel.announce()
        _under_way.append(self)
        try:
            yield
        finally:
            _under_way.pop()

    def sign(self) -> None:
        """Let those who wait know that the main process is alive."""
        for channel in self._channels():
            channel.sign()

    def end(self, message: str) -> None:
        """On the main process: how it has ended. Nobody waits for a call within another."""
        if not _under_way:
            for channel in self._channels():
                channel.send(json.dumps([*self._at, self.place, message]))

    def outcome(self) -> str:
        """On any other rank: how it has ended, once it has."""
        channel = _channel(self._peers if self.among_peers else self._others)
        while True:
            in_replica, in_world, place, message = json.loads(channel.receive())
            if self.among_peers and in_replica < self._at[0]:  # the main process made an earlier call alone
                continue
            if in_world < self._at[1] and channel.is_announced(EARLIER):  # likewise, or some ranks talk by themselves
                continue
            if (in_replica, in_world) == self._at and place != self.place and channel.is_announced(OTHER_PLACE):
                continue
            return message

    def _channels(self) -> list[Channel]:
        return [_channel(name) for name in (self._peers, self._others)]


def _channel(name: str) -> Channel:
    name = f"{names_of_service()}/{name}"
    if name not in _channels:
        _channels[name] = Channel(name)
    return _channels[name]
