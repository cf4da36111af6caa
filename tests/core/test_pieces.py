"""A range of a parameter's elements, as boxes of the full tensor."""

from __future__ import annotations

from itertools import product
from math import prod

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from accel_tp_ddp.core.layout import Layout, packed_ranges
from accel_tp_ddp.core.pieces import FlatShard
from accel_tp_ddp.core.shard import ShardInfo

from ..helpers.ranks import run_on_ranks


@pytest.mark.parametrize("shape", [(7,), (1,), (3, 5), (1, 4), (2, 3, 4), (3, 1, 2), (2, 2, 2, 3), (0,), (0, 3)])
def test_any_range_is_a_few_boxes_that_hold_just_its_elements(shape):
    full = torch.arange(prod(shape)).view(shape)
    for start, stop in product(range(prod(shape) + 1), repeat=2):
        if start > stop:
            continue
        boxes = list(FlatShard(full.shape, start, stop, None).boxes(full.flatten()[start:stop]))
        assert len(boxes) <= max(1, 2 * len(shape) - 1)
        assert sorted(value for box in boxes for value in box.view.flatten().tolist()) == list(range(start, stop))
        for box in boxes:
            place = tuple(slice(first, first + size) for first, size in zip(box.offset, box.view.shape))
            assert torch.equal(full[place], box.view) and box.counts


@pytest.mark.parametrize("count, replicas", [(1, 4), (10, 3), (4096, 2), (100_003, 4), (128256 * 64, 6), (0, 2)])
def test_ranges_of_all_replicas_are_all_elements_once_and_in_shares_that_are_nearly_equal(count, replicas):
    param = torch.empty(count, device="meta")
    spans = [FlatShard.of_replica(param, replica, replicas, None) for replica in range(replicas)]
    assert [span.start for span in spans] == [0, *(span.stop for span in spans[:-1])] and spans[-1].stop == count
    assert max(span.stop - span.start for span in spans) <= max(1, -(-count // replicas), 1.016 * count / replicas)


def boxes_of_shards():
    """Of a tensor that is packed along its second dimension, where the last section is shared by both ranks."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    full = torch.arange(3 * 14).view(3, 14)
    layout = Layout(1, packed_ranges([8, 4, 2], 2, [1, 1, 2]))
    info = ShardInfo.sharded(mesh, full.shape, layout)
    local, seen = info.local_part(full), []
    for replica in range(3):
        span = FlatShard.of_replica(local, replica, 3, info)
        assert span.global_shape == full.shape
        own = span.cut_if_full(full)
        assert torch.equal(own, span.cut_if_full(local)) and torch.equal(own, local.flatten()[span.start : span.stop])
        assert span.cut_if_full(torch.tensor(3.0)) == 3.0 and span.cut_if_full(None) is None
        for box in span.boxes(own):
            place = tuple(slice(first, first + size) for first, size in zip(box.offset, box.view.shape))
            assert torch.equal(full[place], box.view)
            seen += box.view.flatten().tolist() if box.counts else []
    return seen


def test_boxes_of_all_ranks_and_replicas_count_each_element_once():
    assert sorted(value for seen in run_on_ranks(boxes_of_shards, 2) for value in seen) == list(range(3 * 14))
