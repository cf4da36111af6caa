"""Saving in the background: training continues, the moment of the call is saved, and nothing fails unheard."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from accelerate.utils import ProjectConfiguration

from accel_tp_ddp import TensorParallelDDPPlugin, load_state, wait_for_save
from accel_tp_ddp.checkpoint import background, dcp
from accel_tp_ddp.checkpoint import folder as folders
from accel_tp_ddp.checkpoint.folder import MANIFEST
from accel_tp_ddp.checkpoint.places import TENSORS
from accel_tp_ddp.core import store

from ..helpers.compare import assert_tensors_close
from ..helpers.ranks import run_on_ranks
from ..helpers.resuming import SAVED_AFTER, Prepared, Run, Saved, go_on_from, message_of

PATIENCE = 30.0  # seconds after which a held writer continues, so that a failing test ends


@contextmanager
def held_writing(place=""):
    """Let no tensor of that folder reach the disk before the block ends."""
    may_write, stock = threading.Event(), dcp._Writer.write_data

    def write_data(self, plan, planner):
        if place in str(self.path):
            may_write.wait(PATIENCE)
        return stock(self, plan, planner)

    with mock.patch.object(dcp._Writer, "write_data", write_data):
        try:
            yield
        finally:
            may_write.set()


def rank():
    return int(os.environ.get("RANK", "0"))


# --- training continues ----------------------------------------------------------------------------------------------


def save_behind_and_go_on(run, folder, stage=True):
    """As `resuming.save_and_go_on`, but what is saved is written after all later steps."""
    record, prepared = Saved(), Prepared(run)
    prepared.train(prepared.loader, SAVED_AFTER, record)
    stock = dcp.HostBuffers.filled if stage else lambda self, tensors, pin: dict(tensors)
    with held_writing(), mock.patch.object(dcp.HostBuffers, "filled", stock):
        prepared.accelerator.save_state(folder, async_save=True)
        prepared.look(record)
        prepared.train(prepared.accelerator.skip_first_batches(prepared.loader, SAVED_AFTER), 3, record)
        prepared.accelerator.wait_for_everyone()
        assert not Path(folder).exists(), "it was there before it was written"
    wait_for_save()
    assert (Path(folder) / MANIFEST).exists()
    return record


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("states") / "state"
    return folder, run_on_ranks(save_behind_and_go_on, 4, Run(2), str(folder))


@pytest.mark.parametrize("tp, dp", [(2, 2), (1, 1)])
def test_training_continues_during_a_save_and_the_moment_of_the_call_is_saved(saved, tp, dp):
    folder, (first, *_) = saved
    for (record,) in run_on_ranks(go_on_from, tp * dp, Run(tp), [str(folder)]):
        assert record.same_objects and record.step == first.step
        assert_tensors_close(record.weights, first.weights, 1e-6)
        assert_tensors_close(record.state, first.state, 1e-6)
        assert record.learning_rates == pytest.approx(first.learning_rates[SAVED_AFTER:])
        torch.testing.assert_close(record.losses, first.losses[SAVED_AFTER:], rtol=2e-4, atol=0)


def test_without_staging_a_later_moment_would_be_saved(tmp_path):
    first, *_ = run_on_ranks(save_behind_and_go_on, 2, Run(2), str(tmp_path / "state"), stage=False)
    ((record,),) = run_on_ranks(go_on_from, 1, Run(1), [str(tmp_path / "state")])
    with pytest.raises(AssertionError, match="tensors off by more than"):
        assert_tensors_close(record.weights, first.weights, 1e-6)


# --- what is copied --------------------------------------------------------------------------------------------------


def copying(folder):
    """Of two saves, one after the other: the bytes that this rank copied, and those that it wrote; and where to."""
    prepared, copied, written, places = Prepared(Run(2)), [], [], []
    prepared.train(prepared.loader, 1, Saved())
    stock, write = dcp.HostBuffers.filled, dcp._Writer.write_data

    def filled(self, tensors, pin):
        copies = stock(self, tensors, pin)
        assert not pin and all(copy.device.type == "cpu" and copy.is_contiguous() for copy in copies.values())
        copied.append(sum(copy.untyped_storage().nbytes() for copy in copies.values()))
        places.append({copy.data_ptr() for copy in copies.values()})
        return copies

    def write_data(self, plan, planner):
        assert not planner.state_dict, "the thread could reach the live tensors"
        assert self.per_thread_copy_ahead == 0, "torch would copy by a stream of the thread's device"
        items = [item.tensor_data for item in plan.items if item.tensor_data is not None]
        written.append(sum(item.chunk.sizes.numel() * item.properties.dtype.itemsize for item in items))
        return write(self, plan, planner)

    patches = (
        mock.patch.multiple(dcp.HostBuffers, filled=filled),
        mock.patch.multiple(dcp._Writer, write_data=write_data),
    )
    with patches[0], patches[1]:
        for number in range(2):
            prepared.accelerator.save_state(f"{folder}/{number}", async_save=True)
            wait_for_save()
    own = [p for p in prepared.model.parameters()] + [
        value for state in prepared.optimizer.state.values() for value in state.values() if value.dim() > 0
    ]
    held = sum(tensor.nbytes for tensor in own)
    prepared.accelerator.end_training()
    return copied, written, places[0] == places[1], held, len(background.buffers._kept)


def test_each_byte_is_copied_once_by_the_rank_that_writes_it_into_the_same_room_each_time(tmp_path):
    results = run_on_ranks(copying, 4, str(tmp_path))
    shapes = dcp.read_metadata(tmp_path / "1" / TENSORS)
    dtypes = dcp.read_dtypes(tmp_path / "1" / TENSORS)
    saved = sum(shapes[name].numel() * dtype.itemsize for name, dtype in dtypes.items())
    for number in range(2):
        assert sum(copied[number] for copied, *_ in results) == saved
    for copied, written, same_room, held, kept in results:
        assert copied == written and same_room and kept == 0
        assert copied[0] < 0.75 * held, "a replica's other one writes about half of it"


def unable(folder):
    """One rank has no memory for its copies; every rank is told at the call."""
    prepared = Prepared(Run(2))
    full = mock.patch.object(dcp.HostBuffers, "filled", side_effect=MemoryError("no host memory"))
    with full if rank() == 1 else mock.patch.object(folders, "_BLOCK", 1 << 20):
        message = message_of(lambda: prepared.accelerator.save_state(f"{folder}/state", async_save=True))
    wait_for_save()
    prepared.accelerator.wait_for_everyone()
    left = os.listdir(folder)
    prepared.accelerator.wait_for_everyone()
    prepared.accelerator.save_state(f"{folder}/state", async_save=True)
    wait_for_save()
    return message, left


def test_a_rank_that_cannot_copy_is_an_error_of_the_call_on_all_ranks(tmp_path):
    first, second = run_on_ranks(unable, 2, str(tmp_path))
    assert first == second and first[1] == [] and (tmp_path / "state" / MANIFEST).exists()
    assert first[0].startswith("save_state: rank 1: MemoryError: no host memory")


def disagreeing(folder):
    prepared = Prepared(Run(2))
    fault = mock.patch.object(dcp._StagingPlanner, "create_local_plan", side_effect=RuntimeError("no plan"))
    with fault if rank() == 1 else mock.patch.object(folders, "_BLOCK", 1 << 20):
        message = message_of(lambda: prepared.accelerator.save_state(f"{folder}/state", async_save=True))
    prepared.accelerator.wait_for_everyone()
    return message, os.listdir(folder)


def test_ranks_that_cannot_plan_a_save_all_raise_at_the_call(tmp_path):
    first, second = run_on_ranks(disagreeing, 2, str(tmp_path))
    assert first == second and first[1] == [] and "rank 1: RuntimeError: no plan" in first[0]


# --- one after the other ---------------------------------------------------------------------------------------------


def automatic(folder):
    """By the plugin's option; each save waits for the one before, and so does loading."""
    config = ProjectConfiguration(project_dir=folder, automatic_checkpoint_naming=True, total_limit=2)
    run, checkpoints = Run(2), Path(folder) / "checkpoints"
    with mock.patch.dict(os.environ, {"ACCEL_TP_DDP_ASYNC_SAVE": "true"}):
        prepared = Prepared(run, project_config=config)
    save, seen = prepared.accelerator.save_state, []
    for number in range(4):
        torch._foreach_zero_([param.data for param in prepared.model.parameters()])
        torch._foreach_add_([param.data for param in prepared.model.parameters()], number)
        with held_writing(f"checkpoint_{number}"):
            place = save()
            assert place == checkpoints / f"checkpoint_{number}"
            prepared.accelerator.wait_for_everyone()
            seen.append(sorted(path.name for path in checkpoints.glob("checkpoint_*")))
            prepared.accelerator.wait_for_everyone()
    torch._foreach_zero_([param.data for param in prepared.model.parameters()])
    prepared.accelerator.load_state()
    values = {param.data.mean().item() for param in prepared.model.parameters()}
    names = sorted(path.name for path in checkpoints.iterdir())
    prepared.accelerator.wait_for_everyone()
    place = save(async_save=False)
    assert background._pending is None and (place / MANIFEST).exists()
    return seen, values, names


