"""What `watch` counts is what an outside count says, it changes nothing, and it is nowhere when it is off."""

import gc
import logging
import os
import time
from unittest import mock

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, on_main_process
from accelerate.utils import TorchDynamoPlugin, tqdm
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerCallback

from accel_tp_ddp import TensorParallelDDPPlugin
from accel_tp_ddp.core import collectives
from accel_tp_ddp.plugin import watch
from accel_tp_ddp.plugin.accelerator import OVERRIDES as WITHOUT_WATCH
from accel_tp_ddp.training.watch import FINAL_WAIT, KEPT, Watch

from ..helpers.logs import Lines
from ..helpers.models import VOCABULARY, build_model
from ..helpers.prepared import inputs
from ..helpers.ranks import run_on_ranks
from ..helpers.sharded import MLP_PLAN, build_mlp
from ..helpers.trainer import Case, make_trainer, untimed
from ..helpers.training import Spec, train

PEAK = 0.5  # 10^12 operations a second: more than a CPU rank has


def batches(replica, lengths=(8, 8, 8, 8)):
    """Two rows each; of the second one, as many are padding as the replica and the batch say."""
    for index, length in enumerate(lengths):
        ids = torch.randint(1, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(10 * replica + index))
        mask = torch.ones_like(ids)
        mask[1, length - 1 - (replica + index) % 3 :] = 0
        yield {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


class Kept(GeneralTracker):
    """A tracker that keeps what it is given."""

    name, requires_logging_directory = "kept", False

    def __init__(self):
        super().__init__()
        self.rows = []

    @property
    def tracker(self):
        return self.rows

    @on_main_process
    def log(self, values, step=None, **kwargs):
        self.rows.append((step, dict(values)))


def script(tp, every, steps=4, accumulation=1, **options):
    """A loop that logs each step: rows of the tracker, lines of the logger, seconds, tokens, and what was reported."""
    lines, tracker = Lines(), Kept()
    logging.getLogger("accel_tp_ddp").addHandler(lines)
    plugin = TensorParallelDDPPlugin(tp_size=tp, watch=every, peak_tflops=PEAK, **options)
    accelerator = Accelerator(
        parallelism_config=plugin, log_with=[tracker], cpu=True, gradient_accumulation_steps=accumulation
    )
    accelerator.init_trackers("run")
    model = build_model("llama")
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    tokens, start, own = 0, None, list(batches(accelerator.process_index))
    for step in range(steps):
        for index in range(accumulation):
            batch = own[(step * accumulation + index) % len(own)]
            start = start or time.perf_counter()
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                optimizer.step()
                optimizer.zero_grad()
            tokens += int(batch["attention_mask"].sum())
        with torch.no_grad():
            model(**batch)  # whose tokens nobody trains on
        accelerator.log({"mine": step}, step=step)
    seconds = time.perf_counter() - start
    reports = watch._watches[accelerator].reports if every else []
    if every:
        accelerator.end_training()
    logging.getLogger("accel_tp_ddp").removeHandler(lines)
    return {
        **{"rows": tracker.rows, "lines": lines.lines, "seconds": seconds, "tokens": tokens},
        "reports": [report._asdict() for report in reports],
    }


@pytest.mark.parametrize("tp, accumulation", [(2, 1), (2, 2), (4, 1), (1, 1)], ids=str)
def test_tokens_and_seconds_are_those_that_the_script_counts(tp, accumulation):
    ranks = run_on_ranks(script, 4, tp, 2, accumulation=accumulation)
    expected = sum(rank["tokens"] for rank in ranks[::tp])
    assert len({rank["tokens"] for rank in ranks}) == min(4 // tp, 3), "replicas have batches of their own"
    for rank in ranks:
        assert rank["reports"] == ranks[0]["reports"]
        assert [report["steps"] for report in rank["reports"]] == [2, 2]
        assert sum(report["tokens"] for report in rank["reports"]) == expected
        assert sum(report["seconds"] for report in rank["reports"]) == pytest.approx(rank["seconds"], rel=0.2, abs=0.5)


def test_the_main_process_tells_trackers_and_prints_a_line_a_report_and_one_at_the_end():
    first, second = run_on_ranks(script, 2, 2, 2)
    assert second["rows"] == [] and second["lines"] == []
    keys = {"tp/tokens_per_second", "tp/mfu", "tp/peak_memory_gib"}
    # A report is told at the next step, by a row of its own with the step that it belongs to.
    assert [(step, row.keys() - {"tp/collective_share"}) for step, row in first["rows"]] == [
        *((0, {"mine"}), (1, {"mine"}), (1, keys), (2, {"mine"}), (3, {"mine"}), (3, keys))
    ]
    for (_, row), report in zip(first["rows"][2::3], first["reports"], strict=True):
        assert row["tp/tokens_per_second"] == pytest.approx(report["tokens"] / report["seconds"])
        assert row["tp/mfu"] == pytest.approx(report["operations"] / report["seconds"] / (2 * PEAK * 1e12))
        assert row["tp/peak_memory_gib"] == max(report["memory"]) / 2**30 > 0.05
        assert 0 < row["tp/collective_share"] < 1
    *reports, summary = first["lines"]
    assert [line.partition(":")[0] for line in reports] == ["steps to 2", "steps to 4"]
    assert summary.startswith("4 steps in ") and f"{first['tokens']} tokens" in summary
    for line in first["lines"]:
        assert all(part in line for part in ("tokens/s", "MFU", "GiB a rank", "of a step in tensor-parallel collect"))


def test_steps_since_the_last_report_are_in_the_summary():
    first, _ = run_on_ranks(script, 2, 2, 3)
    assert [report["steps"] for report in first["reports"]] == [3, 1]
    assert first["lines"][-1].startswith("4 steps in ") and f"{first['tokens']} tokens" in first["lines"][-1]


# --- operations ------------------------------------------------------------------------------------------------------


def make(name, lora, checkpointing, **options):
    model = build_model(name, attention="eager", use_cache=False, **options)
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    if checkpointing is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
    return model.train()


def operations(tp, name, lora, checkpointing, loss_parallel):
    plugin = TensorParallelDDPPlugin(tp_size=tp, watch=1, peak_tflops=PEAK, loss_parallel=loss_parallel)
    accelerator = Accelerator(parallelism_config=plugin, cpu=True)
    model = make(name, lora, checkpointing)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad]))
    accelerator.backward(model(**next(batches(0))).loss)
    optimizer.step()
    watch._watches[accelerator].finish(together=True)
    (report,) = watch._watches[accelerator].reports
    return report.operations


