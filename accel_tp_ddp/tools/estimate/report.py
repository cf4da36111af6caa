"""An estimate as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .cards import GIB

__all__ = ["as_text"]

_SWITCHED = {"checkpointing": "checkpointing", "lora": "LoRA of rank {}"}


def as_text(answer: Mapping[str, Any]) -> str:
    """A table of the layouts, the best first, which to take and why, and what to change if none fits."""
    request, rows = answer["request"], answer["layouts"]
    timed = "seconds" in rows[0]
    lines = [_headline(answer), ""]
    parts = list(rows[0]["parts"])
    header = ["tp x dp", *parts, "needed", "fits", *(["step", "tokens/s", "of peak"] if timed else []), "mostly"]
    cells = [header, *(_cells(row, timed) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    for row in cells:
        last = len(header) - 1
        lines.append("  ".join([*(c.rjust(w) for c, w in zip(row[:last], widths)), row[last]]).rstrip())
    lines += ["", f"GiB a rank at the peak; needed: 1 GiB and 5 % more, of {request['memory'] / GIB:.1f} GiB"]
    if timed:
        best = rows[0]
        spent = best["seconds"]
        shares = {
            **{"forward": spent["forward"], "backward": spent["backward"], "optimizer": spent["optimizer"]},
            **{"tp collectives that show": spent["tp_exposed"], "dp collectives that show": spent["dp_exposed"]},
        }
        told = ", ".join(f"{name} {value / spent['total']:.0%}" for name, value in shares.items() if value)
        lines.append(f"time of {best['tp']} x {best['dp']}: {told}")
    lines += _verdict(answer)
    lines += [f"not tp {row['tp']}: {row['why']}" for row in answer["refused"]]
    return "\n".join([*lines, *(f"note: {note}" for note in answer["notes"])])


def _headline(answer: Mapping[str, Any]) -> str:
    request = answer["request"]
    features = [text.format(request[name]) for name, text in _SWITCHED.items() if request[name]]
    features += [name for name, value in request["plugin"].items() if value]
    what = request["card"] or f"{request['memory'] / GIB:g} GiB"
    layers = f", {answer['layers']} layers" if answer["layers"] else ""
    return (
        f"{answer['model']}{layers}, on {request['gpus']} x {what}: {request['micro_batch']} x {request['seq_len']} "
        f"tokens a replica, {', '.join([request['precision'], 'AdamW', *features])}"
    )


def _cells(row: Mapping[str, Any], timed: bool) -> list[str]:
    cells = [f"{row['tp']} x {row['dp']}", *(f"{size / GIB:.1f}" for size in row["parts"].values())]
    cells += [f"{row['needed'] / GIB:.1f}", "yes" if row["fits"] else "no"]
    if not timed:
        return [*cells, row["most_memory"]]
    cells += [f"{row['seconds']['total'] * 1e3:,.0f} ms", f"{row['tokens_per_second']:,.0f}"]
    return [*cells, f"{row['share_of_peak']:.0%}", f"{row['most_memory']}; {row['most_time']}"]


def _verdict(answer: Mapping[str, Any]) -> list[str]:
    take = answer["take"]
    if take is not None:
        return [f"take tp {take['tp']} x dp {take['dp']}: {take['why']}"]
    lines = ["nothing fits; of what comes closest would make:"]
    for row in answer["switches"]:
        fits = "which fits" if row["fits"] else "which does not fit"
        lines.append(f"  {row['change']}: {row['needed'] / GIB:.1f} GiB with {row['tp']} x {row['dp']}, {fits}")
    if not any(row["fits"] for row in answer["switches"]):
        lines.append(
            "needed: more memory a GPU, fewer tokens (--seq-len, --micro-batch), or an engine that divides weights "
            "over all ranks"
        )
    return lines
