"""What ranks tell one another goes over gloo, whatever their group's backend is; nothing of it over a device's."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import time
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist

from accel_tp_ddp import CheckpointError, TensorParallelDDPPlugin, wait_for_save
from accel_tp_ddp.checkpoint import folder as folders
from accel_tp_ddp.core import control
from accel_tp_ddp.core.agreement import Ranks
from accel_tp_ddp.core.collectives import object_of_first_rank
from accel_tp_ddp.core.control import collectives, control_group, first_object, gather_objects

from ..helpers.backends import DEVICE, on_device_groups
from ..helpers.compare import assert_tensors_close
from ..helpers.ranks import run_on_ranks
from ..helpers.resuming import Prepared, Run, Saved, message_of
from ..helpers.sharded import tp_mesh

BACKENDS = pytest.mark.parametrize("backend", ["gloo", DEVICE, f"cpu:gloo,cuda:{DEVICE}"])


def exchanged(backend):
    """Over all ranks and over meshes of two, objects of several sizes."""
    with on_device_groups(backend):
        rank, mesh = dist.get_rank(), tp_mesh(2)
        group, own = mesh.get_group(), ["x" * 10 ** (dist.get_rank() + 1), dist.get_rank()]
        seen = (
            [value[1] for value in gather_objects(own)],
            [len(value[0]) for value in gather_objects(own, group)],
            first_object(rank, group),
            first_object(rank),
            object_of_first_rank(mesh, {"rank": rank}),
            Ranks("test").all(rank),
        )
        same = control_group() is dist.group.WORLD, control_group(group) is group
        copied = pickle.loads(pickle.dumps(copy.deepcopy({"mesh": mesh.mesh}))), control_group(group)
        assert copied[1] is control_group(group), "one for each group"
        return seen, same, collectives(group)


@BACKENDS
def test_objects_reach_all_ranks_of_a_group_over_whatever_backend(backend):
    results = run_on_ranks(exchanged, 4, backend)
    for rank, ((everyone, peers, first, of_world, data, all_ranks), same, count) in enumerate(results):
        start = rank - rank % 2
        assert everyone == all_ranks == [0, 1, 2, 3] and peers == [10 ** (start + 1), 10 ** (start + 2)]
        assert (first, of_world, data) == (start, 0, {"rank": start})
        assert same == ((backend == "gloo",) * 2) and count >= 6


def over_and_over():
    """A group's companion ends with it, and one that comes after it gets one of its own."""
    seen = []
    for _ in range(3):
        with on_device_groups():
            mesh = tp_mesh(2)
            seen.append((gather_objects(dist.get_rank(), mesh.get_group()), len(control._beside)))
            gather_objects(None)
            del mesh
    gc.collect()
    return seen, len(control._beside)


def test_groups_for_objects_end_with_the_groups_that_they_are_beside():
    for seen, left in run_on_ranks(over_and_over, 2):
        assert [ranks for ranks, _ in seen] == [[0, 1]] * 3 and left == 0
        assert max(count for _, count in seen) == 1


# --- nothing else talks over the device's group ----------------------------------------------------------------------


def life(folder, device):
    """Everything in which ranks tell one another something, from `prepare` to the end."""

    def live():
        prepared, record = Prepared(Run(2)), Saved()
        accelerator = prepared.accelerator
        prepared.train(prepared.loader, 2, record)
        accelerator.save_state(f"{folder}/state")
        prepared.train(prepared.loader, 1, Saved())
        accelerator.load_state(f"{folder}/state")
        accelerator.save_state(f"{folder}/behind", async_save=True)
        wait_for_save()
        accelerator.load_state(f"{folder}/behind")
        accelerator.save_model(prepared.model, f"{folder}/model")
        if accelerator.is_main_process:
            accelerator.save_model(prepared.model, f"{folder}/alone")
        accelerator.wait_for_everyone()
        prepared.look(record)
        return record

    with mock.patch.dict(os.environ, {"ACCEL_TP_DDP_PROVE": "always", "ACCEL_TP_DDP_REPLICA_CHECK_STEPS": "1"}):
        if not device:
            return live()
        with on_device_groups():
            return live()


