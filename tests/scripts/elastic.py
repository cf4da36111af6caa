"""Saves after every step and resumes from its newest checkpoint: `torchrun --max-restarts 2 elastic.py DIR [STEP]`.

At STEP, in the first attempt, the last rank damages the newest checkpoint and kills itself.
"""

import argparse
import json
import os
import signal
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DataLoaderConfiguration, InitProcessGroupKwargs, ProjectConfiguration, set_seed
from torch import nn

from accel_tp_ddp import TensorParallelDDPPlugin, wait_for_save

STEPS = 8


class Model(nn.Module):
    """Something to shard that needs no import of transformers."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(31, 16)
        self.up, self.down, self.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 31)

    def forward(self, ids):
        hidden = self.embed(ids)
        logits = self.head(hidden + self.down(torch.tanh(self.up(hidden))))
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def train(
    folder: str, killed_at: int = -1, async_save: bool = False, steps: int = STEPS, timeout: int | None = None
) -> None:
    """Writes the losses by step, line by line, to `losses.jsonl` in `folder`."""
    set_seed(0)
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    plugin = TensorParallelDDPPlugin(
        tp_size=2, tp_plan={"up": "colwise", "down": "rowwise"}, async_save=async_save, replica_check_steps=0
    )
    config = ProjectConfiguration(project_dir=folder, automatic_checkpoint_naming=True, total_limit=2)
    loading = DataLoaderConfiguration(use_seedable_sampler=True)  # so that the order of the samples resumes, too
    settings = [] if timeout is None else [InitProcessGroupKwargs(timeout=timedelta(seconds=timeout))]
    accelerator = Accelerator(
        cpu=True,
        parallelism_config=plugin,
        project_config=config,
        dataloader_config=loading,
        kwargs_handlers=settings,
    )
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    data = torch.randint(0, 31, (steps * 4, 12), generator=torch.Generator().manual_seed(1))
    loader = torch.utils.data.DataLoader(data, batch_size=2, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    checkpoints = Path(folder, "checkpoints")
    numbers = [int(path.name.removeprefix("checkpoint_")) for path in checkpoints.glob("checkpoint_*")]
    accelerator.wait_for_everyone()  # before one of them begins to tidy up there
    if numbers:
        accelerator.load_state()
        config.iteration = max(numbers) + 1
    done = accelerator.step
    for step, ids in enumerate(accelerator.skip_first_batches(loader, done), done):
        if (step, attempt) == (killed_at, 0) and accelerator.is_last_process:
            newest = max(checkpoints.glob("checkpoint_*"), key=lambda path: int(path.name.removeprefix("checkpoint_")))
            os.truncate(newest / "tensors" / "__1_0.distcp", 100)
            os.kill(os.getpid(), signal.SIGKILL)
        with accelerator.accumulate(model):
            loss = model(ids)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        loss = accelerator.gather_for_metrics(loss.detach()[None]).mean().item()
        if accelerator.is_main_process:
            with open(f"{folder}/losses.jsonl", "a") as file:
                file.write(json.dumps({"attempt": attempt, "step": step, "loss": loss}) + "\n")
        accelerator.save_state()
    wait_for_save()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("killed_at", type=int, nargs="?", default=-1)
    parser.add_argument("behind", choices=("sync", "async"), nargs="?", default="sync")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--timeout", type=int, help="seconds of the process group")
    args = parser.parse_args()
    train(args.folder, args.killed_at, args.behind == "async", args.steps, args.timeout)
    PartialState().destroy_process_group()
