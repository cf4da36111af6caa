"""Initialising again what is sharded: as the full weight would be, and not each rank's part by itself.

A part that is drawn alike on all ranks repeats itself in the full weight, a scale that follows from the number of
input features would be that of the part, and a padding row would be another token's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from ..core.collectives import send_first_rank
from ..core.shard import remembered_shards

__all__ = ["init_weights", "reset_parameters"]


def reset_parameters(mesh: DeviceMesh, stock: Callable, owner: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
    """The module's own `reset_parameters`, on full weights. Collective; the first rank's random numbers count."""
    with full_parameters(owner, mesh):
        return stock(*args, **kwargs)


def init_weights(
    mesh: DeviceMesh, stock: Callable, model: nn.Module, /, module: nn.Module, *args: Any, **kwargs: Any
) -> Any:
    """The model's own `_init_weights`, which initialises one of its modules, on full weights. Collective as above."""
    with ExitStack() as stack:  # some initialise a layer together with the block around it
        for owner in (module, *module.children()):
            stack.enter_context(full_parameters(owner, mesh))
        return stock(module, *args, **kwargs)


@contextmanager
def full_parameters(module: nn.Module, mesh: DeviceMesh) -> Iterator[None]:
    """Put full weights in the place of the module's shards, and cut them again afterwards. Collective over `mesh`."""
    shards = {name: info for name, info in remembered_shards(module).items() if info.is_sharded}
    own = {name: param for name, param in module._parameters.items() if param is not None}
    full = {}
    for name, info in shards.items():
        if name in own:
            full[name] = nn.Parameter(info.full_tensor(own[name]), requires_grad=own[name].requires_grad)
            full[name].__dict__.update({k: v for k, v in vars(own[name]).items() if k != "tp_shard"})
    module._parameters.update(full)
    try:
        yield
    finally:
        module._parameters.update({name: own[name] for name in full})
    with torch.no_grad():
        for name, param in own.items():
            send_first_rank(mesh, full.get(name, param))
            if name in full:
                param.copy_(shards[name].local_part(full[name]))
