"""`accelerator.save_state`: one folder from which any `tp x dp` can resume.

What is sharded goes through `torch.distributed.checkpoint`, all the rest (schedulers, samplers, GradScaler, random
states, custom objects) through Accelerate's own functions, into files of Accelerate's names.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.checkpointing import save_accelerator_state, save_custom_state
from accelerate.logging import get_logger
from torch import Tensor

from ..core.agreement import Ranks
from ..core.errors import CheckpointError
from .background import buffers, finish_background_save, group_of_its_own, run_in_background
from .dcp import BackgroundWriting, write_tensors
from .description import describe_model, description_folder
from .folder import FolderAside, clear_away, put_back, remove_oldest, write_folder
from .places import TENSORS, absolute, automatic_folder, optimizer_states
from .state import ModelState, summary_keys

__all__ = ["end_after_save", "save_state", "save_state_or_in_background"]

logger = get_logger(__name__)


def save_state(
    accelerator: Accelerator, output_dir: str | os.PathLike | None, tp_size: int, async_save: bool = False
) -> Path:
    """Save all that `accelerator` has prepared or registered. Collective over all ranks.

    Args:
        accelerator: With everything prepared or registered that is to be saved.
        output_dir: The folder; None under automatic naming.
        tp_size: Ranks of a replica.
        async_save: Return once all that is to be saved has been copied to host memory, and write it in the background.
            The folder appears when it is complete.

    Returns:
        The folder.

    Raises:
        ValueError: If there is no folder to save to, or the one to be used under automatic naming is there.
        CheckpointError: If anything fails on any rank; the same on all of them. What was there before stays. Also if
            an earlier save in the background has failed; then nothing is saved.
    """
    ranks = Ranks("save_state")
    ranks.meet()
    finish_background_save(ranks)
    config = accelerator.project_configuration
    place = ranks.on_main(lambda: _place_to_save(accelerator, output_dir))
    limit = config.total_limit if config.automatic_checkpoint_naming else None
    logger.info(f"Saving current state to {place}")
    saver = _Saver(accelerator, ranks, tp_size)
    if async_save:
        _save_in_background(saver, place, limit)
    else:
        write_folder(place, ranks, saver.fill)
        _keep_limit(place, ranks, limit)
    config.iteration += 1
    return place


def _save_in_background(saver: _Saver, place: Path, limit: int | None) -> None:
    """Write what is small, copy the rest, each rank what it is to write of it, and leave that to a thread."""
    ranks = saver.ranks
    timeout = getattr(saver.accelerator.init_handler, "timeout", None)
    group = group_of_its_own(timeout)
    aside = FolderAside(place, ranks)
    with aside.cleared_on_failure(ranks):
        values, about = saver.collect(aside.path)
        # From this thread, as no other can be started from the one below once the script has come to its end.
        writing = ranks.together(lambda: BackgroundWriting(aside.path / TENSORS, values, group, buffers))
        try:
            ranks.together(writing.await_copies)
        except Exception:
            writing.abandon()  # before the folder is removed
            raise
    behind = Ranks("save_state", group)
    behind.place = place

    def write() -> None:
        with aside.cleared_on_failure(behind):
            with _named_by(behind):
                writing.await_end()
            aside.complete(behind, about)
        _keep_limit(place, behind, limit)

    run_in_background(place, write)


def _keep_limit(place: Path, ranks: Ranks, limit: int | None) -> None:
    if limit is not None:
        removed = ranks.on_main(lambda: remove_oldest(place.parent, limit, place))
        if removed and ranks.is_main:  # from a thread, Accelerate's state may be gone
            logger.logger.warning(f"Deleted {len(removed)} checkpoints beyond total_limit={limit}.")


@contextmanager
def _named_by(ranks: Ranks) -> Iterator[None]:
    """Raise what fails in writing tensors, the same on all ranks, with the names that `ranks` puts in front."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(ranks.named(str(error))) from None
    except RuntimeError as error:
        raise ranks.lost() from error


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
            f"{place} already exists. Set accelerator.project_configuration.iteration to the number to continue with."
        )
    return place


class _Saver:
    def __init__(self, accelerator: Accelerator, ranks: Ranks, tp_size: int):
        self.accelerator = accelerator
        self.ranks = ranks
        self.tp_size = tp_size

    def fill(self, folder: Path) -> dict[str, Any]:
        """Write everything into `folder`; returns what the manifest is to keep."""
        values, about = self.collect(folder)
        with _named_by(self.ranks):
            write_tensors(folder / TENSORS, values)
        return about

    def collect(self, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        """Write what is small; returns what is left to write, and what the manifest is to keep."""
        kept = self._run_hooks(folder)
        values = self.ranks.together(lambda: self._values(kept))
        self._agree_on_summaries(values)
        self.ranks.together(lambda: self._write_others(folder))
        self.ranks.together(lambda: self._describe_models(folder, kept))
        return values, self._about(kept)

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
        given = [(full, dict(full)) for full in weights]

        def run() -> list[set[str] | None]:
            for hook in hooks.values():
                hook(models, weights, str(folder))
            return [_left_of(full, before, weights) for full, before in given] if self.ranks.is_main else []

        return self.ranks.each(run)[0]

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
            self.ranks.rank,
            accelerator.step,
            accelerator.scaler if main else None,
        )
        for index, obj in enumerate(accelerator._custom_objects):
            save_custom_state(obj, str(folder), index)

    def _describe_models(self, folder: Path, kept: list[set[str] | None]) -> None:
        for index, (model, names) in enumerate(zip(self.accelerator._models, kept)):
            if names is not None and self.ranks.is_main:
                describe_model(model, names, description_folder(folder, index))


def _left_of(full: dict[str, Tensor], before: dict[str, Tensor], weights: Sequence[Any]) -> set[str] | None:
    """The names that a hook has left of one model's weights."""
    if not any(full is other for other in weights):
        return None
    for name, tensor in full.items():
        if before.get(name) is not tensor:
            raise ValueError(
                f"a save_state pre-hook has put `{name}` into the weights. It may take weights away, and save others "
                "by itself; changed ones cannot be saved by parts."
            )
    return {name.removeprefix("module.") for name in full}


def save_state_or_in_background(
    always: bool,
    stock: Callable,
    accelerator: Accelerator,
    /,
    output_dir: str | None = None,
    *args: Any,
    async_save: bool | None = None,
    **kwargs: Any,
) -> Any:
    """`Accelerator.save_state` without tensor parallelism, which saves in the background where it is asked to."""
    if always if async_save is None else async_save:
        return save_state(accelerator, output_dir, 1, async_save=True)
    finish_background_save(Ranks("save_state"))
    return stock(output_dir, *args, **kwargs)


def end_after_save(always: bool, stock: Callable, accelerator: Accelerator, /) -> None:
    """`Accelerator.end_training`, after the save in the background."""
    try:
        finish_background_save(Ranks("end_training"))
        buffers.clear()
    finally:
        stock()
