"""With zero1 a run is that of plain DDP, and each replica keeps its part of the optimizer's state."""

from __future__ import annotations

import copy
import os
import shutil
from dataclasses import replace
from unittest import mock

import pytest
import torch
from accelerate.utils import DistributedDataParallelKwargs
from peft import LoraConfig, get_peft_model

from accel_tp_ddp.training import zero1
from accel_tp_ddp.training.optimizer import full_optimizer_state

from ..helpers.compare import assert_tensors_close
from ..helpers.faults import injected
from ..helpers.models import VOCABULARY, build_model
from ..helpers.optimizers import Lamb, Quantized
from ..helpers.plain import plain_ddp
from ..helpers.ranks import run_on_ranks
from ..helpers.resuming import MORE, SAVED_AFTER, Prepared, Run, Saved
from ..helpers.trainer import Case, assert_same, assert_same_checkpoint, make_trainer, train_and_save
from ..helpers.training import TOLERANCE, Spec, assert_same_run, differences, make_accelerator, make_optimizer, train


def with_zero1(fn, *args, **kwargs):
    os.environ["ACCEL_TP_DDP_ZERO1"] = "true"
    return fn(*args, **kwargs)


# --- runs ------------------------------------------------------------------------------------------------------------

RUNS = {
    "adamw": (Spec("llama", tied=True, accumulation=2), 2, 2),
    "tp 1, three replicas": (Spec("llama"), 1, 3),
    "fused, shared heads": (Spec("llama_one_key", optimizer="adamw, fused"), 2, 2),
    "one by one": (Spec("qwen3", optimizer="adamw, one by one", max_norm=None), 1, 2),
    "momentum": (Spec("phi3", optimizer="sgd, nesterov"), 2, 2),
    "adafactor": (Spec("llama", optimizer="adafactor"), 2, 2),
    "adafactor, tp 1": (Spec("llama", optimizer="adafactor_of_transformers"), 1, 2),
    "checkpointed": (Spec("llama", checkpointing="reentrant"), 2, 2),
    "gpt2": (Spec("gpt2"), 2, 2),
}


@pytest.mark.parametrize("which", RUNS)
def test_a_run_with_zero1_is_that_of_plain_ddp(which):
    spec, tp, dp = RUNS[which]
    actual = run_on_ranks(with_zero1, tp * dp, train, replace(spec, tp=tp))
    assert_same_run(actual, plain_ddp(spec, dp))


def train_in_small_buckets(spec):
    """Of which most parameters fill several, and some are gathered in place."""
    with mock.patch.object(zero1, "_BUCKET", 4096), mock.patch.object(zero1, "_IN_PLACE", 10000):
        kinds = []
        stock = zero1._buckets
        with mock.patch.object(zero1, "_buckets", lambda *args: kinds.extend(made := list(stock(*args))) or made):
            record = with_zero1(train, spec)
        assert {type(bucket).__name__ for bucket in kinds} == {"_InPlace", "_Rows"} and len(kinds) > 20
        rows = [bucket for bucket in kinds if isinstance(bucket, zero1._Rows)]
        assert any(bucket.even for bucket in rows)
        return record


@pytest.mark.parametrize("tp, dp", [(1, 2), (1, 3)])
def test_parameters_that_fill_several_buckets_are_gathered(tp, dp):
    spec = Spec("llama", max_norm=None, vocabulary=132)
    actual = run_on_ranks(train_in_small_buckets, tp * dp, replace(spec, tp=tp))
    assert_same_run(actual, plain_ddp(spec, dp))


def train_without_gathering(spec):
    with injected("ranges not gathered"):
        return with_zero1(train, spec)


def test_a_run_whose_ranges_are_not_gathered_is_another():
    spec = RUNS["adamw"][0]
    off = differences(run_on_ranks(train_without_gathering, 2, replace(spec, tp=1)), plain_ddp(spec, 2))
    assert off["losses"] > 10 * TOLERANCE, off