def test_a_second_save_waits_for_the_first_and_total_limit_holds(tmp_path):
    for seen, values, names in run_on_ranks(automatic, 2, str(tmp_path)):
        two = ["checkpoint_0", "checkpoint_1"]
        assert seen == [[], two[:1], two, ["checkpoint_1", "checkpoint_2"]]
        assert values == {3.0} and names == ["checkpoint_2", "checkpoint_3"]


# --- what fails ------------------------------------------------------------------------------------------------------


def failing(folder):
    prepared = Prepared(Run(2))
    accelerator, place = prepared.accelerator, Path(folder) / "state"
    accelerator.save_state(place)
    manifest = (place / MANIFEST).read_text()
    full = mock.patch.object(dcp._Writer, "write_data", side_effect=OSError(28, "No space left on device"))
    no_checksum = mock.patch.object(folders, "_checksum", side_effect=OSError(5, "Input/output error"))
    messages = []
    for where, fault in ((1, full), (0, no_checksum)):
        for ask in (lambda: accelerator.save_state(place), lambda: accelerator.load_state(place), wait_for_save):
            prepared.train(prepared.loader, 1, Saved())
            accelerator.wait_for_everyone()  # as the fault is there for whatever this process does
            with fault if rank() == where else mock.patch.object(folders, "_BLOCK", 1 << 20):
                accelerator.save_state(place, async_save=True)
                prepared.train(prepared.loader, 1, Saved())
                background._pending._thread.join()
            messages.append(message_of(ask))
            assert (place / MANIFEST).read_text() == manifest and os.listdir(folder) == ["state"]
    accelerator.load_state(place)
    accelerator.save_state(place, async_save=True)
    wait_for_save()
    assert (place / MANIFEST).read_text() != manifest
    return messages


