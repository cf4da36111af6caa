"""The dropout masks that a training step draws."""

from __future__ import annotations

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import set_seed

from accel_tp_ddp import TensorParallelDDPPlugin
from accel_tp_ddp.training.drift import checksum

from .models import VOCABULARY, build_model

RATE = 0.25


def masks(device_specific: bool = False, checkpointing: bool | None = None, steps: int = 1, eval_too: bool = False):
    """Every mask that was drawn, in order, with the number of dimensions of what it fell on."""
    accelerator = Accelerator(parallelism_config=TensorParallelDDPPlugin(tp_size=2))
    set_seed(3 + (dist.get_rank() if device_specific else 0))
    model = build_model("gpt_neox", attention="eager", attention_dropout=RATE, hidden_dropout=RATE)
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
    model = accelerator.prepare(model)
    drawn = []
    dropout = torch.nn.functional.dropout

    def spy(input, p=0.5, training=True, inplace=False):
        if training and p > 0:
            state = torch.get_rng_state()
            mask = dropout(torch.ones_like(input), p, True) != 0
            torch.set_rng_state(state)
            drawn.append((input.ndim, int(checksum(mask)), 1 - mask.float().mean().item()))
        return dropout(input, p, training, inplace)

    torch.nn.functional.dropout = spy
    try:
        generator = torch.Generator().manual_seed(1 + accelerator.data_parallel_rank)
        ids = torch.randint(0, VOCABULARY, (4, 12), generator=generator)
        for _ in range(steps):
            model.train()
            accelerator.backward(model(input_ids=ids, labels=ids).loss)
            if eval_too:
                model.eval()
                model(input_ids=ids)
    finally:
        torch.nn.functional.dropout = dropout
    return drawn, int(checksum(torch.get_rng_state()))
