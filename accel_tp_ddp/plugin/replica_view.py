"""The replica's view: while a plugin holds, the ranks of a replica present themselves as one process.

Accelerate counts processes in two dictionaries that all its states share, and talks to them by a handful of functions
of `torch.distributed` in one of its modules. There, a replica stands for a process, so that whoever asks (Accelerate's
loaders and schedulers, `TrainingArguments`, a trainer or a script that nobody here has read) gets the answers of plain
DDP on as many ranks as there are replicas. What says which rank writes stays true to the world, and so do barriers and
`torch.distributed` itself.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, operations
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ..core.collectives import send_first_rank
from ..core.override import Override, attributes, overridden
from ..core.shard import ShardInfo, shard_info

__all__ = ["OVERRIDES", "ReplicaView", "current_view", "present_replicas"]


class ReplicaView:
    """What the processes of one mesh are shown.

    Args:
        mesh: `("dp_replicate", "tp")`, over all ranks.

    Attributes:
        is_main: Whether this is the main process, the first rank of the world.
        is_last: Whether this is the last rank of the world.
    """

    def __init__(self, mesh: DeviceMesh):
        self.mesh = mesh
        self.tp_mesh, self.dp_mesh = mesh["tp"], mesh["dp_replicate"]
        self.tp_size, self.dp_size = self.tp_mesh.size(), self.dp_mesh.size()
        self.replica = self.dp_mesh.get_local_rank()
        self.is_main = dist.get_rank() == 0
        self.is_last = dist.get_rank() == dist.get_world_size() - 1
        self._models: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._holders: set[int] = set()
        self._before = (dist.get_world_size(), dist.get_rank())
        self._config: tuple[Any, Any] | None = None  # the accelerators' plugin, and what is shown of it
        self._hooks = ExitStack()
        self._hooks.enter_context(overridden(OVERRIDES, self))
        self._hooks.enter_context(attributes(operations, torch=_Instead(torch, distributed=_over_replicas(self))))
        _count(self.dp_size, self.replica)

    def held_by(self, accelerator: Any, plugin: Any, shown: Any) -> None:
        """Last until this accelerator, and all others that hold the view, have ended or are gone.

        Args:
            plugin: What the accelerator's state has as its `parallelism_config`.
            shown: What readers of `parallelism_config` get in its place.
        """
        self._holders.add(id(accelerator))
        weakref.finalize(accelerator, self._let_go, id(accelerator)).atexit = False
        self._config = (plugin, shown)
        AcceleratorState._shared_state["parallelism_config"] = shown

    def stay(self) -> None:
        """Last as long as the process group, whatever becomes of accelerators."""
        self._holders.add(_PROCESS_GROUP)

    def let_go(self, accelerator: Any) -> None:
        """Not be held by an accelerator that has ended its training. What it shows itself, it goes on showing."""
        accelerator.state.__dict__ = dict(AcceleratorState._shared_state)
        if dist.is_initialized():
            self._let_go(id(accelerator))
        else:
            self.end()

    def _let_go(self, holder: int) -> None:
        self._holders.discard(holder)
        if not self._holders:
            self.end()

    def knows(self, model: nn.Module) -> None:
        """Tell this model's shards from what is the same on all ranks of a replica."""
        self._models.add(model)

    def end(self) -> None:
        """Show everything as it was before."""
        global _current
        if _current is not self:
            return
        _current = None
        self._hooks.close()
        _count(*self._before)
        state = AcceleratorState._shared_state
        if self._config is not None and state.get("parallelism_config") is self._config[1]:
            state["parallelism_config"] = self._config[0]

    # ------------------------------------------------------------------------------------------------ collectives

    def all_gather(self, outputs: list[Tensor], tensor: Tensor) -> None:
        dist.all_gather(outputs, tensor, group=self.dp_mesh.get_group())

    def all_gather_into_tensor(self, output: Tensor, tensor: Tensor) -> None:
        dist.all_gather_into_tensor(output, tensor, group=self.dp_mesh.get_group())

    def all_gather_object(self, outputs: list[Any], data: Any) -> None:
        dist.all_gather_object(outputs, data, group=self.dp_mesh.get_group())

    def all_reduce(self, tensor: Tensor, op: Any = dist.ReduceOp.SUM) -> None:
        """A replica's word is its first rank's (scripts leave some to the main process); shards are each rank's."""
        dist.all_reduce(tensor, op, group=self.dp_mesh.get_group())
        if not self._looks_like_shard(tensor):
            send_first_rank(self.tp_mesh, tensor)

    def broadcast(self, tensor: Tensor, src: int) -> None:
        """From a replica's first rank to all ranks; a sharded parameter, to the ranks that hold the same part."""
        if any(tensor.is_set_to(param) for param, _ in self._shards()):
            group = self.dp_mesh.get_group()
            dist.broadcast(tensor, dist.get_global_rank(group, src), group=group)
        else:
            dist.broadcast(tensor, src * self.tp_size)

    def broadcast_object_list(self, objects: list[Any], src: int) -> None:
        dist.broadcast_object_list(objects, src * self.tp_size)

    def _shards(self) -> Iterator[tuple[nn.Parameter, ShardInfo]]:
        for model in self._models:
            for param in model.parameters():
                info = shard_info(param)
                if info is not None and info.is_sharded:
                    yield param, info

    def _looks_like_shard(self, tensor: Tensor) -> bool:
        """Whether `tensor` is of a sharded parameter's shape and type: its copy, gradient, or moving average.

        Accelerate reduces copies, which nothing else tells from another tensor. One that has that shape by chance is
        reduced rightly, too, wherever the ranks of a replica hold the same. The shapes are those of all ranks, so that
        ranks which hold the same tensor come to the same answer.
        """
        shape = tuple(tensor.shape)
        return any(param.dtype == tensor.dtype and shape in info.local_shapes for param, info in self._shards())


