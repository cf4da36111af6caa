"""Gradients over several accumulated backwards, of a model on shards and of the unsharded one."""

from functools import cache, partial

import torch
from torch.distributed.device_mesh import init_device_mesh

from accel_tp_ddp import full_gradients, parallelize

from .compare import assert_tensors_close
from .faults import injected
from .models import VOCABULARY, build_model

TOLERANCE = 1e-4
PASSES = 3
BATCH, LENGTH = 2, 10


def tokens(seed, vocabulary=VOCABULARY):
    """Each backward pass and each replica has a batch of its own; the second row of each ends in padding."""
    ids = torch.randint(1, vocabulary, (BATCH, LENGTH), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[1, LENGTH - 3 :] = 0
    return ids, mask


def causal_loss(model, seed):
    ids, mask = tokens(seed)
    return model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss


def accumulated(model, loss, seeds, gradients):
    """The gradients after each of several backward passes, without a `zero_grad` between them."""
    after = []
    for seed in seeds:
        loss(model, seed).backward()
        after.append({name: gradient.clone() for name, gradient in gradients(model).items()})
    return after


def own_gradients(model):
    return {name: param.grad for name, param in model.named_parameters() if param.grad is not None}


@cache
def unsharded(build, loss, seeds=tuple(range(PASSES))):
    return accumulated(build(), loss, seeds, own_gradients)


def sharded(build, loss, plan="auto", fault=None, seeds=tuple(range(PASSES))):
    """On a rank."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),), mesh_dim_names=("tp",))
    with injected(fault):
        return accumulated(parallelize(build(), mesh, plan), loss, seeds, full_gradients)


def assert_gradients(on_ranks, expected, floor=0.0):
    for passes in on_ranks:
        assert len(passes) == len(expected)
        for actual, reference in zip(passes, expected):
            assert_tensors_close(actual, reference, TOLERANCE, floor)


@cache  # equal arguments give the same object, which `unsharded` is cached by
def causal(model, tied):
    return partial(build_model, model, tied=tied)
