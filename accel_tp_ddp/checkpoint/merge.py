"""An ordinary checkpoint out of a sharded state, in one process: a tensor and a shard file in memory, no more."""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import save
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

from ..core.errors import BadInputError, CheckpointError, nearest
from .dcp import StoredTensors
from .deferred import DeferredTensor
from .description import ModelDescription, description_folder
from .folder import MANIFEST, Manifest, damage_to, put_back
from .places import TENSORS, absolute, is_sharded_state

__all__ = ["merge"]


def merge(
    state: str | os.PathLike,
    out: str | os.PathLike,
    *,
    max_shard_size: int | str = "5GB",
    model: int | None = None,
    config: str | os.PathLike | None = None,
    verify: bool = True,
    progress: bool = False,
) -> dict[str, Any]:
    """Write what `save_pretrained` of the run would have written, or `save_model` for a model that has none.

    Args:
        state: Folder that `accelerator.save_state` has written under tensor parallelism.
        out: Folder for the checkpoint: a new one, or an empty one.
        max_shard_size: As in `save_pretrained`.
        model: Its number, where the state holds several.
        config: Folder or JSON file of the model's config, for states without one.
        verify: Whether to compare the checksums of the state first, which reads it once more.
        progress: Whether to show progress bars.

    Returns:
        `out`, the `kind` of the model, its `model` number, the number of `tensors` and `bytes`, and the `files`.

    Raises:
        BadInputError: With what to change.
        CheckpointError: If the state is damaged.
    """
    place, target = absolute(state), absolute(out)
    manifest = _manifest_of(place)
    index = _choose(model, manifest.about["models"], place)
    _check_target(target)
    stored = _StoredModel(place, index, ModelDescription.read(description_folder(place, index)))
    write = stored.writer(config, max_shard_size)  # before the checksums, which take their time
    if verify:
        _verify(place, manifest, index, progress)
    aside = target.with_name(f".{target.name}.merging")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        with stored.bar(progress), _quiet(transformers_logging):
            write(aside)
        if target.exists():
            target.rmdir()
        aside.rename(target)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        if isinstance(error, (BadInputError, CheckpointError)) or not isinstance(error, Exception):
            raise
        if isinstance(error, ValueError):  # about the size
            raise BadInputError(str(error)) from error
        raise BadInputError(
            f"{target} cannot be written: {type(error).__name__}: {error}. Give another folder, or make room "
            f"({stored.nbytes:,} bytes)."
        ) from error
    files = sorted(path.name for path in target.iterdir())
    facts = {"kind": stored.kind, "model": index, "tensors": len(stored.names), "bytes": stored.nbytes}
    return {"out": str(target), **facts, "files": files}


def _manifest_of(place: Path) -> Manifest:
    if not place.is_dir():
        raise BadInputError(f"{place} does not exist or is no folder. Give the folder that save_state has written.")
    put_back(place)
    if not is_sharded_state(place):
        hint = "Its weights are not sharded; use them as they are." if any(place.glob("*.safetensors")) else ""
        raise BadInputError(
            f"{place} is no state that accelerator.save_state has written under tensor parallelism: there is no "
            f"{MANIFEST}. {hint or 'Give the folder of one, such as checkpoints/checkpoint_3.'}"
        )
    return Manifest.read(place)


def _choose(model: int | None, there: list[int], place: Path) -> int:
    if not there:
        raise BadInputError(f"{place} holds no models; a hook of the run has saved them elsewhere.")
    if model is None and len(there) > 1:
        raise BadInputError(f"{place} holds several models; choose one by --model, of {there}.")
    if model is not None and model not in there:
        raise BadInputError(f"--model {model}: {place} holds the models {there}.")
    return there[0] if model is None else model


def _check_target(target: Path) -> None:
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise BadInputError(f"{target} exists and is not an empty folder. Give a new folder.")


def _hidden(shown: bool) -> bool | None:
    """For a progress bar: None hides it where the output is no terminal."""
    return None if shown else True


