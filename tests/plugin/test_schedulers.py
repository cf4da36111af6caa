"""Learning rates are those of plain DDP."""

import pytest
import torch
from accelerate import DataLoaderConfiguration
from accelerate.utils import GradientAccumulationPlugin
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR
from torch.utils.data import DataLoader

from ..helpers.prepared import REPLICAS, assert_equal_per_replica, inputs, plain_and_sharded
from ..helpers.sharded import MLP_PLAN, accelerator_for, build_mlp


def learning_rates(tp, kind, accumulation=1, split_batches=False, step_with_optimizer=True, adjust=True):
    accelerator = accelerator_for(
        tp,
        MLP_PLAN,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=accumulation, adjust_scheduler=adjust),
        step_scheduler_with_optimizer=step_with_optimizer,
        dataloader_config=DataLoaderConfiguration(split_batches=split_batches),
    )
    model = build_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    if kind == "lambda":
        scheduler = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    else:
        # 12 are not enough, which Accelerate forgives where it steps several times.
        scheduler = OneCycleLR(optimizer, max_lr=1.0, total_steps=40 if split_batches else 12)
    loader = DataLoader(list(inputs(0, samples=22)), batch_size=4)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    rates = []
    for _ in range(3):
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(batch).square().mean())
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            rates.append(scheduler.get_last_lr()[0])
    return rates, scheduler.scheduler._step_count


@REPLICAS
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulation": 2},
        {"accumulation": 3, "adjust": False},
        {"step_with_optimizer": False},
        {"split_batches": True},
        {"split_batches": True, "accumulation": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["lambda", "one_cycle"])
def test_schedulers_step_as_under_plain_ddp(kind, options, dp):
    if kind == "one_cycle" and options.get("step_with_optimizer") is False:
        pytest.skip("OneCycleLR itself refuses to go beyond its end")
    plain, sharded = plain_and_sharded(learning_rates, dp, kind, **options)
    assert len(set(plain[0][0])) > 3
    assert_equal_per_replica(plain, sharded)
