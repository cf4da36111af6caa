"""Everything of other packages that this one replaces, in one list: where a maintainer starts when they change."""

from __future__ import annotations

from ..checkpoint import from_pretrained
from ..core import slices
from ..core.override import Override
from ..model import full_parameters, methods, peft_methods
from . import accelerator, launch, replica_view, trainer, vllm

__all__ = ["TABLES", "as_markdown", "as_rows"]

#: By the object that has them, or the time for which they hold.
TABLES: dict[str, tuple[Override, ...]] = {
    "Accelerator": accelerator.OVERRIDES,
    "Accelerator with tp_size=1": accelerator.OVERRIDES_WITHOUT_TP,
    "Accelerate while replicas present themselves as processes": replica_view.OVERRIDES,
    "Modules that call torch.distributed while replicas present themselves as processes": replica_view.MODULES,
    "Accelerate under accel_tp_ddp.launch": launch.OVERRIDES,
    "Trainer": trainer.OVERRIDES,
    "Trainer while replicas present themselves as processes": trainer.OVERRIDES_OF_MAIN,
    "TrainingArguments": trainer.OVERRIDES_OF_ARGUMENTS,
    "TRL's rewards": trainer.OVERRIDES_OF_REWARDS,
    "TRL with vLLM": vllm.OVERRIDES,
    "vLLM while TRL makes an engine": vllm.OVERRIDES_OF_ENGINE,
    "Model": methods.OVERRIDES,
    "Model while its weights are sent to vLLM": full_parameters.OVERRIDES,
    "Model that holds slices": slices.OVERRIDES,
    "PeftModel": peft_methods.OVERRIDES,
    "transformers while sharded_loading is active": from_pretrained.OVERRIDES,
}


def as_rows() -> list[dict[str, str]]:
    """Each override as strings: the import path of what is replaced, its name, where it stands, what it does wrong."""
    return [
        {"table": table, "owner": row.owner, "name": row.name, "place": row.place, "reason": row.reason}
        for table, rows in TABLES.items()
        for row in rows
    ]


def as_markdown() -> str:
    """The tables, as `docs/overrides.md` has them."""
    lines = [
        "# What is replaced upstream",
        "",
        "Written by `accel-tp-ddp overrides`; a test compares it. Methods are replaced on one object each (an",
        "accelerator with the plugin, a sharded model), Trainer's for trainers with the plugin, and functions within",
        "a block. How: `accel_tp_ddp/core/override.py`. A line number is that of the release named.",
    ]
    for table, rows in TABLES.items():
        lines += [
            "",
            f"## {table}",
            "",
            "| upstream | place | what it does under tensor parallelism |",
            "| --- | --- | --- |",
        ]
        lines += [f"| `{row.owner}.{row.name}` | {row.place} | {row.reason} |" for row in rows]
    return "\n".join(lines)
