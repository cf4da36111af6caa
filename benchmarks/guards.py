"""What guarding replicated parameters and batches costs, as ratios of step time in one run.

    torchrun --nproc_per_node 2 --rdzv-backend c10d --rdzv-endpoint localhost:0 benchmarks/guards.py

Two equal models take turns, step by step: one without any guard, one with the plugin's default (the first rank's
gradients of replicated parameters before every step, checksums and batches compared every 100 steps).
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM, LlamaConfig

from accel_tp_ddp import parallelize
from accel_tp_ddp.training.drift import DriftGuard
from accel_tp_ddp.training.same_batch import watch_batches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--every", type=int, default=100, help="replica_check_steps")
    args = parser.parse_args()

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    config = LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 3,
        num_hidden_layers=args.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=4096,
    )
    runs = {}
    for name in ("without", "with"):
        torch.manual_seed(0)
        model = parallelize(AutoModelForCausalLM.from_config(config), mesh)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        guard = DriftGuard(mesh, args.every, "heal")
        guard.add(model)
        if name == "with":
            guard.watch(optimizer)
            watch_batches(model, mesh, args.every)
        runs[name] = (model, optimizer, guard)

    ids = torch.randint(0, 4096, (4, args.length), generator=torch.Generator().manual_seed(1))
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(args.rounds + 3):
        for name, (model, optimizer, _) in runs.items():
            dist.barrier()
            start = time.perf_counter()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if index >= 3:
                seconds[name].append(time.perf_counter() - start)

    _, optimizer, guard = runs["with"]
    model = runs["with"][0]
    model(input_ids=ids, labels=ids).loss.backward()
    parts = {"gradients, every step": lambda: guard.agree_on_gradients(optimizer), "checksums": guard.compare}
    costs = {}
    for name, part in parts.items():
        times = []
        for _ in range(20):
            dist.barrier()
            start = time.perf_counter()
            part()
            times.append(time.perf_counter() - start)
        costs[name] = statistics.median(times)
    if dist.get_rank() == 0:
        step = statistics.median(seconds["without"])
        ratio = statistics.median(a / b for a, b in zip(seconds["with"], seconds["without"]))
        print(f"Llama, {args.layers} layers, hidden {args.hidden}, {args.length} x 4 tokens, tp {mesh.size()}")
        print(f"step with guards / without: {ratio:.4f} (median of {args.rounds} pairs; step {step * 1000:.0f} ms)")
        for name, cost in costs.items():
            share = cost / step / (args.every if name == "checksums" else 1)
            print(f"{name}: {cost * 1000:.2f} ms, {share:.3%} of a step")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
