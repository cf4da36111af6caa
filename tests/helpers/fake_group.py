"""One rank of a process group whose collectives do nothing: what a step asks for can be counted exactly."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from accel_tp_ddp.model.check import check_model
from accel_tp_ddp.model.parallelize import shard

from .models import VOCABULARY

BATCH, LENGTH = 2, 10


@contextmanager
def fake_tp(size: int = 2):
    """The mesh of a tensor-parallel group of `size` ranks. Values are those of this rank alone, and so wrong."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        yield init_device_mesh("cpu", (size,), mesh_dim_names=("tp",))
    finally:
        dist.destroy_process_group()


def sharded(model, mesh, **switches):
    """`parallelize`, but for what the ranks serve each other, which wants a real group; with switches of the plan."""
    shard(model, mesh, replace(check_model(model, mesh, "auto"), **switches))
    return model


def batch(seed: int = 0):
    ids = torch.randint(1, VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


class Operations(TorchDispatchMode):
    """Counts the operations within, each with the type and shape of the tensor that it is given first."""

    def __init__(self):
        super().__init__()
        self.seen: Counter = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        flat = [each for arg in args for each in (arg if isinstance(arg, (list, tuple)) else (arg,))]
        first = next((each for each in flat if isinstance(each, torch.Tensor)), None)
        if first is not None:
            self.seen[operation.overloadpacket._qualified_op_name, first.dtype, tuple(first.shape)] += 1
        return operation(*args, **kwargs or {})

    def count(self, name, dtype=None, shape=None):
        """Of an operation such as `aten::clone`."""
        return sum(
            count
            for (operation, of_dtype, of_shape), count in self.seen.items()
            if operation == name and dtype in (None, of_dtype) and shape in (None, of_shape)
        )
