"""Everything of other packages that this one replaces, in one list: where a maintainer starts when they change."""

from __future__ import annotations

from typing import Any

from ..core.override import Override
from . import launch, upstream

__all__ = ["TABLES", "as_markdown", "as_rows"]

#: By the object that has them, or the time for which they hold.
TABLES: dict[str, tuple[Override, ...]] = {
    **upstream.TABLES,
    "Accelerate under accel_tp_ddp.launch": launch.OVERRIDES,
}


def as_rows() -> list[dict[str, Any]]:
    """Each override: the import path of what is replaced, its name, where it stands, what it does wrong; and `since`
    which release it is there, what it `needs` to use, and whether its absence `counts`, as `Override` has it.
    """
    return [
        {"table": table, **{field: getattr(row, field) for field in _FIELDS}, "needs": list(row.needs)}
        for table, rows in TABLES.items()
        for row in rows
    ]


_FIELDS = ("owner", "name", "place", "reason", "since", "counts")


def as_markdown() -> str:
    """The tables, as `docs/overrides.md` has them."""
    lines = [
        "# What is replaced upstream",
        "",
        "Written by `accel-tp-ddp overrides`; a test compares it. Methods are replaced on one object each (an",
        "accelerator with the plugin, a sharded model), Trainer's for trainers with the plugin, and functions within",
        "a block. How: `accel_tp_ddp/core/override.py`. A line number is that of the release named; where earlier",
        "releases do without, the first that has it is named, too.",
        "",
        "All of it is compared with what is installed when the plugin takes hold, and again when it is put in place.",
        "A place that has gone is an error on every rank where training or what is written would be silently wrong,",
        "and one line on the main process where not (the last column). A function with another signature, or that",
        "does not use what its replacement works by, is such a line, and an error where it is called.",
    ]
    for table, rows in TABLES.items():
        lines += [
            "",
            f"## {table}",
            "",
            "| upstream | place | what it does under tensor parallelism | if it has gone |",
            "| --- | --- | --- | --- |",
        ]
        lines += [
            f"| `{row.owner}.{row.name}` | {row.place}{row.since and f', since {row.since}'} | {row.reason} | "
            f"{'error' if row.counts else 'warning'} |"
            for row in rows
        ]
    return "\n".join(lines)
