"""Prepared data loaders give each replica the batches that a rank of plain DDP gets."""

import warnings
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import set_seed
from torch.utils.data import DataLoader

from accel_tp_ddp import full_state_dict

from ..helpers.compare import assert_tensors_close
from ..helpers.prepared import REPLICAS, assert_equal_per_replica, batches, dispatched, inputs, plain_and_sharded
from ..helpers.ranks import run_on_ranks
from ..helpers.sharded import MLP_PLAN, TOLERANCE, accelerator_for, build_mlp

IN_ORDER = ("in order", "batch_sampler in order", "iterable")
SHUFFLED = ("shuffled", "drop_last", "with generator", "batch_sampler", "weighted", "subset")


@REPLICAS
@pytest.mark.parametrize("split_batches", [False, True], ids=["", "split"])
@pytest.mark.parametrize("kind", [*IN_ORDER, *SHUFFLED])
def test_seeded_loaders_give_the_batches_of_plain_ddp(kind, split_batches, dp):
    assert_equal_per_replica(*plain_and_sharded(batches, dp, kind, 22, "alike", split_batches))


@REPLICAS
@pytest.mark.parametrize("options", [{}, {"with_model": True}], ids=str)
@pytest.mark.parametrize("kind", [*IN_ORDER, *SHUFFLED])
def test_unseeded_loaders_give_one_batch_to_a_replica_and_others_to_the_next(kind, options, dp):
    ranks = run_on_ranks(batches, 2 * dp, 2, kind, 16, "by rank", **options)
    assert ranks[0::2] == ranks[1::2], "peers of a replica saw different batches"
    for epoch in range(2):
        shares = [sorted(sum(rank[epoch], [])) for rank in ranks[::2]]
        assert sorted(sum(shares, [])) == list(range(16)), "every sample once"
    if kind in SHUFFLED:
        assert ranks[0][0] != ranks[0][1], "shuffled again in the second epoch"


@REPLICAS
@pytest.mark.parametrize("kind", ["shuffled", "weighted"])
def test_peers_see_the_same_batches_from_a_seedable_sampler_too(kind, dp):
    """Over replicas plain DDP itself needs the same seed everywhere; within a replica nobody should have to know."""
    ranks = run_on_ranks(batches, 2 * dp, 2, kind, 16, "by rank", seedable=True)
    assert ranks[0::2] == ranks[1::2], "peers of a replica saw different batches"


@pytest.mark.parametrize("split_batches", [False, True])
def test_dispatched_batches_are_those_of_plain_ddp(split_batches):
    plain = run_on_ranks(dispatched, 2, None, split_batches)
    assert plain[0] != plain[1] and [sample for _, batch in plain[0][0] for sample in batch] == list(range(22))
    assert run_on_ranks(dispatched, 4, 2, split_batches) == [plain[0], plain[0], plain[1], plain[1]]


