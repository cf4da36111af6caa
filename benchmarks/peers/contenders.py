"""Who takes part: a name, and a function that makes one training step from what all share.

A feature of this package is a row of `VARIANTS`: the plugin's arguments with which it is on, or off.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

from accel_tp_ddp import TensorParallelDDPPlugin

from .sizes import Setting, Step, training_step

__all__ = ["CONTENDERS", "IDLE", "LOCAL", "OURS", "PLAIN", "PREPARED", "VARIANTS"]

OURS, PLAIN, LOCAL = "accel_tp_ddp", "plain DDP, all ranks", "local computation alone"
#: What `tp_size=1` costs is what the second takes beyond the first.
PREPARED, IDLE = "plain DDP, all ranks, by Accelerate", f"{OURS}, tp_size=1"

#: Arguments of the plugin. A release without the feature says so in its line of the table.
VARIANTS: dict[str, dict[str, Any]] = {
    OURS: {},
    f"{OURS}, replica_check_steps=0": {"replica_check_steps": 0},
    f"{OURS}, loss_parallel": {"loss_parallel": True},
    f"{OURS}, sequence_parallel": {"sequence_parallel": True},
    f"{OURS}, overlap": {"overlap": True},
    f"{OURS}, sequence_parallel, overlap": {"sequence_parallel": True, "overlap": True},
    f"{OURS}, zero1": {"zero1": True},
    f"{OURS}, loss_parallel, zero1": {"loss_parallel": True, "zero1": True},
}


def ours(setting: Setting, **options: Any) -> Step:
    return accelerated(setting, TensorParallelDDPPlugin(tp_size=setting.tp, **options), setting.replica_ids)


def accelerated(setting: Setting, plugin: TensorParallelDDPPlugin | None, ids: Tensor, **options: Any) -> Step:
    AcceleratorState._reset_state()  # for an accelerator more; the next fills what all in this process share
    accelerator = Accelerator(cpu=True, parallelism_config=plugin, **options)
    model = setting.model()
    model, optimizer = accelerator.prepare(model, setting.optimizer(model.parameters()))
    return training_step(model, optimizer, ids, accelerator.backward)


def prepared(setting: Setting) -> Step:
    """Plain DDP by Accelerate alone, whose optimizer, for one, is wrapped."""
    return accelerated(setting, None, setting.rank_ids)


def idle(setting: Setting) -> Step:
    """This package with nothing to do."""
    return accelerated(setting, TensorParallelDDPPlugin(tp_size=1), setting.rank_ids)


def plain_ddp(setting: Setting) -> Step:
    """The same global batch over all ranks, no tensor parallelism: each rank holds the whole model."""
    model = DistributedDataParallel(setting.model())
    return training_step(model, setting.optimizer(model.parameters()), setting.rank_ids)


def torch_styles(setting: Setting) -> Step:
    """torch's `parallelize_module` under `DDP(device_mesh=)`, its bridge for both.

    The bridge leaves most parameters out of `named_parameters()` after the first forward (pytorch#152712). They train,
    if the optimizer is made between the wrapper and the first forward, and nobody asks the model for parameters later.
    """
    plan: dict[str, Any] = {}
    for index in range(setting.size.layers):
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
            plan[f"model.layers.{index}.{name}"] = ColwiseParallel()
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            plan[f"model.layers.{index}.{name}"] = RowwiseParallel()
    plan["model.embed_tokens"] = RowwiseParallel(input_layouts=Replicate())
    plan["lm_head"] = ColwiseParallel(output_layouts=Replicate())
    model: nn.Module = parallelize_module(setting.model(), setting.mesh["tp"], plan)
    if setting.dp > 1:
        model = DistributedDataParallel(model, device_mesh=setting.mesh["dp_replicate"])
    return training_step(model, setting.optimizer(model.parameters()), setting.replica_ids)


def transformers_native(setting: Setting, replicas: str) -> Step:
    """transformers' own, which shards while loading; its replicas are FSDP2's, whole (`dp_replicate`) or sharded."""
    from transformers.distributed import DistributedConfig

    layout = DistributedConfig(tp_size=setting.tp, **{replicas: setting.dp})
    model = AutoModelForCausalLM.from_pretrained(setting.folder, distributed_config=layout, dtype=torch.float32)
    model.train()
    return training_step(model, setting.optimizer(model.parameters()), setting.replica_ids)


def deepspeed_autotp(setting: Setting, **options: Any) -> Step:
    """DeepSpeed's AutoTP with ZeRO-1, over gloo like the others, its buckets as large as DDP's.

    Its shared-memory all-reduce is for CPU ranks only, is compiled at the first run, and reduces over all ranks
    whatever the group: left out.
    """
    deepspeed = importlib.import_module("deepspeed")  # no requirement: its build wants torch in the same environment
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel(logging.ERROR)
    model = setting.model()
    elements = min(25 * 2**20 // 4, sum(param.numel() for param in model.parameters()))
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=setting.optimizer(model.parameters()),
        config={
            "train_micro_batch_size_per_gpu": setting.size.batch,
            "zero_optimization": {"stage": 1, "reduce_bucket_size": elements, "allgather_bucket_size": elements},
            "zero_allow_untested_optimizer": True,
            "tensor_parallel": {"autotp_size": setting.tp, **options},
        },
    )
    ids = setting.replica_ids

    def step() -> torch.Tensor:
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        return loss.detach()

    return step


def local_alone(setting: Setting) -> Step:
    """A Llama of one rank's sizes on every rank, without a collective: what is left when communication is free.

    No less than what a rank must compute, with its loss over its part of the vocabulary.
    """
    model = setting.model(shards=setting.tp)
    return training_step(
        model, setting.optimizer(model.parameters()), setting.replica_ids % (setting.size.vocab // setting.tp)
    )


#: In the order of the table; the first is what the others' losses are compared with.
CONTENDERS: dict[str, Callable[[Setting], Step]] = {
    PLAIN: plain_ddp,
    PREPARED: prepared,
    IDLE: idle,
    **{name: partial(ours, **options) for name, options in VARIANTS.items()},
    "torch styles + DDP": torch_styles,
    "transformers tp x dp_replicate": partial(transformers_native, replicas="dp_replicate_size"),
    "transformers fsdp x tp": partial(transformers_native, replicas="fsdp_size"),
    "DeepSpeed AutoTP + ZeRO-1": deepspeed_autotp,
    "DeepSpeed, vocab_parallel_lm_head": partial(deepspeed_autotp, vocab_parallel_lm_head=True),
    LOCAL: local_alone,
}