@pytest.mark.parametrize(
    "name, lora, checkpointing, loss_parallel",
    [
        ("llama", False, None, False),
        ("llama", False, None, True),  # whose gradients are taken in the forward
        ("llama", True, None, False),
        ("llama", False, False, False),
        ("llama", False, True, False),
        ("qwen3_moe", False, None, False),
        ("gpt_neox", False, None, False),
    ],
    ids=str,
)
def test_operations_of_all_ranks_are_those_of_the_unsharded_model(name, lora, checkpointing, loss_parallel):
    """As torch counts them, forward and backward, without what checkpointing computes again."""
    model = make(name, lora, None)
    if checkpointing is not None:
        model.enable_input_require_grads()
    if "moe" in name:  # expert by expert: torch has no formula for its grouped product
        model.set_experts_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        model(**next(batches(0))).loss.backward()
    assert (
        run_on_ranks(operations, 2, 2, name, lora, checkpointing, loss_parallel)
        == [pytest.approx(counter.get_total_flops(), rel=1e-12)] * 2
    )


# --- nothing else changes --------------------------------------------------------------------------------------------


def watched(spec, every):
    watch._watches.clear()  # of accelerators that earlier tests have left on these ranks
    os.environ["ACCEL_TP_DDP_WATCH"] = str(every)
    torch._dynamo.reset()
    frames = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    record = train(spec)
    found = list(watch._watches.values())
    for each in found:
        each.finish(together=True)
    tokens = [report.tokens for each in found for report in each.reports]
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"] - frames
    return (record.losses, record.gradient_norms, record.weights, graphs), tokens


