"""A hook that a user has on one rank alone, as a main process that logs: what is sent does not depend on it."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from accel_tp_ddp import full_gradients
from accel_tp_ddp.model.check import check_model
from accel_tp_ddp.model.parallelize import parallelize_with_map

from ..helpers.compare import assert_tensors_close
from ..helpers.models import build_model
from ..helpers.ranks import run_on_ranks
from ..helpers.sharded import TOLERANCE, token_batch, tp_mesh

FLOOR = 1e-5
AUTOCAST_TOLERANCE = 0.03
CHECKPOINTED = {"use_reentrant": False}


def looks_at_input(seen, layer):
    return layer.self_attn.k_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0].norm().item()))


def looks_at_a_projection(seen, layer):
    def look(module, args, output):
        seen.append((args[0].dtype, args[0].detach().norm().item()))

    return layer.self_attn.q_proj.register_forward_hook(look)


def looks_at_output(seen, layer):
    return layer.mlp.register_forward_hook(lambda module, args, output: seen.append(output.norm().item()))


def looks_at_the_layer(seen, layer):
    return layer.register_forward_hook(
        lambda module, args, output: seen.append(output[0].norm().item())  # a tuple, or the first sample
    )


def looks_at_gradients(seen, layer):
    return layer.mlp.register_full_backward_hook(lambda module, *gradients: seen.append(gradients[1][0].norm().item()))


def steps(model, hook, autocast):
    """What the hook has seen, and the losses; the last gradients stay."""
    seen, losses = [], []
    if hook is not None:
        hook(seen, model.model.layers[0])
    for step in range(2):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(**token_batch(step)).loss
        loss.backward()
        losses.append(loss.item())
    return seen, losses


def on_the_first_rank(hook, autocast, checkpointed, options):
    mesh = tp_mesh()
    plain, own = build_model("llama").train(), build_model("llama").train()
    parallelize_with_map(own, mesh, replace(check_model(own, mesh), **options))
    for model in (plain, own):
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=CHECKPOINTED)
    first = dist.get_rank() == 0
    expected, losses = steps(plain, hook if first else None, autocast)
    seen, own_losses = steps(own, hook if first else None, autocast)
    tolerance = AUTOCAST_TOLERANCE if autocast else TOLERANCE
    assert own_losses == pytest.approx(losses, rel=tolerance)
    assert_tensors_close(
        full_gradients(own),
        {name: param.grad for name, param in plain.named_parameters() if param.grad is not None},
        tolerance,
        0.03 if autocast else FLOOR,
    )
    assert len(seen) == len(expected)
    if options.get("sequence_parallel"):  # what is between blocks is a slice of the sequence
        return len(seen)
    for one, other in zip(seen, expected):
        if isinstance(one, tuple):
            assert one[0] == other[0]
            one, other = one[1], other[1]
        assert one == pytest.approx(other, rel=tolerance)
    return len(seen)


@pytest.mark.parametrize(
    "options", [{}, {"sequence_parallel": True}, {"sequence_parallel": True, "overlap": 0}], ids=str
)
@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize(
    "hook, autocast",
    [
        (looks_at_input, True),
        (looks_at_a_projection, True),
        (looks_at_output, False),
        (looks_at_the_layer, False),
        (looks_at_gradients, False),
    ],
)
def test_a_hook_on_one_rank_changes_nothing_and_sees_what_it_sees_unsharded(hook, autocast, checkpointed, options):
    first, second = run_on_ranks(on_the_first_rank, 2, hook, autocast, checkpointed, options)
    assert first >= 2 and second == 0
