"""What an accelerator prepares, under the plugin and without it.

Wherever it says tp = None, that is Accelerate without the plugin: the reference, run by the same function.
"""

import pytest
import torch
import torch.distributed as dist
from accelerate import DataLoaderConfiguration
from accelerate.utils import set_seed
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from accel_tp_ddp import full_state_dict

from .compare import assert_tensors_close
from .ranks import run_on_ranks
from .sharded import MLP_PLAN, accelerator_for, build_mlp

REPLICAS = pytest.mark.parametrize("dp", [1, 2])


def plain_and_sharded(fn, dp, *args, **kwargs):
    """The results of plain Accelerate on dp ranks, and of tp 2 on 2 x dp ranks: `fn(tp, ...)` both times."""
    return run_on_ranks(fn, dp, None, *args, **kwargs), run_on_ranks(fn, 2 * dp, 2, *args, **kwargs)


def assert_equal_per_replica(plain, sharded):
    assert [sharded[rank] for rank in range(len(sharded))] == [plain[rank // 2] for rank in range(len(sharded))]


def replica(accelerator):
    return accelerator.process_index


def inputs(seed, samples=4, features=8):
    return torch.randn(samples, features, generator=torch.Generator().manual_seed(seed))


class Stream(IterableDataset):
    def __init__(self, count):
        self.count = count

    def __iter__(self):
        return iter(range(self.count))


def make_loader(kind, samples):
    data = list(range(samples))
    if kind == "shuffled":
        return DataLoader(data, batch_size=4, shuffle=True)
    if kind == "in order":
        return DataLoader(data, batch_size=4)
    if kind == "drop_last":
        return DataLoader(data, batch_size=4, shuffle=True, drop_last=True)
    if kind == "with generator":
        return DataLoader(data, batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(5))
    if kind == "batch_sampler":
        return DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data), 4, drop_last=False))
    if kind == "batch_sampler in order":
        return DataLoader(data, batch_sampler=BatchSampler(range(samples), 4, drop_last=False))
    if kind == "weighted":
        return DataLoader(data, batch_size=4, sampler=WeightedRandomSampler([1.0] * samples, samples, False))
    if kind == "subset":
        return DataLoader(data, batch_size=4, sampler=SubsetRandomSampler(data))
    if kind == "iterable":
        return DataLoader(Stream(samples), batch_size=4)
    raise KeyError(kind)


def batches(tp, kind, samples, seeding, split_batches=False, with_model=False, seedable=False):
    """Sample ids of each batch of two epochs. `seeding` "by rank": no two ranks have the same random state."""
    accelerator = accelerator_for(
        tp,
        MLP_PLAN,
        dataloader_config=DataLoaderConfiguration(split_batches=split_batches, use_seedable_sampler=seedable),
    )
    rank = dist.get_rank() if dist.is_initialized() else 0
    set_seed(11 if seeding == "alike" else 100 + rank)
    loader = make_loader(kind, samples)
    if with_model:
        _, loader = accelerator.prepare(build_mlp(), loader)
    else:
        loader = accelerator.prepare(loader)
    if seeding != "alike":
        set_seed(200 + rank)
    return [[torch.as_tensor(batch).tolist() for batch in loader] for _ in range(2)]


class Counted(torch.utils.data.Dataset):
    def __init__(self):
        self.read = 0

    def __len__(self):
        return 22

    def __getitem__(self, index):
        self.read += 1
        return index


def read_to_be_dispatched(tp):
    """How many samples each rank reads."""
    accelerator = accelerator_for(tp, dataloader_config=DataLoaderConfiguration(dispatch_batches=True))
    data = Counted()
    for _ in accelerator.prepare(DataLoader(data, batch_size=4)):
        pass
    return data.read


def dispatched(tp, split_batches):
    config = DataLoaderConfiguration(dispatch_batches=True, split_batches=split_batches)
    accelerator = accelerator_for(tp, dataloader_config=config)
    loader = accelerator.prepare(DataLoader(torch.arange(22), batch_size=4, shuffle=False))
    seen = [(batch.tolist(), accelerator.gather_for_metrics(batch).tolist()) for batch in loader]
    rest = [batch.tolist() for batch in accelerator.skip_first_batches(loader, 2)]
    return seen, rest


OPTIMIZERS = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01, eps=1e-5),
    "amsgrad": lambda groups: torch.optim.AdamW(groups, lr=0.01, eps=1e-5, amsgrad=True),
    "foreach": lambda groups: torch.optim.AdamW(groups, lr=0.01, eps=1e-5, foreach=True),
    "fused": lambda groups: torch.optim.AdamW(groups, lr=0.01, eps=1e-5, fused=True),
    "momentum": lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=0.01, eps=1e-3),
    "adagrad": lambda groups: torch.optim.Adagrad(groups, lr=0.01, eps=1e-3),
}


def make_groups(model):
    decayed = [param for param in model.parameters() if param.ndim > 1]
    return [
        {"params": decayed, "weight_decay": 0.1, "name": "decayed"},
        {"params": [param for param in model.parameters() if param.ndim == 1], "lr": 0.02, "weight_decay": 0.0},
    ]


def optimizer_steps(model, optimizer, seeds):
    for seed in seeds:
        model(inputs(seed)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def check_continues(kind, steps_before):
    """Steps in one process, then prepared, against one process all along."""
    model, reference = build_mlp(), build_mlp()
    optimizer, other = (OPTIMIZERS[kind](make_groups(each)) for each in (model, reference))
    optimizer_steps(model, optimizer, range(steps_before))
    params = [id(param) for group in optimizer.param_groups for param in group["params"]]
    options = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    accelerator = accelerator_for(2, MLP_PLAN)
    model, prepared = accelerator.prepare(model, optimizer)
    assert prepared.optimizer is optimizer
    assert [id(param) for group in optimizer.param_groups for param in group["params"]] == params
    assert [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups] == options
    optimizer_steps(model, prepared, range(10, 14))
    optimizer_steps(reference, other, [*range(steps_before), *range(10, 14)])
    assert_tensors_close(full_state_dict(model), reference.state_dict(), 2e-5)
    for param in model.parameters():
        for value in optimizer.state[param].values():
            assert not torch.is_tensor(value) or value.numel() == 1 or value.shape == param.shape
