"""Initialising again what is sharded: as the whole weight would be, and not each rank's part by itself.

A part that is drawn alike on all ranks repeats itself in the whole weight, a scale that follows from the number of
input features would be that of the part, and a padding row would be another token's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from ..core.collectives import send_first_rank
from ..core.shard import remembered_shards

__all__ = ["initialize_whole"]


def initialize_whole(model: nn.Module, mesh: DeviceMesh) -> None:
    """Let `reset_parameters` of modules, and `_init_weights` of transformers models, see whole weights.

    Both are then collective over `mesh`, and the first rank's random numbers count, for what is replicated too.
    """
    for module in model.modules():
        if module._parameters and callable(getattr(type(module), "reset_parameters", None)):
            module.reset_parameters = _ResetParameters(module, mesh)
        if callable(getattr(type(module), "_init_weights", None)):
            module._init_weights = _InitWeights(module, mesh)


class _ResetParameters:
    """The module's own `reset_parameters`, on whole weights. An object, so that it is copied with its module."""

    def __init__(self, module: nn.Module, mesh: DeviceMesh):
        self.module = module
        self.mesh = mesh

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with whole_parameters(self.module, self.mesh):
            return type(self.module).reset_parameters(self.module, *args, **kwargs)


class _InitWeights(_ResetParameters):
    """The model's own `_init_weights`, which initialises one of its modules, on whole weights."""

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:  # some initialise a layer together with the block around it
            for owner in (module, *module.children()):
                stack.enter_context(whole_parameters(owner, self.mesh))
            return type(self.module)._init_weights(self.module, module, *args, **kwargs)


@contextmanager
def whole_parameters(module: nn.Module, mesh: DeviceMesh) -> Iterator[None]:
    """Put whole weights in the place of the module's shards, and cut them again afterwards. Collective over `mesh`."""
    shards = {name: info for name, info in remembered_shards(module).items() if info.is_sharded}
    own = {name: param for name, param in module._parameters.items() if param is not None}
    whole = {}
    for name, info in shards.items():
        if name in own:
            whole[name] = nn.Parameter(info.full_tensor(own[name]), requires_grad=own[name].requires_grad)
            whole[name].__dict__.update({k: v for k, v in vars(own[name]).items() if k != "tp_shard"})
    module._parameters.update(whole)
    try:
        yield
    finally:
        module._parameters.update({name: own[name] for name in whole})
    with torch.no_grad():
        for name, param in own.items():
            send_first_rank(mesh, whole.get(name, param))
            if name in whole:
                param.copy_(shards[name].local_part(whole[name]))
