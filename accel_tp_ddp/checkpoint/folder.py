"""A checkpoint folder that is there whole or not at all.

It is written beside its place, listed with sizes and checksums in a manifest, checked, and then renamed. What stood
there before goes only after that. A `SIGKILL` at any moment leaves either the old folder or the new one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..core.agreement import Ranks
from ..core.errors import CheckpointError

__all__ = [
    "FolderAside",
    "MANIFEST",
    "Manifest",
    "SavedFolder",
    "clear_away",
    "damage_to",
    "is_replaced",
    "newest_first",
    "put_back",
    "remove_oldest",
    "write_whole",
]

MANIFEST = "state_manifest.json"
_FORMAT = "accel_tp_ddp state"
_VERSION = 1
_NUMBERED = re.compile(r"checkpoint_(\d+)")
_BLOCK = 1 << 22
logger = logging.getLogger(__name__)


class Manifest:
    """What a checkpoint consists of.

    Attributes:
        about: What the saver wants to know when loading; JSON values.
        files: Size in bytes and SHA-256 of each file, by its path within the folder.
    """

    def __init__(self, about: dict[str, Any], files: dict[str, tuple[int, str]]):
        self.about = about
        self.files = files

    def write(self, folder: Path) -> None:
        content = {"format": _FORMAT, "version": _VERSION, "about": self.about, "files": self.files}
        text = json.dumps({"content": content, "sha256": _sha256_of_json(content)}, indent=1)
        with open(folder / MANIFEST, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Raises CheckpointError if it is not there, damaged, or of a later version."""
        path = folder / MANIFEST
        try:
            whole = json.loads(path.read_text(encoding="utf-8"))
            content = whole["content"]
            told, found = whole["sha256"], _sha256_of_json(content)
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing: this is no complete state.") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} cannot be read as a manifest: {error}.") from None
        if told != found:
            raise CheckpointError(f"{path} is damaged: its contents have the SHA-256 {found}, and it says {told}.")
        if content.get("format") != _FORMAT or content.get("version") != _VERSION:
            raise CheckpointError(
                f"{path} is of the format {content.get('format')!r}, version {content.get('version')!r}; this version "
                f"of the package reads {_FORMAT!r}, version {_VERSION}."
            )
        return cls(content["about"], {name: tuple(entry) for name, entry in content["files"].items()})


def write_whole(place: Path, ranks: Ranks, fill: Callable[[Path], dict[str, Any]]) -> None:
    """Let all ranks `fill` a folder, and let it appear at `place` when all of it is there. Collective.

    Args:
        place: Where it shall be. What is there is replaced at the end; files that are no part of a state are kept.
        fill: Called on every rank with a folder beside `place`; returns what the manifest keeps (the main process's).

    Raises:
        CheckpointError: On every rank, if anything fails on any; `place` is then as it was.
    """
    aside = FolderAside(place, ranks)
    with aside.cleared_on_failure(ranks):
        aside.complete(ranks, fill(aside.path))


class FolderAside:
    """A folder beside its `place`, to be filled and then to appear there. Made on every rank; collective.

    Attributes:
        path: Where it is for now.
    """

    def __init__(self, place: Path, ranks: Ranks):
        self.place, self.path, ranks.place = place, _aside(place, "saving"), place
        ranks.on_main(lambda: _make_room(place, self.path))
        with self.cleared_on_failure(ranks):
            ranks.together(lambda: _check_shared(self.path, ranks))

    @contextmanager
    def cleared_on_failure(self, ranks: Ranks) -> Iterator[None]:
        """Delete the folder if what is done meanwhile fails."""
        try:
            yield
        except BaseException:
            if ranks.is_main:
                shutil.rmtree(self.path, ignore_errors=True)
            raise

    def complete(self, ranks: Ranks, about: dict[str, Any]) -> None:
        """List what is there, with what the manifest is to keep beside it, and put it in its place. Collective."""
        names = ranks.on_main(lambda: _files_in(self.path))
        parts = ranks.each(
            lambda: {name: _checksum(self.path / name, sync=True) for name in names[ranks.rank :: ranks.size]}
        )
        files = {name: entry for part in parts for name, entry in part.items()}
        ranks.on_main(lambda: _finish(Manifest(about, dict(sorted(files.items()))), self.path, self.place))


def damage_to(folder: Path, manifest: Manifest, names: list[str]) -> str | None:
    """What is wrong with the files `names` of a checkpoint, if anything; reads each of them once."""
    for name in names:
        path, (size, checksum) = folder / name, manifest.files[name]
        try:
            found = path.stat().st_size
            if found != size:
                return f"{path} has {found} bytes, and {size} were written"
            found_checksum = _checksum(path)[1]
        except FileNotFoundError:
            return f"{path} is missing ({size} bytes)"
        except OSError as error:
            return f"{path} cannot be read: {error}"
        if found_checksum != checksum:
            return f"{path} is damaged: its SHA-256 is {found_checksum}, and {checksum} was written"
    return None


