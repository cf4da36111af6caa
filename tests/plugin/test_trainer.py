"""`transformers.Trainer` under the plugin does what it does under plain DDP: logs, counts, checkpoints, resuming."""

import atexit
import multiprocessing
import shutil
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from unittest import mock

import pytest
import torch
import transformers

from accel_tp_ddp import TensorParallelDDPPlugin
from accel_tp_ddp.core import store
from accel_tp_ddp.core.override import stock_of
from accel_tp_ddp.plugin import trainer

from ..helpers.faults import injected
from ..helpers.models import VOCABULARY, build_model
from ..helpers.ranks import RanksError, run_on_ranks
from ..helpers.trainer import (
    PAD,
    WORST_AT_THE_END,
    Case,
    assert_same,
    assert_same_checkpoint,
    collate,
    make_trainer,
    rows,
    train_and_save,
)


class Streamed(torch.utils.data.IterableDataset):
    def __init__(self, samples):
        self.samples = samples

    def __iter__(self):
        return iter(self.samples)


class Augmented(torch.utils.data.Dataset):
    """Each sample is drawn anew from torch's random state, as augmentation in a worker does it."""

    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        ids = torch.randint(1, VOCABULARY, (12,)).tolist()
        return {"input_ids": ids, "labels": ids}


def run(tp, folder, case, resume=None, without=None, fault=None):
    """Train, evaluate, predict and save; what the trainer has logged and counted, on every rank.

    Without the override of that name, or with a fault injected, if one is given.
    """
    multiprocessing.current_process()._config["daemon"] = False  # or a rank could not start data workers
    with injected(fault):
        trainer = make_trainer(tp, folder, case)
        if case.sharded_by_transformers and tp:
            trainer.model._tp_size = tp
        if without is None:
            return train_and_save(trainer, folder, case, resume)
    stock = {name: stock_of(transformers.Trainer, name) for name in TOGETHER.get(without, (without,))}
    with mock.patch.multiple(transformers.Trainer, **stock), mock.patch.object(store, "PEERS_TIMEOUT", 1.0):
        return train_and_save(trainer, folder, case, resume)


