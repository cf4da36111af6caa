"""What can be found wrong with a model before a weight of it is touched."""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from ..core.errors import PlanError
from ..core.shard import check_mesh, has_dtensor_parameters, holds_shards, remembered_shards
from ..core.slices import check_slices_mesh, full_on_meta
from ..core.wrappers import unwrap
from ..plans.peft import check_adapters
from ..plans.plan import Plan, resolve_plan
from ..plans.rules import PlanLike, load_plan

__all__ = ["Running", "check_model"]


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


class Running:
    """The modules of a sharded model that run under styles, to find those that are not in it any more.

    Args:
        model: A bare model that has been sharded.
        plan: By which; None for one that was sharded already.
    """

    def __init__(self, model: nn.Module, plan: Plan | None):
        self.model = model
        sites = [entry.site for entry in plan.entries] if plan is not None else []
        self._under_style = [(site.name, site.module) for site in sites if "forward" in site.module.__dict__]
        self._with_shards = [(site.name, site.module) for site in sites if remembered_shards(site.module)]

    def check(self) -> None:
        """Raise if a module has been replaced, or has got its own forward back: it would run on parts as if full.

        Raises:
            ValueError: With their names.
        """
        present = set(self.model.modules())
        lost = [name for name, module in self._under_style if "forward" not in module.__dict__]
        lost += [name for name, module in (*self._under_style, *self._with_shards) if module not in present]
        if lost:
            names = list(dict.fromkeys(lost))
            some = ", ".join(f"`{name}`" for name in names[:3]) + (", ..." if len(names) > 3 else "")
            raise ValueError(
                f"{len(names)} modules of this {type(self.model).__name__} were replaced after they had been sharded "
                f"({some}): they would compute on a rank's part as if it were all. Whatever replaces modules "
                "(quantization, kernels, another precision) has to do so before `prepare`."
            )