class SavedFolder:
    """A checkpoint to be loaded, verified by all ranks together."""

    def __init__(self, path: Path, ranks: Ranks):
        self.path = path
        self.ranks = ranks

    def problem(self) -> str | None:
        """What is wrong with it, the same on every rank. Each rank reads its share of the files. Collective."""
        told = self.ranks.on_main(self._read_manifest)
        if isinstance(told, str):
            return told
        about, files = told
        self.manifest = Manifest(about, files)
        share = list(files)[self.ranks.rank :: self.ranks.size]
        found = self.ranks.all(damage_to(self.path, self.manifest, share))
        return next((problem for problem in found if problem is not None), None)

    def _read_manifest(self) -> str | tuple[dict[str, Any], dict[str, tuple[int, str]]]:
        try:
            manifest = Manifest.read(self.path)
        except CheckpointError as error:
            return str(error)
        return manifest.about, manifest.files


def newest_first(parent: Path) -> list[Path]:
    """The folders `checkpoint_<number>` in `parent`, the highest number first."""
    found = [(int(match[1]), path) for path in parent.iterdir() if (match := _NUMBERED.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def remove_oldest(parent: Path, limit: int, kept: Path) -> list[Path]:
    """Leave at most `limit` of the folders `checkpoint_<number>`, `kept` among them; returns what went."""
    others = [path for path in newest_first(parent) if path.name != kept.name]
    removed = others[max(limit - 1, 0) :]
    for path in removed:
        going = _aside(path, "removing")  # so that nobody takes half of it for a checkpoint
        path.rename(going)
        shutil.rmtree(going)
    return removed


def clear_away(parent: Path) -> None:
    """Delete what saves and removals that were killed have left beside the folders `checkpoint_<number>`."""
    for purpose in ("saving", "removing"):
        for path in parent.glob(f".checkpoint_*.{purpose}"):
            shutil.rmtree(path)


def put_back(place: Path) -> None:
    """Finish what a save was killed at: between taking the old folder away and putting the new one there."""
    replaced = _aside(place, "replaced")
    if not replaced.exists():
        return
    if not place.exists():
        replaced.rename(place)
    else:
        _keep_foreign_files(replaced, place)
        shutil.rmtree(replaced)


def is_replaced(place: Path) -> bool:
    """Whether there is something for `put_back`."""
    return _aside(place, "replaced").exists()


def _aside(place: Path, purpose: str) -> Path:
    return place.with_name(f".{place.name}.{purpose}")


def _make_room(place: Path, aside: Path) -> None:
    if os.path.ismount(place):
        raise ValueError(f"{place} is where a file system is mounted, and cannot be replaced. Save to a folder in it.")
    existing = next(path for path in (place, *place.parents) if path.exists())
    if not existing.is_dir():
        raise ValueError(f"{existing} is a file, so {place} cannot be a folder. Save to another one.")
    place.parent.mkdir(parents=True, exist_ok=True)
    put_back(place)
    if aside.exists():
        shutil.rmtree(aside)
    aside.mkdir()


def _check_shared(aside: Path, ranks: Ranks) -> None:
    if not aside.is_dir():
        raise CheckpointError(
            f"rank {ranks.rank} does not see {aside}, which the main process has made. All ranks write parts of one "
            "checkpoint: save to a file system that they share."
        )


def _files_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _finish(manifest: Manifest, aside: Path, place: Path) -> None:
    for name, (size, _) in manifest.files.items():
        if (aside / name).stat().st_size != size:
            raise CheckpointError(f"{aside / name} changed while it was saved.")
    manifest.write(aside)
    for folder in [path for path in aside.rglob("*") if path.is_dir()] + [aside]:
        _sync_folder(folder)
    replaced = _aside(place, "replaced")
    if place.exists():
        place.rename(replaced)
    try:
        aside.rename(place)
    except OSError:
        if replaced.exists():
            replaced.rename(place)
        raise
    _sync_folder(place.parent)
    try:
        put_back(place)
    except OSError as error:  # the checkpoint is there; the next save or load tries this again
        logger.warning("%s could not be cleared away: %s", replaced, error)


def _keep_foreign_files(replaced: Path, place: Path) -> None:
    """Move over what somebody else put into the folder that is to go."""
    try:
        listed = set(Manifest.read(replaced).files) | {MANIFEST}
    except CheckpointError:
        listed = set()
    for name in _files_in(replaced):
        target = place / name
        if name not in listed and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            (replaced / name).rename(target)


def _checksum(path: Path, sync: bool = False) -> tuple[int, str]:
    digest, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            size += len(block)
        if sync:
            os.fsync(file.fileno())
    return size, digest.hexdigest()


def _sha256_of_json(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
