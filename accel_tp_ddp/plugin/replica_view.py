"""The replica's view: while a plugin holds, the ranks of a replica present themselves as one process.

Accelerate counts processes in two dictionaries that all its states share, and talks to them by a handful of functions
of `torch.distributed` in one of its modules. There, a replica stands for a process, so that whoever asks (Accelerate's
loaders and schedulers, `TrainingArguments`, a trainer or a script that nobody here has read) gets the answers of plain
DDP on as many ranks as there are replicas. What says which rank writes stays true to the world, and so do barriers and
`torch.distributed` itself.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ..core.collectives import gather_replicas, send_first_rank
from ..core.override import Override, attributes, overridden
from ..core.shard import ShardInfo, shard_info

__all__ = ["MODULES", "OVERRIDES", "ReplicaView", "current_view", "present_replicas"]


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
        self._reached: set[Override] = set()
        self.reach_modules()
        _count(self.dp_size, self.replica)

    def reach_modules(self) -> None:
        """Let what has been imported by now of `MODULES` talk to replicas."""
        for row in MODULES:
            if row not in self._reached and row.is_loaded():
                self._reached.add(row)
                module = row.upstream()
                instead = row.function(self, vars(module)[row.name])
                self._hooks.enter_context(attributes(module, **{row.name: instead}))

    def held_by(self, accelerator: Any, plugin: Any, shown: Any) -> None:
        """Last until this accelerator, and all others that hold the view, have ended or are gone.

        Args:
            plugin: What the accelerator's state has as its `parallelism_config`.
            shown: What readers of `parallelism_config` get in its place.
        """
        self.reach_modules()
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

    def shards(self) -> Iterator[tuple[nn.Parameter, ShardInfo]]:
        """The sharded parameters of the models that are known."""
        for model in self._models:
            for param in model.parameters():
                info = shard_info(param)
                if info is not None and info.is_sharded:
                    yield param, info


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
    """A module, some names of which are others."""

    def __init__(self, module: Any, **names: Any):
        self.__dict__.update(names, _module=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class _AmongReplicas(_Instead):
    """`torch.distributed`, whose functions take the group of the replicas where they are given none.

    Ranks are then those in that group. Barriers stay the world's.
    """

    def __init__(self, view: ReplicaView):
        super().__init__(dist, view=view)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._module, name)
        if name == "nn":
            return _Instead(found, all_gather=self._all_gather_with_gradients)
        takes = inspect.signature(found).parameters if inspect.isfunction(found) else {}
        if "group" not in takes or "barrier" in name:
            return found

        @functools.wraps(found)
        def among_replicas(*args: Any, **kwargs: Any) -> Any:
            given = inspect.signature(found).bind(*args, **kwargs).arguments
            if given.get("group") in (None, dist.group.WORLD):
                given["group"] = group = self.view.dp_mesh.get_group()
                for end in {"src", "dst"} & takes.keys():
                    rank = given.get(end, takes[end].default)
                    if isinstance(rank, int):
                        given[end] = dist.get_global_rank(group, rank)
            return found(**given)

        return among_replicas

    def _all_gather_with_gradients(self, tensor: Tensor) -> tuple[Tensor, ...]:
        return gather_replicas(self.view.dp_mesh, tensor)


class _OfAccelerate(_AmongReplicas):
    """What Accelerate's functions call: what they broadcast reaches all ranks, and what they reduce, too."""

    def all_reduce(self, tensor: Tensor, op: Any = dist.ReduceOp.SUM) -> None:
        """A replica's word is its first rank's (scripts leave some to the main process); shards are each rank's."""
        if self.view.dp_size > 1:  # one process reduces nothing, and so takes tensors of any device and type
            dist.all_reduce(tensor, op, group=self.view.dp_mesh.get_group())
        if not self._looks_like_shard(tensor):
            send_first_rank(self.view.tp_mesh, tensor)

    def broadcast(self, tensor: Tensor, src: int) -> None:
        """From a replica's first rank to all ranks; a sharded parameter, to the ranks that hold the same part."""
        is_shard = any(param.device == tensor.device and tensor.is_set_to(param) for param, _ in self.view.shards())
        if self.view.dp_size == 1:
            if not is_shard:
                send_first_rank(self.view.tp_mesh, tensor)
        elif is_shard:
            group = self.view.dp_mesh.get_group()
            dist.broadcast(tensor, dist.get_global_rank(group, src), group=group)
        else:
            dist.broadcast(tensor, src * self.view.tp_size)

    def broadcast_object_list(self, objects: list[Any], src: int) -> None:
        """From a replica's first rank to all ranks. With one replica that is the main process, whatever `src`."""
        dist.broadcast_object_list(objects, src * self.view.tp_size if self.view.dp_size > 1 else 0)

    def _looks_like_shard(self, tensor: Tensor) -> bool:
        """Whether `tensor` is of a sharded parameter's shape and type: its copy, gradient, or moving average.

        Accelerate reduces copies, which nothing else tells from another tensor. One that has that shape by chance is
        reduced rightly, too, wherever the ranks of a replica hold the same. The shapes are those of all ranks, so that
        ranks which hold the same tensor come to the same answer.
        """
        shape = tuple(tensor.shape)
        return any(param.dtype == tensor.dtype and shape in info.local_shapes for param, info in self.view.shards())