def current_view() -> ReplicaView | None:
    """The view that holds now."""
    return _current


def present_replicas(mesh: DeviceMesh) -> ReplicaView:
    """Let the ranks of each replica of `mesh` present themselves as one process; again, if they do already."""
    global _current
    if _current is not None and _current.mesh is mesh:
        return _current
    if _current is not None:
        _current.end()
    _current = ReplicaView(mesh)
    return _current


_current: ReplicaView | None = None
_PROCESS_GROUP = 0  # the address of no accelerator


def _count(processes: int, index: int) -> None:
    for state in (PartialState._shared_state, AcceleratorState._shared_state):
        if state:
            state.update(num_processes=processes, process_index=index)


class _Instead:
    """A module, with some names of its own."""

    def __init__(self, module: Any, **names: Any):
        self.__dict__.update(names, _module=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _over_replicas(view: ReplicaView) -> _Instead:
    names = ("all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "broadcast")
    calls = {name: getattr(view, name) for name in (*names, "broadcast_object_list")}
    return _Instead(dist, **calls)


def _use_distributed(view: ReplicaView, stock: Callable, state: PartialState, /) -> bool:
    return state.distributed_type != DistributedType.NO


def _is_main_process(view: ReplicaView, stock: Callable, state: PartialState, /) -> bool:
    return view.is_main


def _is_last_process(view: ReplicaView, stock: Callable, state: Any, /) -> bool:
    return view.is_last


def _reset_state(view: ReplicaView, stock: Callable, /, *args: Any, **kwargs: Any) -> None:
    view.end()
    stock(*args, **kwargs)


def _gather(view: ReplicaView, stock: Callable, /, *args: Any, **kwargs: Any) -> Any:
    return stock(*args, **kwargs) if view.dp_size > 1 else next(iter([*args, *kwargs.values()]))


def _row(owner: str, name: str, function: Callable[..., Any], line: str, reason: str) -> Override:
    return Override(f"accelerate.{owner}", name, function, f"accelerate 1.15, {line}", reason)


#: While the view holds.
OVERRIDES = (
    _row("state.PartialState", "use_distributed", _use_distributed, "state.py:381", "sees no peers with one replica"),
    _row("state.PartialState", "is_main_process", _is_main_process, "state.py:393", "is true on a replica's ranks"),
    _row("state.PartialState", "is_last_process", _is_last_process, "state.py:388", "is true on a replica's ranks"),
    _row("Accelerator", "is_last_process", _is_last_process, "accelerator.py:743", "counts by itself"),
    _row("state.PartialState", "_reset_state", _reset_state, "state.py:370", "forgets the counts, not the rest"),
    _row("state.AcceleratorState", "_reset_state", _reset_state, "state.py:1074", "forgets the counts, not the rest"),
    _row("utils.operations", "_gpu_gather", _gather, "utils/operations.py:308", "adds a dimension in one process"),
    _row("utils.operations", "_gpu_gather_object", _gather, "utils/operations.py:488", "takes lists in one process"),
)