class InPairs:
    """A batch sampler of a user's own: each index together with its mirror image."""

    batch_size, drop_last = 4, False

    def __init__(self, samples):
        self.samples = samples

    def __iter__(self):
        order = [index for pair in zip(range(self.samples), reversed(range(self.samples))) for index in pair]
        order = order[: self.samples]
        return iter([order[start : start + 4] for start in range(0, self.samples, 4)])

    def __len__(self):
        return -(-self.samples // 4)


def uneven_batches(tp, options):
    accelerator = accelerator_for(tp, MLP_PLAN, dataloader_config=DataLoaderConfiguration(**options))
    accelerator.prepare(build_mlp())
    seen = {}
    for samples in (18, 22, 3):
        set_seed(11)
        for kind, loader in {
            "own": DataLoader(range(samples), batch_sampler=InPairs(samples)),
            "shuffled": DataLoader(range(samples), batch_size=4, shuffle=True),
            "drop_last": DataLoader(range(max(samples, 8)), batch_size=4, drop_last=True),
        }.items():
            loader = accelerator.prepare(loader)
            epochs = [[batch.tolist() for batch in loader] for _ in range(2)]
            rest = [batch.tolist() for batch in accelerator.skip_first_batches(loader, 1)]
            seen[kind, samples] = epochs, len(loader), rest
    return seen


@REPLICAS
@pytest.mark.parametrize("split_batches", [False, True], ids=["", "split"])
@pytest.mark.parametrize("even_batches", [False, True], ids=["uneven", "even"])
def test_uneven_and_own_batches_are_those_of_plain_ddp(even_batches, split_batches, dp):
    options = {"even_batches": even_batches, "split_batches": split_batches}
    plain, sharded = plain_and_sharded(uneven_batches, dp, options)
    assert_equal_per_replica(plain, sharded)
    if dp == 2 and not split_batches:
        first, second = (rank["own", 18][0][0] for rank in plain)
        assert (len(first) == len(second)) == even_batches


def stateful(tp):
    """All batches; and what a loader made anew gives that has the state after two of them."""
    options = {"dataloader_config": DataLoaderConfiguration(use_stateful_dataloader=True)}
    accelerator = accelerator_for(tp, **options)
    first = accelerator.prepare(DataLoader(range(20), batch_size=2))
    seen, state = [], None
    for index, batch in enumerate(first):
        seen.append(batch.tolist())
        if index == 1:
            state = first.state_dict()
    second = accelerator.prepare(DataLoader(range(20), batch_size=2))
    second.load_state_dict(state)
    return seen, [batch.tolist() for batch in second]


@REPLICAS
def test_a_stateful_loader_resumes_where_it_was(dp):
    pytest.importorskip("torchdata.stateful_dataloader")
    plain, sharded = plain_and_sharded(stateful, dp)
    assert_equal_per_replica(plain, sharded)
    for seen, resumed in plain:
        assert resumed == seen[2:] and len(resumed) > 2


def joined(tp, even_batches, as_on_gpus):
    """One replica has a batch more than the other; with DDP's join that takes no one to wait for."""
    accelerator = accelerator_for(tp, MLP_PLAN)
    samples = 14 if even_batches is None else 18
    model = build_mlp()
    loader = DataLoader(list(inputs(0, samples=samples)), batch_size=4)
    model, optimizer, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), loader)
    on_gpus = mock.patch.object(Accelerator, "multi_device", True) if as_on_gpus else nullcontext()
    losses = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with on_gpus, accelerator.join_uneven_inputs([model], even_batches=even_batches):
            for batch in loader:
                loss = model(batch).square().mean()
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 0.1)
                optimizer.step()
                optimizer.zero_grad()
                losses.append(float(loss))
    told = any("join_uneven_inputs` will have no effect" in str(warning.message) for warning in caught)
    return losses, full_state_dict(model), told


@REPLICAS
@pytest.mark.parametrize("even_batches", [None, False])
def test_joining_uneven_inputs_trains_as_under_plain_ddp(even_batches, dp):
    """On GPUs. Accelerate asks for the kind of device only, and DDP's join works on the CPU as well."""
    plain = run_on_ranks(joined, dp, None, even_batches, dp > 1)
    sharded = run_on_ranks(joined, 2 * dp, 2, even_batches, True)
    if dp == 2:
        assert [len(losses) for losses, *_ in plain] == ([2, 2] if even_batches is None else [3, 2])
    for rank, (losses, weights, told) in enumerate(sharded):
        assert losses == pytest.approx(plain[rank // 2][0], rel=TOLERANCE) and not told
        if even_batches is None or dp == 1:
            assert_tensors_close(weights, plain[rank // 2][1], 1e-4)


def test_joining_has_no_effect_on_the_cpu_and_says_so_as_accelerate_does():
    plain, sharded = run_on_ranks(joined, 2, None, None, False), run_on_ranks(joined, 4, 2, None, False)
    assert all(told for *_, told in [*plain, *sharded])
    for rank, (losses, *_) in enumerate(sharded):
        assert losses == pytest.approx(plain[rank // 2][0], rel=TOLERANCE)
