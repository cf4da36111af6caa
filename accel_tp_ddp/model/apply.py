"""Apply a verified plan: each module gets its style, and the model what its forward as one needs."""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from ..core.collectives import send_first_rank
from ..core.randomness import draws_dropout
from ..core.slices import slices_become_shards
from ..plans.peft import adapted_model
from ..plans.plan import Plan
from ..styles.region import Region
from .output_attentions import return_all_heads
from .sequence import spread_sequence

__all__ = ["apply_plan"]


def apply_plan(model: nn.Module, mesh: DeviceMesh, plan: Plan) -> None:
    """Shard the parameters of `model` in place, and let its modules run on their parts. Collective over the mesh."""
    dropout = draws_dropout(model)
    region = Region(mesh, dropout, plan.overlap)
    forwards = {model, adapted_model(model)}  # either may be called, and the second is what unloading adapters leaves
    for called in forwards:
        region.attach(called)
    with slices_become_shards(model, plan.layouts_by_parameter):
        for tensor in [*model.parameters(), *model.buffers()]:
            if not tensor.is_meta:  # what stands in for a slice, which is no other rank's
                send_first_rank(mesh, tensor)  # as DDP does it over its ranks: seeds may differ, shards must fit
        for entry in plan.entries:
            entry.style.apply(entry.site, region)
    if plan.sequence_parallel:
        spread_sequence(model, plan, region)
    for called in forwards:
        return_all_heads(called, plan, region)