def _verify(place: Path, manifest: Manifest, index: int, progress: bool) -> None:
    own = f"{description_folder(place, index).relative_to(place).as_posix()}/"
    names = [name for name in manifest.files if name.startswith((f"{TENSORS}/", own))]
    for name in tqdm(names, desc="Comparing checksums", disable=_hidden(progress)):
        problem = damage_to(place, manifest, [name])
        if problem is not None:
            raise CheckpointError(f"{problem}. Nothing has been merged.")


class _StoredModel:
    """One model of a state, as deferred tensors and a way to write them."""

    def __init__(self, place: Path, index: int, description: ModelDescription | None):
        self.place = place
        self.folder = description_folder(place, index)
        self.description = description
        self.prefix = f"models.{index}."
        self._tensors = StoredTensors(place / TENSORS)
        self._bar: Any = None
        self.there = [name.removeprefix(self.prefix) for name in self._tensors.names if name.startswith(self.prefix)]
        self.names = list(description.tensors) if description is not None else self.there
        self.kind = description.kind if description is not None else "weights"
        absent = [name for name in self.names if name not in self.there and self._shape(name).numel()]
        if absent:
            raise CheckpointError(f"{place / TENSORS} holds no `{absent[0]}`, which the state says it holds.")
        for name in self.there:
            if self._tensors.shape(self.prefix + name) is None:
                raise BadInputError(
                    f"`{name}` is no tensor but an object (from get_extra_state), which no safetensors file can hold. "
                    "Load the state in a run, and save it by other means."
                )

    @property
    def nbytes(self) -> int:
        return sum(self._shape(name).numel() * self._dtype(name).itemsize for name in self.names)

    def _shape(self, name: str) -> torch.Size:
        if self.description is not None:
            return torch.Size(self.description.tensors[name][1])
        shape = self._tensors.shape(self.prefix + name)
        assert shape is not None, "objects were refused when the state was opened"
        return shape

    def _dtype(self, name: str) -> torch.dtype:
        return (
            self.description.dtype(name) if self.description is not None else self._tensors.dtype(self.prefix + name)
        )

    def _read(self, name: str) -> Tensor:
        if self._shape(name).numel() == 0:  # which has no place among the tensors
            return torch.empty(self._shape(name), dtype=self._dtype(name))
        tensor = self._tensors.tensor(self.prefix + name)
        if self._bar is not None:
            self._bar.update(tensor.nbytes)
        return tensor

    @contextmanager
    def bar(self, shown: bool) -> Iterator[None]:
        """Follow the reading by a progress bar."""
        with tqdm(total=self.nbytes, desc="Merging", unit="B", unit_scale=True, disable=_hidden(shown)) as self._bar:
            yield

    def deferred(self, names: list[str], aliases: dict[str, str]) -> dict[str, Tensor]:
        """The state dict, in the order of `names`."""
        made = {
            name: DeferredTensor.of(self._shape(name), self._dtype(name), partial(self._read, name))
            for name in names
            if name not in aliases
        }
        return {name: made[aliases.get(name, name)] for name in names}

    # ------------------------------------------------------------------------------------------------------- writing

    def writer(self, config: str | os.PathLike | None, size: int | str) -> Callable[[Path], None]:
        """What writes the checkpoint into a folder."""
        description = self.description
        if description is None and config is None:
            raise BadInputError(
                f"{self.place} holds no config: it is of an earlier version of this package. Give the config of the "
                "model by --config, as a folder or a config.json."
            )
        if description is not None and description.saved_by is None:
            raise BadInputError(
                f"model {self.prefix.split('.')[1]} is a {self.kind}, whose own save_pretrained writes no full "
                "checkpoint. Load the state in a run (accelerator.load_state), and call save_pretrained there."
            )
        if description is not None and description.saved_by == "save_model":
            return partial(self._write_plainly, size=size)
        source = Path(config) if config is not None else self.folder
        model = self._build(source)
        names, aliases = self._names_in(model)
        if self.description is not None and (conversions := self.description.conversions(self.folder)) is not None:
            model._weight_conversions = conversions
        return partial(self._write_pretrained, model=model, names=names, aliases=aliases, source=source, size=size)

    def _write_pretrained(
        self,
        folder: Path,
        model: nn.Module,
        names: list[str],
        aliases: dict[str, str],
        source: Path,
        size: int | str,
    ) -> None:
        model.save_pretrained(folder, state_dict=self.deferred(names, aliases), max_shard_size=size)
        if source == self.folder:  # the run's own, to the letter; one from elsewhere has been read and written
            self._copy_configs(folder)
        elif (source / "generation_config.json").exists():
            shutil.copyfile(source / "generation_config.json", folder / "generation_config.json")

    def _write_plainly(self, folder: Path, size: int | str) -> None:
        state = self.deferred(self.description.names, self.description.aliases)
        PartialState(cpu=True)  # which Accelerate's `save` asks whether it is the main process
        writer = SimpleNamespace(get_state_dict=lambda model: state, save=save)
        Accelerator.save_model(writer, nn.Module(), folder, max_shard_size=size)
        self._copy_configs(folder)

    def _copy_configs(self, folder: Path) -> None:
        for name in ("config.json", "generation_config.json"):
            if (self.folder / name).exists():
                shutil.copyfile(self.folder / name, folder / name)

    def _build(self, source: Path) -> nn.Module:
        """The model without its weights: for the names that are tied, and for transformers' conversion."""
        description, kind = self.description, None
        if description is not None:
            kind = _class_of(description.kind, description.module)
        config = _config_from(source, getattr(kind, "config_class", None) or transformers.AutoConfig)
        if kind is None:
            architectures = getattr(config, "architectures", None)
            if not architectures:
                raise BadInputError(f'{source} names no class: add `architectures`, such as ["LlamaForCausalLM"].')
            self.kind = architectures[0]
            kind = _class_of(self.kind, "transformers")
        with torch.device("meta"):
            model = kind(config)
        first = next(iter(self.names), None)
        return model.to(self._dtype(first)) if first is not None else model

    def _names_in(self, model: nn.Module) -> tuple[list[str], dict[str, str]]:
        """The names in order, and of tied weights the further ones, each with the one that is stored."""
        own, there = dict(model.state_dict(keep_vars=True)), set(self.names)
        if self.description is not None:
            names, aliases = self.description.names, self.description.aliases
        else:
            stored = {id(tensor): name for name, tensor in own.items() if name in there}
            names = [name for name in own if id(own[name]) in stored]
            aliases = {name: stored[id(own[name])] for name in names if name not in there}
        missing = sorted(own.keys() - set(names))
        if missing:
            raise self._other_model(f"`{missing[0]}`, which is not there.{nearest(missing[0], there)}")
        unknown = [name for name in (*names, *self.names) if name not in own]
        if unknown:
            raise self._other_model(f"no `{unknown[0]}`, which is there.")
        for name in self.names:
            if own[name].shape != self._shape(name):
                sizes = f"of size {tuple(own[name].shape)}, and there it has {tuple(self._shape(name))}"
                raise self._other_model(f"`{name}` {sizes}.")
        return names, aliases

    def _other_model(self, what: str) -> BadInputError:
        return BadInputError(
            f"the weights in {self.place} are not those of a {self.kind} with this config: it has {what} Give the "
            "config of the model that was trained."
        )


def _config_from(source: Path, kind: Any) -> Any:
    try:
        if source.is_dir() and not (source / "config.json").exists():
            raise FileNotFoundError("no config.json in it")  # for which transformers would take a default one
        return kind.from_pretrained(source)
    except Exception as error:
        raise BadInputError(
            f"{source} cannot be read as a config: {type(error).__name__}: {error}. Give the folder or "
            "the config.json of the model by --config."
        ) from error


def _class_of(name: str, module: str) -> type:
    """The class, from where the run had it, or from where this version of transformers has it."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        found = getattr(transformers, name, None)
        if found is None:
            raise BadInputError(
                f"the class {name} of the model cannot be found in {module}: {error}. Put it on PYTHONPATH, or "
                "install what it comes from."
            ) from None
        return found


@contextmanager
def _quiet(logging: Any) -> Iterator[None]:
    """No progress bars but our own."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
