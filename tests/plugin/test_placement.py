"""A model goes to the device when it has been sharded: each move is seen, with what the model holds then."""

import copy

import pytest
import torch
from torch import nn

from accel_tp_ddp import TensorParallelDDPPlugin
from accel_tp_ddp.plugin.placement import empty_cache, end_waiting, move_but_for, wait_for_prepare, waits_for

from ..helpers.models import build_model
from ..helpers.ranks import run_on_ranks
from ..helpers.trainer import collate, rows

MOVES: list[int] = []


def watched(model):
    """Let `model` note how many elements it holds whenever it, or what it is a part of, is moved."""

    class Watched(type(model)):
        def _apply(self, fn, recurse=True):
            MOVES.append(elements(self))
            return super()._apply(fn, recurse)

    Watched.__name__ = type(model).__name__
    model.__class__ = Watched
    return model


def elements(model):
    return sum(param.numel() for param in model.parameters())


def with_lora(model):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(target_modules="all-linear", r=4, task_type="CAUSAL_LM"))


def settings(tp, folder, **options):
    return {
        "output_dir": folder,
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "parallelism_config": TensorParallelDDPPlugin(tp_size=tp) if tp else None,
        **options,
    }


def make_trainer(tp, folder, lora=False, made=False, **options):
    from transformers import Trainer, TrainingArguments

    model = watched(build_model("llama"))
    given = {"model_init": lambda: watched(build_model("llama"))} if made else {"model": model}
    if lora:
        given = {"model": with_lora(model)}
    return Trainer(
        **given,
        args=TrainingArguments(**settings(tp, folder, **options)),
        train_dataset=rows(16),
        eval_dataset=rows(8),
        data_collator=collate,
    )


def make_dpo(tp, folder):
    trl = pytest.importorskip("trl")
    from ..helpers.trl import dataset, tokenizer

    return trl.DPOTrainer(
        watched(build_model("llama")),
        watched(build_model("llama")),
        trl.DPOConfig(**settings(tp, folder, bf16=False, gradient_checkpointing=False)),
        train_dataset=dataset("prompt", "chosen", "rejected"),
        processing_class=tokenizer(),
    )


USES = {
    "predict": (make_trainer, {}, ["predict"]),
    "train, evaluate, train": (make_trainer, {}, ["train", "evaluate", "train"]),
    "model_init": (make_trainer, {"made": True}, ["train"]),
    "evaluation in bf16": (make_trainer, {"bf16_full_eval": True}, ["evaluate", "train"]),
    "LoRA": (make_trainer, {"lora": True}, ["train"]),
    "DPO": (make_dpo, {}, ["train"]),
}


def moved(tp, folder, name):
    """The most elements that were moved at once, those that are held in the end, and whether all has moved."""
    make, options, calls = USES[name]
    MOVES.clear()
    trainer = make(tp, folder, **options)
    for call in calls:
        getattr(trainer, call)(*([rows(8)] if call == "predict" else []))
    model = trainer.accelerator.unwrap_model(trainer.model)
    assert MOVES and waits_for(model) is None
    return max(MOVES), elements(model.get_base_model() if options.get("lora") else model)


@pytest.mark.parametrize("name", USES)
def test_no_more_of_a_model_than_its_shards_is_moved(name, tmp_path):
    if name == "DPO":
        pytest.importorskip("trl")
    ((most, held),) = run_on_ranks(moved, 1, None, str(tmp_path), name)
    assert most == held, "plainly all of it"
    for most_sharded, held_sharded in run_on_ranks(moved, 2, 2, str(tmp_path), name):
        assert most_sharded == held_sharded < 0.6 * most


def called_before(tp, folder):
    trainer = make_trainer(tp, folder)
    MOVES.clear()
    batch = collate(rows(4))
    copied = copy.deepcopy(trainer.model)
    before = trainer.model(**batch).loss.item()
    moves = list(MOVES)
    same = copied(**batch).loss.item() == before
    trainer.train()
    return before, same, moves[:1] == [elements(copied)]


def test_a_model_that_is_called_before_it_is_prepared_is_moved_first(tmp_path):
    ((plain, *_),) = run_on_ranks(called_before, 1, None, str(tmp_path))
    assert run_on_ranks(called_before, 2, 2, str(tmp_path)) == [(plain, True, True)] * 2


class Loss(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.inner = nn.ModuleDict({"model": model})
        self.head = nn.Linear(2, 2)
        self.register_buffer("weights", torch.ones(2))


def test_what_a_loss_has_of_its_own_does_not_wait_with_its_model():
    model, meta = nn.Linear(2, 2), torch.device("meta")
    loss = Loss(model)
    wait_for_prepare(model, meta)
    move_but_for(model, loss, waits_for(model))
    assert {t.device for t in (*loss.head.parameters(), loss.weights)} == {meta}
    assert model.weight.device.type == "cpu" and end_waiting(model) == meta
    assert waits_for(model) is end_waiting(model) is None and not model._forward_pre_hooks


def test_waiting_ends_with_the_first_call_of_the_model_or_of_its_copy():
    model, meta = nn.Linear(2, 2), torch.device("meta")
    wait_for_prepare(model, torch.device("cpu"))
    wait_for_prepare(model, meta)
    copied = copy.deepcopy(model)
    assert copied(torch.ones(2, device="meta")).device == copied.weight.device == meta
    assert waits_for(copied) is None and waits_for(model) == meta and model.weight.device.type == "cpu"


def test_there_may_be_no_cache_to_empty():
    empty_cache("cpu")
