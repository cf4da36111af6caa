"""What zero1 saves and costs: bytes of optimizer state, collectives of a step, and step time, in one run.

    torchrun --nproc_per_node 4 --rdzv-backend c10d --rdzv-endpoint localhost:0 -m benchmarks.zero1 --tp 2
    python -m benchmarks.zero1 --sizes

Two equal models take turns, step by step, one with zero1 and one without. State and collectives are counted. For
comparison: the largest share of a replica if whole parameters were dealt out, the largest first, as torch's
`ZeroRedundancyOptimizer` does it. `--sizes` computes, without weights, what a rank holds of Llamas of 8 B and 70 B
parameters: weights, gradients and two states, in single precision. Exit code 1 if a share is above 1/dp + 2 %.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig

from accel_tp_ddp import parallelize, resolve_plan
from accel_tp_ddp.core.pieces import FlatShard
from accel_tp_ddp.training.zero1 import Zero1

MOST = 0.02
GIB = 1 << 30
LLAMAS: dict[str, dict[str, Any]] = {
    "8 B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70 B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}


class Collectives(TorchDispatchMode):
    """Counts what a step sends: the number and the bytes that each rank puts in, by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: dict[str, tuple[int, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        name = str(func)
        if name.startswith("c10d."):
            kind = name.split(".")[1].strip("_")
            inputs = args[1:2] if "allgather" in kind else args[:1]
            size = sum(leaf.nbytes for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor))
            number, before = self.sent.get(kind, (0, 0))
            self.sent[kind] = number + 1, before + size
        return func(*args, **(kwargs or {}))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zero1", description=__doc__)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=32001, help="odd, so that no share of it is even")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--sizes", action="store_true")
    args = parser.parse_args(argv)
    if args.sizes:
        return max(sizes(name, tp, dp) for name in LLAMAS for tp, dp in ((2, 4), (8, 4)))
    return step(args)


def sizes(name: str, tp: int, dp: int) -> int:
    config = LlamaConfig(**LLAMAS[name], num_key_value_heads=8, vocab_size=128256)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    layouts = resolve_plan(model, tp).layouts_by_parameter
    elements = kept = 0
    for param in model.parameters():
        layout = layouts.get(param)
        count = param.numel() if layout is None else param.numel() // param.shape[layout.dim] * layout.sizes[0]
        elements += count
        kept += min(FlatShard.step(count, dp), count)
    off, on = 16 * elements / GIB, (8 * elements + 8 * kept) / GIB
    share = kept / elements
    print(
        f"{name}, tp {tp} x dp {dp}: {off:.1f} GiB a rank without zero1, {on:.1f} GiB with it; state {share:.4f} "
        f"as large (1/dp = {1 / dp:.4f})"
    )
    return int(share > (1 + MOST) / dp)


def step(args: argparse.Namespace) -> int:
    dist.init_process_group("gloo")
    dp = dist.get_world_size() // args.tp
    mesh = init_device_mesh("cpu", (dp, args.tp), mesh_dim_names=("dp_replicate", "tp"))
    group = mesh["dp_replicate"].get_group()
    config = LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 3,
        num_hidden_layers=args.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=args.vocabulary,
    )
    runs = {}
    for name in ("off", "on"):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        model = DistributedDataParallel(parallelize(model, mesh["tp"]) if args.tp > 1 else model, process_group=group)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        if name == "on":
            Zero1(optimizer, group, lambda model=model: [model]).stay_last(optimizer)
        runs[name] = (model, optimizer)

    generator = torch.Generator().manual_seed(mesh.get_local_rank("dp_replicate"))
    ids = torch.randint(0, args.vocabulary, (2, args.length), generator=generator)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    updates: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(args.rounds + 3):
        for name, (model, optimizer) in runs.items():
            dist.barrier()
            start = time.perf_counter()
            model(input_ids=ids, labels=ids).loss.backward()
            before = time.perf_counter()
            optimizer.step()
            end = time.perf_counter()
            optimizer.zero_grad()
            if index >= 3:
                seconds[name].append(end - start)
                updates[name].append(end - before)

    states = {name: state_bytes(optimizer) for name, (_, optimizer) in runs.items()}
    share = states["on"] / states["off"]
    if dist.get_rank() == 0:
        print(f"{sum(p.numel() for p in runs['on'][0].parameters()):,} parameters on a rank, tp {args.tp} x dp {dp}")
        print(f"state: {states['off']:,} bytes without, {states['on']:,} with: {share:.4f} (1/dp = {1 / dp:.4f})")
        print(f"whole parameters dealt out would leave {largest_share(runs['on'][0], dp):.4f} on one replica")
    for name, (model, optimizer) in runs.items():
        counted = {}
        for part in ("forward and backward", "optimizer step"):
            with Collectives() as collectives:
                if part == "optimizer step":
                    optimizer.step()
                else:
                    model(input_ids=ids, labels=ids).loss.backward()
            counted[part] = collectives.sent
        optimizer.zero_grad()
        if dist.get_rank() == 0:
            for part, sent in counted.items():
                rows = [f"{number} {kind} of {size:,} bytes in all" for kind, (number, size) in sent.items()]
                print(f"zero1 {name}, {part}: {'; '.join(rows) or 'none'}")
    if dist.get_rank() == 0:
        for what, times in (("step", seconds), ("optimizer step", updates)):
            ratios = [on / off for on, off in zip(times["on"], times["off"])]
            low, middle, high = statistics.quantiles(ratios, n=4)
            medians = {name: statistics.median(own) * 1e3 for name, own in times.items()}
            print(
                f"{what}: {middle:.3f} (quartiles {low:.3f} to {high:.3f}) with zero1 of without; medians "
                f"{medians['on']:.1f} and {medians['off']:.1f} ms"
            )
    dist.barrier()
    dist.destroy_process_group()
    return int(share > (1 + MOST) / dp)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    values = [value for state in optimizer.state.values() for value in state.values()]
    return sum(value.nbytes for value in values if isinstance(value, Tensor) and value.dim())


def largest_share(model: nn.Module, dp: int) -> float:
    loads = [0] * dp
    for count in sorted((param.numel() for param in model.parameters()), reverse=True):
        loads[loads.index(min(loads))] += count
    return max(loads) / sum(loads)


if __name__ == "__main__":
    sys.exit(main())