# --- what is kept, and where -----------------------------------------------------------------------------------------


def tokens(seed, samples=2):
    return torch.randint(1, VOCABULARY, (samples, 8), generator=torch.Generator().manual_seed(seed))


def take_steps(accelerator, model, optimizer, seeds, max_norm=0.5):
    """Losses and norms of this replica."""
    seen = []
    for seed in seeds:
        ids = tokens(10 * seed + accelerator.process_index)
        loss = model(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        optimizer.zero_grad()
        seen.append([loss.item(), float(norm)])
    return seen


def kept(kind, tp):
    accelerator = make_accelerator(tp)
    model = build_model("llama")
    # Hooks from before and after `prepare` see the parameters and their gradients.
    optimizer = make_optimizer(model, kind)
    seen = []

    def look(when):
        def hook(optimizer, args, kwargs):
            params = [param for group in optimizer.param_groups for param in group["params"]]
            same = [id(param) for param in params] == [id(param) for param in own]
            grads = all(param.grad is not None and param.grad.shape == param.shape for param in params)
            seen.append((when, same, grads))

        return hook

    optimizer.register_step_pre_hook(look("before"))
    optimizer.register_step_post_hook(look("before"))
    model, prepared = accelerator.prepare(model, optimizer)
    late = optimizer.register_step_pre_hook(look("after"))
    optimizer.register_step_post_hook(look("after"))
    own = [param for group in optimizer.param_groups for param in group["params"]]
    take_steps(accelerator, model, prepared, range(2))
    late.remove()
    take_steps(accelerator, model, prepared, range(2, 3))
    assert seen == [(when, True, True) for when in ("before", "after") * 4 + ("before", "before", "after")]
    assert set(optimizer.state) <= set(own)
    state = sum(
        v.numel() for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor) and v.dim()
    )
    return state, sum(param.numel() for param in own)


@pytest.mark.parametrize("kind, tp, dp, tensors", [("adamw", 2, 2, 2), ("sgd", 1, 3, 1), ("adamw, fused", 1, 4, 2)])
def test_each_replica_keeps_its_share_of_the_state(kind, tp, dp, tensors):
    results = run_on_ranks(with_zero1, tp * dp, kept, kind, tp)
    for state, elements in results:
        assert state <= 1.02 * tensors * elements / dp
    # Together they have all of it, once.
    assert sum(state for state, _ in results) == tensors * sum(elements for _, elements in results) / dp
    assert all(state == tensors * elements for state, elements in run_on_ranks(kept, dp, kind, None))


def stepped_by(make, tp):
    accelerator = make_accelerator(tp)
    model = build_model("llama")
    optimizer = make(model.parameters(), lr=0.1)
    model, prepared = accelerator.prepare(model, optimizer)
    seen = take_steps(accelerator, model, prepared, range(3))
    return seen, sorted(state_of(optimizer)), [group.get("step") for group in optimizer.param_groups]


