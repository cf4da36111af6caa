"""Models whose output layer defers its logits have the losses and gradients that they have with full ones."""

import copy
import os
import pickle
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional

from accel_tp_ddp import TensorParallelDDPPlugin, full_gradients, parallelize
from accel_tp_ddp.loss import vocab_parallel
from accel_tp_ddp.loss.deferred import DeferredLogits
from accel_tp_ddp.loss.heads import defer_logits, losses_only

from ..helpers.compare import assert_tensors_close
from ..helpers.models import VOCABULARY
from ..helpers.ranks import run_on_ranks
from ..helpers.sharded import TOLERANCE, token_batch, tp_mesh
from ..helpers.training import Spec, assert_same_run, train
from .models import FLOOR, MODELS, batches, build

TP = pytest.mark.parametrize("tp", [2, 4])


def compared(name, tp, kinds, lora=False, deep=False):
    vocab_parallel.LEAST_ROWS = 8  # more than one chunk; of no consequence for others
    found = {}
    reference, model = build(name), build(name)
    if lora:
        reference, model = (adapted(each) for each in (reference, model))
    parallelize(model, tp_mesh(tp))
    defer_logits(model, True)
    if deep:
        model = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    for kind in kinds:
        batch = batches()[kind]
        with mock.patch.object(DeferredLogits, "full_values", without_full):
            outputs = model(**batch)
            assert isinstance(outputs.logits, DeferredLogits) and outputs.logits.shape[-1] == VOCABULARY
            outputs.loss.backward()
        expected = reference(**batch)
        expected.loss.backward()
        assert abs(outputs.loss.item() - expected.loss.item()) < 2e-6 * abs(expected.loss.item()), kind
        grads = {n: p.grad for n, p in reference.named_parameters() if p.grad is not None}
        assert_tensors_close(full_gradients(model), grads, TOLERANCE, FLOOR)
        found[kind] = outputs.loss.item()
    return found


def without_full(logits):
    """In the place of what computes full logits."""
    raise AssertionError("full logits were computed")


def adapted(model):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    config = LoraConfig(target_modules=["q_proj", "lm_head"], r=4, init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(model, config)


@TP
@pytest.mark.parametrize("name", MODELS)
def test_a_models_loss_and_gradients_are_those_of_the_unsharded_model(name, tp):
    kinds = list(batches())[: 2 if tp == 4 else 4]
    losses = run_on_ranks(compared, tp, name, tp, kinds)
    assert len(set(losses[0].values())) > len(kinds) // 2 and all(own == losses[0] for own in losses)


@TP
def test_an_adapted_head_is_run_chunk_by_chunk(tp):
    pytest.importorskip("peft")
    run_on_ranks(compared, tp, "llama", tp, ["labels", "items"], lora=True)


def test_a_copied_model_still_defers():
    run_on_ranks(compared, 2, "llama", 2, ["labels"], deep=True)


# --- reading them ----------------------------------------------------------------------------------------------------


def read(reading):
    reference, model = build("gemma2"), build("gemma2")
    parallelize(model, tp_mesh(2))
    defer_logits(model, True)
    logits, expected = model(**batches()["labels"]).logits, reference(**batches()["labels"]).logits
    text = repr(logits)
    assert "not gathered" in text and len(text) < 200
    if reading == "on one rank":
        if dist.get_rank() == 0:
            with pytest.raises(RuntimeError, match="loss_parallel=False"):
                logits.argmax(-1)
            with pytest.raises(RuntimeError, match="full_tensor"):
                print(logits.detach().tolist())
        return
    if reading == "in full":
        full, wanted = logits.full_tensor(), expected
        assert type(full) is torch.Tensor and torch.allclose(full, expected, atol=1e-5)
    else:  # a loss of one's own
        labels = batches()["labels"]["labels"][:, 1:].flatten()
        full = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels, reduction="none")
        wanted = functional.cross_entropy(expected[:, :-1].flatten(0, 1), labels, reduction="none")
        assert torch.allclose(full, wanted, atol=1e-5)
    weights = torch.linspace(0, 1, full.numel()).view_as(full)
    (full * weights).sum().backward()
    (wanted * weights).sum().backward()
    grads = {n: p.grad for n, p in reference.named_parameters() if p.grad is not None}
    assert_tensors_close(full_gradients(model), grads, TOLERANCE, FLOOR)


@pytest.mark.parametrize("reading", ["on one rank", "in full", "for a loss of one's own"])
def test_who_reads_deferred_logits_is_told_or_served(reading):
    run_on_ranks(read, 2, reading)


