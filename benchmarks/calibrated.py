"""How right the step times of `accel-tp-ddp estimate` are on this machine, once it has been measured.

    python -m benchmarks.calibrated [--sizes host-bound ...] [--rounds 12] [--card FILE]

Four CPU ranks (gloo) measure, all at the same time, as in training: a matrix product, a small and a large addition,
the time that an operation of a tiny model takes (forward and backward, by the number of its operations), and two
all-reduces over the tensor-parallel groups. That is a card for `estimate --gpu FILE`. In turn with it, round by round,
they take steps of a Llama of the sizes of `benchmarks.peers` at tp 2 x dp 2, which `estimate` tells from the card.

Ranks outnumber cores, and others use the machine. So all times are those of the processors, which others hardly
change: of all ranks, divided by the cores, as the clock would show if nothing waited and nobody else were there. What
the clock has shown is printed besides. Exit code 1 where an estimate is off by more than 20 %.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from accel_tp_ddp import TensorParallelDDPPlugin
from accel_tp_ddp.tools.tally import Live, Tally
from benchmarks.estimates import estimated_step
from benchmarks.launch import run_command, start_ranks
from benchmarks.peers.__main__ import TIMEOUT, quietly
from benchmarks.peers.sizes import SIZES, Setting

RANKS, TP = 4, 2
MOST_OFF = 0.20
SMALL, LARGE = 2**10, 2**20  # elements of an all-reduce
ROWS, INNER, COLUMNS = 512, 1024, 1536  # of a matrix product, as one rank has it at the size `compute-bound`
ELEMENTS, PAIRS = 2**20, 8  # of additions; together more than the caches hold
MANY = 2**24  # elements of an addition whose result is fresh memory each time
OUT = "ACCEL_TP_DDP_CALIBRATED"  # environment variable: where the ranks leave what they have measured


class Measured:
    """Seconds of the processor and of the clock that something takes on this rank, run by run."""

    def __init__(self) -> None:
        self.processor: dict[str, list[float]] = {}
        self.clock: dict[str, list[float]] = {}

    def take(self, name: str, run: Callable[[], Any], times: int = 1) -> None:
        dist.barrier()
        clock, processor = time.perf_counter(), time.process_time()
        for _ in range(times):
            run()
        taken = time.process_time() - processor, time.perf_counter() - clock
        for seconds, kept in zip(taken, (self.processor, self.clock)):
            kept.setdefault(name, []).append(seconds / times)

    def over_ranks(self) -> dict[str, dict[str, float]]:
        """Medians over the rounds: of the processor, means over the ranks; of the clock, the slowest rank's."""
        found = {}
        for kind, kept, how in (
            ("processor", self.processor, statistics.mean),
            ("clock", self.clock, max),
        ):
            ranks: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(ranks, kept)
            rounds = {name: zip(*(rank[name] for rank in ranks)) for name in kept}
            found[kind] = {name: statistics.median(map(how, rows)) for name, rows in rounds.items()}
        return found


def step_of(setting: Setting) -> Callable[[], None]:
    """The step that is estimated, of a Llama of the bench's."""
    AcceleratorState._reset_state()  # the next one fills what all in this process share
    plugin = TensorParallelDDPPlugin(tp_size=setting.tp, prove="never", replica_check_steps=0)
    accelerator = Accelerator(cpu=True, parallelism_config=plugin)
    return estimated_step(accelerator, setting.model(), setting.replica_ids)[1]


def tiny_step(setting: Setting) -> tuple[Callable[[], None], int]:
    """Forward and backward of a model whose operations take no time of their own, and how many these are."""
    model, ids = setting.model(), setting.replica_ids

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        model.zero_grad()

    step()
    with Tally(Live(), "activations", {}) as tally:
        step()
    return step, sum(tally.work.values())


