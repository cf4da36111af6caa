"""300 steps at tp x dp against plain DDP: the loss curves, and how far apart the weights end.

    python benchmarks/long_run.py --figure docs/long_run.svg

A small Llama and a small Qwen3 learn the bytes of Python's standard library. Each run is a training of its own,
started with torchrun. How far two runs may be apart is told by control pairs, which differ by rounding alone: plain
DDP with another bucket size, and plain DDP with the samples of each batch in reverse order. On two gloo ranks a + b =
b + a, so the bucket size changes nothing there; it does on four, so that pair is made of runs on four ranks with half
the batch on each.

Needs matplotlib, for the figure alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, set_seed
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config, get_cosine_schedule_with_warmup

LENGTH, GLOBAL_BATCH = 64, 8
SIZES = dict(
    hidden_size=64,
    intermediate_size=176,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=8,
    vocab_size=256,
    tie_word_embeddings=False,
)
MODELS = {"llama": LlamaConfig, "qwen3": Qwen3Config}
# name: (ranks, tp, DDP bucket in MiB, whether batches are reversed)
RUNS = {
    "plain DDP": (2, None, 25, False),
    "tp2 x dp2": (4, 2, 25, False),
    "plain DDP, reversed": (2, None, 25, True),
    "plain DDP, small buckets": (2, None, 0.02, False),
    "one process": (1, None, 25, False),
    "tp4 x dp1": (4, 4, 25, False),
    "one process, reversed": (1, None, 25, True),
    "4 ranks": (4, None, 25, False),
    "4 ranks, small buckets": (4, None, 0.02, False),
}
# what is compared: the run, what it is held against, the control pair
COMPARED = [
    ("tp2 x dp2", "plain DDP", [("plain DDP, reversed", "plain DDP"), ("4 ranks, small buckets", "4 ranks")]),
    ("tp4 x dp1", "one process", [("one process, reversed", "one process"), ("4 ranks, small buckets", "4 ranks")]),
]


def corpus(size: int) -> torch.Tensor:
    """The first bytes of the modules of Python's standard library, in samples of `LENGTH`."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = b"".join(path.read_bytes() for path in files)[: size * LENGTH]
    return torch.tensor(list(text)).view(-1, LENGTH)