def state_of(optimizer):
    numbers = {id(p): n for n, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    return [numbers[id(param)] for param in optimizer.state]


@pytest.mark.parametrize("make", [Lamb, Quantized])
def test_an_optimizer_that_looks_at_more_than_one_element_gets_full_parameters(make):
    plain = run_on_ranks(stepped_by, 2, make, None)
    ours = run_on_ranks(with_zero1, 2, stepped_by, make, 1)
    for (seen, _, steps), (expected, _, wanted) in zip(ours, plain):
        assert torch.tensor(seen).allclose(torch.tensor(expected), rtol=2e-5) and steps == wanted
    (_, first, _), (_, second, _) = ours
    assert sorted(first + second) == plain[0][1] and first and second  # each on one replica


def refused(tp, make, **options):
    accelerator = make_accelerator(tp)
    model = build_model("llama")
    model, optimizer = accelerator.prepare(model, make(model.parameters(), **options))
    take_steps(accelerator, model, optimizer, range(1))


class ScheduleFree(torch.optim.SGD):
    def train(self): ...
    def eval(self): ...


@pytest.mark.parametrize(
    "make, options, message",
    [
        (Lamb, {"among_all": True}, "depends on other parameters too"),
        (torch.optim.LBFGS, {}, "LBFGS on a parameter looks at other parameters"),
        (ScheduleFree, {}, "outside of its step"),
    ],
)
def test_what_zero1_cannot_divide_is_one_error_on_every_rank(make, options, message):
    for raised in run_on_ranks(with_zero1, 2, refused, 1, make, expect_raise=True, **options):
        assert raised.type_name == "ValueError" and message in raised.message and "zero1=False" in raised.message


# --- checkpoints -----------------------------------------------------------------------------------------------------

LAYOUTS = {"tp 2 x dp 2": (2, 2, True), "off, tp 2 x dp 2": (2, 2, False), "tp 1 x dp 2": (1, 2, True)}
LAYOUTS |= {"tp 1 x dp 4": (1, 4, True), "off, tp 4": (4, 1, False), "plain DDP": (None, 2, False)}
#: A run is saved at the first, and continued from there at each of the others.
CHAINS = {
    "adamw": ("tp 2 x dp 2", ["off, tp 2 x dp 2", "tp 1 x dp 2", "tp 1 x dp 4", "off, tp 4"]),
    "adamw, off to on": ("off, tp 2 x dp 2", ["tp 2 x dp 2", "tp 1 x dp 4"]),
    "adamw, plain to on": ("plain DDP", ["tp 2 x dp 2", "tp 1 x dp 2"]),
    "shared heads": ("tp 2 x dp 2", ["off, tp 4", "tp 1 x dp 2"]),
    "packed": ("tp 2 x dp 2", ["tp 1 x dp 4"]),
    "adafactor": ("tp 2 x dp 2", ["tp 1 x dp 2", "off, tp 4"]),
}
MODELS = {"shared heads": "llama_one_key", "packed": "phi3_two_keys"}


def in_layout(layout, run, fn, *args):
    tp, dp, divided = LAYOUTS[layout]
    run = replace(run, tp=tp)
    return (
        run_on_ranks(with_zero1, tp * dp, fn, run, *args) if divided else run_on_ranks(fn, (tp or 1) * dp, run, *args)
    )


def save_and_continue(run, folder):
    record, prepared = Saved(), Prepared(run)
    prepared.train(prepared.loader, SAVED_AFTER, record)
    prepared.accelerator.save_state(folder)
    state = copy.deepcopy(full_optimizer_state(prepared.optimizer))
    prepared.train(prepared.accelerator.skip_first_batches(prepared.loader, SAVED_AFTER), MORE, record)
    return record.losses[SAVED_AFTER:], state


def continue_from(run, folder, again):
    """With another start. Saves what it has loaded once more."""
    record, prepared = Saved(), Prepared(run, seed=5)
    prepared.accelerator.load_state(folder)
    kept = sum(v.numel() for s in prepared.optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor))
    if run.tp is not None:
        prepared.accelerator.save_state(again)
    state = copy.deepcopy(full_optimizer_state(prepared.optimizer))
    prepared.train(prepared.accelerator.skip_first_batches(prepared.loader, SAVED_AFTER), MORE, record)
    return record.losses, state, kept


@pytest.mark.parametrize("which", CHAINS)
def test_a_checkpoint_is_continued_at_any_layout_with_zero1_or_without(tmp_path, which):
    first, others = CHAINS[which]
    run = Run(None, MODELS.get(which, "llama"), "adafactor" if which == "adafactor" else "adamw")
    folder = str(tmp_path / "0")
    losses, saved = in_layout(first, run, save_and_continue, folder)[0]
    for number, layout in enumerate(others, 1):
        again = str(tmp_path / str(number))
        results = in_layout(layout, run, continue_from, folder, again)
        continued, loaded, _ = results[0]
        assert continued == pytest.approx(losses, rel=2e-5)
        assert_same_states(loaded, saved)
        if LAYOUTS[layout][2] and which != "adafactor":
            elements = sum(sum(v.numel() for v in s.values()) for s in saved["state"].values())
            tp, dp, _ = LAYOUTS[layout]
            assert sum(kept for *_, kept in results[::tp]) < 1.1 * elements / tp + 50 * dp * tp  # replicated ones
        folder = again