def test_no_object_goes_over_the_devices_group(tmp_path):
    """From the proof in `prepare` over the watches of a step to states and exports."""
    of_device = run_on_ranks(life, 4, str(tmp_path / "device"), True)
    of_cpu = run_on_ranks(life, 4, str(tmp_path / "cpu"), False)
    for ours, theirs in zip(of_device, of_cpu):
        assert ours.losses == pytest.approx(theirs.losses)
        assert_tensors_close(ours.weights, theirs.weights, 1e-6)
        assert_tensors_close(ours.state, theirs.state, 1e-6)
    assert sorted(os.listdir(tmp_path / "device")) == ["alone", "behind", "model", "state"]


# --- a main process that takes its time ------------------------------------------------------------------------------


def slow(folder, behind, seconds, limit):
    """The main process's checksums take longer than the device's group lets anybody wait."""
    stock = folders._checksum

    def checksum(*args, **kwargs):
        time.sleep(seconds if dist.get_rank() == 0 else 0)
        return stock(*args, **kwargs)

    with on_device_groups(timeout=timedelta(seconds=limit)):
        prepared = Prepared(Run(2))
        prepared.train(prepared.loader, 1, Saved())
        with mock.patch.object(folders, "_checksum", checksum):
            prepared.accelerator.save_state(folder, async_save=behind)
            wait_for_save()
        prepared.train(prepared.loader, 1, Saved())


@pytest.mark.parametrize("behind", [False, True])
def test_the_main_process_may_take_longer_than_the_devices_group_waits(tmp_path, behind):
    run_on_ranks(slow, 2, str(tmp_path / "state"), behind, 0.8, 2.0)
    assert (tmp_path / "state" / folders.MANIFEST).exists()


def missing(seconds, met):
    with on_device_groups():
        control.be_patient(seconds)
        try:
            ranks = Ranks("test")
            if met:
                ranks.all(None)
            if ranks.rank:
                return message_of(lambda: ranks.all(None), CheckpointError, RuntimeError)
            time.sleep(3 * seconds)
        finally:
            control.be_patient(control.PATIENCE)
        return None


@pytest.mark.parametrize(
    "met, message", [(True, "test: lost contact with another rank"), (False, "the ranks could not be connected")]
)
def test_a_rank_that_does_not_come_is_an_error_after_the_time_that_is_set(met, message):
    started = time.monotonic()
    results = run_on_ranks(missing, 2, 1, met)
    assert results[1].startswith(message) and time.monotonic() - started < 30
    assert met or "GLOO_SOCKET_IFNAME" in results[1]


def raising(folder):
    with on_device_groups():
        prepared = Prepared(Run(2))
        fault = mock.patch.object(folders, "_checksum", side_effect=OSError(5, "Input/output error"))
        with fault if dist.get_rank() == 0 else mock.patch.object(folders, "_BLOCK", 1 << 20):
            return message_of(lambda: prepared.accelerator.save_state(folder), CheckpointError)


def test_an_error_on_one_rank_is_an_error_on_all_of_them(tmp_path):
    first, second = run_on_ranks(raising, 2, str(tmp_path / "state"))
    assert first == second and "Input/output error" in first and not Path(tmp_path / "state").exists()


# --- the option ------------------------------------------------------------------------------------------------------


def told(seconds):
    with mock.patch.dict(os.environ, {"ACCEL_TP_DDP_CONTROL_TIMEOUT": str(seconds)}):
        Prepared(Run(2))
    try:
        return control.patience()
    finally:
        control.be_patient(control.PATIENCE)


def test_the_plugin_sets_how_long_ranks_wait(monkeypatch):
    assert set(run_on_ranks(told, 2, 77)) == {timedelta(seconds=77)}
    assert TensorParallelDDPPlugin(tp_size=2).control_timeout == control.PATIENCE
    monkeypatch.setenv("ACCEL_TP_DDP_CONTROL_TIMEOUT", "soon")
    with pytest.raises(ValueError, match="ACCEL_TP_DDP_CONTROL_TIMEOUT.*'soon'.*at least 1"):
        TensorParallelDDPPlugin(tp_size=2)
