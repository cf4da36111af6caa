"""`accelerator.save_state`: one folder that any `tp x dp` can go on from.

What is sharded goes through `torch.distributed.checkpoint`, all the rest (schedulers, samplers, GradScaler, random
states, custom objects) through Accelerate's own functions, into files of Accelerate's names.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.checkpointing import save_accelerator_state, save_custom_state
from accelerate.logging import get_logger
from torch import Tensor

from ..errors import CheckpointError
from .folder import clear_away, put_back, remove_oldest, write_whole
from .objects import ModelState, summary_keys
from .places import TENSORS, absolute, automatic_folder, optimizer_states
from .ranks import Ranks
from .tensors import write_tensors

__all__ = ["save_state"]

logger = get_logger(__name__)


def save_state(accelerator: Accelerator, output_dir: str | os.PathLike | None, tp_size: int) -> Path:
    """Save all that `accelerator` has prepared or registered. Collective over all ranks.

    Returns:
        The folder.

    Raises:
        ValueError: If there is no folder to save to, or the one to be used under automatic naming is there.
        CheckpointError: If anything fails on any rank; the same on all of them. What was there before stays.
    """
    ranks = Ranks("save_state")
    ranks.meet()
    config = accelerator.project_configuration
    place = ranks.on_main(lambda: _place_to_save(accelerator, output_dir))
    logger.info(f"Saving current state to {place}")
    write_whole(place, ranks, _Saver(accelerator, ranks, tp_size).fill)
    if config.automatic_checkpoint_naming and config.total_limit is not None:
        removed = ranks.on_main(lambda: remove_oldest(place.parent, config.total_limit, place))
        if removed:
            logger.warning(f"Deleted {len(removed)} checkpoints beyond total_limit={config.total_limit}.")
    config.iteration += 1
    return place


def _place_to_save(accelerator: Accelerator, output_dir: str | os.PathLike | None) -> Path:
    if not accelerator.project_configuration.automatic_checkpoint_naming:
        if output_dir is None:
            raise ValueError("no output_dir is given, and automatic checkpoint naming is off. Pass output_dir.")
        return absolute(output_dir)
    place = automatic_folder(accelerator) / f"checkpoint_{accelerator.save_iteration}"
    put_back(place)
    clear_away(place.parent)
    if place.exists():
        raise ValueError(
            f"{place} already exists. Set accelerator.project_configuration.iteration to the number to go on with."
        )
    return place


class _Saver:
    def __init__(self, accelerator: Accelerator, ranks: Ranks, tp_size: int):
        self.accelerator = accelerator
        self.ranks = ranks
        self.tp_size = tp_size

    def fill(self, folder: Path) -> dict[str, Any]:
        """Write everything into `folder`; returns what the manifest is to keep."""
        kept = self._run_hooks(folder)
        values = self.ranks.together(lambda: self._values(kept))
        self._agree_on_summaries(values)
        try:
            write_tensors(folder / TENSORS, values)
        except CheckpointError as error:
            raise CheckpointError(self.ranks.told(str(error))) from None
        except RuntimeError as error:
            raise self.ranks.lost() from error
        self.ranks.together(lambda: self._write_others(folder))
        return self._about(kept)

    def _about(self, kept: list[set[str] | None]) -> dict[str, Any]:
        return {
            "tp_size": self.tp_size,
            "dp_size": self.ranks.size // self.tp_size,
            "models": [index for index, names in enumerate(kept) if names is not None],
            "optimizers": len(self.accelerator._optimizers),
            "schedulers": len(self.accelerator._schedulers),
            "custom_objects": len(self.accelerator._custom_objects),
            "step": self.accelerator.step,
            "devices": self.ranks.all(self.accelerator.device.index),
            "torch": torch.__version__,
        }

    def _run_hooks(self, folder: Path) -> list[set[str] | None]:
        """Call the user's hooks as Accelerate does. Returns which tensors of each model are left to save: None: none.

        A hook takes out of `weights` what it saves itself; on the main process, as in scripts it often does so there
        only.
        """
        models, hooks = self.accelerator._models, self.accelerator._save_model_state_pre_hook
        everything: list[set[str] | None] = [set(ModelState(model, "").values()) for model in models]
        if not hooks:
            return everything
        weights = [self.accelerator.get_state_dict(model, unwrap=False) for model in models]
        given = [(whole, dict(whole)) for whole in weights]

        def run() -> list[set[str] | None]:
            for hook in hooks.values():
                hook(models, weights, str(folder))
            return [_left_of(whole, before, weights) for whole, before in given] if self.ranks.is_main else []

        kept = self.ranks.all(self.ranks.together(run))[0]
        return kept

    def _values(self, kept: list[set[str] | None]) -> dict[str, Any]:
        """All tensors by name, and a summary of each optimizer."""
        values: dict[str, Any] = {}
        for index, (model, names) in enumerate(zip(self.accelerator._models, kept)):
            if names is not None:
                values.update(ModelState(model, f"models.{index}.").values(names))
        for state in optimizer_states(self.accelerator):
            tensors, summary = state.values()
            values.update(tensors)
            values[state.summary_name] = summary
        return values

    def _agree_on_summaries(self, values: dict[str, Any]) -> None:
        """Any rank may write them, and one that holds nothing of a small parameter may have no state for it."""
        own = {state.summary_name: values[state.summary_name] for state in optimizer_states(self.accelerator)}
        keys = {name: summary_keys(summary) for name, summary in own.items()}
        if len(set(self.ranks.all(repr(keys)))) > 1:
            for other in reversed(self.ranks.all(own)):
                for name, summary in other.items():
                    for kind in ("tensors", "values"):
                        values[name][kind] = {**values[name][kind], **summary[kind]}

    def _write_others(self, folder: Path) -> None:
        accelerator, main = self.accelerator, self.ranks.is_main
        # Accelerate writes some of these on every rank, under one name.
        save_accelerator_state(
            str(folder),
            [],
            [],
            accelerator._schedulers if main else [],
            accelerator._dataloaders if main else [],
            accelerator.process_index,
            accelerator.step,
            accelerator.scaler if main else None,
        )
        for index, obj in enumerate(accelerator._custom_objects):
            save_custom_state(obj, str(folder), index)


def _left_of(whole: dict[str, Tensor], before: dict[str, Tensor], weights: Sequence[Any]) -> set[str] | None:
    """The names that a hook has left of one model's weights."""
    if not any(whole is other for other in weights):
        return None
    for name, tensor in whole.items():
        if before.get(name) is not tensor:
            raise ValueError(
                f"a save_state pre-hook has put `{name}` into the weights. It may take weights away, and save others "
                "by itself; changed ones cannot be saved by parts."
            )
    return {name.removeprefix("module.") for name in whole}
