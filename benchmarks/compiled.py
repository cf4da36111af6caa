"""What `torch.compile` with inductor gives: a step of the whole model compiled, or layer by layer, over the eager one.

    python -m benchmarks.compiled [--size host-bound] [--ways "by layer"] [--backend inductor]

Accelerate compiles, by its `dynamo_plugin`, as a script or `TrainingArguments(torch_compile=True)` asks for it. The
steps take turns on four gloo ranks, tp 2 x dp 2, as in `benchmarks.peers`; printed are medians and quartiles of ratios
of neighbours, of time on the clock and of CPU time, and the first losses. Compiling takes minutes and is not counted.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from accelerate.utils import TorchDynamoPlugin
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh

from accel_tp_ddp import TensorParallelDDPPlugin

from .launch import start_ranks
from .peers.contenders import accelerated
from .peers.rounds import Entrant, interleave, spread
from .peers.sizes import SIZES, Setting, Step

EAGER, WAYS = "eager", {"by layer": True, "whole": False}
STEPS_BEFORE = 3


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiled", description=__doc__)
    parser.add_argument("--size", choices=sorted(SIZES), default="host-bound")
    for name in ("hidden", "layers", "vocab", "batch", "length"):
        parser.add_argument(f"--{name}", type=int, help="instead of the size's; the batch is a replica's")
    parser.add_argument("--ways", nargs="*", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--loss-parallel", action="store_true")
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--budget", type=float, default=120, help="seconds after which no further round is begun")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    given = options(argv)
    if "RANK" not in os.environ:
        return start_ranks("benchmarks.compiled", given.ranks, sys.argv[1:] if argv is None else argv)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    dist.init_process_group("gloo", timeout=timedelta(minutes=30))  # ranks compile at their own pace
    mesh = init_device_mesh("cpu", (given.ranks // given.tp, given.tp), mesh_dim_names=("dp_replicate", "tp"))
    changed = {name: getattr(given, name) for name in ("hidden", "layers", "vocab", "batch", "length")}
    size = replace(SIZES[given.size], **{name: value for name, value in changed.items() if value is not None})
    setting = Setting(size, mesh, "no folder")
    entrants, rows = [], []
    for name in (EAGER, *given.ways):
        entrant, row = enter(name, setting, given)
        entrants.append(entrant)
        rows.append(row)
        if dist.get_rank() == 0:
            print(row, flush=True)
    times = interleave(entrants, given.rounds, given.budget, dist.group.WORLD)
    if dist.get_rank() == 0:
        print(f"{given.size}, {setting.size}, {len(times.steps[EAGER])} rounds; eager over compiled:")
        for name in given.ways:
            for what, own in (("time", times.steps), ("CPU time", times.steps_cpu)):
                low, middle, high = spread([a / b for a, b in zip(own[EAGER], own[name])])
                medians = " and ".join(f"{spread(own[each])[1] * 1000:.0f}" for each in (EAGER, name))
                print(f"{name}: {what} {middle:.2f} x faster ({low:.2f} to {high:.2f}); medians {medians} ms")
    dist.barrier()
    dist.destroy_process_group()
    return 0


def enter(name: str, setting: Setting, given: argparse.Namespace) -> tuple[Entrant, str]:
    counters.clear()
    start = time.perf_counter()
    step = build(name, setting, given)
    losses = [float(step()) for _ in range(STEPS_BEFORE)]
    graphs = counters["stats"]["unique_graphs"]
    row = f"{name}: losses {', '.join(f'{loss:.6f}' for loss in losses)}; {graphs} graphs; first steps "
    return Entrant(name, step, bare=lambda: None), f"{row}{time.perf_counter() - start:.0f} s"


def build(name: str, setting: Setting, given: argparse.Namespace) -> Step:
    how: dict[str, Any] = {}
    if name != EAGER:
        how["dynamo_plugin"] = TorchDynamoPlugin(backend=given.backend, use_regional_compilation=WAYS[name])
    plugin = TensorParallelDDPPlugin(tp_size=given.tp, loss_parallel=given.loss_parallel)
    return accelerated(setting, plugin, setting.replica_ids, **how)


if __name__ == "__main__":
    sys.exit(main())