def assert_same_states(ours, theirs):
    """To the bit: nothing has been computed between."""
    assert ours["state"].keys() == theirs["state"].keys()
    for number, state in theirs["state"].items():
        assert ours["state"][number].keys() == state.keys()
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(ours["state"][number][key]), torch.as_tensor(value)), (number, key)


# --- what else a script does -----------------------------------------------------------------------------------------


def unusual(tp, which):
    """A run with something of its own: losses and norms, and the weights on the main process."""
    options = {}
    if which == "unused parameters":
        options["kwargs_handlers"] = [DistributedDataParallelKwargs(find_unused_parameters=True)]
    accelerator = make_accelerator(tp, **options)
    model = build_model("llama")
    if which == "lora":
        model = get_peft_model(model, LoraConfig(target_modules="all-linear", r=3, task_type="CAUSAL_LM"))
        torch.manual_seed(0)
        for name, param in sorted(model.named_parameters()):
            if "lora_" in name:
                torch.nn.init.normal_(param, std=0.1)
    if which == "unused parameters":
        model.aside = torch.nn.Linear(5, 5)
    if which == "frozen":
        model.model.embed_tokens.weight.requires_grad_(False)
    if "overflow" in which:
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
    optimizer = make_optimizer(model, "adamw, fused" if which == "overflow, fused" else "adamw")
    if which == "stepped before":
        for seed in range(2):
            model(input_ids=tokens(seed), labels=tokens(seed)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    if which == "optimizer first":
        optimizer = accelerator.prepare(optimizer)
        model = accelerator.prepare(model)
    else:
        model, optimizer = accelerator.prepare(model, optimizer)
    seen = take_steps(accelerator, model, optimizer, range(2))
    if which == "frozen":  # and a group of a parameter of no model is added
        optimizer.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))], "lr": 0.1})
    if "overflow" in which:
        last = accelerator.process_index == accelerator.num_processes - 1
        handle = next(model.parameters()).register_hook(lambda grad: grad * float("inf") if last else grad)
        take_steps(accelerator, model, optimizer, range(2, 3), max_norm=float("inf"))
        handle.remove()
        assert optimizer.step_was_skipped or which == "overflow, fused"  # whose kernel skips it
        seen.append([accelerator.scaler.get_scale(), 0.0])
    seen += take_steps(accelerator, model, optimizer, range(3, 5))
    if which == "closure":
        ids = tokens(accelerator.process_index)

        def closure():
            optimizer.zero_grad()
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            return loss

        seen.append([optimizer.optimizer.step(closure).item(), 0.0])
        seen += take_steps(accelerator, model, optimizer, range(5, 6))
    weights = accelerator.get_state_dict(model)
    return seen, {name: tensor.clone() for name, tensor in weights.items()} if accelerator.is_main_process else None


UNUSUAL = {"lora": 2, "unused parameters": 2, "frozen": 1, "overflow": 1, "stepped before": 2, "closure": 1}
UNUSUAL |= {"overflow, fused": 1}
UNUSUAL |= {"optimizer first": 2}