def test_what_fails_in_the_background_is_raised_on_all_ranks_when_the_run_next_asks(tmp_path):
    started = time.monotonic()
    first, second = run_on_ranks(failing, 2, str(tmp_path))
    assert first == second and len(first) == 6 and time.monotonic() - started < 60
    for caller, message in zip(("save_state", "load_state", "wait_for_save") * 2, first):
        assert message.startswith(f"{caller}: the save in the background to {tmp_path / 'state'} has failed")
    for message in first[:3]:
        assert "rank 1: " in message and "No space left on device" in message
    for message in first[3:]:
        assert "rank 0: " in message and "Input/output error" in message


def killed(folder, at):
    prepared = Prepared(Run(2))
    prepared.accelerator.save_state(folder)
    prepared.accelerator.wait_for_everyone()
    if rank() == 1:
        owner, name = KILLS[at]
        setattr(owner, name, lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL))
    prepared.accelerator.save_state(folder, async_save=True)
    prepared.accelerator.end_training()


KILLS = {"tensors": (dcp._Writer, "write_data"), "checksums": (folders, "_checksum")}


@pytest.mark.parametrize("at", KILLS)
def test_a_rank_killed_during_a_save_leaves_the_old_state_and_the_others_raise(tmp_path, at):
    place, started = tmp_path / "state", time.monotonic()
    survivor, dead = run_on_ranks(killed, 2, str(place), at, expect_raise=True)
    assert time.monotonic() - started < 60
    assert "exit code -9" in dead.message and survivor.type_name != "EOFError"
    ((record,),) = run_on_ranks(go_on_from, 1, Run(1), [str(place)])
    assert len(record.losses) == 3


