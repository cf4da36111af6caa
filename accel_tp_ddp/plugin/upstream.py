"""What is asked of the installed packages when the plugin takes hold: that they are as this one knows them.

Two things can be wrong. A package may be older than setup.cfg allows, where pip was not asked; and one of the places
that are replaced upstream may have changed.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, requires
from itertools import chain

from ..checkpoint import from_pretrained
from ..core import slices
from ..core.agreement import Ranks
from ..core.errors import UpstreamError
from ..core.override import Override, check
from ..core.upstream import installed_version, release
from ..loss import fused_heads
from ..model import full_parameters, methods, peft_methods
from ..training import gradients, zero1
from . import accelerator, replica_view, trainer, vllm, watch

__all__ = ["TABLES", "check_releases", "check_upstream"]

#: By the object that has them, or the time for which they hold. Those of the launcher are its own.
TABLES: dict[str, tuple[Override, ...]] = {
    "Accelerator": accelerator.OVERRIDES,
    "Accelerator with tp_size=1": accelerator.OVERRIDES_WITHOUT_TP,
    "Accelerator with tp_size=1 and zero1": accelerator.OVERRIDES_WITH_ZERO1,
    "Accelerator with watch": watch.OVERRIDES,
    "Trainer with watch": watch.OVERRIDES_OF_LOGS,
    "Optimizer with zero1": zero1.OVERRIDES,
    "Accelerate while replicas present themselves as processes": replica_view.OVERRIDES,
    "Modules that call torch.distributed while replicas present themselves as processes": replica_view.MODULES,
    "Trainer": trainer.OVERRIDES,
    "Trainer, with zero1 too": trainer.OVERRIDES_OF_STATES,
    "Trainer while replicas present themselves as processes": trainer.OVERRIDES_OF_MAIN,
    "Trainer before it makes its accelerator": trainer.OVERRIDES_OF_SETTINGS,
    "Trainer, as it makes its accelerator": trainer.OVERRIDES_OF_ACCELERATORS,
    "TrainingArguments": trainer.OVERRIDES_OF_ARGUMENTS,
    "Label smoothing": trainer.OVERRIDES_OF_SMOOTHERS,
    "TRL's scores of tokens": fused_heads.OVERRIDES,
    "Losses of sentence-transformers": trainer.OVERRIDES_OF_LOSSES,
    "TRL's rewards": trainer.OVERRIDES_OF_REWARDS,
    "TRL with vLLM": vllm.OVERRIDES,
    "vLLM while TRL makes an engine": vllm.OVERRIDES_OF_ENGINE,
    "GradScaler": gradients.OVERRIDES,
    "Model": methods.OVERRIDES,
    "Model while its weights are sent to vLLM": full_parameters.OVERRIDES,
    "Model that holds slices": slices.OVERRIDES,
    "PeftModel": peft_methods.OVERRIDES,
    "transformers while sharded_loading is active": from_pretrained.OVERRIDES,
}


def check_upstream() -> None:
    """Compare what has been imported with what this package was written for; collective over all ranks.

    What does not work is said in one line for each package, on the main process.

    Raises:
        UpstreamError: On every rank, if training, or what is written, would be silently wrong.
    """

    def on_this_rank() -> None:
        check_releases(_required())
        check(chain(*TABLES.values()))

    Ranks(otherwise=UpstreamError).together(on_this_rank)


def check_releases(required: Iterable[str]) -> None:
    """Raise if a package in which something is replaced is in use, and older than required.

    Args:
        required: As the metadata of a distribution has it. Other conditions than a first release are passed over.

    Raises:
        UpstreamError: With all of them.
    """
    packages = {row.package for rows in TABLES.values() for row in rows}
    old = {}
    for requirement in required:
        match = re.match(r"([\w.-]+)\s*>=\s*([\d.]+)", requirement)
        if match is not None and (package := match[1].replace("-", "_")) in packages and package in sys.modules:
            installed = installed_version(match[1])
            if release(installed) < release(match[2]):
                old[match[1]] = installed, match[2]
    if old:
        found = ", ".join(f"{name} {installed} (the oldest is {first})" for name, (installed, first) in old.items())
        wanted = " ".join(f"'{name}>={first}'" for name, (_, first) in old.items())
        raise UpstreamError(f"accel_tp_ddp does not work with {found}: pip install {wanted}")


def _required() -> list[str]:
    try:
        return requires("accel-tp-ddp") or []
    except PackageNotFoundError:  # a checkout that is not installed
        return []
