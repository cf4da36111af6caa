"""Runs whose replicated parameters would drift apart over tensor-parallel ranks."""

from __future__ import annotations

import logging

import torch
import torch.distributed as dist
from accelerate import Accelerator

from accel_tp_ddp import TensorParallelDDPPlugin
from accel_tp_ddp.training.drift import DriftGuard, checksum, is_replicated

from .models import build_model
from .training import SyntheticTokens, make_optimizer


def prepare(architecture="qwen3", **options):
    accelerator = Accelerator(parallelism_config=TensorParallelDDPPlugin(tp_size=2, **options))
    model = build_model(architecture)
    optimizer = make_optimizer(model)
    return accelerator, *accelerator.prepare(model, optimizer)


def step(accelerator, model, optimizer, index=0):
    samples = SyntheticTokens(4, seed=10 + index + 100 * accelerator.data_parallel_rank)
    batch = {name: torch.stack([sample[name] for sample in samples]) for name in ("input_ids", "labels")}
    accelerator.backward(model(**batch).loss)
    optimizer.step()
    optimizer.zero_grad()


def replicated_checksums(model, optimizer):
    params = [param for param in model.parameters() if is_replicated(param)]
    states = [value for param in params for value in optimizer.state[param].values()]
    return [int(checksum(tensor)) for tensor in [*params, *states]]


def noisy_gradients(guarded: bool):
    """Every rank's gradients get other last bits, as from kernels that add in varying order."""
    if not guarded:
        DriftGuard.agree_on_gradients = lambda self, optimizer: None
    accelerator, model, optimizer = prepare(replica_check_steps=0)
    noise = torch.Generator().manual_seed(dist.get_rank())
    for param in model.parameters():
        param.register_hook(lambda grad: grad * (1 + 1e-6 * torch.randn(grad.shape, generator=noise)))
    for index in range(3):
        step(accelerator, model, optimizer, index)
    return replicated_checksums(model, optimizer)


def drift(option: str, what: str):
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("accel_tp_ddp.training.drift").addHandler(handler)
    accelerator, model, optimizer = prepare(replica_check_steps=2, replica_drift=option)
    step(accelerator, model, optimizer)
    norm = accelerator.unwrap_model(model).model.norm.weight
    if accelerator.tensor_parallel_rank == 1:
        tensor = norm.data if what == "parameter" else optimizer.state[norm]["exp_avg"]
        tensor[3] += 1e-6
    step(accelerator, model, optimizer, 1)
    return replicated_checksums(model, optimizer), messages
