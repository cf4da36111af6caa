"""A board shows what ranks have put up so far, and is empty again when all have seen it."""

import torch.distributed as dist

from accel_tp_ddp.core.store import Board

from ..helpers.ranks import run_on_ranks


def looks():
    board, rank = Board("test"), dist.get_rank()
    store = dist.distributed_c10d._get_default_store()
    before, seen = store.num_keys(), [board.read("1")]
    dist.barrier()
    for each in range(2):
        if rank == each:
            board.post("1", [each, 0.1, None])
        dist.barrier()
        seen.append(board.read("1"))
        dist.barrier()
    for each in range(2):
        if rank == each:
            seen.append((board.leave("1"), board.read("1")))
        dist.barrier()
    return seen, store.num_keys() - before


def test_what_is_there_is_seen_and_the_last_one_removes_it():
    first, both = {0: [0, 0.1, None]}, {0: [0, 0.1, None], 1: [1, 0.1, None]}
    assert run_on_ranks(looks, 2) == [
        ([{}, first, both, (False, both)], 0),
        ([{}, first, both, (True, {})], 0),
    ]