def on_a_rank(given: argparse.Namespace, path: Path) -> None:
    os.environ["ACCELERATE_USE_CPU"] = "true"
    quietly()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=TIMEOUT)
    world, rank = dist.get_world_size(), dist.get_rank()
    mesh = init_device_mesh("cpu", (world // TP, TP), mesh_dim_names=("dp_replicate", "tp"))
    group = mesh["tp"].get_group()
    tiny, operations = tiny_step(Setting(SIZES["tiny"], mesh, ""))
    steps = {name: step_of(Setting(SIZES[name], mesh, "")) for name in given.sizes}
    left, right = torch.randn(ROWS, INNER), torch.randn(INNER, COLUMNS)
    some = [(torch.randn(ELEMENTS), torch.randn(ELEMENTS)) for _ in range(PAIRS)]
    many = torch.randn(MANY), torch.randn(MANY)
    sent = {"small": torch.zeros(SMALL), "large": torch.zeros(LARGE)}

    def send(tensor: Tensor) -> None:
        dist.all_reduce(tensor, group=group)

    measured, begun = Measured(), time.perf_counter()
    for index in range(-2, given.rounds):
        late = torch.tensor(float(index > 1 and time.perf_counter() - begun > given.budget))
        dist.broadcast(late, 0)
        if late:
            break
        if index == 0:  # optimizer state, and DDP's second set of buckets, are made
            measured = Measured()
        measured.take("product", lambda: left @ right, 3)
        measured.take("addition", lambda: [one + other for one, other in some])
        measured.take("large addition", lambda: many[0] + many[1])
        measured.take("tiny", tiny)
        measured.take("small", lambda: send(sent["small"]), 10)
        measured.take("large", lambda: send(sent["large"]), 3)
        for name, step in steps.items():
            measured.take(name, step)
    found = {**measured.over_ranks(), "operations": operations, "rounds": len(measured.clock["product"])}
    if rank == 0:
        path.write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def card_of(found: dict[str, Any]) -> dict[str, Any]:
    """The card that the ranks are: what the clock would show without others, cores shared by the ranks."""
    took = {name: seconds * _ranks_a_core() for name, seconds in found["processor"].items()}
    product = 2 * ROWS * INNER * COLUMNS / took["product"]
    # An all-reduce of two ranks sends each byte once: see `send_time`.
    link = (LARGE - SMALL) * 4 / max(took["large"] - took["small"], 1e-9)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / RANKS
    return {
        "name": "ranks of this machine",
        **{"memory_mib": memory / 2**20, "bf16_tflops": product / 1e12, "fp32_tflops": product / 1e12},
        **{"memory_gbs": 3 * 4 * ELEMENTS * PAIRS / took["addition"] / 1e9},
        **{"fresh_gbs": 3 * 4 * MANY / took["large addition"] / 1e9},
        **{"link_gbs": link / 1e9, "network_gbs": link / 1e9, "apart": False},
        "achieved": {
            **{"matmul": 1, "memory": 1, "links": 1, "start_us": took["small"] * 1e6},
            "launch_us": took["tiny"] / found["operations"] * 1e6,
        },
        "source": f"measured on {RANKS} ranks of {_cores()} cores by benchmarks/calibrated.py",
    }


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _ranks_a_core() -> float:
    return max(RANKS / _cores(), 1)


def compare(given: argparse.Namespace, found: dict[str, Any], folder: Path) -> bool:
    card = card_of(found)
    path = given.card or folder / "card.json"
    path.write_text(json.dumps(card, indent=1))
    reached = card["achieved"]
    print(
        f"{RANKS} ranks on {_cores()} cores, {found['rounds']} rounds: {card['fp32_tflops'] * 1e3:.1f} GFLOP/s, "
        f"{card['memory_gbs']:.2f} GB/s of memory, {card['fresh_gbs']:.2f} of fresh memory, "
        f"{card['link_gbs']:.3f} of links, "
        f"a start {reached['start_us']:.0f} us, an operation {reached['launch_us']:.1f} us"
    )
    head = f"{'size':<16}{'predicted':>12}{'measured':>12}{'ratio':>8}{'on the clock':>15}   predicted by part"
    print(head, flush=True)
    passed = True
    for name in given.sizes:
        size = SIZES[name]
        config = size.config()
        config.architectures = ["LlamaForCausalLM"]
        config.save_pretrained(folder / name)
        batch = ("--micro-batch", str(size.batch), "--seq-len", str(size.length))
        ranks = ("--gpus", str(RANKS), "--gpus-per-node", str(RANKS), "--tp", str(TP), "--gpu", str(path))
        (row,) = run_command("estimate", str(folder / name), *ranks, *batch, "--precision", "fp32").found["layouts"]
        told = row["seconds"]
        took = found["processor"][name] * _ranks_a_core()
        parts = ", ".join(
            f"{part} {told[part] * 1e3:.0f}" for part in ("forward", "backward", "optimizer", "tp", "dp")
        )
        cells = f"{told['total'] * 1e3:>9.0f} ms{took * 1e3:>9.0f} ms{told['total'] / took:>8.2f}"
        print(f"{name:<16}{cells}{found['clock'][name] * 1e3:>12.0f} ms   {parts}", flush=True)
        passed = passed and abs(told["total"] / took - 1) <= MOST_OFF
    return passed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sizes", nargs="+", default=["host-bound", "compute-bound", "vocab-64k"], choices=sorted(SIZES)
    )
    parser.add_argument("--rounds", type=int, default=12, help="at most (%(default)s)")
    parser.add_argument("--budget", type=float, default=240, help="seconds after which no further round is begun")
    parser.add_argument("--card", type=Path, metavar="FILE", help="keep the card there, for `estimate --gpu FILE`")
    given = parser.parse_args()
    if "RANK" in os.environ:
        on_a_rank(given, Path(os.environ[OUT]))
        return 0
    with tempfile.TemporaryDirectory() as root:
        out = Path(root) / "measured.json"
        os.environ[OUT] = str(out)
        code = start_ranks("benchmarks.calibrated", RANKS, sys.argv[1:])
        return code or (0 if compare(given, json.loads(out.read_text()), Path(root)) else 1)


if __name__ == "__main__":
    sys.exit(main())
