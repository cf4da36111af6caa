"""TRL's fused output layer, which multiplies with `lm_head.weight` by itself, is computed from shards."""

from unittest import mock

import pytest
import torch
from torch.nn import functional

from accel_tp_ddp import full_gradients, parallelize
from accel_tp_ddp.core.gathered import GatheredWhenUsed
from accel_tp_ddp.core.override import install_for_all
from accel_tp_ddp.loss import fused_heads, vocab_parallel
from accel_tp_ddp.loss.heads import defer_logits

from ..helpers.compare import assert_tensors_close
from ..helpers.ranks import run_on_ranks
from ..helpers.sharded import TOLERANCE, tp_mesh
from .models import FLOOR, batches, build

pytest.importorskip("trl.kernels.chunked_logprob")

OPTIONAL = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
FIELDS = ("loss", "log_probs", *OPTIONAL)


def joined(tensor):
    """In the place of what gathers a weight."""
    raise AssertionError("the weight was gathered")


def scored(name, options, mode):
    """All fields and the gradients of their weighted sums, against the unsharded model's."""
    from trl.trainer.utils import add_fused_lm_head

    vocab_parallel.LEAST_ROWS = 8
    install_for_all(fused_heads.OVERRIDES, lambda owner: ())
    reference, model = build(name), build(name)
    batch = batches()["labels"]
    with torch.no_grad():  # some labels are to be the most likely ones
        batch["labels"][:, 5:] = reference(**batch).logits.argmax(-1)[:, 4:-1]
    for each in (reference, model):
        add_fused_lm_head(each, outputs=("log_probs", *OPTIONAL), **options)
    parallelize(model, tp_mesh(2))
    defer_logits(model, mode)
    guard = mock.patch.object(GatheredWhenUsed, "full_values", joined)
    with guard if mode else mock.patch.object(vocab_parallel, "token_statistics", joined):
        outputs = model(**batch, fused_lm_head=True)
    expected = reference(**batch, fused_lm_head=True)
    for field in FIELDS:
        ours, theirs = outputs[field], expected[field]
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype and ours.requires_grad == theirs.requires_grad
        assert torch.allclose(ours.float(), theirs.float(), rtol=1e-5, atol=1e-5), field
    assert expected.is_top1.any() and not expected.is_top1.all()
    for each in (outputs, expected):
        weights = torch.linspace(-1, 1, each.log_probs.numel()).view_as(each.log_probs)
        ((each.log_probs.exp() * weights).sum() + (each.entropy * weights.flip(0)).sum() + each.loss).backward()
    grads = {n: p.grad for n, p in reference.named_parameters() if p.grad is not None}
    assert_tensors_close(full_gradients(model), grads, TOLERANCE, FLOOR)


@pytest.mark.parametrize("name", ["llama", "llama, tied", "gemma2", "cohere", "granite", "phi"])
def test_scores_of_tokens_and_their_gradients_come_from_shards(name):
    run_on_ranks(scored, 2, name, {"temperature": 0.7}, "auto")


def test_a_head_in_float32_is_scored_in_float32():
    run_on_ranks(scored, 2, "llama", {"cast_lm_head_to_fp32": True}, "auto")


def test_without_loss_parallel_the_weight_is_gathered():
    run_on_ranks(scored, 2, "llama", {}, False)


# --- a weight that is read and used ----------------------------------------------------------------------------------


class Keeper(torch.nn.Module):
    """Reads the output layer's weight within its forward."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        hidden = self.model.model(input_ids=ids).last_hidden_state
        self.kept = [self.model.lm_head.weight]
        return hidden


def read_late():
    model = Keeper(build("llama"))
    plan = {f"model.{name}": style for name, style in model.model.tp_plan.items()}
    parallelize(model, tp_mesh(2), plan)
    hidden = model(batches()["labels"]["input_ids"])
    with pytest.raises(RuntimeError, match="used after"):
        functional.linear(hidden, model.kept[0])


def test_a_weight_read_in_a_forward_and_used_after_it_is_an_error_and_no_hang():
    run_on_ranks(read_late, 2)
