"""What a state says of its models, beside their tensors: enough to make ordinary checkpoints of them by `merge`.

models/0/model.json               the class, the names in order, which of them are tied, types and shapes
models/0/config.json              and generation_config.json, as `save_pretrained` writes them
models/0/conversions.pkl          how transformers has converted what it loaded
"""

from __future__ import annotations

import copy
import json
import logging
import pickle
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..core.errors import CheckpointError
from .dcp import Part
from .export import takes_state_dict
from .state import ModelState

__all__ = ["ModelDescription", "describe_model", "description_folder"]

_CONVERSIONS = "_weight_conversions"  # what transformers' `from_pretrained` leaves on a model for `save_pretrained`
logger = logging.getLogger(__name__)


@dataclass
class ModelDescription:
    """One model of a state.

    Attributes:
        kind: Name of its class.
        module: Where that class is defined.
        names: Of `state_dict()`, in order.
        aliases: Of tied tensors, the further names, each with the one under which the tensor is stored.
        tensors: Data type and unsharded shape by name, without aliases.
        saved_by: What writes a full checkpoint of it: its `save_pretrained`, or Accelerate's `save_model`; None where
            its own `save_pretrained` writes something else.
    """

    kind: str
    module: str
    names: list[str]
    aliases: dict[str, str]
    tensors: dict[str, tuple[str, list[int]]]
    saved_by: str | None

    @classmethod
    def read(cls, folder: Path) -> ModelDescription | None:
        """From `description_folder(state, index)`; None where there is none."""
        path = folder / "model.json"
        if not path.exists():
            return None
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from None

    def conversions(self, folder: Path) -> Any | None:
        """What `from_pretrained` had left on the model; None if it was built in another way."""
        path = folder / "conversions.pkl"
        if not path.exists():
            return None
        try:
            return pickle.loads(path.read_bytes())
        except Exception as error:  # of whatever classes there are in another version of transformers
            raise CheckpointError(
                f"{path} cannot be read: {type(error).__name__}: {error}. Use the version of transformers that the "
                "state was saved with."
            ) from None

    def dtype(self, name: str) -> torch.dtype:
        return getattr(torch, self.tensors[name][0])


def description_folder(state: Path, index: int) -> Path:
    return state / "models" / str(index)


def describe_model(model: nn.Module, kept: Iterable[str], folder: Path) -> None:
    """Write what `ModelDescription` reads, for a model of which the state keeps the tensors `kept`."""
    state = ModelState(model, "")
    model, left = state.model, set(kept)
    names = [name for name in model.state_dict(keep_vars=True) if name in left or state.aliases.get(name) in left]
    tensors = {
        name: (str(part.local.dtype).removeprefix("torch."), list(part.size()))
        for name, part in state.values().items()
        if isinstance(part, Part) and name in names
    }
    aliases = {name: to for name, to in state.aliases.items() if name in names}
    saved_by: str | None = "save_pretrained" if takes_state_dict(model) else "save_model"
    if saved_by == "save_model" and hasattr(type(model), "save_pretrained"):
        saved_by = None
    described = ModelDescription(type(model).__name__, type(model).__module__, names, aliases, tensors, saved_by)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.json").write_text(json.dumps(asdict(described), indent=1), encoding="utf-8")
    if hasattr(getattr(model, "config", None), "save_pretrained"):
        _write_configs(model, folder)
    if getattr(model, _CONVERSIONS, None) is not None:
        _if_possible(
            lambda: (folder / "conversions.pkl").write_bytes(pickle.dumps(getattr(model, _CONVERSIONS))),
            f"how {type(model).__name__} was converted",
        )


def _write_configs(model: nn.Module, folder: Path) -> None:
    config: Any = copy.deepcopy(model.config)
    if isinstance(getattr(model, "dtype", None), torch.dtype):
        config.dtype = str(model.dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__]
    _if_possible(lambda: config.save_pretrained(folder), f"the config of {type(model).__name__}")
    generation = getattr(model, "generation_config", None)
    if hasattr(generation, "save_pretrained"):
        _if_possible(lambda: generation.save_pretrained(folder), f"the generation config of {type(model).__name__}")


def _if_possible(write: Any, what: str) -> None:
    """A run can resume from a state without it."""
    try:
        write()
    except OSError:
        raise
    except Exception as error:
        logger.warning("the state does not hold %s, so `merge` will do without it: %s", what, error)
