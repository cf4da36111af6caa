"""Shard a model by a plan. Imports torch only: usable without Accelerate."""

from __future__ import annotations

import logging

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ..core.collectives import send_first_rank
from ..core.errors import PlanError
from ..core.mesh import tensor_parallel_mesh
from ..core.randomness import draws_dropout
from ..core.shard import mark_unsharded, remember_everywhere, restore_shards, shard_info
from ..core.slices import (
    check_slices_mesh,
    full_on_meta,
    refuse_resizing,
    refuse_slices,
    restore_full,
    settle_slices,
)
from ..core.wrappers import unwrap
from ..plans.peft import adapted_model, check_adapters
from ..plans.plan import Plan, resolve_plan
from ..plans.rules import PlanLike, load_plan
from ..styles.forward import ParallelForward
from ..styles.region import Region
from .dtensor import has_dtensor_parameters, localize_with_map
from .generation import generate_together
from .initialization import initialize_whole
from .methods import save_full_checkpoints
from .output_attentions import return_all_heads
from .peft_methods import look_after_adapters
from .transformers_tp import adopt

__all__ = [
    "check_mesh",
    "check_model",
    "is_parallelized",
    "localize",
    "parallelize",
    "parallelize_with_map",
]

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
        parallelize_with_map(unwrap(model), mesh, check_model(model, mesh, plan))
    return model


def localize(model: nn.Module) -> nn.Module:
    """Turn every DTensor parameter of `model` into a local `nn.Parameter` that carries its `ShardInfo`.

    Works in place and returns the model. The modules go on computing on DTensors, so a model that
    `torch.distributed.tensor.parallel.parallelize_module` or transformers has parallelized runs as it did.

    Raises:
        ValueError: If a parameter lies on a mesh of more than one dimension, or has a partial placement.
    """
    refuse_slices(model, "localize")
    meshes = [param.device_mesh for param in model.parameters() if isinstance(param, DTensor)]
    if meshes:
        parallelize_with_map(model, meshes[0], None)
    else:
        mark_unsharded(model)
        save_full_checkpoints(model)
    return model


def check_model(model: nn.Module, mesh: DeviceMesh, plan: PlanLike = "auto") -> Plan | None:
    """Everything that can be found wrong before a weight is touched. None for a model that is made of DTensors.

    Raises:
        ValueError: See `parallelize`.
    """
    tp_size = mesh.size()
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError(
            f"the model is wrapped in DistributedDataParallel already, and cannot be sharded (tp_size={tp_size}). "
            "Pass the bare model; `Accelerator.prepare` wraps it after sharding."
        )
    model = unwrap(model)
    check_adapters(model)
    if is_parallelized(model):
        raise ValueError(
            f"this {type(model).__name__} is sharded already (tp_size={tp_size}). Prepare a model once, and use what "
            "`prepare` returned; to train it anew, build or load it again."
        )
    if has_dtensor_parameters(model):
        check_mesh(model, mesh)
        if plan != "auto":
            rule = next(iter(load_plan(plan)), plan)
            raise PlanError(
                f"tensor-parallel plan: `{rule}` cannot be applied, because the parameters of this "
                f'{type(model).__name__} are DTensors already (tp_size={tp_size}). Leave tp_plan at "auto", or pass '
                "the model unsharded."
            )
        return None
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            raise ValueError(
                f"`{name}` of size {tuple(tensor.shape)} is on the meta device and has no data to shard. "
                "Load the weights first."
            )
    check_slices_mesh(model, mesh)
    with full_on_meta(model):
        return resolve_plan(model, tp_size, plan)


def check_mesh(model: nn.Module, mesh: DeviceMesh) -> None:
    """Raise unless what is sharded of `model` already is sharded over the ranks of `mesh`.

    Raises:
        ValueError: With the first parameter that is not, its ranks, and those of `mesh`.
    """
    wanted = dist.get_process_group_ranks(mesh.get_group())
    for name, param in model.named_parameters():
        own = param.device_mesh if isinstance(param, DTensor) else getattr(shard_info(param), "mesh", None)
        if own is None or own.ndim != 1:
            continue  # `localize` has its own word for meshes of several dimensions
        ranks = dist.get_process_group_ranks(own.get_group())
        if ranks != wanted:
            raise ValueError(
                f"`{name}` of size {tuple(param.shape)} is sharded over {len(ranks)} ranks {ranks} of another mesh, "
                f"but tp_size={mesh.size()} and the `tp` mesh has the ranks {wanted} here. Parallelize the model with "
                '`accelerator.torch_device_mesh["tp"]`, or pass it unsharded.'
            )


def is_parallelized(model: nn.Module) -> bool:
    """Whether `model` holds localized parameters."""
    restore_shards(model)
    return any(shard_info(param) is not None for param in model.parameters())


def parallelize_with_map(model: nn.Module, mesh: DeviceMesh, plan: Plan | None) -> dict[nn.Parameter, nn.Parameter]:
    """Carry out a verified plan; None localizes a model of DTensors. Collective over the mesh.

    Returns:
        Old parameter to new one, for those whose object had to change: none for a plain model.
    """
    if plan is None:
        mapping = localize_with_map(model)
        adopt(model, Region(mesh))
    else:
        restore_full(model, plan.layouts_by_parameter)
        plain = dict(model.named_parameters(remove_duplicate=False))
        region = Region(mesh, draws_dropout(model))
        with full_on_meta(model) as stand_ins:
            _agree_on_weights(model, mesh)
            for entry in plan.entries:
                entry.style.apply(entry.site, region)
        settle_slices(model, stand_ins)
        for whole in {model, adapted_model(model)}:  # either may be called, and the second is what unloading leaves
            region.attach(whole)
            return_all_heads(whole, plan, region)
        if has_dtensor_parameters(model):
            localize_with_map(model, keep=plain)
        link_partial_gradients(plan)
        remember_everywhere(model)
        mapping = {}
        if dist.get_rank() == 0:
            logger.info("%s", plan)
    mark_unsharded(model)
    save_full_checkpoints(model)
    refuse_resizing(model)
    generate_together(model, mesh)
    initialize_whole(model, mesh)
    look_after_adapters(model)
    return mapping


def link_partial_gradients(plan: Plan) -> None:
    """Let small partial gradients ride on the all-reduce of the column-parallel modules beside them."""
    by_parent: dict[int, list[ParallelForward]] = {}
    for entry in plan.entries:
        by_parent.setdefault(id(entry.site.parent), []).extend(entry.style.calls(entry.site))
    for calls in by_parent.values():
        partial = tuple(call for call in calls if call.partial_gradients)
        for call in calls:
            if call.style.enters:
                call.partners = partial


def _agree_on_weights(model: nn.Module, mesh: DeviceMesh) -> None:
    """The first rank's values everywhere, as DDP does it over its ranks: seeds may differ, slices must fit."""
    for tensor in [*model.parameters(), *model.buffers()]:
        if not tensor.is_meta:  # what stands in for a slice, which is no other rank's
            send_first_rank(mesh, tensor)
