"""Accelerate's DDP wrapper over the data-parallel group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

_left_open: WeakValueDictionary[int, DistributedDataParallelKwargs] = WeakValueDictionary()  # they have no hash
_outliving: set[dist.ProcessGroup] = set()


def outlive(group: dist.ProcessGroup) -> None:
    """Keep the group of DDP modules for as long as the process lives, whoever destroys it.

    A reducer that is the last to hold its group frees it without giving up the interpreter lock. Gloo's destructor
    waits there for its threads, one of which may wait for that lock to let go of the last collective's tensors: a
    deadlock, when a script gathers, ends the training and returns (up to torch 2.13; of the kind of pytorch#56297).
    """
    _outliving.add(group)


def _adopt_timeout(accelerator: Accelerator, mesh: DeviceMesh) -> None:
    """A mesh makes its groups with torch's default timeout; give them the user's."""
    handler = accelerator.init_handler
    timeout = getattr(handler, "timeout", None)
    if timeout is not None and accelerator.distributed_type != DistributedType.NO:
        for name in mesh.mesh_dim_names:
            dist.distributed_c10d._set_pg_timeout(timeout, mesh.get_group(name))


def left_to_plugin(handler: DistributedDataParallelKwargs) -> DistributedDataParallelKwargs:
    """Mark settings that no user has made, as Trainer's are, which has them from its own arguments."""
    _left_open[id(handler)] = handler
    return handler


class _OverReplicas:
    """The user's DDP settings, over the data-parallel group; communication hooks too.

    Where the user gave none, gradients are views of DDP's buckets, which keeps them once and not twice. Its buckets
    are as large as they always are: a rank has 1/tp of the gradients and so 1/tp of the buckets, and larger ones would
    be sent later, beside less that is left of the backward.
    """

    def __init__(self, handler: DistributedDataParallelKwargs | None, group: dist.ProcessGroup):
        self.handler = handler or left_to_plugin(DistributedDataParallelKwargs())
        self.group = group

    def to_kwargs(self) -> dict[str, Any]:
        left_open = _left_open.get(id(self.handler)) is self.handler
        ours = {"gradient_as_bucket_view": True} if left_open else {}
        return {**ours, **self.handler.to_kwargs(), "process_group": self.group}

    def register_comm_hook(self, model: nn.parallel.DistributedDataParallel) -> None:
        self.handler.register_comm_hook(_CommHookTarget(model, self.group))


class _CommHookTarget:
    def __init__(self, model: nn.parallel.DistributedDataParallel, group: dist.ProcessGroup):
        self.model = model
        self.group = group

    def register_comm_hook(self, state: Any, hook: Callable) -> None:
        if state is None:  # torch's compression hooks then take the whole world
            state = self.group
        else:
            state.process_group = self.group
        self.model.register_comm_hook(state=state, hook=hook)
