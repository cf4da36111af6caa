"""What the folders of a run's states are called, which of them are states, and what is in them by which name."""

from __future__ import annotations

import os
from pathlib import Path

from accelerate import Accelerator

from .folder import MANIFEST
from .state import OptimizerState, parameter_names

__all__ = ["TENSORS", "absolute", "automatic_folder", "is_sharded_state", "optimizer_states"]

#: Where in a state the files of `torch.distributed.checkpoint` are.
TENSORS = "tensors"
_AUTOMATIC = "checkpoints"


def is_sharded_state(folder: str | os.PathLike) -> bool:
    """Whether `folder` is, or is left of, what this package's `save_state` has written."""
    folder = absolute(folder)
    return (folder / MANIFEST).exists() or (folder / TENSORS).is_dir()


def automatic_folder(accelerator: Accelerator) -> Path:
    return absolute(accelerator.project_dir) / _AUTOMATIC


def absolute(path: str | os.PathLike) -> Path:
    return Path(os.path.realpath(os.path.expanduser(path)))


def optimizer_states(accelerator: Accelerator) -> list[OptimizerState]:
    names = parameter_names(accelerator._models)
    return [
        OptimizerState(optimizer, names, f"optimizers.{index}.")
        for index, optimizer in enumerate(accelerator._optimizers)
    ]
