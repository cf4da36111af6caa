"""Weights that are not sharded, read by slices: safetensors files with or without an index, or `torch.save` files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Size

from ..core.errors import CheckpointError
from .dcp import Part
from .state import ModelState

__all__ = ["PlainWeights", "is_plain_state", "is_weights_only", "load_pickled", "plain_file"]


def plain_file(folder: Path, stem: str, ending: str, index: int) -> Path:
    """How Accelerate names the file of its model, optimizer, ... number `index`."""
    return folder / (f"{stem}.{ending}" if index == 0 else f"{stem}_{index}.{ending}")


def is_plain_state(folder: Path) -> bool:
    """Whether this is what Accelerate's own `save_state` writes."""
    return any(folder.glob("random_states_*.pkl"))


def is_weights_only(folder: Path) -> bool:
    """Whether this is a Hugging Face checkpoint: weights and a config, and nothing of a training run."""
    weights = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
    return (folder / "config.json").exists() and any((folder / name).exists() for name in weights)


class PlainWeights:
    """The full tensors of one model in a folder, by name."""

    def __init__(self, folder: Path, index: int):
        self.folder = folder
        single, many = plain_file(folder, "model", "safetensors", index), folder / "model.safetensors.index.json"
        pickled = plain_file(folder, "pytorch_model", "bin", index)
        self._pickled: Mapping[str, Any] = {}
        if single.exists():
            self._files = {single: None}
        elif index == 0 and many.exists():
            listed = json.loads(many.read_text(encoding="utf-8"))["weight_map"].values()
            self._files = dict.fromkeys(folder / name for name in listed)
        elif pickled.exists():
            self._files = {}
            self._pickled = load_pickled(pickled)
        else:
            raise CheckpointError(f"there is neither {single} nor {pickled}.")
        self._sources: dict[str, Path | None] = dict.fromkeys(self._pickled)
        self.shapes: dict[str, Size] = {name: tensor.shape for name, tensor in self._pickled.items()}
        for path in self._files:
            with _opened(path) as file:
                for name in file.keys():  # noqa: SIM118 (no dict)
                    self._sources[name] = path
                    self.shapes[name] = Size(file.get_slice(name).get_shape())
        # Accelerate writes the names of the DDP wrapper.
        self._prefix = "module." if all(name.startswith("module.") for name in self.shapes) else ""
        self.shapes = {name.removeprefix(self._prefix): shape for name, shape in self.shapes.items()}

    def load(self, state: ModelState) -> None:
        """Copy this rank's slices into the model's tensors. Check before: `ModelState.check`."""
        parts = {name: part for name, part in state.values().items() if isinstance(part, Part)}
        by_file: dict[Path | None, list[tuple[str, Part]]] = {}
        for full_name, part in parts.items():
            name = self.name_of(full_name.removeprefix(state.prefix), state)
            if name is not None and not part.is_empty:
                by_file.setdefault(self._sources[self._prefix + name], []).append((self._prefix + name, part))
        for path, wanted in by_file.items():
            if path is None:
                for name, part in wanted:
                    part.copy_from(self._pickled[name])
                continue
            with _opened(path) as file:
                for name, part in wanted:
                    # A slice of a single number needs no indices, which safetensors does not take there.
                    scalar = part.size() == Size()
                    part.copy_from(file.get_tensor(name) if scalar else file.get_slice(name))

    def name_of(self, name: str, state: ModelState) -> str | None:
        """Under which of its names a tensor of the model is here: of tied weights only one is kept."""
        names = [name, *(alias for alias, kept in state.aliases.items() if kept == name)]
        return next((name for name in names if name in self.shapes), None)

    def stored(self, state: ModelState) -> dict[str, Size]:
        """The shapes here, under the model's own names and prefix; see `ModelState.check`."""
        shapes = {state.aliases.get(name, name): shape for name, shape in self.shapes.items()}
        return {state.prefix + name: shape for name, shape in shapes.items()}


def load_pickled(path: Path, **options: Any) -> Any:
    """`torch.load` without reading more than is used, and without running what is in the file."""
    options = {"map_location": "cpu", "weights_only": True, "mmap": True, **options}
    try:
        return torch.load(path, **options)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing.") from None
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read: {type(error).__name__}: {error}") from error


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing.") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file: {error}") from error