def main_process_alone(folder):
    prepared, told = Prepared(Run(2)), None
    with held_writing():
        prepared.accelerator.save_state(folder, async_save=True)
        with mock.patch.object(store, "PEERS_TIMEOUT", 1.0):
            told = message_of(wait_for_save) if rank() == 0 else None
    prepared.accelerator.wait_for_everyone()
    wait_for_save()
    return told


def test_wait_for_save_on_the_main_process_alone_is_an_error(tmp_path):
    results = run_on_ranks(main_process_alone, 2, str(tmp_path / "state"))
    assert "`wait_for_save` was called on the main process" in results[0] and results[1] is None


# --- the end of a run ------------------------------------------------------------------------------------------------


def ends_at_once(number, port, folder, how):
    """A script that saves at its end, and how it ends."""
    os.environ.update(ACCELERATE_USE_CPU="true", RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True")
    torch.set_num_threads(1)
    prepared, stock = Prepared(Run(2)), dcp._Writer.write_data

    def slowly(self, plan, planner):
        time.sleep(1.0)
        return stock(self, plan, planner)

    dcp._Writer.write_data = slowly
    prepared.accelerator.save_state(folder, async_save=True)
    assert not Path(folder).exists()
    if how == "by end_training":
        prepared.accelerator.end_training()
        assert Path(folder).exists()


@pytest.mark.parametrize("how", ["by end_training", "without a word"])
def test_a_run_that_ends_waits_for_a_save_in_the_background(tmp_path, how):
    folder = tmp_path / "state"
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("forkserver")
    processes = [context.Process(target=ends_at_once, args=(n, store.port, str(folder), how)) for n in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        if process.exitcode is None:
            process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
    ((record,),) = run_on_ranks(go_on_from, 1, Run(1), [str(folder)])
    assert len(record.losses) == 3


# --- without tensor parallelism --------------------------------------------------------------------------------------


def plain(folder):
    prepared, record = Prepared(Run(1)), Saved()
    accelerator = prepared.accelerator
    prepared.train(prepared.loader, 1, record)
    with held_writing():
        accelerator.save_state(folder, async_save=True)
        prepared.look(record)
        prepared.train(prepared.loader, 1, Saved())
    accelerator.load_state(folder)  # waits
    after = Saved()
    prepared.look(after)
    assert_tensors_close(after.weights, record.weights, 1e-7)
    accelerator.save_state(f"{folder} of Accelerate")
    accelerator.wait_for_everyone()
    assert (Path(f"{folder} of Accelerate") / "model.safetensors").exists()
    accelerator.save_state(folder, async_save=True)
    wait_for_save()
    load_state(accelerator, folder)


@pytest.mark.parametrize("dp", [1, 2])
def test_saving_in_the_background_works_at_tp_size_1_too(tmp_path, dp):
    run_on_ranks(plain, dp, str(tmp_path / "state"))


def test_async_save_is_off_unless_an_argument_or_the_environment_sets_it(monkeypatch):
    assert TensorParallelDDPPlugin(tp_size=2).async_save is False
    monkeypatch.setenv("ACCEL_TP_DDP_ASYNC_SAVE", "true")
    assert TensorParallelDDPPlugin(tp_size=2).async_save is True
    assert TensorParallelDDPPlugin(tp_size=2, async_save=False).async_save is False
    with pytest.raises(ValueError, match="async_save is 'soon'.*ACCEL_TP_DDP_ASYNC_SAVE"):
        TensorParallelDDPPlugin(tp_size=2, async_save="soon")