@pytest.mark.parametrize(
    "ranks, spec",
    [
        (4, Spec("llama", tp=2, accumulation=2)),
        (2, Spec("qwen3_moe", tp=2, checkpointing="non_reentrant", mixed_precision="bf16")),
        pytest.param(2, Spec("llama", tp=2, lora=True), marks=pytest.mark.slow),
        pytest.param(2, Spec("llama", tp=2, compiled="whole", samples=8, steps=4), marks=pytest.mark.slow),
        (2, Spec("llama", tp=2, compiled="by layer", samples=8, steps=4)),
    ],
    ids=["accumulation", "checkpointing", "lora", "compiled", "compiled by layer"],
)
def test_losses_norms_weights_and_graphs_are_the_same_bit_by_bit(ranks, spec):
    with_watch, without = run_on_ranks(watched, ranks, spec, 2), run_on_ranks(watched, ranks, spec, 0)
    for (ours, tokens), (theirs, nothing) in zip(with_watch, without):
        assert len(tokens) == spec.steps // 2 and min(tokens) > 0 and not nothing
        assert bool(ours[3]) == bool(spec.compiled)
        assert (ours[0], ours[1], ours[3]) == (theirs[0], theirs[1], theirs[3])
        assert (ours[2] is None) == (theirs[2] is None)
        for name, value in (ours[2] or {}).items():
            assert torch.equal(value, theirs[2][name]), name


def hooks(every):
    watch._watches.clear()
    accelerator = Accelerator(parallelism_config=TensorParallelDDPPlugin(tp_size=2, watch=every), cpu=True)
    model = build_model("llama")
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    own = [*model._forward_pre_hooks.values(), *model._forward_hooks.values()]
    own += optimizer.optimizer._optimizer_step_post_hooks.values()
    replaced = {name for name, value in vars(accelerator).items() if type(value).__name__ == "Overridden"}
    seen = [getattr(hook, "__module__", None) or type(hook).__module__ for hook in own]
    of_watch = sum("watch" in (getattr(hook, "__self__", hook)).__class__.__module__ for hook in own)
    return of_watch, replaced - {row.name for row in WITHOUT_WATCH}, len(seen), len(watch._watches)


def test_there_are_no_hooks_when_it_is_off():
    off, on = (run_on_ranks(hooks, 4, every)[0] for every in (0, 1))
    assert off[0] == off[3] == 0 and off[1] == set()
    assert on[0] == 3 and on[1] == {"log"} and on[3] == 1


def numbers_of_collectives(every, steps):
    """How many collectives each step had over the groups of the mesh, and what stands in the collectives' places."""
    stock = collectives._sum_in_place
    plugin = TensorParallelDDPPlugin(tp_size=2, watch=every, replica_check_steps=0)
    accelerator = Accelerator(parallelism_config=plugin, cpu=True)
    model = build_model("llama")
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    groups = [
        *(plugin.device_mesh[name].get_group() for name in ("tp", "dp_replicate")),
        torch.distributed.group.WORLD,
    ]
    counts, timed = [], []
    for batch in list(batches(accelerator.process_index))[:steps]:
        before = [group._get_sequence_number_for_group() for group in groups]
        accelerator.backward(model(**batch).loss)
        timed.append(collectives._sum_in_place is not stock)
        optimizer.step()
        optimizer.zero_grad()
        counts.append([group._get_sequence_number_for_group() - number for group, number in zip(groups, before)])
    return counts, timed, collectives._sum_in_place is stock


def test_no_collective_is_added():
    off, _, _ = run_on_ranks(numbers_of_collectives, 4, 0, 4)[0]
    on, timed, put_back = run_on_ranks(numbers_of_collectives, 4, 2, 4)[0]
    assert timed == [False, True, False, False] or timed == [False, True, False, True]
    assert put_back
    for step, (ours, theirs) in enumerate(zip(on, off)):
        assert ours == theirs, step


def joined(every):
    """One replica has three batches and the other two."""
    plugin = TensorParallelDDPPlugin(tp_size=2, watch=every, tp_plan=MLP_PLAN, prove="never")
    accelerator = Accelerator(parallelism_config=plugin, cpu=True)
    model = build_mlp()
    loader = DataLoader(list(inputs(0, samples=18)), batch_size=4)
    model, optimizer, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), loader)

    def step(batch):
        accelerator.backward(model(batch).square().mean())
        optimizer.step()

    on_gpus = mock.patch.object(Accelerator, "multi_device", True)  # all that Accelerate asks before it joins
    with on_gpus, accelerator.join_uneven_inputs([model], even_batches=False):
        taken = [step(batch) for batch in loader]
    for batch in inputs(1, samples=4).split(2):
        step(batch)
    watch._watches[accelerator].finish(together=True)
    return len(taken), [report.steps for report in watch._watches[accelerator].reports]


def test_replicas_that_take_unlike_numbers_of_steps_wait_for_nobody():
    ranks = run_on_ranks(joined, 4, 2)
    assert [taken for taken, _ in ranks] == [3, 3, 2, 2]
    assert [reports for _, reports in ranks] == [[5], [5], [4], [4]]


