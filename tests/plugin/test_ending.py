"""Groups that are destroyed right after a collective, while a DDP module still holds them: nothing hangs.

torch frees the group under the interpreter lock where the module's reducer is the last to hold it. Whether gloo's
threads have let go of the last tensors by then is a matter of microseconds, so it is done many times.
"""

import multiprocessing
import sys
import time

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from accel_tp_ddp.plugin import ddp

from ..helpers.ranks import run_on_ranks
from ..helpers.sharded import MLP_PLAN, accelerator_for, build_mlp

TRIALS = 100
PATIENCE = {True: 60, False: 10}  # seconds; all trials take about 5, and the first that hangs comes early


def end_often(rank: int, port: int, outlive: bool) -> None:
    torch.set_num_threads(1)
    sys.setswitchinterval(100)  # no thread gets the lock by force, so that few trials are enough
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    for trial in range(TRIALS):
        dist.init_process_group("gloo", store=dist.PrefixStore(str(trial), store), rank=rank, world_size=2)
        model = DistributedDataParallel(build_mlp())
        if outlive:
            ddp.outlive(model.process_group)
        dist.all_gather([torch.empty(4), torch.empty(4)], torch.ones(4))
        dist.destroy_process_group()
        del model


def exit_codes(outlive: bool) -> list[int | None]:
    """None of a process that hangs."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("forkserver")
    processes = [context.Process(target=end_often, args=(rank, store.port, outlive), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + PATIENCE[outlive]
    for process in processes:
        process.join(max(0, deadline - time.monotonic()))
    found = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return found


def test_a_group_that_outlives_its_module_can_be_destroyed_at_any_time():
    assert exit_codes(outlive=True) == [0, 0]


def test_another_one_cannot():
    assert any(None in exit_codes(outlive=False) for _ in range(5))  # a busy machine may need several


def outlives(tp):
    ddp._outliving.clear()
    model = accelerator_for(tp, MLP_PLAN).prepare(build_mlp())
    return model.process_group in ddp._outliving


def test_the_groups_of_prepared_modules_outlive_them():
    assert run_on_ranks(outlives, 4, 2) == [True] * 4
    assert run_on_ranks(outlives, 2, 1) == [True] * 2
    assert run_on_ranks(outlives, 2, None) == [False] * 2
