"""Runs of `transformers.Trainer`, and how what they log and write is compared."""

import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from accel_tp_ddp import TensorParallelDDPPlugin

from .compare import assert_tensors_close
from .models import VOCABULARY, build_model

PAD = 0
TIMES = ("runtime", "per_second", "preparation_time", "step_time")


def rows(count, seed=0, uneven=True):
    """Token ids of uneven length, each with its labels; the first third of each row is a prompt, not to be learned."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, VOCABULARY, (count, 16), generator=generator)
    lengths = torch.randint(6, 17, (count,), generator=generator) if uneven else torch.full((count,), 16)
    samples = [row[:length] for row, length in zip(tokens, lengths)]
    return [
        {"input_ids": ids.tolist(), "labels": [-100] * (len(ids) // 3) + ids[len(ids) // 3 :].tolist()}
        for ids in samples
    ]


def collate(samples, most=None):
    if most is not None and len(samples) > most:
        raise RuntimeError("CUDA out of memory.")  # what Trainer takes for a sign to try less
    longest = max(len(sample["input_ids"]) for sample in samples)

    def padded(key, value):
        return torch.tensor([sample[key] + [value] * (longest - len(sample[key])) for sample in samples])

    mask = padded("input_ids", PAD) != PAD
    return {"input_ids": padded("input_ids", PAD), "labels": padded("labels", -100), "attention_mask": mask.long()}


def accuracy(prediction):
    logits, labels = prediction.predictions, prediction.label_ids
    counted = labels[:, 1:] != -100
    hits = (logits.argmax(-1)[:, :-1] == labels[:, 1:]) & counted
    return {"accuracy": hits.sum() / counted.sum(), "rows": len(labels), "labels": int(labels[labels != -100].sum())}


def smooth_loss(outputs, labels, num_items_in_batch=None):
    logits = outputs["logits"][:, :-1].flatten(0, 1)
    total = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")
    return total / num_items_in_batch


@dataclass(frozen=True)
class Case:
    """TrainingArguments, and what else a script gives to its Trainer."""

    arguments: dict = field(default_factory=dict)
    model: str = "llama"
    train_rows: int = 27
    uneven: bool = True  # rows of different length; Accelerate's own dispatching refuses those
    data: type | None = None
    metrics: bool = False
    compute_loss: bool = False
    before: bool = False  # evaluates before it trains
    lora: bool = False
    inside: bool = False  # of a module that is no model of transformers
    most_samples: int | None = None  # that fit into memory
    sharded_by_transformers: bool = False  # as far as the model says
    weights: float = 1e-3
    rounded: float = 2e-4


class Inside(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, **batch):
        return self.inner(**batch)


def make_trainer(tp, folder, case):
    from transformers import Trainer, TrainingArguments, set_seed

    set_seed(0)
    train_data, eval_data = rows(case.train_rows, 1, case.uneven), rows(27, 2)
    arguments = {
        "output_dir": folder,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "max_steps": 5,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "learning_rate": 1e-2,
        "max_grad_norm": 0.5,
        "include_num_input_tokens_seen": "non_padding",
        **case.arguments,
    }
    model, plan = build_model(case.model), "auto"
    if case.inside:
        plan = {f"inner.{name}": style for name, style in model.tp_plan.items()}
        model = Inside(model)
    arguments["parallelism_config"] = TensorParallelDDPPlugin(tp_size=tp, tp_plan=plan) if tp else None
    if case.lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(target_modules="all-linear", r=4, task_type="CAUSAL_LM"))
    return Trainer(
        model,
        TrainingArguments(**arguments),
        train_dataset=case.data(train_data) if case.data else train_data,
        eval_dataset=eval_data,
        data_collator=partial(collate, most=case.most_samples),
        compute_metrics=accuracy if case.metrics else None,
        compute_loss_func=smooth_loss if case.compute_loss else None,
    )


def train_and_save(trainer, folder, case, resume):
    first = trainer.evaluate() if case.before else None
    trainer.train(resume_from_checkpoint=resume)
    last = trainer.evaluate()
    predicted = trainer.predict(rows(7, 3)).predictions if case.metrics else None
    trainer.save_model(f"{folder}/final")
    state = trainer.state
    trainer.accelerator.wait_for_everyone()
    return {
        "logs": [untimed(row) for row in state.log_history],
        "evaluated": [untimed(metrics) for metrics in (first, last) if metrics],
        "predicted": predicted,
        "counts": (state.global_step, state.num_input_tokens_seen, state.total_flos, state.epoch),
        "batch": trainer.get_total_train_batch_size(trainer.args),
    }


def untimed(metrics):
    return {name: value for name, value in metrics.items() if not any(time in name for time in TIMES)}


def assert_same(actual, expected, relative):
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.keys() == theirs.keys(), f"{ours} against {theirs}"
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value, rel=relative, abs=1e-7), f"{name} in {ours} against {theirs}"


def assert_same_checkpoint(ours, theirs, tolerance=1e-3):
    """The same files, and in them the same weights, optimizer state and counts."""
    ours, theirs = Path(ours), Path(theirs)
    assert {path.name for path in ours.iterdir()} == {path.name for path in theirs.iterdir()}
    for weights in theirs.glob("*.safetensors"):
        assert_tensors_close(load_file(ours / weights.name), load_file(weights), tolerance)
    if (theirs / "config.json").exists():
        assert json.loads((ours / "config.json").read_text()) == json.loads((theirs / "config.json").read_text())
    if (theirs / "optimizer.pt").exists():
        got, wanted = (torch.load(folder / "optimizer.pt", weights_only=True) for folder in (ours, theirs))
        assert got["param_groups"] == wanted["param_groups"] and got["state"].keys() == wanted["state"].keys()
        for index, state in wanted["state"].items():
            ours, theirs = ({k: torch.as_tensor(v) for k, v in s.items()} for s in (got["state"][index], state))
            assert_tensors_close(ours, theirs, tolerance)


WORST_AT_THE_END = {"load_best_model_at_end": True, "greater_is_better": True}  # the best would be the last
