"""`accelerator.load_state`: from a sharded state at any `tp x dp`, from Accelerate's own, and from mere weights."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.checkpointing import load_accelerator_state, load_custom_state
from accelerate.logging import get_logger
from accelerate.utils import load

from ..core.agreement import Ranks
from ..core.errors import CheckpointError
from .background import finish_background_save
from .dcp import read_dtypes, read_metadata, read_tensors
from .folder import MANIFEST, SavedFolder, is_replaced, newest_first, put_back
from .places import TENSORS, absolute, automatic_folder, is_sharded_state, optimizer_states
from .plain import PlainWeights, is_plain_state, is_weights_only, load_pickled, plain_file
from .state import ModelState

__all__ = ["load_any_state", "load_state"]

logger = get_logger(__name__)


def load_state(
    accelerator: Accelerator,
    input_dir: str | os.PathLike | None = None,
    load_kwargs: dict[str, Any] | None = None,
    strict: bool = True,
    map_location: Any = None,
) -> None:
    """Load what `accelerator.save_state` has saved, at this or any other `tp x dp`. Collective over all ranks.

    Takes a sharded state, what Accelerate's own `save_state` has written, and a Hugging Face checkpoint (weights
    only). Works on any prepared `Accelerator`, with this package's plugin and without.

    Args:
        accelerator: With everything prepared that the state is to go to.
        input_dir: Folder of the state; None under automatic naming: the newest one that is intact.
        load_kwargs: Options of `torch.load` for what is not sharded.
        strict: Whether models need exactly the tensors that were saved.
        map_location: As in Accelerate's own; nothing depends on it, tensors go where they belong.

    Raises:
        ValueError: If there is no such folder.
        CheckpointError: If it is damaged, incomplete, or of other models or optimizers: the same on all ranks, and
            before anything is loaded.
    """
    ranks = Ranks("load_state")
    ranks.meet()
    finish_background_save(ranks)
    folder = _folder_to_load(accelerator, input_dir, ranks)
    logger.info(f"Loading states from {folder.path}")
    loader = _LOADERS[ranks.on_main(lambda: _kind_of(folder.path))](accelerator, ranks, folder, strict, load_kwargs)
    mesh = accelerator.torch_device_mesh
    loader.run(mesh["tp"].size() if mesh is not None and "tp" in mesh.mesh_dim_names else 1)


def _folder_to_load(accelerator: Accelerator, input_dir: str | os.PathLike | None, ranks: Ranks) -> SavedFolder:
    """The verified folder. Collective."""
    automatic = input_dir is None
    candidates = ranks.on_main(lambda: _candidates(accelerator, input_dir))
    skipped: list[str] = []
    for path in candidates:
        folder = SavedFolder(path, ranks)
        problem = folder.problem() if ranks.on_main(lambda: is_sharded_state(path)) else None
        if problem is None:
            for reason in skipped:
                logger.warning(f"load_state passes over a damaged checkpoint: {reason}. It takes {path}.")
            return folder
        skipped.append(problem)
        if not automatic:
            break
    hint = "" if automatic else ranks.on_main(lambda: _newest_intact_beside(candidates[0]))
    raise CheckpointError(f"load_state: {'; '.join(skipped)}. Nothing has been loaded.{hint}")


def _candidates(accelerator: Accelerator, input_dir: str | os.PathLike | None) -> list[Path]:
    if input_dir is not None:
        path = absolute(input_dir)
        put_back(path)
        if not path.is_dir():
            raise ValueError(f"Tried to find {path} but folder does not exist")
        return [path]
    if not accelerator.project_configuration.automatic_checkpoint_naming:
        raise ValueError("No input_dir provided and automatic checkpoint naming is disabled.")
    parent = automatic_folder(accelerator)
    found = newest_first(parent) if parent.is_dir() else []
    if not found:
        raise ValueError(f"there is no checkpoint in {parent}")
    return found


def _newest_intact_beside(damaged: Path) -> str:
    alone = Ranks("load_state", alone=True)
    for path in newest_first(damaged.parent):
        if path != damaged and is_sharded_state(path) and SavedFolder(path, alone).problem() is None:
            return f" The newest intact checkpoint is {path}."
    return ""


def _kind_of(folder: Path) -> str:
    if is_sharded_state(folder):
        return "sharded"
    if is_plain_state(folder):
        return "plain"
    if is_weights_only(folder):
        return "weights"
    raise ValueError(
        f"{folder} is neither a state that `save_state` has written (no {MANIFEST}, no random_states_*.pkl) nor a "
        "checkpoint with a config and weights"
    )


class _StateLoader:
    """One kind of folder. `check` must change nothing; then `load` may."""

    def __init__(
        self,
        accelerator: Accelerator,
        ranks: Ranks,
        folder: SavedFolder,
        strict: bool,
        load_kwargs: dict[str, Any] | None,
    ):
        self.accelerator = accelerator
        self.ranks = ranks
        self.folder = folder
        self.path = folder.path
        self.strict = strict
        self.load_kwargs = load_kwargs

    def run(self, tp_size: int) -> None:
        self.tp_size, self.ranks.place = tp_size, self.path
        self.ranks.together(self.check_others)
        self.ranks.together(self._run_hooks)
        self.ranks.together(self.check)
        try:
            self.ranks.together(self.load)
            self.ranks.together(self.load_others)
        except (CheckpointError, ValueError) as error:
            raise CheckpointError(f"{error} Loading had begun: models and optimizers may hold parts of it.") from error

    def _run_hooks(self) -> None:
        """Call the user's hooks as Accelerate does: models that they take out of the list are theirs to load."""
        models = list(self.accelerator._models)
        for hook in self.accelerator._load_model_state_pre_hook.values():
            hook(models, str(self.path))
        left = {id(model) for model in models}
        self.models = {
            index: ModelState(model, f"models.{index}.")
            for index, model in enumerate(self.accelerator._models)
            if id(model) in left
        }
        self.optimizers = optimizer_states(self.accelerator)

    def files(self) -> set[str]:
        """What belongs to the state, by the paths within the folder."""
        return {path.name for path in self.path.iterdir()}

    def check_others(self) -> None:
        """Raise if what is not sharded does not fit."""
        found = sum(1 for name in self.files() if re.fullmatch(r"custom_checkpoint_\d+\.pkl", name))
        self._same_number("custom objects registered for checkpointing", len(self.accelerator._custom_objects), found)
        for index in range(len(self.accelerator._schedulers)):
            path = plain_file(self.path, "scheduler", "bin", index)
            if path.name not in self.files():
                raise CheckpointError(f"{path} is missing: the state of scheduler {index}.")

    def _same_number(self, what: str, own: int, found: int) -> None:
        if own != found:
            raise CheckpointError(
                f"{own} {what} here, but {found} in {self.path}. Prepare and register the same things as when it was "
                "saved."
            )

    def check(self) -> None:
        raise NotImplementedError

    def load(self) -> None:
        raise NotImplementedError

    def load_others(self) -> None:
        accelerator = self.accelerator
        source = self.random_state_of()
        overrides = load_accelerator_state(
            str(self.path),
            [],
            [],
            accelerator._schedulers,
            accelerator._dataloaders,
            source,
            accelerator.scaler if "scaler.pt" in self.files() else None,
            "cpu",
            self.load_kwargs,
        )
        accelerator.step = overrides["step"] if "step" in overrides else self.step()
        for index, obj in enumerate(accelerator._custom_objects):
            load_custom_state(obj, str(self.path), index)
        if accelerator.device.type == "cuda" and source not in (-1, self.ranks.rank):
            states, gpu = load(self._random_states(source)).get("torch_cuda_manual_seed", []), self.device_of(source)
            if gpu is not None and gpu < len(states):
                torch.cuda.set_rng_state(states[gpu], accelerator.device)

    def _random_states(self, rank: int) -> Path:
        return self.path / f"random_states_{rank}.pkl"

    def random_state_of(self) -> int:
        """Whose random states this rank resumes with; -1: there are none for it, and it keeps its own."""
        replica = self.ranks.rank // self.tp_size
        return replica if self._random_states(replica).exists() else -1

    def device_of(self, rank: int) -> int | None:
        """Which GPU that rank had."""
        return rank % torch.cuda.device_count()

    def step(self) -> int:
        """`accelerator.step` where this rank has no random states in the folder."""
        return load(self._random_states(0)).get("step", 0)