# --- ranks that do not do the same -----------------------------------------------------------------------------------


def skipping(every, together):
    """The second replica does not take its second step, though it has done the backward."""
    lines, plugin = Lines(), TensorParallelDDPPlugin(tp_size=1, watch=every)
    logging.getLogger("accel_tp_ddp").addHandler(lines)
    accelerator = Accelerator(parallelism_config=plugin, cpu=True)
    model = build_model("llama")
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    losses, tokens = [], []
    for step, batch in enumerate(batches(accelerator.process_index, [8] * 6)):
        losses.append(model(**batch).loss)
        accelerator.backward(losses[-1])
        if (accelerator.process_index, step) != (1, 1):
            optimizer.step()
        optimizer.zero_grad()
        tokens.append(int(batch["attention_mask"].sum()))
    begin = time.perf_counter()
    for own in [watch._watches[accelerator]] if every else []:
        own.finish(together=together)
    waited = time.perf_counter() - begin
    logging.getLogger("accel_tp_ddp").removeHandler(lines)
    reports = [report for own in watch._watches.values() for report in own.reports] if every else []
    return [loss.item() for loss in losses], [report._asdict() for report in reports], lines.lines, tokens, waited


@pytest.mark.parametrize("together", [True, False])
def test_a_replica_that_skips_a_step_is_waited_for_by_nobody(together):
    plain, ours = (run_on_ranks(skipping, 2, every, together, timeout=60) for every in (0, 2))
    assert [rank[0] for rank in ours] == [rank[0] for rank in plain]
    (_, reports, lines, first, waited), (_, _, nothing, second, _) = ours
    assert nothing == []
    assert [report["steps"] for report in reports] == [2, 2, 2]
    assert [report["tokens"] for report in reports[:2]] == [sum(first[:2] + second[:3]), sum(first[2:4] + second[3:5])]
    assert [line.partition(":")[0] for line in lines[:3]] == ["steps to 2", "steps to 4", "steps to 6"]
    if together:  # its last step is known at the end
        assert reports[2]["tokens"] == sum(first[4:] + second[5:])
        assert not any("from" in line for line in lines)
        assert waited < FINAL_WAIT
    else:
        assert reports[2]["tokens"] == sum(first[4:])
        assert ["from 1 of 2 ranks" in line for line in lines] == [False, False, True, True]
        assert waited < 3 * FINAL_WAIT


def unequal(steps):
    """Two reports together, and then as many steps as the rank has batches left."""
    own, model = Watch(1, 1, "cpu", lambda dtype: None), nn.Linear(2, 2)
    own.follow(model)
    rank = torch.distributed.get_rank()

    def take(count, together=True):
        for _ in range(count):
            model(torch.ones(1, 2)).sum().backward()
            if together:
                torch.distributed.barrier()
            own.step()

    take(2)
    with own.without_others():
        take(steps[rank], together=False)
    begin = time.perf_counter()
    own.finish(together=True)
    own.finish(together=True)  # there is nothing more to tell
    waited = time.perf_counter() - begin
    take(1)
    own.finish(together=True)
    return [(report.steps, report.known) for report in own.reports], waited


@pytest.mark.parametrize("steps", [(1, 0), (0, 1), (0, 0), (2, 1)], ids=str)
def test_a_rank_that_took_no_step_since_the_last_report_is_at_the_end_too(steps):
    for rank, (reports, waited) in enumerate(run_on_ranks(unequal, 2, steps, timeout=60)):
        assert reports == [(1, 2), (1, 2), *([(steps[rank], 2)] if any(steps) else []), (1, 2)]
        assert waited < FINAL_WAIT


def keys(both):
    """How many keys the store has after more and more reports; the second rank has some only if `both` have."""
    own, model = Watch(1, 1, "cpu", lambda dtype: None), nn.Linear(2, 2)
    own.follow(model)
    counts = []
    store = torch.distributed.distributed_c10d._get_default_store()
    for _ in range(4):
        for _ in range(2 * KEPT):
            model(torch.ones(1, 2)).sum().backward()
            if both:
                torch.distributed.barrier()
            if both or torch.distributed.get_rank() == 0:
                own.step()
        torch.distributed.barrier()
        counts.append(store.num_keys())
        torch.distributed.barrier()
    return counts, {report.known for report in own.reports}


