"""A checkpoint folder is there whole or not at all, whenever the process that writes it is killed."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

from accel_tp_ddp import CheckpointError
from accel_tp_ddp.checkpoint import folder as folders
from accel_tp_ddp.checkpoint.folder import MANIFEST, Manifest, SavedFolder, newest_first, put_back, write_whole
from accel_tp_ddp.core.agreement import Ranks

RANKS = Ranks("save_state")  # of one process


def write(place: Path, content: str, files: int = 2) -> None:
    def fill(folder: Path) -> dict:
        (folder / "tensors").mkdir()
        for number in range(files):
            (folder / "tensors" / f"{number}.bin").write_text(content * (number + 1))
        return {"content": content}

    write_whole(place, RANKS, fill)


def content_of(place: Path) -> str:
    """What is saved there, verified as `load_state` does it."""
    put_back(place)
    folder = SavedFolder(place, RANKS)
    problem = folder.problem()
    assert problem is None, problem
    content = folder.manifest.about["content"]
    for name in folder.manifest.files:
        assert set((place / name).read_text()) == set(content)
    return content


def writer_killed_at(event: int, place: Path) -> bool:
    """Write in a process that gets a SIGKILL at its `event`-th call to the file system; whether it came so far."""
    pid = os.fork()
    if pid == 0:
        seen = 0

        def count(name: str, args: tuple) -> None:
            nonlocal seen
            if name.startswith(("open", "os.", "shutil.")) and any(str(place.parent) in str(arg) for arg in args):
                seen += 1
                if seen == event:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        try:
            write(place, "n")
        finally:
            os._exit(0)
    _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize("before", ["nothing", "a state", "a state and other files"])
def test_a_kill_at_any_call_to_the_file_system_leaves_the_old_state_or_the_new_one(tmp_path, before):
    place, event, found = tmp_path / "state", 0, []
    while True:
        event += 1
        for path in tmp_path.iterdir():
            shutil.rmtree(path)
        if before != "nothing":
            write(place, "o", files=3)
        if before == "a state and other files":
            (place / "notes").mkdir()
            (place / "notes" / "log.txt").write_text("mine")
        killed = writer_killed_at(event, place)
        put_back(place)
        found.append(content_of(place) if place.exists() else None)
        assert found[-1] in (("o", "n") if before != "nothing" else (None, "n"))
        if before == "a state and other files":
            assert (place / "notes" / "log.txt").read_text() == "mine"
        write(place, "a")  # and what is left over is in nobody's way
        assert content_of(place) == "a"
        assert [path.name for path in tmp_path.iterdir()] == ["state"]
        if not killed:
            break
    assert event > 20 and found[-1] == "n" and found[0] != "n"
    assert found == sorted(found, key=lambda content: content == "n"), "a new state was there, and then not"


def test_replacing_a_state_in_place_would_be_seen(tmp_path, monkeypatch):
    """Without the renaming the test above fails."""

    def in_place(manifest, aside, place):
        if place.exists():
            folders.shutil.rmtree(place)
        aside.rename(place)
        manifest.write(place)

    monkeypatch.setattr(folders, "_finish", in_place)
    with pytest.raises(AssertionError):
        test_a_kill_at_any_call_to_the_file_system_leaves_the_old_state_or_the_new_one(tmp_path, "a state")


def test_a_failure_leaves_the_old_state(tmp_path):
    write(tmp_path / "state", "o")

    def fill(folder: Path) -> dict:
        (folder / "half.bin").write_text("n")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_whole(tmp_path / "state", RANKS, fill)
    assert content_of(tmp_path / "state") == "o"
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "a flipped byte": (flip, "is damaged: its SHA-256 is"),
    "a file cut short": (lambda path: os.truncate(path, 1), "has 1 bytes, and 2 were written"),
    "a missing file": (Path.unlink, "is missing (2 bytes)"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_told_with_the_file_and_what_was_written(tmp_path, damage):
    write(tmp_path / "state", "a")
    file = tmp_path / "state" / "tensors" / "1.bin"
    change, message = DAMAGES[damage]
    change(file)
    problem = SavedFolder(tmp_path / "state", RANKS).problem()
    assert str(file) in problem and message in problem


@pytest.mark.parametrize("at", [0, 10, 100, 200, 300])
def test_a_flipped_byte_in_the_manifest_is_found(tmp_path, at):
    write(tmp_path / "state", "o")
    path = tmp_path / "state" / MANIFEST
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=str(path)):
        Manifest.read(tmp_path / "state")


def test_a_missing_manifest_and_one_of_a_later_version_are_told(tmp_path):
    with pytest.raises(CheckpointError, match=f"{MANIFEST} is missing"):
        Manifest.read(tmp_path)
    Manifest({}, {}).write(tmp_path)
    assert Manifest.read(tmp_path).files == {}
    folders._VERSION += 1
    try:
        Manifest({}, {}).write(tmp_path)
    finally:
        folders._VERSION -= 1
    with pytest.raises(CheckpointError, match="version 2; this version of the package reads"):
        Manifest.read(tmp_path)


@pytest.mark.parametrize("what", ["a file", "a folder below a file"])
def test_a_place_that_cannot_be_a_folder_is_named(tmp_path, what):
    (tmp_path / "file").write_text("mine")
    place = tmp_path / "file" if what == "a file" else tmp_path / "file" / "state"
    with pytest.raises(ValueError, match=f"{tmp_path}/file is a file, so {place} cannot be a folder"):
        write(place, "n")
    assert (tmp_path / "file").read_text() == "mine"


def test_checkpoints_are_counted_by_number(tmp_path):
    for name in ("checkpoint_2", "checkpoint_10", "checkpoint_9", ".checkpoint_11.saving", "checkpoint_x", "best"):
        (tmp_path / name).mkdir()
    assert [path.name for path in newest_first(tmp_path)] == ["checkpoint_10", "checkpoint_9", "checkpoint_2"]
