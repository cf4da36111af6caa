"""A run that is saved after three steps and continues, and runs that resume from what it has saved."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch.utils.data import DataLoader
from transformers import get_linear_schedule_with_warmup

from accel_tp_ddp import CheckpointError, full_state_dict
from accel_tp_ddp.core.shard import shard_info
from accel_tp_ddp.core.wrappers import unwrap

from .models import build_model
from .training import SyntheticTokens, make_accelerator, make_optimizer

LAYOUTS = {"1x1": (1, 1), "1x2": (1, 2), "2x1": (2, 1), "2x2": (2, 2), "4x1": (4, 1)}  # tp x dp
SAVED_AFTER, MORE = 3, 3
GLOBAL_BATCH = 4  # whatever the number of replicas, so that runs at all layouts are one run


class WholeTokens(SyntheticTokens):
    """Without padding: then the mean over replicas is the mean over samples."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


@dataclass(frozen=True)
class Run:
    """`tp` None: Accelerate without the plugin."""

    tp: int | None
    model: str = "llama"
    optimizer: str = "adamw"
    options: tuple = ()  # of the model's config

    def with_tp(self, tp: int | None) -> Run:
        return Run(tp, self.model, self.optimizer, self.options)


@dataclass
class Saved:
    """What a run saw, and what it held when it was saved (on the main process)."""

    losses: list[float] = field(default_factory=list)
    learning_rates: list[float] = field(default_factory=list)
    state: dict[str, torch.Tensor] = field(default_factory=dict)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    same_objects: bool = True
    step: int = 0


class Prepared:
    def __init__(self, run: Run, seed: int = 0, **options: Any):
        set_seed(7)
        config = DataLoaderConfiguration(split_batches=True, use_seedable_sampler=True)
        self.accelerator: Accelerator = make_accelerator(run.tp, dataloader_config=config, **options)
        model = build_model(run.model, seed=seed, **dict(run.options))
        optimizer = make_optimizer(model, run.optimizer)
        scheduler = get_linear_schedule_with_warmup(optimizer, num_warmup_steps=2, num_training_steps=20)
        loader = DataLoader(WholeTokens(32, seed=1), batch_size=GLOBAL_BATCH, shuffle=True)
        self.model, self.optimizer, self.loader, self.scheduler = self.accelerator.prepare(
            model, optimizer, loader, scheduler
        )
        torch.manual_seed(100 + self.accelerator.process_index)  # another one for each replica

    def train(self, batches: Any, steps: int, record: Saved) -> None:
        self.model.train()
        for number, batch in enumerate(batches):
            if number == steps:
                break
            with self.accelerator.accumulate(self.model):
                loss = self.model(**batch).loss
                self.accelerator.backward(loss)
                self.accelerator.clip_grad_norm_(self.model.parameters(), 0.5)
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
            loss = self.accelerator.gather_for_metrics(loss.detach().repeat(len(batch["input_ids"]))).mean()
            record.losses.append(loss.item())
            record.learning_rates.append(self.scheduler.get_last_lr()[0])

    def look(self, record: Saved) -> None:
        """The full optimizer state and weights; collective."""
        record.state = full_optimizer_state(self.model, self.optimizer)
        record.weights = {name: tensor.clone() for name, tensor in full_state_dict(self.model).items()}
        record.step = self.accelerator.step

    def ids(self) -> list[int]:
        state = unwrap(self.model).state_dict(keep_vars=True)
        return [id(tensor) for tensor in state.values()]


def full_optimizer_state(model: torch.nn.Module, optimizer: Any) -> dict[str, torch.Tensor]:
    result = {}
    for name, param in unwrap(model).named_parameters():
        info = shard_info(param)
        for key, value in sorted(optimizer.state[param].items()):
            if isinstance(value, torch.Tensor):
                whole = value.shape != param.shape or info is None
                result[f"{name} {key}"] = (value.detach() if whole else info.full_tensor(value)).cpu().clone()
    return result


def save_and_go_on(run: Run, folder: str) -> Saved:
    record, prepared = Saved(), Prepared(run)
    prepared.train(prepared.loader, SAVED_AFTER, record)
    prepared.accelerator.save_state(folder)
    prepared.look(record)
    rest = prepared.accelerator.skip_first_batches(prepared.loader, SAVED_AFTER)
    prepared.train(rest, MORE, record)
    return record


def go_on_from(run: Run, folders: list[str]) -> list[Saved]:
    """From each of `folders` in turn, beginning with other weights."""
    prepared, records = Prepared(run, seed=5), []
    for folder in folders:
        record, before = Saved(), prepared.ids()
        prepared.accelerator.load_state(folder)
        record.same_objects = prepared.ids() == before
        prepared.look(record)
        rest = prepared.accelerator.skip_first_batches(prepared.loader, SAVED_AFTER)
        prepared.train(rest, MORE, record)
        records.append(record)
    return records


def message_of(call, *kinds):
    """What `call` raises; it has to."""
    try:
        call()
    except kinds or (CheckpointError,) as error:
        return str(error)
    raise AssertionError("nothing was raised")