@pytest.mark.parametrize("both", [True, False])
def test_the_store_does_not_grow_with_the_reports(both):
    (counts, known), (_, others) = run_on_ranks(keys, 2, both, timeout=60)
    assert known == ({2} if both else {1}) and others == ({2} if both else set())
    assert max(counts[1:]) - min(counts[1:]) <= (2 if both else 0), counts


def timed_in_turns():
    stock = [getattr(collectives, name) for name in ("_sum_in_place", "gather_into", "_reduce_scatter")]
    own, models = [Watch(2, 2, "cpu", lambda dtype: None) for _ in range(2)], [nn.Linear(2, 2) for _ in range(2)]
    for each, model in zip(own, models):
        each.follow(model)
    seen = []
    for _ in range(8):
        for model in models:
            model(torch.ones(1, 2)).sum().backward()
        for each in own:
            seen.append(collectives._sum_in_place is not stock[0])
            each.step()
    left = [getattr(collectives, name) for name in ("_sum_in_place", "gather_into", "_reduce_scatter")]
    return seen, left == stock


def test_what_times_collectives_is_put_back_where_two_accelerators_take_turns():
    seen, put_back = run_on_ranks(timed_in_turns, 1)[0]
    assert put_back and any(seen)


def given_up():
    """A step that is timed ends by an error; whether collectives are timed then, and when its accelerator is gone."""
    stock = collectives._sum_in_place
    plugin = TensorParallelDDPPlugin(tp_size=2, watch=2, replica_check_steps=0)
    accelerator = Accelerator(parallelism_config=plugin, cpu=True)
    model = build_model("llama")
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    first, second = batches(0, (8, 8))
    accelerator.backward(model(**first).loss)
    optimizer.step()
    with pytest.raises(TypeError):
        accelerator.backward(model(**second))  # no loss
    timed = collectives._sum_in_place is not stock
    accelerator.free_memory()
    del accelerator, model, optimizer, plugin
    for _ in range(3):  # some of it is held by what the first time collects
        gc.collect()
    return timed, collectives._sum_in_place is stock


def test_what_times_collectives_is_put_back_when_a_step_was_given_up():
    assert run_on_ranks(given_up, 2) == [(True, True)] * 2


# --- Trainer ---------------------------------------------------------------------------------------------------------


def trainer_logs(tp, folder, every):
    watch._watches.clear()
    os.environ["ACCEL_TP_DDP_WATCH"] = str(every)
    trainer = make_trainer(tp, folder, Case())
    trainer.train()
    trainer.evaluate()
    found = [report.tokens for each in watch._watches.values() for report in each.reports]
    return [untimed(row) for row in trainer.state.log_history], found, trainer.state.num_input_tokens_seen


def test_trainer_logs_what_it_logs_and_that_only_where_asked(tmp_path):
    on, off = (run_on_ranks(trainer_logs, 4, 2, str(tmp_path), every) for every in (2, 0))
    for (ours, tokens, seen), (theirs, nothing, _) in zip(on, off):
        added = [{name for name in row if name.startswith("tp/")} for row in ours]
        assert [bool(names) for names in added[:5]] == [False, True, False, True, False]
        assert not any(added[5:])
        assert [
            {name: value for name, value in row.items() if name not in names} for row, names in zip(ours, added)
        ] == (theirs)
        assert sum(tokens) == seen and len(tokens) == 3  # the last step is added at the end of training
        assert nothing == [] and not any("tp/" in name for row in theirs for name in row)


class Telling(TrainerCallback):
    """Logs rows of its own in the middle of a training."""

    def __init__(self, everywhere):
        self.everywhere, self.trainer = everywhere, None

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2 and (self.everywhere or state.is_world_process_zero):
            self.trainer.log({"train_loss": 1.0})


def telling(tp, folder, every, everywhere):
    lines, callback = Lines(), Telling(everywhere)
    logging.getLogger("accel_tp_ddp").addHandler(lines)
    os.environ["ACCEL_TP_DDP_WATCH"] = str(every)
    callback.trainer = trainer = make_trainer(tp, folder, Case())
    trainer.add_callback(callback)
    trainer.train()
    logging.getLogger("accel_tp_ddp").removeHandler(lines)
    rows = [
        {name: value for name, value in untimed(row).items() if "tp/" not in name} for row in trainer.state.log_history
    ]
    return rows, lines.lines


