"""A disk that is really full: a small file system in memory, where this process may mount one."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

from accel_tp_ddp import CheckpointError, wait_for_save
from accel_tp_ddp.checkpoint.folder import MANIFEST

from ..helpers.ranks import run_on_ranks
from ..helpers.resuming import Prepared, Run, Saved


@pytest.fixture
def small_disk(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    try:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)], capture_output=True, text=True
        )
    except OSError as error:
        pytest.skip(f"no mount: {error}")
    if done.returncode:
        pytest.skip(f"a file system cannot be mounted here: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def saves(disk):
    """Save; fill the disk up to about half a state; save again, at once and in the background; make room; save."""
    prepared = Prepared(Run(2))
    accelerator, place = prepared.accelerator, os.path.join(disk, "state")
    accelerator.save_state(place)
    manifest = Path(place, MANIFEST).read_text()
    used = sum(path.stat().st_size for path in Path(place).rglob("*") if path.is_file())
    accelerator.wait_for_everyone()
    filler = Path(disk, "filler")
    if accelerator.is_main_process:
        space = os.statvfs(disk)
        assert space.f_bavail * space.f_bsize > used, "no room for a second one in any case"
        filler.write_bytes(b"0" * (space.f_bavail * space.f_bsize - used // 2))
    accelerator.wait_for_everyone()
    messages = []
    for behind in (False, True):
        prepared.train(prepared.loader, 1, Saved())
        started = time.monotonic()
        try:
            accelerator.save_state(place, async_save=behind)
            wait_for_save()
            raise AssertionError("there was room")
        except CheckpointError as error:
            messages.append(str(error))
        assert time.monotonic() - started < 30
        accelerator.wait_for_everyone()
        assert sorted(os.listdir(disk)) == ["filler", "state"] and Path(place, MANIFEST).read_text() == manifest
        accelerator.wait_for_everyone()
    accelerator.load_state(place)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        filler.unlink()
    accelerator.wait_for_everyone()
    accelerator.save_state(place)
    assert Path(place, MANIFEST).read_text() != manifest
    return messages


def test_on_a_full_disk_saving_fails_on_all_ranks_and_the_old_state_stays(small_disk):
    first, second = run_on_ranks(saves, 2, str(small_disk))
    assert first == second and len(first) == 2
    for message in first:
        assert str(small_disk / "state") in message and "No space left on device" in message, message
