"""`python -m benchmarks.peers`, which starts its ranks itself; or the same under torchrun."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import warnings
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers.utils import logging

from ..launch import start_ranks
from . import __doc__ as about
from .contenders import CONTENDERS, OURS
from .growth import growth
from .rounds import enter, interleave
from .sizes import SIZES, Setting
from .table import as_json, as_text

TIMEOUT = timedelta(seconds=120)  # of a collective: ranks that wait for one that has failed are to say so


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=sorted(SIZES), default="host-bound")
    for name in ("hidden", "layers", "vocab", "batch", "length"):
        parser.add_argument(f"--{name}", type=int, help="instead of the size's; the batch is a replica's")
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=4, help="where torchrun has not started them")
    parser.add_argument("--rounds", type=int, default=30, help="at most")
    parser.add_argument("--budget", type=float, default=180, help="seconds after which no further round is begun")
    parser.add_argument(
        "--only", nargs="+", metavar="PART", help="contenders of these names, or whose names contain them"
    )
    parser.add_argument(
        "--against", default=OURS, choices=list(CONTENDERS), metavar="NAME", help="whose times ratios are to"
    )
    parser.add_argument("--optimizer", choices=["fused", "loop"], default="fused", help="which of torch's AdamW")
    parser.add_argument("--growth", action="store_true", help="how a step grows with layers and tokens, instead")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    return parser.parse_args()


def quietly() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for category in (FutureWarning, UserWarning):
        warnings.filterwarnings("ignore", category=category)


def main() -> int:
    given = options()
    if "RANK" not in os.environ:
        return start_ranks("benchmarks.peers", given.ranks, sys.argv[1:])
    os.environ["ACCELERATE_USE_CPU"] = "true"
    quietly()
    dist.init_process_group("gloo", timeout=TIMEOUT)
    world, rank = dist.get_world_size(), dist.get_rank()
    if world % given.tp:
        raise SystemExit(f"--tp {given.tp} does not divide {world} ranks")
    control = dist.new_group(timeout=timedelta(minutes=30))  # which no contender uses
    mesh = init_device_mesh("cpu", (world // given.tp, given.tp), mesh_dim_names=("dp_replicate", "tp"))
    changed = {name: getattr(given, name) for name in ("hidden", "layers", "vocab", "batch", "length")}
    size = replace(SIZES[given.size], **{name: value for name, value in changed.items() if value is not None})
    chosen = {
        name: build
        for name, build in CONTENDERS.items()
        if not given.only or any(part == name if part in CONTENDERS else part in name for part in given.only)
    }
    with tempfile.TemporaryDirectory() as folder:
        shared = [folder]
        dist.broadcast_object_list(shared, 0, group=control)
        setting = Setting(size, mesh, shared[0], given.optimizer == "fused")
        if given.growth:
            rows = growth(setting, given.rounds, given.budget, control)
            if rank == 0:
                print("\n".join(rows), flush=True)
        else:
            if rank == 0:
                setting.model().save_pretrained(setting.folder)
            dist.barrier(group=control)
            entrants = []
            for name, build in chosen.items():
                entrants.append(enter(name, build, setting, control))
                if rank == 0:
                    was = entrants[-1].error or f"{entrants[-1].seconds_to_build:.0f} s for its first steps"
                    print(f"{name}: {was}", file=sys.stderr, flush=True)
            times = interleave(entrants, given.rounds, given.budget, control)
            if rank == 0:
                print(as_text(given.size, setting, entrants, times, given.against), flush=True)
                if given.json:
                    found = as_json(given.size, setting, entrants, times, given.against)
                    given.json.write_text(json.dumps(found, indent=1))
        dist.barrier(group=control)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