def train(model_name: str, tp: int | None, bucket: float, reverse: bool, steps: int, out: Path) -> None:
    handlers = [
        DistributedDataParallelKwargs(bucket_cap_mb=bucket),
        InitProcessGroupKwargs(timeout=timedelta(seconds=300)),
    ]
    options = {}
    if tp is not None:
        from accel_tp_ddp import TensorParallelDDPPlugin

        options["parallelism_config"] = TensorParallelDDPPlugin(tp_size=tp)
    set_seed(0)
    accelerator = Accelerator(cpu=True, kwargs_handlers=handlers, **options)
    model = AutoModelForCausalLM.from_config(MODELS[model_name](**SIZES))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    scheduler = get_cosine_schedule_with_warmup(optimizer, 10, steps)
    batch = GLOBAL_BATCH // (accelerator.num_processes // (tp or 1))
    loader = DataLoader(list(corpus(steps * GLOBAL_BATCH)), batch_size=batch, shuffle=True)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    losses, norms = [], []
    for ids in loader:
        ids = ids.flip(0) if reverse else ids
        loss = model(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        norms.append(float(accelerator.clip_grad_norm_(model.parameters(), 1.0)))
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(accelerator.gather_for_metrics(loss.detach().repeat(len(ids))).mean().item())
    assert len(losses) == steps
    weights = accelerator.get_state_dict(model)
    own = accelerator.unwrap_model(model).named_parameters()
    replicated = {name: param.detach() for name, param in own if getattr(param, "tp_shard", None) is None}
    torch.save(replicated, out / f"replicated{accelerator.process_index}.pt")
    if accelerator.is_main_process:
        torch.save({"losses": losses, "norms": norms, "weights": weights}, out / "run.pt")
    accelerator.end_training()


def launch(model_name: str, name: str, steps: int, out: Path) -> None:
    ranks, tp, bucket, reverse = RUNS[name]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks)]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", __file__]
    command += ["--child", json.dumps([model_name, tp, bucket, reverse]), "--out", str(out), "--steps", str(steps)]
    out.mkdir(parents=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    log = out / "log"
    with log.open("w") as file:
        code = subprocess.run(command, env=environment, stdout=file, stderr=subprocess.STDOUT).returncode
    if code:
        raise SystemExit(f"{model_name}, {name} failed:\n{log.read_text()[-4000:]}")


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Of all weights as one vector, relative."""
    assert one.keys() == other.keys()
    squares = sum((one[name] - other[name]).double().square().sum() for name in one)
    return float((squares / sum(w.double().square().sum() for w in other.values())).sqrt())


def peers_are_equal(out: Path, ranks: int) -> bool:
    """Whether all ranks hold the same bits of each replicated parameter: peers, and after DDP the replicas as well."""
    first, *others = (torch.load(out / f"replicated{rank}.pt") for rank in range(ranks))
    assert first and all(first.keys() == other.keys() for other in others)
    return all(torch.equal(first[name], other[name]) for other in others for name in first)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--figure", type=Path, help="where to draw the loss curves (SVG or PNG)")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return train(*args.child, args.steps, args.out)

    results, failed = {}, []
    with tempfile.TemporaryDirectory() as folder:
        for model in args.models:
            for name, (ranks, tp, _, _) in RUNS.items():
                out = Path(folder, model, name.replace(" ", "_"))
                launch(model, name, args.steps, out)
                results[model, name] = torch.load(out / "run.pt")
                if tp is not None and not peers_are_equal(out, ranks):
                    failed.append(f"{model}, {name}: replicated parameters are not bit-equal")
            failed += report(model, {name: results[model, name] for name in RUNS})
    if args.figure:
        draw(args.figure, args.models, results)
    if failed:
        raise SystemExit("\n".join(failed))


def report(model: str, runs: dict[str, dict]) -> list[str]:
    failed = []
    buckets = distance(runs["plain DDP, small buckets"]["weights"], runs["plain DDP"]["weights"])
    print(f"{model}: loss {runs['plain DDP']['losses'][0]:.3f} -> {runs['plain DDP']['losses'][-1]:.3f}")
    print(f"  plain DDP on 2 ranks, small buckets: weights {buckets:.1e} apart")
    for name, reference, controls in COMPARED:
        losses, wanted = (torch.tensor(runs[run]["losses"], dtype=torch.float64) for run in (name, reference))
        off = distance(runs[name]["weights"], runs[reference]["weights"])
        worst = ((losses - wanted) / wanted).abs().max()
        print(f"  {name} against {reference}: losses at most {worst:.1e} apart (relative), weights {off:.2e}")
        for one, other in controls:
            control = distance(runs[one]["weights"], runs[other]["weights"])
            print(f"    control pair ({one} / {other}): weights {control:.2e}; ratio {off / control:.2f}")
            if off > 3 * control:
                failed.append(f"{model}, {name}: {off / control:.2f} times as far as the control pair {one}")
    sys.stdout.flush()
    return failed


def draw(path: Path, models: list[str], results: dict) -> None:
    import matplotlib

    matplotlib.use("svg" if path.suffix == ".svg" else "agg")
    from matplotlib import pyplot

    layouts = [(name, reference) for name, reference, _ in COMPARED]
    figure, axes = pyplot.subplots(
        2, len(models) * 2, figsize=(5 * len(models) * 2, 6), height_ratios=[3, 1], squeeze=False, sharex=True
    )
    columns = [(model, *pair) for model in models for pair in layouts]
    for (above, below), (model, name, reference) in zip(axes.T, columns):
        wanted, got = results[model, reference]["losses"], results[model, name]["losses"]
        above.plot(wanted, linewidth=3, color="0.75", label=reference)
        above.plot(got, linewidth=0.8, color="tab:blue", label=name)
        above.set_title(f"{model}: {name}")
        above.legend()
        below.semilogy([abs(a - b) / b + 1e-9 for a, b in zip(got, wanted)], linewidth=0.8)
        below.set_xlabel("step")
    axes[0, 0].set_ylabel("training loss")
    axes[1, 0].set_ylabel("relative difference")
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    main()
