"""Where objects go that ranks tell one another: over gloo, also where tensors go over NCCL.

A collective that waits too long on a GPU's group ends the process, before an error can be raised; and whatever the
main process does by itself meanwhile (checksums of a checkpoint, removing an old one) counts as waiting. So each group
whose backend is a device's has a second one beside it, for objects alone, with patience. A group of CPU ranks over
gloo serves for its own objects.
"""

from __future__ import annotations

import pickle
from datetime import timedelta
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = [
    *("PATIENCE", "barrier", "be_patient", "collectives", "control_group", "first_object", "gather_objects"),
    "patience",
]

T = TypeVar("T")

#: Seconds that ranks wait for one another where nobody says otherwise.
PATIENCE = 3600
#: Groups that take objects themselves: those of CPU ranks, and of one process that plays a rank of many.
_TAKE_OBJECTS = ("gloo", "mpi", "fake")
_beside: WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup] = WeakKeyDictionary()
_made: dict[str, int] = {}
_seconds: float = PATIENCE


def be_patient(seconds: float) -> None:
    """Let ranks wait for one another so long on groups that are made from now on."""
    global _seconds
    _seconds = seconds


def patience() -> timedelta:
    return timedelta(seconds=_seconds)


def control_group(group: dist.ProcessGroup | None = None) -> dist.ProcessGroup:
    """The group for objects of `group`'s ranks: `group` itself, or one beside it. Collective over it, the first time.

    Args:
        group: None: the default group. What is beside that can be passed to any function of `torch.distributed`, and
            what is beside another one to those of this module: making one that torch knows of would involve all ranks.
    """
    world = dist.group.WORLD
    group = group if group is not None else world
    assert group is not None, "there are several ranks"
    if dist.get_backend(group) in _TAKE_OBJECTS:
        return group
    if group not in _beside:
        try:
            _beside[group] = _of_world() if group is world else _among_ranks_of(group)
        except RuntimeError as error:
            raise RuntimeError(
                f"the ranks could not be connected over gloo, for what they tell one another beside tensors: {error}. "
                "Where it has picked the wrong network interface, name the right one by GLOO_SOCKET_IFNAME; where "
                f"ranks come later than {_seconds} s, set ACCEL_TP_DDP_CONTROL_TIMEOUT, the plugin's control_timeout."
            ) from error
    return _beside[group]


def _of_world() -> dist.ProcessGroup:
    made: Any = dist.new_group(backend="gloo", timeout=patience(), group_desc="accel_tp_ddp control")
    return made


def _among_ranks_of(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """By a name that only these ranks need to agree on, and that no other group over the same store has."""
    name = f"accel_tp_ddp/control/{group.group_name}"
    number = _made[name] = _made.get(name, 0) + 1
    store = dist.PrefixStore(f"{name}/{number}", dist.distributed_c10d._get_default_store())
    made, kind = dist.ProcessGroup(store, group.rank(), group.size()), dist.ProcessGroup.BackendType.GLOO
    # Held by `made` alone: that frees it without keeping the interpreter lock, which its threads may wait for.
    gloo: Any = dist.ProcessGroupGloo(store, group.rank(), group.size(), timeout=patience())
    made._register_backend(torch.device("cpu"), kind, gloo)
    made._set_default_backend(kind)
    return made


def gather_objects(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """The `value` of each rank of `group` (None: of all ranks), in rank order. Collective over it.

    Args:
        value: Anything that can be pickled.
    """
    control, own = control_group(group), _pickled(value)
    sizes = torch.empty(control.size(), dtype=torch.int64)
    control._allgather_base(sizes, torch.tensor([own.numel()])).wait()
    longest = int(sizes.max())
    everything = torch.empty(control.size() * longest, dtype=torch.uint8)
    control._allgather_base(everything, torch.cat([own, own.new_zeros(longest - own.numel())])).wait()
    return [_unpickled(part[:size]) for part, size in zip(everything.view(-1, longest), sizes.tolist())]


def first_object(value: T, group: dist.ProcessGroup | None = None) -> T:
    """The `value` of the first rank of `group`, on all of them. Collective over it."""
    control = control_group(group)
    is_first = control.rank() == 0
    sent = _pickled(value) if is_first else torch.empty(0, dtype=torch.uint8)
    size = torch.tensor([sent.numel()])
    control.broadcast(size, 0).wait()
    sent = sent if is_first else torch.empty(int(size), dtype=torch.uint8)
    control.broadcast(sent, 0).wait()
    return value if is_first else _unpickled(sent)


def barrier() -> None:
    """Wait for all ranks, patiently."""
    dist.barrier(group=control_group())


def collectives(group: Any) -> int:
    """How many collectives there were so far over `group` and what is beside it."""
    return sum(_count(each) for each in (group, _beside.get(group)) if each is not None)


def _count(group: Any) -> int:
    try:
        return group._get_sequence_number_for_group()
    except RuntimeError:  # a backend that does not count
        return 0


def _pickled(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)


def _unpickled(data: Tensor) -> Any:
    return pickle.loads(data.numpy().tobytes())