@pytest.mark.parametrize("everywhere", [True, False])
def test_a_row_that_a_callback_logs_is_not_the_end_of_training(everywhere, tmp_path):
    on, off = (run_on_ranks(telling, 2, 2, str(tmp_path), every, everywhere, timeout=60) for every in (3, 0))
    assert [rows for rows, _ in on] == [rows for rows, _ in off]
    assert [line.partition(" in ")[0].partition(":")[0] for line in on[0][1]] == [
        "steps to 3",
        "steps to 5",
        "5 steps",
    ]
    assert on[1][1] == []


class Row(TrainerCallback):
    """Keeps the step and the names of what is logged."""

    def __init__(self):
        self.rows = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        kinds = [kind for kind in ("loss", "train_loss", "tp/tokens_per_second") if kind in logs]
        self.rows.append((state.global_step, *kinds))


class Reported(Row):
    """As a tracker of `report_to`: those are told by where they are from."""

    __module__ = "transformers.integrations.integration_utils"


def told_to_callbacks(tp, folder):
    os.environ["ACCEL_TP_DDP_WATCH"] = "2"
    trainer, tracker, other = make_trainer(tp, folder, Case({"max_steps": 4})), Reported(), Row()
    trainer.add_callback(tracker)
    trainer.add_callback(other)
    trainer.train()
    return tracker.rows, other.rows


def test_trackers_of_trainer_have_a_report_at_the_step_it_belongs_to(tmp_path):
    for tracker, other in run_on_ranks(told_to_callbacks, 2, 2, str(tmp_path)):
        rows = [(1, "loss"), (2, "loss"), (3, "loss"), (4, "loss"), (4, "train_loss")]
        assert other == rows
        assert tracker == [*rows[:2], (2, "tp/tokens_per_second"), *rows[2:], (4, "tp/tokens_per_second")]


def bars(tp, folder):
    """Whether there is a progress bar of Accelerate, and one of Trainer's."""
    trainer = make_trainer(tp, folder, Case({"disable_tqdm": False, "max_steps": 1}))
    (callback,) = [each for each in trainer.callback_handler.callbacks if type(each).__name__ == "ProgressCallback"]
    with mock.patch.object(callback, "on_step_end", wraps=callback.on_step_end) as stepped:
        stepped.side_effect = lambda *args, **kwargs: shown.append(callback.training_bar is not None)
        shown = []
        trainer.train()
    return not tqdm(range(1)).disable, shown


def test_progress_bars_are_on_the_main_process_alone(tmp_path):
    plain, sharded = run_on_ranks(bars, 2, 0, str(tmp_path)), run_on_ranks(bars, 4, 2, str(tmp_path))
    assert plain == [(True, [True]), (False, [False])]
    assert sharded == [plain[0], plain[1], plain[1], plain[1]]


# --- what it is given ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, value", [("watch", -1), ("watch", "often"), ("peak_tflops", 0), ("peak_tflops", "x")])
def test_a_wrong_value_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value!r}; it has to be a"):
        TensorParallelDDPPlugin(**{name: value})


def test_peaks_are_those_of_the_data_sheets_by_the_name_of_the_device(monkeypatch):
    gpu = torch.device("cuda")
    assert watch.peak_of(torch.device("cpu"), torch.bfloat16) is None
    for name, peak in (("NVIDIA H200", 989.4e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA H100 PCIe", None)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert watch.peak_of(gpu, torch.bfloat16) == peak
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert (
        watch.peak_of(gpu, torch.float32) == pytest.approx(66.9e12) and watch.peak_of(gpu, torch.float8_e4m3fn) is None
    )
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert watch.peak_of(gpu, torch.float32) is None  # it would be TF32, of which the sheet says nothing


def compiled_afterwards(every):
    """A script that compiles what `prepare` has returned. Nothing is counted in there; it is one graph still."""
    accelerator = Accelerator(
        parallelism_config=TensorParallelDDPPlugin(tp_size=2, watch=every, replica_check_steps=0),
        cpu=True,
        dynamo_plugin=TorchDynamoPlugin(backend="no"),
    )
    model = build_model("llama", use_cache=False)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    model = torch.compile(model, backend="aot_eager", fullgraph=True)
    losses = []
    for batch in batches(0, (8, 8)):
        losses.append(model(**batch).loss)
        accelerator.backward(losses[-1])
        optimizer.step()
    return [loss.item() for loss in losses]


def test_a_model_that_is_compiled_afterwards_is_one_graph_still():
    assert run_on_ranks(compiled_afterwards, 2, 1) == run_on_ranks(compiled_afterwards, 2, 0)
