"""An ordinary Accelerate script over epochs of rows: it clips, evaluates what it held out, saves and loads again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .compare import assert_tensors_close
from .sharded import accelerator_for

BATCH, STEPS = 4, 6
Row = Mapping[str, Tensor]


@dataclass
class Run:
    sharded: int  # parameters
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    evaluated: list[float] = field(default_factory=list)
    weights: dict[str, Tensor] | None = None
    reloaded: list[float] | None = None


def train(model: nn.Module, rows: Sequence[Row], held_out: Sequence[Row], tp: int | None, folder: str | None) -> Run:
    """With `folder`, it saves the model at the end and loads it as a plain one."""
    torch.manual_seed(3)
    accelerator = accelerator_for(tp)
    plain_class = type(model)
    model, optimizer, train_loader, eval_loader = accelerator.prepare(
        model,
        torch.optim.AdamW(model.parameters(), lr=5e-3, eps=1e-5),
        DataLoader(rows, batch_size=BATCH, shuffle=True),
        DataLoader(held_out, batch_size=BATCH),
    )
    run = Run(sharded=sum(getattr(param, "tp_shard", None) is not None for param in model.parameters()))
    while len(run.norms) < STEPS:
        model.train()
        for batch in train_loader:
            loss = model(**batch).loss
            accelerator.backward(loss)
            run.norms.append(float(accelerator.clip_grad_norm_(model.parameters(), 0.5)))
            optimizer.step()
            optimizer.zero_grad()
            run.losses.append(accelerator.gather_for_metrics(loss.detach().repeat(len(batch["labels"]))).mean().item())
    model.eval()
    for batch in eval_loader:
        with torch.no_grad():
            run.evaluated += accelerator.gather_for_metrics(_score(model(**batch).logits)).tolist()
    weights = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        run.weights = {name: tensor.clone() for name, tensor in weights.items()}
    if folder is not None:
        accelerator.unwrap_model(model).save_pretrained(folder, is_main_process=accelerator.is_main_process)
        accelerator.wait_for_everyone()
        plain, keys = plain_class.from_pretrained(folder, output_loading_info=True)
        assert not keys["missing_keys"] and not keys["unexpected_keys"] and not keys["mismatched_keys"]
        with torch.no_grad():
            run.reloaded = _score(plain.eval()(**together(held_out)).logits).tolist()
    return run


def together(rows: Sequence[Row]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _score(logits: Tensor) -> Tensor:
    return logits.flatten(1).square().mean(1)


def assert_same(runs: Sequence[Run], plain: Sequence[Run], tp: int = 2) -> None:
    """Each rank's run is that of the plain DDP rank its replica stands for, and its saved model the trained one."""
    for rank, got in enumerate(runs):
        expected = plain[rank // tp]
        for name in ("losses", "norms", "evaluated"):
            actual, wanted = torch.tensor(getattr(got, name)), torch.tensor(getattr(expected, name))
            torch.testing.assert_close(actual, wanted, rtol=2e-4, atol=0, msg=lambda m: f"{rank} {name}: {m}")
        if got.reloaded is not None:
            torch.testing.assert_close(torch.tensor(got.reloaded), torch.tensor(got.evaluated), rtol=1e-4, atol=0)
    assert_tensors_close(runs[0].weights, plain[0].weights, 2e-4, floor=1e-3)
