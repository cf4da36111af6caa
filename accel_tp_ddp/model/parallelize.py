"""Shard a model by a plan. Imports torch only: usable without Accelerate."""

from __future__ import annotations

import logging

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ..core.mesh import tensor_parallel_mesh
from ..core.serving import serve
from ..core.shard import remember_everywhere
from ..core.slices import refuse_slices
from ..core.wrappers import unwrap
from ..plans.plan import Plan
from ..plans.rules import PlanLike
from .apply import apply_plan
from .check import check_model
from .dtensor import localize_with_map
from .methods import install_methods, install_saving
from .partial_gradients import link_partial_gradients
from .peft_methods import watch_adapters
from .transformers_tp import adopt

__all__ = ["localize", "parallelize", "parallelize_with_map", "shard"]

logger = logging.getLogger(__name__)


def parallelize(model: nn.Module, tp_mesh: DeviceMesh, plan: PlanLike = "auto") -> nn.Module:
    """Shard `model` over a tensor-parallel mesh by a plan, in place; its parameters are left localized.

    The weights of the mesh's first rank count: they are sent to the others before they are cut. A model whose
    parameters are DTensors already (parallelized by torch or transformers) is taken as it is, and localized. Of one
    that was loaded in slices, the slices are what the plan would have cut, and stay.

    Args:
        model: A bare or compiled model, not yet wrapped in DDP. Plain parameters keep their identity.
        tp_mesh: One-dimensional mesh, or one with a dimension named `tp`.
        plan: See `resolve_plan`.

    Returns:
        `model`.

    Raises:
        ValueError: If the model is wrapped or parallelized already, or the plan cannot be carried out; on every rank
            that finds it, before any weight is touched or any collective is entered.
    """
    mesh = tensor_parallel_mesh(tp_mesh)
    if mesh.size() > 1:
        verified = check_model(model, mesh, plan)
        parallelize_with_map(unwrap(model), mesh, verified)
    return model


def parallelize_with_map(model: nn.Module, mesh: DeviceMesh, plan: Plan | None) -> dict[nn.Parameter, nn.Parameter]:
    """Carry out a verified plan; None localizes a model of DTensors. Collective over the mesh.

    Returns:
        Old parameter to new one, for those whose object had to change: none for a plain model.
    """
    mapping = shard(model, mesh, plan)
    install_methods(model, mesh, watch_adapters(model))
    serve(model, mesh)
    if plan is not None and dist.get_rank() == 0:
        logger.info("%s", plan)
    return mapping


def shard(model: nn.Module, mesh: DeviceMesh, plan: Plan | None) -> dict[nn.Parameter, nn.Parameter]:
    """Carry out a plan, but for the model's methods and what is served. See `parallelize_with_map`."""
    plain = dict(model.named_parameters(remove_duplicate=False)) if plan is not None else None
    if plan is not None:
        apply_plan(model, mesh, plan)
    mapping = localize_with_map(model, keep=plain)
    remember_everywhere(model)
    if plan is not None:
        link_partial_gradients(plan)
    else:
        adopt(model, mesh)
    return mapping


def localize(model: nn.Module) -> nn.Module:
    """Turn every DTensor parameter of `model` into a local `nn.Parameter` that carries its `ShardInfo`.

    Works in place and returns the model. The modules still compute on DTensors, so a model that
    `torch.distributed.tensor.parallel.parallelize_module` or transformers has parallelized runs as it did.

    Raises:
        ValueError: If a parameter lies on a mesh of more than one dimension, or has a partial placement.
    """
    refuse_slices(model, "localize")
    meshes = [param.device_mesh for param in model.parameters() if isinstance(param, DTensor)]
    if meshes:
        parallelize_with_map(model, meshes[0], None)
    else:
        remember_everywhere(model)
        install_saving(model)
    return model
