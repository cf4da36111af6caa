"""One ordinary Accelerate training script. Only `make_accelerator` knows whether there is tensor parallelism."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import TorchDynamoPlugin, set_seed
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset
from transformers import AutoModelForCausalLM, get_linear_schedule_with_warmup
from transformers.optimization import Adafactor

from .compare import relative_errors
from .models import VOCABULARY, build_model

TRAIN_SAMPLES = 22  # at a batch of 4, on one and on two replicas alike, the last batch is not full
EVAL_SAMPLES = 11
BATCH = 4
LENGTH = 12
# The contract allows 2e-4. Rounding moves these runs by 1e-6 at most (test_training.py holds that), so less will do.
TOLERANCE = 2e-5  # relative, of losses, learning rates and gradient norms
WEIGHT_TOLERANCE = 1e-4  # relative, of each tensor's norm, after all steps
SERIES = ("losses", "learning_rates", "gradient_norms", "eval_losses")


@dataclass(frozen=True)
class Spec:
    """A training run; hashable, so that a reference is computed once. `tp` None: Accelerate without the plugin."""

    model: str
    tied: bool = False
    tp: int | None = None
    accumulation: int = 1
    max_norm: float | None = 0.5
    checkpointing: str | None = None  # "reentrant" or "non_reentrant"
    mixed_precision: str = "no"
    dtype: str = "float32"  # of the weights
    autocast: str | None = None  # by the script itself, as Accelerate has no fp16 on CPUs
    attention: str | None = None
    decay: str = "ndim"  # which parameters decay, see `make_optimizer`
    optimizer: str = (
        "adamw"  # of OPTIMIZERS; "sgd", whose steps show a wrong gradient scale, which Adam's normalisation hides
    )
    steps: int = 6
    samples: int = TRAIN_SAMPLES
    vocabulary: int = VOCABULARY  # the ids drawn stay below the default
    noise: float = 0.0  # relative, on every initial weight: to see what rounding alone does
    lora: bool = False  # whether adapters are trained
    compiled: str | None = None  # "whole" or "by layer", by Accelerate
    folder: str | None = None  # of a checkpoint: the model is loaded from there, in slices where there are any

    @property
    def exact(self) -> Spec:
        """The same run in single precision."""
        return replace(self, mixed_precision="no", dtype="float32", autocast=None)


@dataclass
class Record:
    """What one rank saw. Weights only on the main process, where `get_state_dict` promises them."""

    losses: list[float] = field(default_factory=list)  # per batch, the mean over the replicas
    learning_rates: list[list[float]] = field(default_factory=list)  # per optimizer step and parameter group
    gradient_norms: list[float] = field(default_factory=list)  # per optimizer step, where clipping is on
    ids: list[list[int]] = field(default_factory=list)  # per batch, of this rank
    eval_losses: list[list[float]] = field(default_factory=list)  # per epoch and sample
    eval_ids: list[list[int]] = field(default_factory=list)  # per epoch and sample
    weights: dict[str, torch.Tensor] | None = None


class SyntheticTokens(Dataset):
    """Seeded token ids of ragged length, padded on the right; each sample says which one it is."""

    def __init__(self, count: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.randint(1, VOCABULARY, (count, LENGTH), generator=generator)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        mask = (torch.arange(LENGTH) < LENGTH - index % 5).long()
        tokens = self.tokens[index] * mask
        labels = tokens.masked_fill(mask == 0, -100)
        return {"id": torch.tensor(index), "input_ids": tokens, "attention_mask": mask, "labels": labels}


def make_accelerator(tp: int | None, **options: Any) -> Accelerator:
    if tp is None:
        return Accelerator(**options)
    from accel_tp_ddp import TensorParallelDDPPlugin

    return Accelerator(parallelism_config=TensorParallelDDPPlugin(tp_size=tp), **options)


# What a script may give besides the learning rate. With the default eps, Adam blows the rounding noise of a gradient
# that is zero (a key's bias) up to a full step.
_ADAMW = {"lr": 1e-2, "eps": 1e-5}
_SGD = {"lr": 0.5, "momentum": 0.9}
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "adamw": (torch.optim.AdamW, _ADAMW),
    "adamw, foreach": (torch.optim.AdamW, {**_ADAMW, "foreach": True}),
    "adamw, one by one": (torch.optim.AdamW, {**_ADAMW, "foreach": False}),
    "adamw, fused": (torch.optim.AdamW, {**_ADAMW, "fused": True}),
    "sgd": (torch.optim.SGD, _SGD),
    "sgd, nesterov": (torch.optim.SGD, {**_SGD, "nesterov": True, "foreach": True}),
    "sgd, fused": (torch.optim.SGD, {**_SGD, "nesterov": True, "fused": True}),
    "adafactor": (torch.optim.Adafactor, {"lr": 1e-2}),
    "adafactor_of_transformers": (Adafactor, {"lr": 1e-2, "relative_step": False, "beta1": 0.5}),
}
_OF_NORMS_AND_BIASES = {torch.optim.SGD: {"lr": 0.25}}  # the others: 5e-3
_DECAY = {torch.optim.SGD: 1e-3}  # the others: 0.1


def make_optimizer(model: torch.nn.Module, kind: str = "adamw", mask: str = "ndim") -> torch.optim.Optimizer:
    """With weight decay on some parameters only: on matrices, or on what no `mask` "name" speaks of."""
    make, options = OPTIMIZERS[kind]
    without = ("bias", "norm", "embed")
    decays = {
        "ndim": lambda name, param: param.ndim >= 2,
        "name": lambda name, param: not any(word in name for word in without),
    }[mask]
    decayed = [param for name, param in model.named_parameters() if decays(name, param)]
    others = [param for name, param in model.named_parameters() if not decays(name, param)]
    groups = [
        {"params": decayed, "weight_decay": _DECAY.get(make, 0.1)},
        {"params": others, "weight_decay": 0.0, **_OF_NORMS_AND_BIASES.get(make, {"lr": 5e-3})},
    ]
    return make(groups, **options)


def train(spec: Spec) -> Record:
    set_seed(7)
    dynamo = TorchDynamoPlugin(backend="aot_eager", use_regional_compilation=spec.compiled == "by layer")
    accelerator = make_accelerator(
        spec.tp,
        gradient_accumulation_steps=spec.accumulation,
        mixed_precision=spec.mixed_precision,
        dynamo_plugin=dynamo if spec.compiled else None,
    )
    model = make_model(spec, accelerator)
    if spec.checkpointing:
        reentrant = {"reentrant": True, "non_reentrant": False}[spec.checkpointing]
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    optimizer = make_optimizer(model, spec.optimizer, spec.decay)
    scheduler = get_linear_schedule_with_warmup(optimizer, num_warmup_steps=3, num_training_steps=40)
    train_loader = DataLoader(SyntheticTokens(spec.samples, seed=1), batch_size=BATCH, shuffle=True)
    eval_loader = DataLoader(SyntheticTokens(EVAL_SAMPLES, seed=2), batch_size=BATCH)
    model, optimizer, train_loader, eval_loader, scheduler = accelerator.prepare(
        model, optimizer, train_loader, eval_loader, scheduler
    )
    record = Record()
    while len(record.learning_rates) < spec.steps:
        model.train()
        for batch in train_loader:
            ids = batch.pop("id")
            with accelerator.accumulate(model):
                with autocasting(spec.autocast):
                    loss = model(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients and spec.max_norm is not None:
                    norm = accelerator.clip_grad_norm_(model.parameters(), spec.max_norm)
                    record.gradient_norms.append(float(norm))
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            record.ids.append(ids.tolist())
            record.losses.append(accelerator.gather_for_metrics(loss.detach().repeat(len(ids))).mean().item())
            if accelerator.sync_gradients:
                record.learning_rates.append(scheduler.get_last_lr())
        ids, losses = evaluate(accelerator, model, eval_loader)
        record.eval_ids.append(ids)
        record.eval_losses.append(losses)
    weights = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        record.weights = {name: tensor.detach().cpu().clone() for name, tensor in weights.items()}
    return record


def make_model(spec: Spec, accelerator: Accelerator) -> torch.nn.Module:
    if spec.folder is not None:
        plugin = accelerator.state.parallelism_config
        with nullcontext() if plugin is None else plugin.sharded_loading():
            return AutoModelForCausalLM.from_pretrained(spec.folder)
    model = build_model(
        spec.model, tied=spec.tied, attention=spec.attention, noise=spec.noise, vocab_size=spec.vocabulary
    )
    if spec.lora:
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    return model.to(getattr(torch, spec.dtype))


def autocasting(dtype: str | None) -> AbstractContextManager:
    return nullcontext() if dtype is None else torch.autocast("cpu", dtype=getattr(torch, dtype))


@torch.no_grad()
def evaluate(accelerator: Accelerator, model: torch.nn.Module, loader: DataLoader) -> tuple[list[int], list[float]]:
    model.eval()
    seen, losses = [], []
    for batch in loader:
        ids, labels = batch.pop("id"), batch.pop("labels")
        logits = model(**batch).logits
        per_token = cross_entropy(logits[:, :-1].transpose(1, 2).float(), labels[:, 1:], reduction="none")
        ids, per_sample = accelerator.gather_for_metrics((ids, per_token.mean(dim=1)))
        seen += ids.tolist()
        losses += per_sample.tolist()
    return seen, losses


def differences(actual: list[Record], reference: list[Record]) -> dict[str, float]:
    """The worst relative differences of each series and weight, between rank `r` and rank `r // tp` of plain DDP.

    What is not a matter of rounding (which samples a rank saw, how many steps, which weights) has to be the same.
    """
    tp, uneven = divmod(len(actual), len(reference))
    assert tp and not uneven, f"{len(actual)} ranks against {len(reference)} replicas"
    worst = {name: 0.0 for name in SERIES}
    for rank, record in enumerate(actual):
        expected = reference[rank // tp]
        assert record.ids == expected.ids, f"rank {rank} trained on {record.ids} instead of {expected.ids}"
        assert record.eval_ids == expected.eval_ids, f"rank {rank} saw {record.eval_ids} in evaluation"
        for name in SERIES:
            got, wanted = (torch.tensor(getattr(r, name), dtype=torch.float64) for r in (record, expected))
            assert got.shape == wanted.shape, f"rank {rank}: {name} {got.tolist()} for {wanted.tolist()}"
            if got.numel():
                off = ((got - wanted).abs() / wanted.abs().clamp(min=1e-12)).max().item()
                worst[name] = off if off != off else max(worst[name], off)  # NaN stays NaN
    weights = relative_errors(actual[0].weights, reference[0].weights)
    return {**worst, **{f"weight {name}": error for name, error in weights.items()}}


def assert_same_run(
    actual: list[Record], reference: list[Record], tolerance: float = TOLERANCE, weights: float = WEIGHT_TOLERANCE
) -> None:
    off = {
        name: f"{error:.1e}"
        for name, error in differences(actual, reference).items()
        if not error <= (weights if name.startswith("weight ") else tolerance)
    }
    assert not off, f"relative differences above {tolerance} ({weights} for weights): {off}"
