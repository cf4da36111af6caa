"""Replicated parameters inside a sharded block: each rank has a part of their gradients, to be summed."""

from __future__ import annotations

from ..plans.plan import Plan
from ..styles.forward import ParallelForward

__all__ = ["link_partial_gradients"]


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
