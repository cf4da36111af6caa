"""What can be found wrong with a model before a weight of it is touched."""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from ..core.errors import PlanError
from ..core.shard import check_mesh, has_dtensor_parameters, holds_shards
from ..core.slices import check_slices_mesh, full_on_meta
from ..core.wrappers import unwrap
from ..plans.peft import check_adapters
from ..plans.plan import Plan, resolve_plan
from ..plans.rules import PlanLike, load_plan

__all__ = ["check_model"]


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
    if holds_shards(model):
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
