"""How long a step takes, from what it does.

* A kernel takes the longer of its floating-point operations at the reached peak and its bytes at the reached bandwidth
  (the roofline of Williams, Waterman and Patterson, CACM 52(4), 2009). Bytes are those of its inputs and outputs, each
  once: kernels are not fused, as they are not in an eager model. On CPU ranks the pages of a large new tensor come
  before either, see `Card.fresh`.
* Python launches kernels one by one: a phase takes at least its number of kernels times the time of a launch; on CPU
  ranks, which are not apart from their host, these add up.
* A collective of n ranks takes what a ring does (Thakur, Rabenseifner and Gropp, IJHPCA 19(1), 2005, and nccl-tests,
  doc/PERFORMANCE.md): an all-reduce 2 (n - 1) / n of its bytes at the reached bandwidth of the slowest link, gathering
  and scattering (n - 1) / n of the joined bytes, a broadcast all of them. Each costs a start besides.
* Tensor-parallel collectives are waited for, but for those with which weight gradients overlap: of them what is longer
  than the work between start and wait shows, on CPU ranks all. The tensor-parallel ranks are within a node.
* The replicas' all-reduces of gradients overlap with the backward (Li et al., PVLDB 13(12), 2020): what is longer
  than the backward shows, and the last bucket always does; on CPU ranks all of it, as it takes the same cores.
  All-gathers of zero1 come after the step and show.
* Each rank has an adapter of its own to the network, and a group over nodes uses those of all its ranks in a node, as
  NCCL does with a ring for each.

What is not told: kernels that are slow for their shapes (few tokens, narrow parts), the skew of ranks, data loading,
the gaps between collectives and kernels. Compare layouts by it rather than budgets.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..tally import Collective, Work
from .cards import Card
from .extend import Extended

__all__ = ["Duration", "duration", "send_time"]


@dataclass(frozen=True)
class Duration:
    """Seconds of a step.

    Attributes:
        forward, backward, optimizer: Kernels, or their launches; clipping counts as the optimizer's.
        tp: Collectives of a replica, and `tp_exposed`: what of them shows.
        dp: Those over the replicas, and `dp_exposed`: what of them shows.
        flops: Of matrix products and attention on one rank.
        bound: What the kernels wait for most: "compute", "memory" or "launches".
    """

    forward: float
    backward: float
    optimizer: float
    tp: float
    tp_exposed: float
    dp: float
    dp_exposed: float
    flops: int
    bound: str

    @property
    def total(self) -> float:
        return self.forward + self.backward + self.optimizer + self.tp_exposed + self.dp_exposed


def duration(step: Extended, card: Card, tp: int, dp: int, per_node: int) -> Duration:
    """How long the step of one of `tp x dp` ranks takes, with `per_node` ranks in a node."""
    phases, bounds = {}, {"compute": 0.0, "memory": 0.0, "launches": 0.0}
    for phase in ("forward", "backward", "clip", "step"):
        spent = _kernels([row for row in step.work if row.phase == phase], card)
        phases[phase] = sum(spent.values())
        for name, seconds in spent.items():
            bounds[name] += seconds
    inside = [
        (row, send_time(row, tp, card, per_node if tp > per_node else 0))
        for row in step.collectives
        if row.group == "tp"
    ]
    between = [row for row in step.collectives if row.group != "tp"]
    reduced = [row for row in between if row.phase == "backward"]
    adapters = max(per_node // tp, 1) if tp * dp > per_node else 0
    overlapped = sum(send_time(row, dp, card, adapters) * row.count for row in reduced)
    later = sum(send_time(row, dp, card, adapters) * row.count for row in between if row.phase != "backward")
    number = max(sum(row.count for row in reduced), 1)
    return Duration(
        forward=phases["forward"],
        backward=phases["backward"],
        optimizer=phases["clip"] + phases["step"],
        tp=sum(seconds * row.count for row, seconds in inside),
        tp_exposed=sum(max(seconds - _beside(row, card), 0.0) * row.count for row, seconds in inside),
        dp=overlapped + later,
        dp_exposed=(max(overlapped - phases["backward"], overlapped / number) if card.apart else overlapped) + later,
        flops=sum(row.flops * row.count for row in step.work),
        bound=max(bounds, key=lambda name: bounds[name]),
    )


def _beside(row: Collective, card: Card) -> float:
    """Seconds of what runs while a collective is under way."""
    return sum(_kernels(row.beside, card).values()) if card.apart else 0.0


def _kernels(rows: Iterable[Work], card: Card) -> dict[str, float]:
    """Seconds of kernels bound by compute, of those bound by memory, and of launches; what does not show is 0."""
    compute = memory = launches = 0.0
    for row in rows:
        by_flops = row.flops / (card.peak(row.dtype) * card.matmul)
        by_bytes = row.bytes / card.reached_bandwidth
        memory += row.fresh * card.fault * row.count
        if by_flops > by_bytes:
            compute += by_flops * row.count
        else:
            memory += by_bytes * row.count
        launches += card.launch * row.count
    if card.apart:
        compute, memory, launches = (0.0, 0.0, launches) if launches > compute + memory else (compute, memory, 0.0)
    return {"compute": compute, "memory": memory, "launches": launches}


def send_time(row: Collective, ranks: int, card: Card, adapters: int = 0) -> float:
    """Seconds of one collective; `adapters`: of its ranks in one node, where they are in several.

    Between nodes the first bytes take twice as long to arrive.
    """
    if ranks == 1:
        return 0.0
    share = (ranks - 1) / ranks
    if row.kind.startswith("all_reduce"):
        share *= 2
    elif row.kind.startswith("broadcast"):
        share = 1.0
    bandwidth = (min(card.link, card.network * adapters) if adapters else card.link) * card.links
    return share * row.bytes / bandwidth + card.start * (2 if adapters else 1)
