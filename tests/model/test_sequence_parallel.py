"""With the sequence spread over the ranks a model has the losses and gradients that it has without."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from accel_tp_ddp import full_gradients
from accel_tp_ddp.model.check import check_model
from accel_tp_ddp.model.parallelize import parallelize_with_map
from accel_tp_ddp.model.sequence import check_sequence

from ..helpers.compare import assert_tensors_close
from ..helpers.models import build_model
from ..helpers.ranks import run_on_ranks
from ..helpers.sharded import TOLERANCE, token_batch, tp_mesh

FLOOR = 1e-5
TP = pytest.mark.parametrize("tp", [2, 4])


def spread(model, tp=None):
    mesh = tp_mesh(tp)
    plan = check_model(model, mesh)
    check_sequence(model, plan)
    parallelize_with_map(model, mesh, replace(plan, sequence_parallel=True))
    return model


def batches():
    """By name: lengths that two ranks divide and that they do not, padded on either side, several in one row."""
    even, uneven, row = token_batch(), token_batch(4, 2, 11), token_batch(5, 1, 12)
    padded = torch.ones_like(uneven["input_ids"])
    padded[0, :4], padded[1, -3:] = 0, 0
    positions = torch.cat([torch.arange(5), torch.arange(7)]).view(1, -1)
    return {
        "even": even,
        "uneven": uneven,
        "padded": {**uneven, "attention_mask": padded, "labels": uneven["labels"].masked_fill(padded == 0, -100)},
        "packed": {**row, "position_ids": positions},
    }


def gradients(model):
    return {name: param.grad for name, param in model.named_parameters() if param.grad is not None}


def compared(name, kinds, checkpointing=None, tp=None, **options):
    """Two backwards of each batch, which accumulate, and the logits of evaluation."""
    reference, model = build_model(name, **options).train(), build_model(name, **options).train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
    spread(model, tp)
    for kind in kinds:
        batch = batches()[kind]
        for scale in (1.0, 2.0):
            losses = [each(**batch).loss for each in (model, reference)]
            assert abs(losses[0].item() - losses[1].item()) < 2e-6 * abs(losses[1].item()), (kind, losses)
            for loss in losses:
                (scale * loss).backward()
            assert_tensors_close(full_gradients(model), gradients(reference), TOLERANCE, FLOOR)
    with torch.no_grad():
        logits = [each.eval()(**batches()["uneven"]).logits for each in (model, reference)]
    assert torch.allclose(*logits, atol=1e-5)
    prompt = batches()["even"]["input_ids"][:, :4].clamp(min=1)
    tokens = [each.generate(prompt, max_new_tokens=3, do_sample=False) for each in (model, reference)]
    assert torch.equal(*tokens)


@TP
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt2"])
def test_losses_and_gradients_are_those_of_the_unsharded_model(name, tp):
    run_on_ranks(compared, tp, name, list(batches())[: 4 if tp == 2 else 2], tp=tp)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "qwen3_moe"])
def test_what_is_computed_again_is_spread_again(name, reentrant):
    run_on_ranks(compared, 2, name, ["even", "padded"], reentrant)


# Experts, latent attention, shared heads, alibi with a residual inside, parallel blocks.
@pytest.mark.parametrize(
    "name", ["mixtral", "deepseek_v3", "gpt_oss", "longcat_flash", "llama_one_key", "bloom", "falcon_two_keys", "gpt_neox"]
)
def test_blocks_of_other_kinds_see_the_whole_sequence(name):
    run_on_ranks(compared, 2, name, ["even", "padded"])
