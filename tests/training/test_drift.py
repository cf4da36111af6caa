"""What is replicated over tensor-parallel ranks stays equal bit by bit, and is watched."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from accel_tp_ddp import TensorParallelDDPPlugin
from accel_tp_ddp.core.randomness import DeviceGenerator, default_generators
from accel_tp_ddp.training import buckets
from accel_tp_ddp.training.drift import DriftGuard, checksum

from ..helpers.drifting import drift, noisy_gradients
from ..helpers.ranks import run_on_ranks
from ..helpers.sharded import build_mlp, tp_mesh


def test_replicated_parameters_stay_bit_equal_where_gradients_differ_in_their_last_bits():
    first, second, *others = run_on_ranks(noisy_gradients, 4, True)
    assert len(first) > 10
    assert first == second
    assert others[0] == others[1]


def test_without_the_guard_those_gradients_drift_apart():
    first, second, *_ = run_on_ranks(noisy_gradients, 4, False, timeout=120)
    assert first != second
    run_on_ranks(restore_guard, 4)


def restore_guard():
    import importlib

    import accel_tp_ddp.training.drift

    importlib.reload(accel_tp_ddp.training.drift)


@pytest.mark.parametrize("what", ["parameter", "optimizer state"])
def test_drift_is_healed_and_reported_by_name(what):
    results = run_on_ranks(drift, 4, "heal", what)
    (first, messages), (second, _), *_ = results
    assert first == second
    assert len(messages) == 1 and "model.norm.weight" in messages[0], messages


def test_drift_raises_on_every_rank_if_asked():
    raised = run_on_ranks(drift, 4, "raise", "parameter", expect_raise=True)
    assert all("model.norm.weight" in error.message for error in raised)


def test_a_drift_option_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match='"heal" or "raise"'):
        TensorParallelDDPPlugin(replica_drift="ignore")


@pytest.mark.parametrize("size", [1, 4, 1023, (1 << 18) + 5, (1 << 20) + 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_a_checksum_shows_one_changed_element_anywhere(size, dtype):
    tensor = torch.zeros(size, dtype=dtype)
    before = int(checksum(tensor))
    assert 0 <= before < 1 << 62
    for index in {0, size // 2, size - 1}:
        changed = tensor.clone()
        changed[index] = 1
        assert int(checksum(changed)) != before
        changed[index] = 0
        assert int(checksum(changed)) == before


def test_a_checksum_shows_swapped_elements():
    assert int(checksum(torch.tensor([1.0, 2.0]))) != int(checksum(torch.tensor([2.0, 1.0])))


BYTES = torch.randint(0, 256, (64,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("offset", range(5))
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.float8_e4m3fn, torch.bfloat16, torch.complex64])
def test_a_checksum_is_that_of_the_elements_wherever_they_are_stored(dtype, offset):
    elements = BYTES.bool() if dtype == torch.bool else BYTES.view(dtype)
    view = elements[offset : offset + 4]
    assert int(checksum(view)) == int(checksum(view.clone()))
    strided = elements[: elements.numel() // 4 * 4].view(-1, 4)[:, 1:3].t()
    assert not strided.is_contiguous()
    assert int(checksum(strided)) == int(checksum(strided.contiguous()))


def test_a_checksum_is_that_of_the_values_of_lazy_views():
    values = BYTES.view(torch.int32).float().view(torch.complex64)
    assert int(checksum(values.conj())) == int(checksum(values.conj().resolve_conj())) != int(checksum(values))
    assert int(checksum(values.conj().imag)) == int(checksum(values.conj().imag.resolve_neg()))


@pytest.mark.parametrize("device", ["cpu", "device"])
def test_a_generator_that_has_drifted_is_healed(device):
    results = run_on_ranks(drifted_generator, 2, device)
    assert [names for names, *_ in results] == [[f"torch's random state ({device})"]] * 2
    (_, drawn, *_), (_, others, *_) = results
    assert drawn == others
    assert all(again == [] for *_, again in results)


def drifted_generator(device):
    """What stands for an accelerator's is a second generator, by the functions that its module would have."""
    own = torch.Generator()
    module = SimpleNamespace(get_rng_state=own.get_state, set_rng_state=own.set_state)
    guard = DriftGuard(tp_mesh(2), 0, "heal")
    guard.generators["device"] = DeviceGenerator(module)
    if dist.get_rank() == 1:
        torch.rand(3, generator=own if device == "device" else None)
    names = guard.compare()
    return names, torch.rand(4, generator=own).tolist() + torch.rand(4).tolist(), guard.compare()


def test_the_generators_are_those_of_the_processor_and_of_the_accelerator():
    assert list(default_generators("cpu")) == ["cpu"]
    found = default_generators("cuda")
    assert list(found) == ["cpu", "cuda"] and found["cuda"].module is torch.cuda


def sparse_buffer():
    model = build_mlp()
    model.register_buffer("links", torch.eye(3).to_sparse())
    guard = DriftGuard(tp_mesh(2), 0, "raise")
    guard.add(model)
    return guard.compare()


def test_what_has_no_bits_in_an_order_is_left_out():
    assert run_on_ranks(sparse_buffer, 2) == [[], []]


def agreement_in_buckets(sizes, dtypes, bucket):
    """What is sent for replicated gradients of these sizes: how many bytes, and whether they are the gradient's own."""
    params = [torch.nn.Parameter(torch.zeros(size, dtype=dtype)) for size, dtype in zip(sizes, dtypes)]
    for param in params:
        param.grad = torch.full_like(param, dist.get_rank() + 1)
    params[-1].grad = torch.stack([params[-1].grad] * 2, -1)[..., 0]  # not contiguous
    own = [param.grad.data_ptr() for param in params]
    guard, sent = DriftGuard(tp_mesh(2), 0, "heal"), []
    stock = dist.broadcast

    def broadcast(tensor, *args, **kwargs):
        sent.append((tensor.nbytes, tensor.data_ptr() in own))
        return stock(tensor, *args, **kwargs)

    with mock.patch.object(buckets, "BUCKET_BYTES", bucket), mock.patch.object(dist, "broadcast", broadcast):
        guard.agree_on_gradients(torch.optim.SGD(params))
    assert all((param.grad == 1).all() for param in params)
    assert own == [param.grad.data_ptr() for param in params]
    return sent


@pytest.mark.parametrize(
    "bucket, wanted",
    [
        (1 << 20, [(4 * 190, False), (2 * 20, True)]),
        (200, [(4 * 100, True), (4 * 50, False), (2 * 20, True), (4 * 40, False)]),
        (1, [(40, True), (80, True), (80, True), (400, True), (2 * 20, True), (160, False)]),
    ],
    ids=["one a type", "several", "each by itself"],
)
def test_replicated_gradients_are_sent_in_buckets_and_large_ones_as_they_are(bucket, wanted):
    sizes, dtypes = [10, 20, 20, 100, 20, 40], [*[torch.float32] * 4, torch.bfloat16, torch.float32]
    for sent in run_on_ranks(agreement_in_buckets, 2, sizes, dtypes, bucket):
        assert sorted(sent) == sorted(wanted)
