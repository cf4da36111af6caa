"""transformers' own tensor parallelism, for the same comparison: the two ways in which it shards a model."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers.distributed import DistributedConfig

from accel_tp_ddp.plans.rules import PlanLike


def shard_while_loading(model: nn.Module, mesh: DeviceMesh, folder: Path, plan: PlanLike) -> nn.Module:
    """Each rank reads its part of the checkpoint in `folder`; the built `model` only says of which class."""
    config = DistributedConfig(tp_size=mesh.size())
    return type(model).from_pretrained(folder, distributed_config=config, dtype=torch.float32).eval()


def shard_built(model: nn.Module, mesh: DeviceMesh, folder: Path, plan: PlanLike) -> nn.Module:
    """What `from_pretrained` does to a model that it has just made, here to one that has its weights."""
    config, _, manager = type(model).prepare_distribute_model(DistributedConfig(tp_size=mesh.size()))
    model = type(model).maybe_distribute_model(model, config, manager)
    model.tie_weights()  # it wraps tied weights one by one
    return model