@pytest.mark.parametrize("which", UNUSUAL)
def test_what_a_script_does_beside_is_as_under_plain_ddp(which):
    tp = UNUSUAL[which]
    plain = run_on_ranks(unusual, 2, None, which)
    ours = run_on_ranks(with_zero1, 2 * tp, unusual, tp, which)
    for rank, (seen, _) in enumerate(ours):
        assert torch.tensor(seen).allclose(torch.tensor(plain[rank // tp][0]), rtol=2e-4), (seen, plain[rank // tp][0])
    assert_tensors_close(ours[0][1], plain[0][1], 2e-4)


def steps_that_cannot_be(which):
    accelerator = make_accelerator(1)
    model = build_model("llama")
    params = list(model.parameters())
    if which == "other order" and accelerator.process_index == 1:
        params.reverse()
    optimizer = torch.optim.AdamW(params, lr=0.01)
    model, prepared = accelerator.prepare(model, optimizer)
    if which == "no_sync":
        with model.no_sync():
            take_steps(accelerator, model, prepared, range(1))
    if which == "join":
        with accelerator.join_uneven_inputs([model]):
            pass
    take_steps(accelerator, model, prepared, range(1))


@pytest.mark.parametrize(
    "which, message",
    [("no_sync", "within `no_sync`"), ("join", "join_uneven_inputs does not go"), ("other order", "divide the optim")],
)
def test_a_step_that_zero1_cannot_take_is_one_error_on_every_rank(which, message):
    for raised in run_on_ranks(with_zero1, 2, steps_that_cannot_be, which, expect_raise=True):
        assert message in raised.message


def failing_step():
    """A step that raises leaves parameters, gradients and state where the next one finds them."""
    accelerator = make_accelerator(1)
    model = build_model("llama")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model, prepared = accelerator.prepare(model, optimizer)
    take_steps(accelerator, model, prepared, range(1))
    params, (group,) = list(model.parameters()), optimizer.param_groups
    group["betas"], betas = "two", group["betas"]
    with pytest.raises(ValueError):
        take_steps(accelerator, model, prepared, range(1, 2))
    state = optimizer.state_dict()["state"]
    assert len(state) == len(params) == len(group["params"])
    assert all(own is param for own, param in zip(group["params"], params))
    group["betas"] = betas
    optimizer.zero_grad()
    take_steps(accelerator, model, prepared, range(2, 3))
    assert {int(own["step"]) for own in optimizer.state.values()} == {2}


def test_a_step_that_raises_can_be_taken_again():
    run_on_ranks(with_zero1, 2, failing_step)


# --- Trainer ---------------------------------------------------------------------------------------------------------

STEPS = 4
CASES = {
    "adamw": Case({"max_steps": STEPS, "save_strategy": "steps", "save_steps": 2}),
    "lora": Case({"max_steps": STEPS, "save_strategy": "steps", "save_steps": 2}, lora=True),
}


def trained(tp, folder, case, resume=None):
    return train_and_save(make_trainer(tp, folder, case), folder, case, resume)


@pytest.mark.parametrize("which, tp", [("adamw", 1), ("adamw", 2), ("lora", 1)])
def test_a_trainer_run_and_its_checkpoints_are_those_of_plain_ddp(tmp_path, which, tp):
    case, plain, ours, off = CASES[which], str(tmp_path / "plain"), str(tmp_path / "ours"), str(tmp_path / "off")
    expected = run_on_ranks(trained, 2, None, plain, case)
    actual = run_on_ranks(with_zero1, 2 * tp, trained, tp, ours, case)
    assert_same(actual[0]["logs"], expected[0]["logs"], 2e-4)
    for name in ("checkpoint-2", f"checkpoint-{STEPS}"):
        assert_same_checkpoint(f"{ours}/{name}", f"{plain}/{name}")
    if which == "adamw":  # continued without zero1, and from plain DDP with it
        shutil.copytree(f"{ours}/checkpoint-2", f"{off}/checkpoint-2")
        run_on_ranks(trained, 2, None, off, case, f"{off}/checkpoint-2")
        assert_same_checkpoint(f"{off}/checkpoint-{STEPS}", f"{plain}/checkpoint-{STEPS}")
        shutil.rmtree(ours)
        shutil.copytree(f"{plain}/checkpoint-2", f"{ours}/checkpoint-2")
        run_on_ranks(with_zero1, 2 * tp, trained, tp, ours, case, f"{ours}/checkpoint-2")
        assert_same_checkpoint(f"{ours}/checkpoint-{STEPS}", f"{plain}/checkpoint-{STEPS}")