class Reader(torch.nn.Module):
    """Reads the logits of a model in a forward of its own."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, **batch):
        outputs = self.model(**batch)
        changed = outputs.logits.float()
        changed *= 2  # computed by now, and changed in place
        return outputs.loss + changed.logsumexp(-1).mean() + outputs.logits[..., ::2].square().mean()


def read_inside():
    reference, model = Reader(build("llama")), Reader(build("llama"))
    plan = {f"model.{name}": style for name, style in model.model.tp_plan.items()}
    parallelize(model, tp_mesh(2), plan)
    defer_logits(model, "auto")
    with losses_only():
        loss = model(**batches()["labels"])
    wanted = reference(**batches()["labels"])
    assert torch.allclose(loss, wanted)
    loss.backward()
    wanted.backward()
    assert_tensors_close(full_gradients(model), {n: p.grad for n, p in reference.named_parameters()}, TOLERANCE, FLOOR)


def test_what_is_read_within_the_models_forward_is_computed():
    run_on_ranks(read_inside, 2)


def kinds_of_logits():
    """By mode: in training, in evaluation, without labels, and where somebody says that losses are all he wants."""
    found = {}
    batch = token_batch()
    for mode in (True, "auto", False):
        model = parallelize(build("llama"), tp_mesh(2))
        defer_logits(model, mode)
        tokens = {"input_ids": batch["input_ids"]}
        logits = [model(**batch).logits, model.eval()(**batch).logits, model.train()(**tokens).logits]
        with losses_only():
            logits.append(model(**tokens).logits)
        found[mode] = [isinstance(each, DeferredLogits) for each in logits]
    return found


def test_logits_are_deferred_where_the_mode_says_so():
    for found in run_on_ranks(kinds_of_logits, 2):
        assert found == {True: [True, False, False, True], "auto": [False] * 3 + [True], False: [False] * 4}


# --- under Accelerate ------------------------------------------------------------------------------------------------


def trained(spec, mode="true"):
    os.environ["ACCEL_TP_DDP_LOSS_PARALLEL"] = mode
    return train(spec)


SPECS = {
    "llama": Spec("llama", optimizer="sgd"),
    "tied, accumulated": Spec("llama", tied=True, accumulation=2),
    "gemma2, checkpointed": Spec("gemma2", checkpointing="non_reentrant"),
    "bf16": Spec("llama", mixed_precision="bf16"),
}


@pytest.mark.parametrize("name", SPECS)
def test_a_run_with_loss_parallel_is_that_of_plain_ddp(name):
    spec = SPECS[name]
    plain = run_on_ranks(train, 2, spec)
    ours = run_on_ranks(trained, 4, Spec(**{**vars(spec), "tp": 2}))
    if spec.mixed_precision == "no":
        assert_same_run(ours, plain)
    else:
        assert_same_run(ours, plain, 2e-2, 5e-2)


def without_a_head():
    from accelerate import Accelerator

    plugin = TensorParallelDDPPlugin(tp_size=2, loss_parallel=True, tp_plan={"lm_head": "replicate"})
    Accelerator(parallelism_config=plugin).prepare(build("llama"))


def test_loss_parallel_without_a_sharded_head_is_an_error_on_every_rank():
    for raised in run_on_ranks(without_a_head, 2, expect_raise=True):
        assert "loss_parallel=True" in raised.message and "colwise_gather_output" in raised.message


def with_ddp(options, own_loss):
    """Losses and gradients under DDP with settings that let it touch outputs, in two steps."""
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs

    tp = 2 if dist.get_world_size() == 4 else None
    plugin = TensorParallelDDPPlugin(tp_size=tp, loss_parallel=True) if tp else None
    accelerator = Accelerator(parallelism_config=plugin, kwargs_handlers=[DistributedDataParallelKwargs(**options)])
    model = accelerator.prepare(build("llama"))
    found = []
    for step in range(2):
        batch = token_batch(seed=10 + 2 * step + accelerator.process_index)
        with mock.patch.object(DeferredLogits, "full_values", without_full):
            outputs = model(**batch)
            loss = outputs.loss
            if own_loss:
                loss = functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
            loss.backward()
        found.append((loss.item(), {n: g.clone() for n, g in full_gradients(accelerator.unwrap_model(model)).items()}))
    return found


@pytest.mark.parametrize("own_loss", [False, True], ids=["the model's loss", "a loss of one's own"])
@pytest.mark.parametrize("setting", ["find_unused_parameters", "static_graph"])
def test_ddp_may_touch_outputs(setting, own_loss):
    plain = run_on_ranks(with_ddp, 2, {setting: True}, own_loss)
    for rank, steps in enumerate(run_on_ranks(with_ddp, 4, {setting: True}, own_loss)):
        for (loss, grads), (expected, expected_grads) in zip(steps, plain[rank // 2], strict=True):
            assert loss == pytest.approx(expected, rel=2e-6)
            assert_tensors_close(grads, expected_grads, TOLERANCE, FLOOR)


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits):
        return logits.clone()

    @staticmethod
    def backward(ctx, grad):
        return -grad


def reversed_gradients():
    reference, model = build("llama"), build("llama")
    parallelize(model, tp_mesh(2))
    defer_logits(model, True)
    labels = batches()["labels"]["labels"].flatten()
    for each in (model, reference):
        logits = each(**batches()["labels"]).logits
        if isinstance(logits, DeferredLogits):
            logits._source.open = True  # as within the model's forward
        functional.cross_entropy(Reversed.apply(logits).flatten(0, 1), labels).backward()
    assert_tensors_close(full_gradients(model), {n: p.grad for n, p in reference.named_parameters()}, TOLERANCE, FLOOR)


def test_an_autograd_function_on_deferred_logits_is_not_passed_by():
    run_on_ranks(reversed_gradients, 2)
