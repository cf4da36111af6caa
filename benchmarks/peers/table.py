"""The figures of a run, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist

from .contenders import IDLE, LOCAL, OURS, PLAIN, PREPARED
from .observe import Collective
from .rounds import Entrant, Times, spread
from .sizes import Setting

__all__ = ["as_json", "as_text"]

MIB = 2**20
#: What a contender's losses may differ by from the first one's; a wrong gradient shows in the second step already.
SAME_LOSS = 1e-3
#: Whose ranks hold whole models, so that there is no share of one to compare them with.
WHOLE = (PLAIN, PREPARED, IDLE)


def as_json(
    name: str, setting: Setting, entrants: Sequence[Entrant], times: Times, against: str = OURS
) -> dict[str, Any]:
    """All figures; ratios are over the times of `against`."""
    return {
        "size": {"name": name, **asdict(setting.size)},
        "ranks": {"tp": setting.tp, "dp": setting.dp},
        "optimizer": "fused" if setting.fused else "loop",
        "torch": torch.__version__,
        "rounds": max(map(len, times.steps.values()), default=0),
        "against": against,
        "contenders": [_figures(setting, entrant, entrants, times, against) for entrant in entrants],
    }


def _figures(
    setting: Setting, entrant: Entrant, entrants: Sequence[Entrant], times: Times, against: str
) -> dict[str, Any]:
    if entrant.error:
        return {"name": entrant.name, "error": entrant.error}
    name = entrant.name
    seconds = spread(times.steps[name])[1]
    found: dict[str, Any] = {
        "name": name,
        "milliseconds": seconds * 1000,
        "CPU milliseconds": spread(times.steps_cpu[name])[1] * 1000,
        "tokens a second": setting.tokens / seconds,
        "peak": entrant.memory.peak,
        "held": entrant.memory.held,
        "collectives": _by_group(setting, entrant.collectives),
        "bare milliseconds": spread(times.bare[name])[1] * 1000,
    }
    kinds = (("", times.steps, times.bare), ("CPU ", times.steps_cpu, times.bare_cpu))
    for kind, steps, bare in kinds:
        if against in steps:
            found[f"{kind}ratio"] = spread([own / other for own, other in zip(steps[name], steps[against])])
        if LOCAL in steps and name not in (LOCAL, *WHOLE):
            parts = zip(steps[name], bare[name], steps[LOCAL])
            found[f"{kind}efficiency"] = spread([(local + sent) / own for own, sent, local in parts])
    first = next((other for other in entrants if not other.error), None)
    if first is not None and name != LOCAL:
        found["loss off by"] = max(abs(a - b) / abs(b) for a, b in zip(entrant.losses, first.losses))
        found["same losses"] = found["loss off by"] <= SAME_LOSS
    return found


def _by_group(setting: Setting, collectives: Sequence[Collective]) -> dict[str, dict[str, int]]:
    """Number and bytes for the group of this rank's replica (tp), of the replicas (dp), and of all ranks."""
    names = {
        tuple(range(dist.get_world_size())): "all",
        tuple(dist.get_process_group_ranks(setting.mesh["dp_replicate"].get_group())): "dp",
        tuple(dist.get_process_group_ranks(setting.mesh["tp"].get_group())): "tp",
    }
    found: dict[str, dict[str, int]] = {}
    for each in collectives:
        if each.group.size() == 1:
            continue
        own = found.setdefault(names.get(each.ranks, "other"), {"number": 0, "bytes": 0})
        own["number"] += 1
        own["bytes"] += each.bytes
    return found


def as_text(name: str, setting: Setting, entrants: Sequence[Entrant], times: Times, against: str = OURS) -> str:
    run, size = as_json(name, setting, entrants, times, against), setting.size
    columns = ["", "step, ratio", "CPU time, ratio", "ms", "tokens/s", "peak MiB", "held MiB", "tp: number, MiB"]
    columns += ["dp or all: number, MiB", "bare ms", "efficiency (of CPU time)", "loss off by"]
    rows, errors = [], []
    for figures in run["contenders"]:
        if "error" in figures:
            errors.append(f"{figures['name']}: {figures['error']}")
            rows.append([figures["name"], "failed", *[""] * (len(columns) - 2)])
            continue
        rows.append(
            [
                figures["name"],
                _ratio(figures.get("ratio")),
                _ratio(figures.get("CPU ratio")),
                f"{figures['milliseconds']:.0f}",
                f"{figures['tokens a second']:.0f}",
                f"{figures['peak'] / MIB:.1f}",
                f"{figures['held'] / MIB:.1f}",
                _communication(figures["collectives"], ["tp"]),
                _communication(figures["collectives"], ["dp", "all", "other"]),
                f"{figures['bare milliseconds']:.0f}",
                f"{figures['efficiency'][1]:.2f} ({figures['CPU efficiency'][1]:.2f})"
                if "efficiency" in figures
                else "",
                f"{figures['loss off by']:.0e}{'' if figures['same losses'] else ' WRONG'}"
                if "loss off by" in figures
                else "",
            ]
        )
    title = (
        f"{name}: Llama, hidden {size.hidden}, {size.layers} layers, vocabulary {size.vocab}, float32, AdamW "
        f"({run['optimizer']}); tp {setting.tp} x dp {setting.dp}, {size.batch} x {size.length} tokens a replica; "
        f"{run['rounds']} interleaved rounds, ratios to {against}, medians and quartiles; torch {run['torch']}"
    )
    widths = [max(len(row[index]) for row in [columns, *rows]) for index in range(len(columns))]
    lines = [columns, ["-" * width for width in widths], *rows]
    table = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in lines]
    return "\n".join([title, "", *table, *(["", *errors] if errors else [])])


def _ratio(quartiles: tuple[float, float, float] | None) -> str:
    return "{1:.2f} ({0:.2f} to {2:.2f})".format(*quartiles) if quartiles else ""


def _communication(collectives: dict[str, dict[str, int]], groups: Sequence[str]) -> str:
    own = [collectives[group] for group in groups if group in collectives]
    if not own:
        return ""
    return f"{sum(each['number'] for each in own)}, {sum(each['bytes'] for each in own) / MIB:.1f}"