class _Sharded(_StateLoader):
    def files(self) -> set[str]:
        return set(self.folder.manifest.files)

    def check_others(self) -> None:
        super().check_others()
        about = self.about
        self._same_number("prepared optimizers", len(self.accelerator._optimizers), about["optimizers"])
        self._same_number("prepared schedulers", len(self.accelerator._schedulers), about["schedulers"])

    @property
    def about(self) -> dict[str, Any]:
        return self.folder.manifest.about

    def check(self) -> None:
        stored = read_metadata(self.path / TENSORS)
        for index, state in self.models.items():
            if index not in self.about["models"]:
                raise CheckpointError(f"{self.path} holds no weights of model {index}.")
            state.check(stored, self.strict)
        names = {optimizer.summary_name: None for optimizer in self.optimizers}
        self.summaries = read_tensors(self.path / TENSORS, names)
        for optimizer in self.optimizers:
            optimizer.check(self.summaries[optimizer.summary_name], stored)
        self.stored = stored

    def load(self) -> None:
        values: dict[str, Any] = {}
        for state in self.models.values():
            values.update(state.values())
        dtypes = read_dtypes(self.path / TENSORS)
        for optimizer in self.optimizers:
            values.update(optimizer.targets(self.summaries[optimizer.summary_name], self.stored, dtypes))
        loaded = read_tensors(self.path / TENSORS, {n: v for n, v in values.items() if n in self.stored})
        for state in self.models.values():
            state.take_objects(loaded)
        for optimizer in self.optimizers:
            optimizer.take(self.summaries[optimizer.summary_name])

    def random_state_of(self) -> int:
        replica, peer = divmod(self.ranks.rank, self.tp_size)
        if replica >= self.about["dp_size"]:
            return -1
        return replica * self.about["tp_size"] + (peer if self.tp_size == self.about["tp_size"] else 0)

    def device_of(self, rank: int) -> int | None:
        return self.about["devices"][rank]

    def step(self) -> int:
        return self.about["step"]


