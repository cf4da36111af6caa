"""The figures of a run, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist

from .contenders import LOCAL, OURS, PLAIN
from .observe import Collective
from .rounds import Entrant, Times, spread
from .sizes import Setting

__all__ = ["as_json", "as_text"]

MIB = 2**20
#: What a contender's losses may differ by from the first one's; a wrong gradient shows in the second step already.
SAME_LOSS = 1e-3


def as_json(name: str, setting: Setting, entrants: Sequence[Entrant], times: Times) -> dict[str, Any]:
    return {
        "size": {"name": name, **asdict(setting.size)},
        "ranks": {"tp": setting.tp, "dp": setting.dp},
        "optimizer": "fused" if setting.fused else "loop",
        "torch": torch.__version__,
        "rounds": max(map(len, times.steps.values()), default=0),
        "contenders": [_figures(setting, entrant, entrants, times) for entrant in entrants],
    }


def _figures(setting: Setting, entrant: Entrant, entrants: Sequence[Entrant], times: Times) -> dict[str, Any]:
    if entrant.error:
        return {"name": entrant.name, "error": entrant.error}
    steps, bare = times.steps[entrant.name], times.bare[entrant.name]
    seconds = spread(steps)[1]
    found: dict[str, Any] = {
        "name": entrant.name,
        "milliseconds": seconds * 1000,
        "tokens a second": setting.tokens / seconds,
        "peak": entrant.memory.peak,
        "held": entrant.memory.held,
        "collectives": _by_group(setting, entrant.collectives),
        "bare milliseconds": spread(bare)[1] * 1000,
    }
    if OURS in times.steps:
        found["ratio"] = spread([own / ours for own, ours in zip(steps, times.steps[OURS])])
    if LOCAL in times.steps and entrant.name not in (LOCAL, PLAIN):
        local = times.steps[LOCAL]
        found["efficiency"] = spread([(part + comm) / own for own, comm, part in zip(steps, bare, local)])
    first = next((other for other in entrants if not other.error), None)
    if first is not None and entrant.name != LOCAL:
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


def as_text(name: str, setting: Setting, entrants: Sequence[Entrant], times: Times) -> str:
    run, size = as_json(name, setting, entrants, times), setting.size
    columns = ["", "step / ours (quartiles)", "ms", "tokens/s", "peak MiB", "held MiB", "tp: number, MiB"]
    columns += ["dp or all: number, MiB", "bare ms", "efficiency", "loss off by"]
    rows, errors = [], []
    for figures in run["contenders"]:
        if "error" in figures:
            errors.append(f"{figures['name']}: {figures['error']}")
            rows.append([figures["name"], "failed", *[""] * (len(columns) - 2)])
            continue
        rows.append(
            [
                figures["name"],
                "{1:.2f} ({0:.2f} to {2:.2f})".format(*figures["ratio"]) if "ratio" in figures else "",
                f"{figures['milliseconds']:.0f}",
                f"{figures['tokens a second']:.0f}",
                f"{figures['peak'] / MIB:.1f}",
                f"{figures['held'] / MIB:.1f}",
                _communication(figures["collectives"], ["tp"]),
                _communication(figures["collectives"], ["dp", "all", "other"]),
                f"{figures['bare milliseconds']:.0f}",
                f"{figures['efficiency'][1]:.2f}" if "efficiency" in figures else "",
                f"{figures['loss off by']:.0e}{'' if figures['same losses'] else ' WRONG'}"
                if "loss off by" in figures
                else "",
            ]
        )
    title = (
        f"{name}: Llama, hidden {size.hidden}, {size.layers} layers, vocabulary {size.vocab}, float32, AdamW "
        f"({run['optimizer']}); tp {setting.tp} x dp {setting.dp}, {size.batch} x {size.length} tokens a replica; "
        f"{run['rounds']} interleaved rounds, torch {run['torch']}"
    )
    widths = [max(len(row[index]) for row in [columns, *rows]) for index in range(len(columns))]
    lines = [columns, ["-" * width for width in widths], *rows]
    table = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in lines]
    return "\n".join([title, "", *table, *(["", *errors] if errors else [])])


def _communication(collectives: dict[str, dict[str, int]], groups: Sequence[str]) -> str:
    own = [collectives[group] for group in groups if group in collectives]
    if not own:
        return ""
    return f"{sum(each['number'] for each in own)}, {sum(each['bytes'] for each in own) / MIB:.1f}"
