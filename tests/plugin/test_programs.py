"""Programs that know nothing of tensor parallelism do at tp 2 x dp 2 what they do under plain DDP on 2 ranks.

What each of them asks of Accelerate differs: the number of processes, rows gathered by hand, negatives of all
processes, a folder written by some other `save`. The scripts themselves, unchanged: `tests/system/test_programs.py`.
"""

import json
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file

from accel_tp_ddp import TensorParallelDDPPlugin
from benchmarks.programs import standins

from ..helpers.compare import assert_tensors_close
from ..helpers.models import VOCABULARY, build_model
from ..helpers.ranks import run_on_ranks
from ..helpers.trainer import assert_same, untimed
from ..helpers.trl import without_noise

TP, DP = 2, 2
TOLERANCE = 2e-4


def plugin(tp):
    return TensorParallelDDPPlugin(tp_size=tp) if tp > 1 else None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Small models and data sets."""
    built = tmp_path_factory.mktemp("programs") / "standins"
    standins.build(built)
    return built


def both(fn, *args):
    """What `fn(tp, ...)` gives on each rank of plain DDP, and of tp x dp by replica."""
    plain = run_on_ranks(fn, DP, 1, *args)
    ours = run_on_ranks(fn, TP * DP, TP, *args)
    return [(ours[replica * TP + peer], plain[replica]) for replica in range(DP) for peer in range(TP)]


# --- a loop of one's own over Accelerator ----------------------------------------------------------------------------

EVALUATED = 13  # rows, on 2 replicas in batches of 3: the last batch is filled up


def train_and_count(tp):
    """A loop that counts by processes, as examples without a Trainer do."""
    from accelerate import Accelerator
    from accelerate.utils import gather_object, set_seed
    from torch.utils.data import DataLoader
    from transformers import get_scheduler

    set_seed(0)
    accelerator = Accelerator(parallelism_config=plugin(tp), gradient_accumulation_steps=2)
    data = torch.randint(1, VOCABULARY, (47, 12))
    rows = [{"input_ids": row, "labels": row, "id": index} for index, row in enumerate(data)]
    per_device, epochs = 3, 2
    model = build_model("llama")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loader = DataLoader(rows[EVALUATED:], batch_size=per_device, shuffle=True)
    evaluation = DataLoader(rows[:EVALUATED], batch_size=per_device)
    model, optimizer, loader, evaluation = accelerator.prepare(model, optimizer, loader, evaluation)
    steps = epochs * -(-len(loader) // 2)
    scheduler = get_scheduler(
        "linear",
        optimizer,
        num_warmup_steps=2 * accelerator.num_processes,
        num_training_steps=steps * accelerator.num_processes,
    )
    scheduler = accelerator.prepare(scheduler)
    found = {"rates": [], "losses": [], "rows": [], "predicted": []}
    found["batch"] = per_device * accelerator.num_processes * accelerator.gradient_accumulation_steps
    for _ in range(epochs):
        model.train()
        for batch in loader:
            batch.pop("id")
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            found["losses"].append(accelerator.gather(loss.detach().repeat(per_device)).mean().item())
            if accelerator.sync_gradients:
                found["rates"].append(scheduler.get_last_lr()[0])
    model.eval()
    seen = 0
    for step, batch in enumerate(evaluation):
        with torch.no_grad():
            predicted = model(input_ids=batch["input_ids"]).logits[:, -1].argmax(-1)
        ids, predicted = accelerator.gather((batch["id"], predicted))
        if step == len(evaluation) - 1:
            ids, predicted = ids[: EVALUATED - seen], predicted[: EVALUATED - seen]
        seen += len(ids)
        found["rows"] += ids.tolist()
        found["predicted"] += predicted.tolist()
    found["objects"] = gather_object([accelerator.process_index])
    found["sum"] = accelerator.reduce(torch.ones(()), reduction="sum").item()
    found["index"] = accelerator.process_index
    uneven = torch.ones(accelerator.process_index + 1)
    found["padded"] = accelerator.gather(accelerator.pad_across_processes(uneven)).tolist()
    with accelerator.split_between_processes(list(range(5))) as own:
        found["own"] = own
    return found


@pytest.fixture(scope="module")
def loops():
    return both(train_and_count)


def test_a_schedule_over_steps_times_processes_is_walked_to_its_end(loops):
    for ours, plain in loops:
        assert plain["rates"][-1] == 0 and max(plain["rates"]) == 1e-2
        assert ours["rates"] == plain["rates"]
        assert ours["losses"] == pytest.approx(plain["losses"], rel=TOLERANCE)


def test_rows_gathered_and_cut_by_hand_are_each_there_once(loops):
    for ours, plain in loops:
        assert plain["rows"] == list(range(EVALUATED))
        assert ours["rows"] == plain["rows"] and ours["predicted"] == plain["predicted"]


def test_what_is_counted_and_summed_over_processes_is_counted_over_replicas(loops):
    for ours, plain in loops:
        assert (plain["batch"], plain["objects"], plain["sum"]) == (12, [0, 1], 2.0)
        for name in ("batch", "objects", "sum", "index", "padded", "own"):
            assert ours[name] == plain[name], name


# --- TRL -------------------------------------------------------------------------------------------------------------


def liked(completions, **kwargs):
    return [sum(text.count(word) for word in ("w1", "w2", "w3")) + len(text) / 50 for text in completions]


def train_with_trl(tp, kind, folder, output):
    import trl
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    set_seed(0)
    plugged = plugin(tp)
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/model")
    arguments = {
        "output_dir": f"{output}/{kind}-{tp}",
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "learning_rate": 1e-2,
        "bf16": False,
        "gradient_checkpointing": False,
        "max_completion_length": 6,
        "parallelism_config": plugged,
    }
    data = load_dataset(f"{folder}/data/prompts", split="train", cache_dir=f"{output}/{tp}-{torch.initial_seed()}")
    shared = {"train_dataset": data, "processing_class": AutoTokenizer.from_pretrained(f"{folder}/model")}
    if kind == "distillation":
        teacher = AutoModelForCausalLM.from_pretrained(f"{folder}/teacher")
        trainer = trl.DistillationTrainer(model, teacher, args=trl.DistillationConfig(**arguments), **shared)
    else:
        kind, _, option = kind.partition(" ")
        arguments |= {"num_generations": 4, "beta": 0.1}
        arguments |= {option: 16} if option else {}
        config = getattr(trl, f"{kind}Config")(**arguments)
        trainer = getattr(trl, f"{kind}Trainer")(model, reward_funcs=liked, args=config, **shared)
    trainer.train()
    return [untimed(row) for row in trainer.state.log_history]


KINDS = ["RLOO", "distillation", "GRPO generation_batch_size"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_trainer_of_trl_logs_what_it_logs_under_plain_ddp(kind, folder, tmp_path):
    pytest.importorskip("trl")
    for ours, plain in both(train_with_trl, kind, str(folder), str(tmp_path)):
        assert sum("loss" in row for row in plain) == 3
        for row, expected in zip(ours, plain, strict=True):
            assert row.get("num_tokens") == expected.get("num_tokens")
        assert_same([without_noise(row) for row in ours], [without_noise(row) for row in plain], 5e-4)


# --- sentence-transformers -------------------------------------------------------------------------------------------

LOSSES = {
    "gathered": ("MultipleNegativesRankingLoss", {"gather_across_devices": True}),
    "cached": ("CachedMultipleNegativesRankingLoss", {"mini_batch_size": 2}),
    "cached, gathered": ("CachedMultipleNegativesRankingLoss", {"mini_batch_size": 2, "gather_across_devices": True}),
}


@dataclass
class Embedded:
    logs: list
    evaluated: dict | None


def train_embeddings(tp, kind, folder, output, evaluate=False):
    from datasets import load_dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer import losses
    from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator
    from transformers import set_seed

    set_seed(0)
    name, options = LOSSES[kind]
    arguments = SentenceTransformerTrainingArguments(
        output_dir=f"{output}/{tp}",
        max_steps=3,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        logging_steps=1,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        parallelism_config=plugin(tp),
    )
    cache = f"{output}/cache-{tp}"
    data = load_dataset(f"{folder}/data/triplets", split="train", cache_dir=cache)
    model = SentenceTransformer(f"{folder}/bert-base-cased", device="cpu")
    pairs = load_dataset(f"{folder}/data/scored", split="test", cache_dir=cache)
    evaluator = EmbeddingSimilarityEvaluator(pairs["sentence1"], pairs["sentence2"], pairs["score"], name="pairs")
    loss = getattr(losses, name)(model, **options)
    trainer = SentenceTransformerTrainer(model, arguments, train_dataset=data, loss=loss, evaluator=evaluator)
    trainer.train()
    evaluated = untimed(trainer.evaluate()) if evaluate else None
    trainer.save_model(f"{output}/{tp}/final")
    model.save(f"{output}/{tp}/saved")
    trainer.accelerator.wait_for_everyone()
    return Embedded([untimed(row) for row in trainer.state.log_history if "loss" in row], evaluated)


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[] if k == "gathered" else pytest.mark.slow) for k in LOSSES])
def test_a_sentence_transformer_learns_and_saves_what_it_does_under_plain_ddp(kind, folder, tmp_path):
    pytest.importorskip("sentence_transformers")
    for ours, plain in both(train_embeddings, kind, str(folder), str(tmp_path)):
        assert sum("loss" in row for row in plain.logs) == 3
        assert_same(ours.logs, plain.logs, TOLERANCE)
    for saved in ("final", "saved"):
        ours, plain = tmp_path / f"{TP}" / saved, tmp_path / "1" / saved
        names = {str(path.relative_to(plain)) for path in plain.rglob("*")}
        assert {str(path.relative_to(ours)) for path in ours.rglob("*")} == names
        got, expected = (load_file(path / "model.safetensors") for path in (ours, plain))
        assert {name: tensor.shape for name, tensor in got.items()} == {n: t.shape for n, t in expected.items()}
        assert_tensors_close(got, expected, 1e-3)
        assert json.loads((ours / "config.json").read_text()) == json.loads((plain / "config.json").read_text())


def test_a_sentence_transformer_is_evaluated_once_by_all_replicas(folder, tmp_path):
    pytest.importorskip("sentence_transformers")
    for ours, plain in both(train_embeddings, "gathered", str(folder), str(tmp_path), True):
        assert (ours.evaluated or {}).keys() == (plain.evaluated or {}).keys()
        for name, value in (plain.evaluated or {}).items():
            assert ours.evaluated[name] == pytest.approx(value, rel=TOLERANCE, abs=1e-6), name