class _Plain(_StateLoader):
    """What Accelerate's own `save_state` has written: every rank reads its slices of the full tensors."""

    def check(self) -> None:
        self.weights = {index: PlainWeights(self.path, index) for index in self.models}
        for index, state in self.models.items():
            state.check(self.weights[index].stored(state), self.strict)
        self.states = [
            load_pickled(plain_file(self.path, "optimizer", "bin", index), **(self.load_kwargs or {}))
            for index in range(len(self.optimizers))
        ]
        for optimizer, saved in zip(self.optimizers, self.states):
            optimizer.check_plain(saved)

    def load(self) -> None:
        for index, state in self.models.items():
            self.weights[index].load(state)
        for optimizer, saved in zip(self.optimizers, self.states):
            optimizer.take_plain(saved)


class _WeightsOnly(_StateLoader):
    """A Hugging Face checkpoint: weights, and nothing else to load."""

    def check_others(self) -> None:
        if len(self.accelerator._models) != 1:
            raise CheckpointError(
                f"{self.path} holds the weights of one model, and {len(self.accelerator._models)} are prepared."
            )

    def check(self) -> None:
        self.weights = PlainWeights(self.path, 0)
        for state in self.models.values():
            state.check(self.weights.stored(state), self.strict)

    def load(self) -> None:
        for state in self.models.values():
            self.weights.load(state)

    def load_others(self) -> None:
        logger.warning(f"{self.path} holds weights only: optimizers, schedulers and random states stay as they are.")


_LOADERS: dict[str, type[_StateLoader]] = {"sharded": _Sharded, "plain": _Plain, "weights": _WeightsOnly}


def load_any_state(
    async_save: bool,
    stock: Callable,
    accelerator: Accelerator,
    /,
    input_dir: str | None = None,
    load_kwargs: dict | None = None,
    **load_model_func_kwargs: Any,
) -> None:
    """`Accelerator.load_state` that takes sharded states too; anything else goes where it went."""
    finish_background_save(Ranks("load_state"))  # which may be what is to be loaded
    load = partial(load_state, accelerator) if _is_sharded(accelerator, input_dir) else stock
    load(input_dir, load_kwargs, **load_model_func_kwargs)


def _is_sharded(accelerator: Accelerator, input_dir: str | None) -> bool:
    if input_dir is not None:
        path = absolute(input_dir)
        return is_sharded_state(path) or is_replaced(path)
    if not accelerator.project_configuration.automatic_checkpoint_naming:
        return False
    parent = automatic_folder(accelerator)
    return parent.is_dir() and any(is_sharded_state(path) for path in newest_first(parent)[:1])