@cache
def plain(case_name, dp=2):
    """What a case gives under plain DDP, and the folder it wrote. Computed once a session."""
    folder = tempfile.mkdtemp(prefix="plain_ddp_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    # Plain DDP never wraps a model that was evaluated before training, so there the reference is not evaluated then.
    case = replace(CASES[case_name], before=False)
    return run_on_ranks(run, dp, None, folder, case), Path(folder)


def assert_invisible(case_name, folder, dp=2, **options):
    case, (theirs, reference) = CASES[case_name], plain(case_name, dp)
    ours = run_on_ranks(run, 2 * dp, 2, str(folder), case, **options)
    for rank, got in enumerate(ours):
        wanted = theirs[rank // 2]
        assert len(wanted["logs"]) > 4 and wanted["logs"][0].keys() & {"loss", "eval_loss"}
        assert_same(got["logs"], wanted["logs"], case.rounded)
        assert_same(got["evaluated"][1 if case.before else 0 :], wanted["evaluated"], case.rounded)
        assert got["counts"] == pytest.approx(wanted["counts"], rel=1e-9) and got["batch"] == wanted["batch"]
        if case.metrics:
            assert got["predicted"].shape == wanted["predicted"].shape == (7, *wanted["predicted"].shape[1:])
            assert torch.allclose(torch.tensor(got["predicted"]), torch.tensor(wanted["predicted"]), atol=1e-3)
    assert_same_checkpoint(folder / "final", reference / "final", case.weights)
    saved = {path.name for path in reference.glob("checkpoint-*")}
    assert {path.name for path in folder.glob("checkpoint-*")} == saved
    assert bool(saved) == (case.arguments.get("save_strategy") == "steps")
    for name in saved:
        assert_same_checkpoint(folder / name, reference / name)


CASES = {
    "base": Case({"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}),
    "accumulation": Case({"gradient_accumulation_steps": 2, "num_train_epochs": 2, "max_steps": -1}, train_rows=22),
    "tokens counted on each device": Case({"average_tokens_across_devices": False}, sharded_by_transformers=True),
    "grouped by length": Case({"train_sampling_strategy": "group_by_length"}),
    "rebalanced batches": Case({"train_sampling_strategy": "batch_rebalance"}, train_rows=40),
    "streaming": Case(data=Streamed, uneven=False),
    "two workers": Case({"dataloader_num_workers": 2, "dataloader_multiprocessing_context": "fork"}, data=Augmented),
    "metrics": Case({"eval_strategy": "steps", "eval_steps": 2}, metrics=True),
    "evaluation on start": Case({"eval_on_start": True}),
    "best model at the end": Case(
        {
            "eval_strategy": "steps",
            "eval_steps": 2,
            "save_strategy": "steps",
            "save_steps": 2,
            **WORST_AT_THE_END,
        }
    ),
    "gradient checkpointing": Case({"gradient_checkpointing": True}),
    "adafactor": Case({"optim": "adafactor"}),
    "label smoothing": Case({"label_smoothing_factor": 0.1}),
    "own loss": Case({"gradient_accumulation_steps": 2}, compute_loss=True),
    "no clipping": Case({"max_grad_norm": 0.0}),
    "only the model saved": Case({"save_strategy": "steps", "save_steps": 4, "save_only_model": True}),
    "evaluated before training": Case(before=True),
    "LoRA": Case(
        {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, **WORST_AT_THE_END},
        lora=True,
    ),
    "bf16": Case({"bf16": True}, rounded=2e-2, weights=3e-2),
    "a batch size that fits": Case(
        {"per_device_train_batch_size": 8, "auto_find_batch_size": True, "eval_strategy": "no"}, most_samples=6
    ),
    "compiled": Case({"torch_compile": True, "torch_compile_backend": "aot_eager", "max_steps": 3}, uneven=False),
    "a module of one's own": Case(
        {"save_strategy": "steps", "save_steps": 4, "remove_unused_columns": False, "label_names": ["labels"]},
        inside=True,
    ),
    "noise on the embeddings": Case({"neftune_noise_alpha": 5.0}),
}


SLOW = {"compiled"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in CASES])
def test_a_trainer_run_is_that_of_plain_ddp(name, tmp_path):
    assert_invisible(name, tmp_path)


def test_a_trainer_run_with_one_replica_is_that_of_a_single_process(tmp_path):
    assert_invisible("base", tmp_path, dp=1)


# --- resuming --------------------------------------------------------------------------------------------------------

# The state of torch's generators decides over the noise, so it shows whether that was saved and restored.
RESUMED = {"save_strategy": "steps", "save_steps": 3, "neftune_noise_alpha": 5.0, "lr_scheduler_type": "constant"}
RANKS_AND_TP = {"plain DDP": (2, None), "tp2 x dp2": (4, 2)}


def steps_logged(layout, folder, steps, **options):
    """What each replica's first rank logs at each step, and in the evaluation at the end."""
    ranks, tp = RANKS_AND_TP[layout]
    results = run_on_ranks(run, ranks, tp, str(folder), Case({**RESUMED, "max_steps": steps}), **options)
    return [[row for row in result["logs"] if "train_loss" not in row] for result in results[:: tp or 1]]


@cache
def uninterrupted():
    with tempfile.TemporaryDirectory() as folder:
        return steps_logged("plain DDP", folder, 6)


def assert_resumes(before, after, folder, **options):
    """Train to step 3 in one layout, and go on in another, with all objects made anew."""
    steps_logged(before, folder, 3)
    resumed = steps_logged(after, folder, 6, resume=f"{folder}/checkpoint-3", **options)
    for logs, expected in zip(resumed, uninterrupted(), strict=True):
        assert len(expected) == 7
        assert_same(logs, expected, 2e-4)


@pytest.mark.parametrize(
    "before, after", [("tp2 x dp2", "tp2 x dp2"), ("plain DDP", "tp2 x dp2"), ("tp2 x dp2", "plain DDP")]
)
def test_a_stopped_trainer_run_resumes_as_if_it_had_not_been_stopped(before, after, tmp_path):
    assert_resumes(before, after, tmp_path)


# --- teeth -----------------------------------------------------------------------------------------------------------

# What shows that an override is needed: the case that is off without it.
NEEDED_BY = {
    "get_tp_size": "tokens counted on each device",
    "train": "evaluated before training",
    "_save": "a module of one's own",
    "_save_optimizer_and_scheduler": "base",
}

# Taken out together: `save_model` changes nothing in transformers 5.23, and does all that is needed in 5.20.
TOGETHER = {"_save": ("_save", "save_model")}


def test_each_override_of_trainer_has_a_run_that_needs_it():
    # The search is seen further down, when the model moves in test_placement; that two ranks write one file at once,
    # by chance alone; the random states of GPUs, with one; and what a loss takes from full logits is memory, and time.
    others = {"hyperparameter_search", "save_model", "_save_rng_state", "_load_rng_state", "_move_model_to_device"}
    assert NEEDED_BY.keys() | others | {"compute_loss"} == {
        row.name for row in (*trainer.OVERRIDES, *trainer.OVERRIDES_OF_STATES)
    }


@pytest.mark.parametrize("override", NEEDED_BY)
def test_without_the_override_a_trainer_run_is_not_that_of_plain_ddp(override, tmp_path):
    with pytest.raises((AssertionError, RanksError)):
        assert_invisible(NEEDED_BY[override], tmp_path, without=override)


def test_where_flos_are_summed_over_ranks_a_trainer_run_is_not_that_of_plain_ddp(tmp_path):
    with pytest.raises(AssertionError):
        assert_invisible("base", tmp_path, fault="flos of every rank")


@pytest.mark.parametrize("case", ["base", "two workers", "tokens counted on each device"])
def test_where_ranks_count_themselves_a_trainer_run_is_not_that_of_plain_ddp(case, tmp_path):
    with pytest.raises((AssertionError, RanksError)):
        assert_invisible(case, tmp_path, fault="ranks that count themselves")


def test_where_ranks_count_themselves_a_resumed_run_is_another(tmp_path):
    with pytest.raises((AssertionError, RanksError)):
        assert_resumes("tp2 x dp2", "tp2 x dp2", tmp_path, fault="ranks that count themselves")


def searched(folder):
    make_trainer(2, folder, Case()).hyperparameter_search(backend="optuna", n_trials=1)


def test_a_hyperparameter_search_is_refused(tmp_path):
    for raised in run_on_ranks(searched, 2, str(tmp_path), expect_raise=True):
        assert raised.type_name == "NotImplementedError" and "tp_size=2" in raised.message


# --- generation in evaluation ----------------------------------------------------------------------------------------


def generated(tp, folder):
    """Greedy and sampled, by the trainer that generates in evaluation."""
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, set_seed

    set_seed(0)
    results = []
    for sampled in (False, True):
        arguments = Seq2SeqTrainingArguments(
            folder,
            per_device_eval_batch_size=2,
            predict_with_generate=True,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            parallelism_config=TensorParallelDDPPlugin(tp_size=tp) if tp else None,
        )
        data = [{"input_ids": row["input_ids"][:6], "labels": row["input_ids"][:6]} for row in rows(7, 5)]
        trainer = Seq2SeqTrainer(build_model("qwen3"), arguments, data_collator=collate, eval_dataset=data)
        prediction = trainer.predict(data, max_new_tokens=6, do_sample=sampled, pad_token_id=PAD)
        results.append(prediction.predictions.tolist())
    return results


def test_predictions_that_are_generated_are_those_of_plain_ddp(tmp_path):
    expected = run_on_ranks(generated, 2, None, str(tmp_path))
    assert len(expected[0][0]) == 8 and expected[0][0] != expected[0][1]  # upstream, with one to fill up the batch
    for results in run_on_ranks(generated, 4, 2, str(tmp_path)):
        assert results == expected[0]


def views_under_trainer(folder):
    made = make_trainer(2, folder, Case())
    made.train()
    return made.model_wrapped.gradient_as_bucket_view, made.accelerator.ddp_handler.gradient_as_bucket_view


def test_trainers_own_ddp_settings_leave_bucket_views_open(tmp_path):
    assert run_on_ranks(views_under_trainer, 4, str(tmp_path)) == [(True, False)] * 4
