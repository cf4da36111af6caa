"""The rest of Accelerate's calls: each gives what plain DDP on dp ranks gives, or keeps the world-wide convention."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from accelerate.local_sgd import LocalSGD
from accelerate.utils import set_seed

from accel_tp_ddp import TensorParallelDDPPlugin, grad_scaler

from .compare import assert_tensors_close
from .models import VOCABULARY, build_model
from .ranks import run_on_ranks
from .training import make_accelerator


def split(tp: int | None, padding: bool):
    accelerator = make_accelerator(tp)
    parts = []
    for inputs in (list(range(7)), torch.arange(7), {"a": list(range(5)), "b": list("vwxyz")}):
        with accelerator.split_between_processes(
            inputs, apply_padding=padding and not isinstance(inputs, dict)
        ) as part:
            parts.append(part.tolist() if isinstance(part, torch.Tensor) else part)
    return parts


@pytest.mark.parametrize("padding", [False, True])
def test_inputs_are_split_between_replicas(padding):
    plain = run_on_ranks(split, 2, None, padding)
    assert plain[0] != plain[1]
    assert run_on_ranks(split, 4, 2, padding) == [plain[0], plain[0], plain[1], plain[1]]


def numbers(tp: int | None):
    accelerator = make_accelerator(tp)
    replica = accelerator.process_index // (tp or 1)
    value = torch.tensor(float(replica + 1))
    objects = [replica, accelerator.process_index == 0]
    if accelerator.process_index == accelerator.num_processes - 1:
        accelerator.set_trigger()
    lengths = accelerator.pad_across_processes(torch.ones(replica + 1, 2), dim=0).shape
    from accelerate.utils import broadcast_object_list

    return {
        "mean": accelerator.gather(value).mean().item(),
        "mean of reduce": accelerator.reduce(value, "mean").item(),
        "sum over processes": accelerator.reduce(value, "sum").item() / accelerator.num_processes,
        "padded": tuple(lengths),
        "broadcast": broadcast_object_list(list(objects)),
        "trigger": accelerator.check_trigger(),
    }


def test_means_triggers_padding_and_broadcasts_are_those_of_plain_ddp():
    plain = run_on_ranks(numbers, 2, None)
    for rank, result in enumerate(run_on_ranks(numbers, 4, 2)):
        assert result == plain[rank // 2]


def local_sgd(tp: int | None):
    accelerator = make_accelerator(tp)
    set_seed(0)
    model = build_model("llama")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    replica = accelerator.process_index // (tp or 1)
    with LocalSGD(accelerator=accelerator, model=model, local_sgd_steps=2) as local:
        for index in range(4):
            generator = torch.Generator().manual_seed(10 * index + replica)
            ids = torch.randint(0, VOCABULARY, (2, 8), generator=generator)
            with accelerator.no_sync(model):
                model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            local.step()
    return accelerator.get_state_dict(model)


def test_local_sgd_averages_over_replicas_only():
    plain, sharded = run_on_ranks(local_sgd, 2, None), run_on_ranks(local_sgd, 4, 2)
    assert_tensors_close(sharded[0], plain[0], 1e-5)


def overflow(rank_with_inf: int):
    accelerator = make_accelerator(2)
    model = build_model("llama")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    scaler = grad_scaler(accelerator.torch_device_mesh, device="cpu", init_scale=2.0**10, growth_interval=1)
    scales, moved = [], []
    for index in range(3):
        before = [param.detach().clone() for param in model.parameters()]
        ids = torch.randint(0, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(index))
        scaler.scale(model(input_ids=ids, labels=ids).loss).backward()
        if index == 1 and accelerator.tensor_parallel_rank == rank_with_inf:
            next(param for param in model.parameters() if param.tp_shard is not None).grad.view(-1)[0] = float("inf")
        scaler.step(optimizer.optimizer)
        scaler.update()
        optimizer.optimizer.zero_grad()
        scales.append(scaler.get_scale())
        moved.append(any(not torch.equal(a, b) for a, b in zip(before, model.parameters())))
    return scales, moved


@pytest.mark.parametrize("rank", [0, 1])
def test_an_overflow_on_one_rank_skips_the_step_on_all_of_them(rank):
    results = run_on_ranks(overflow, 2, rank)
    assert results[0] == results[1]
    scales, moved = results[0]
    assert moved == [True, False, True]
    assert scales == [2.0**11, 2.0**10, 2.0**11]


def refuse(name: str):
    accelerator = Accelerator(parallelism_config=TensorParallelDDPPlugin(tp_size=2))
    model = build_model("llama")
    if name == "Adafactor":
        optimizer = torch.optim.Adafactor(model.parameters())
    elif name == "transformers":
        from transformers.optimization import Adafactor

        optimizer = Adafactor(model.parameters())
    else:
        optimizer = torch.optim.Muon([param for param in model.parameters() if param.ndim == 2])
    accelerator.prepare(model, optimizer)


@pytest.mark.parametrize("name", ["Adafactor", "transformers", "Muon"])
def test_optimizers_that_look_at_whole_matrices_are_refused_by_name(name):
    for error in run_on_ranks(refuse, 2, name, expect_raise=True):
        assert error.type_name == "ValueError"
        assert name.replace("transformers", "Adafactor") in error.message and "AdamW" in error.message