def _torch_of_accelerate(view: ReplicaView, stock: Any) -> Any:
    return _Instead(stock, distributed=_OfAccelerate(view))


def _torch(view: ReplicaView, stock: Any) -> Any:
    return _Instead(stock, distributed=_AmongReplicas(view))


def _torch_distributed(view: ReplicaView, stock: Any) -> Any:
    return _AmongReplicas(view)


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


def _recursively_apply(
    view: ReplicaView, stock: Callable, /, func: Callable, data: Any, *args: Any, **options: Any
) -> Any:
    """`reduce`, whatever name a script has it by, comes here with its `reduction`: one process takes no mean."""
    if view.dp_size == 1 and "reduction" in options:
        options["reduction"] = "none"
    return stock(func, data, *args, **options)


def _row(owner: str, name: str, function: Callable[..., Any], line: str, reason: str, *needs: str) -> Override:
    return Override(f"accelerate.{owner}", name, function, f"accelerate 1.15, {line}", reason, needs)


_ONE = "adds a dimension in one process"
_MEAN = "takes a mean, which is an error for integers, in one process"
_NO_PEERS, _COUNT = "sees no peers with one replica", "num_processes"

#: While the view holds.
OVERRIDES = (
    _row("state.PartialState", "use_distributed", _use_distributed, "state.py:381", _NO_PEERS, _COUNT),
    _row("state.PartialState", "is_main_process", _is_main_process, "state.py:393", "is true on a replica's ranks"),
    _row("state.PartialState", "is_last_process", _is_last_process, "state.py:388", "is true on a replica's ranks"),
    _row("Accelerator", "is_last_process", _is_last_process, "accelerator.py:743", "counts by itself"),
    _row("state.PartialState", "_reset_state", _reset_state, "state.py:370", "forgets the counts, not the rest"),
    _row("state.AcceleratorState", "_reset_state", _reset_state, "state.py:1074", "forgets the counts, not the rest"),
    _row("utils.operations", "_gpu_gather", _gather, "utils/operations.py:308", _ONE, "torch"),
    _row("utils.operations", "recursively_apply", _recursively_apply, "utils/operations.py:84", _MEAN),
    _row("utils.operations", "_gpu_gather_object", _gather, "utils/operations.py:488", "takes lists in one process"),
)

_SENTENCES = ("sentence_transformers.util.distributed", "sentence_transformers 6.2, util/distributed.py:9")
#: Modules of packages that talk to processes by `torch.distributed` itself, by a name that they have for it or torch.
MODULES = (
    Override(
        *("accelerate.utils.operations", "torch", _torch_of_accelerate, "accelerate 1.15, utils/operations.py:24"),
        "gathers, reduces and broadcasts among all ranks",
    ),
    Override(
        *("transformers.trainer_pt_utils", "dist", _torch_distributed, "transformers 5.23, trainer_pt_utils.py:36"),
        "sums FLOPs over all ranks, and samples by rank",
        counts=False,
    ),
    Override(_SENTENCES[0], "torch", _torch, _SENTENCES[1], "gathers the negatives of peers, with gradients"),
    Override(_SENTENCES[0], "dist", _torch_distributed, _SENTENCES[1], "gathers the negatives of peers"),
)
