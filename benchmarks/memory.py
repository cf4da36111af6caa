"""What loading and export cost in host memory, rank by rank, at two sizes that differ in the number of layers only.

    python benchmarks/memory.py --what loading
    python benchmarks/memory.py --what loading --architecture qwen3_moe --tp 4 --layers 4 12
    python benchmarks/memory.py --what export

`loading` writes a checkpoint with plain `save_pretrained`, and on `tp` ranks loads it in slices or plainly and shards
it with `parallelize`, each rank in a process of its own. It gives the peak of each rank's memory above what it had
before, as a multiple of the bytes of the parameters that it holds in the end, of the rank where that is largest.

`export` measures, on `tp` ranks, `save_pretrained` and `accelerator.save_model`, for comparison what a script would do
by itself, `save_pretrained(state_dict=full_state_dict(model))`, and in one process `merge` of a saved state. It gives
the peak of the memory of the rank that writes, and of the others, as a multiple of the largest tensor of the unsharded
model, and of that tensor together with the largest file. So that freed memory counts as freed, glibc maps every large
block by itself. Exit code 1 if the writer takes more than 1.1 times the tensor and the file, another rank more than
1.1 times the tensor, or either grows with the layers.

Memory is RssAnon of /proc/self/status, sampled every millisecond. Pages of the checkpoint that are mapped into memory
count as RssFile: they belong to the page cache and can be dropped at any time, so they have a column of their own.
Exit code 1 if the multiple in slices is above 1.5, or what is above the shard grows with the layers.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from accel_tp_ddp import TensorParallelDDPPlugin, full_state_dict, parallelize
from accel_tp_ddp.checkpoint.merge import merge
from accel_tp_ddp.core.shard import shard_info

forked = multiprocessing.get_context("fork")  # what is imported already need not be imported again
MIB = 1 << 20
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
MOST_EXPORTED = 1.1
GROWTH, MOST = 0.05, 1.5  # what a multiple may grow by from the smaller to the larger size, and what it may be
ABOVE = 32 * MIB  # what may be added above the shard: sampling misses short peaks, and the layers would add more

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 2816, "num_key_value_heads": 8},
    "qwen3_moe": {"num_key_value_heads": 8, "num_experts": 16, "moe_intermediate_size": 256, "head_dim": 64},
    "inkling2_text": {"num_key_value_heads": 8, "swa_num_attention_heads": 16, "swa_num_key_value_heads": 8}
    | {"n_routed_experts": 16, "moe_intermediate_size": 256, "head_dim": 64, "swa_head_dim": 64, "pad_token_id": None},
}
SIZES = {"hidden_size": 1024, "num_attention_heads": 16, "vocab_size": 8192, "tie_word_embeddings": False}


class PeakMemory:
    """Peaks of this process's memory while active, above what it was at the start, in bytes."""

    def __enter__(self) -> PeakMemory:
        gc.collect()
        self._before = self._highest = resident_memory()
        self._stop = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self._sampler.start()
        self._started = time.perf_counter()
        return self

    def __exit__(self, *error: Any) -> None:
        self.seconds = time.perf_counter() - self._started
        self._stop.set()
        self._sampler.join()
        self._take()
        self.anonymous, self.mapped = (now - before for now, before in zip(self._highest, self._before))

    def _sample(self) -> None:
        while not self._stop.wait(0.001):
            self._take()

    def _take(self) -> None:
        self._highest = tuple(map(max, self._highest, resident_memory()))


def resident_memory() -> tuple[int, int]:
    """RssAnon and RssFile."""
    with open("/proc/self/status", encoding="ascii") as status:
        values = {line.partition(":")[0]: line.split()[1] for line in status if line.startswith("Rss")}
    return int(values["RssAnon"]) * 1024, int(values["RssFile"]) * 1024


def run(target: Callable[..., None], arguments: list[tuple]) -> list[dict[str, Any]]:
    """In forked processes; the answers by rank."""
    results = forked.Queue()
    processes = [forked.Process(target=target, args=(*given, results)) for given in arguments]
    for process in processes:
        process.start()
    answers = sorted((results.get(timeout=500) for _ in processes), key=lambda answer: answer["rank"])
    for process in processes:
        process.join()
    return answers


# ------------------------------------------------------------------------------------------------------------ loading


def config_of(architecture: str, layers: int) -> Any:
    return AutoConfig.for_model(architecture, **SIZES, **ARCHITECTURES[architecture], num_hidden_layers=layers)


def write_checkpoint(architecture: str, layers: int, folder: Path) -> None:
    model = AutoModelForCausalLM.from_config(config_of(architecture, layers), dtype=torch.float32)
    logging.disable_progress_bar()
    model.save_pretrained(folder, max_shard_size="200MB")


def load_on_rank(rank: int, tp: int, folder: Path, in_slices: bool, dtype: str, results: Any) -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    dist.init_process_group("gloo", init_method=f"file://{folder}-store-{in_slices}", rank=rank, world_size=tp)
    plugin = TensorParallelDDPPlugin(tp_size=tp)
    plugin.get_device_mesh("cpu")
    own = dtype if dtype == "auto" else getattr(torch, dtype)
    with PeakMemory() as memory:
        if in_slices:
            with plugin.sharded_loading():
                model = AutoModelForCausalLM.from_pretrained(folder, dtype=own)
        else:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=own)
        parallelize(model, plugin.device_mesh["tp"])
    held = sum(param.numel() * param.element_size() for param in model.parameters())
    largest = max(param.numel() * param.element_size() for param in model.parameters())
    results.put(
        {
            **{"rank": rank, "peak": memory.anonymous, "mapped": memory.mapped, "held": held, "largest": largest},
            "seconds": memory.seconds,
        }
    )
    dist.barrier()
    dist.destroy_process_group()


def measure_loading(options: argparse.Namespace) -> tuple[list[dict[str, Any]], bool]:
    rows: list[dict[str, Any]] = []
    above: list[float] = []
    multiples: list[float] = []
    with torch.device("meta"):  # imports the model's code, which the ranks are forked with
        AutoModelForCausalLM.from_config(config_of(options.architecture, 1))
    for layers in options.layers:
        with tempfile.TemporaryDirectory(dir=options.folder) as root:
            folder = Path(root) / "checkpoint"
            writer = forked.Process(target=write_checkpoint, args=(options.architecture, layers, folder))
            writer.start()  # in a process of its own, whose memory is gone afterwards
            writer.join()
            runs = {
                name: run(
                    load_on_rank,
                    [(rank, options.tp, folder, name == "slices", options.dtype) for rank in range(options.tp)],
                )
                for name in ("slices", "plain")
            }
        for name, answers in runs.items():
            worst = max(answers, key=lambda answer: answer["peak"] / answer["held"])
            if name == "slices":
                above.append(worst["peak"] - worst["held"])
                multiples.append(worst["peak"] / worst["held"])
            rows.append(
                {
                    "layers": layers,
                    "loaded": name,
                    "shard MiB": round(worst["held"] / MIB, 1),
                    "peak MiB": round(worst["peak"] / MIB, 1),
                    "peak / shard": round(worst["peak"] / worst["held"], 2),
                    "above the shard, in largest parameters": round(
                        (worst["peak"] - worst["held"]) / worst["largest"], 1
                    ),
                    "mapped MiB": round(worst["mapped"] / MIB, 1),
                    "seconds": round(max(answer["seconds"] for answer in answers), 1),
                }
            )
    return rows, max(multiples) <= MOST and above[-1] <= above[0] + ABOVE


# -------------------------------------------------------------------------------------------------------------- export


def give_back_what_is_freed() -> None:
    """Have glibc map every block of 64 KiB or more by itself, and unmap it when freed.

    Call it first of all: what lies in the heap already is used again before anything is mapped.
    """
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, 1 << 16)
    libc.mallopt(M_TRIM_THRESHOLD, 1 << 16)


def export_on_rank(rank: int, options: argparse.Namespace, layers: int, folder: Path, results: Any) -> None:
    give_back_what_is_freed()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(options.tp))
    os.environ.update(ACCELERATE_USE_CPU="true", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=options.tp)
    accelerator = Accelerator(parallelism_config=TensorParallelDDPPlugin(tp_size=options.tp))
    model = accelerator.prepare(
        AutoModelForCausalLM.from_config(config_of(options.architecture, layers), dtype=torch.float32)
    )
    bare = accelerator.unwrap_model(model)

    def by_hand() -> None:
        bare.save_pretrained(
            folder / "by hand",
            state_dict=full_state_dict(bare),
            is_main_process=rank == 0,
            max_shard_size=options.file,
        )

    ways: dict[str, Callable[[], None]] = {
        "save_pretrained": lambda: bare.save_pretrained(folder / "save_pretrained", max_shard_size=options.file),
        "save_model": lambda: accelerator.save_model(model, folder / "save_model", max_shard_size=options.file),
        "full_state_dict": by_hand,
    }
    sizes = [shard_info(p).global_shape.numel() * p.itemsize for p in model.parameters() if shard_info(p) is not None]
    answer: dict[str, Any] = {"rank": rank, "tensor": max(sizes)}
    for name, way in ways.items():
        dist.barrier()
        with PeakMemory() as memory:
            way()
        answer[name] = memory.anonymous
    accelerator.save_state(folder / "state")
    results.put(answer)
    dist.barrier()
    dist.destroy_process_group()


def merge_alone(options: argparse.Namespace, folder: Path, results: Any) -> None:
    give_back_what_is_freed()
    torch.set_num_threads(1)
    with PeakMemory() as memory:
        merge(folder / "state", folder / "merge", max_shard_size=options.file)
    results.put({"rank": 0, "merge": memory.anonymous})


def measure_export(options: argparse.Namespace) -> tuple[list[dict[str, Any]], bool]:
    """The rows of the table, and whether memory stays within its bounds."""
    rows: list[dict[str, Any]] = []
    with torch.device("meta"):  # imports the model's code, which the ranks are forked with
        AutoModelForCausalLM.from_config(config_of(options.architecture, 1))
    for layers in options.layers:
        with tempfile.TemporaryDirectory(dir=options.folder) as root:
            folder = Path(root)
            ranks = run(export_on_rank, [(rank, options, layers, folder) for rank in range(options.tp)])
            ranks[0] |= run(merge_alone, [(options, folder)])[0]
            tensor = ranks[0]["tensor"]
            file = max(path.stat().st_size for path in (folder / "save_pretrained").glob("*.safetensors"))
            model = sum(path.stat().st_size for path in (folder / "save_pretrained").glob("*.safetensors"))
        for way in ("save_pretrained", "save_model", "full_state_dict", "merge"):
            for name, answers in (("writer", ranks[:1]), ("peer", ranks[1:] if way != "merge" else [])):
                if answers:
                    peak = max(answer[way] for answer in answers)
                    rows.append(
                        {
                            "layers": layers,
                            "model MiB": round(model / MIB),
                            "way": way,
                            "process": name,
                            "peak MiB": round(peak / MIB, 1),
                            "/ tensor": round(peak / tensor, 2),
                            "/ (tensor + file)": round(peak / (tensor + file), 2),
                        }
                    )
    return rows, all(_is_bounded(rows, name) for name in ("writer", "peer"))


def _is_bounded(rows: list[dict[str, Any]], process: str) -> bool:
    column = "/ (tensor + file)" if process == "writer" else "/ tensor"
    for way in {row["way"] for row in rows} - {"full_state_dict"}:
        found = [row[column] for row in rows if row["way"] == way and row["process"] == process]
        if found and (max(found) > MOST_EXPORTED or found[-1] > found[0] + GROWTH):
            return False
    return True


MEASURES = {"export": measure_export, "loading": measure_loading}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=sorted(MEASURES), required=True)
    parser.add_argument("--architecture", choices=sorted(ARCHITECTURES), default="llama")
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--layers", type=int, nargs="+", default=[6, 18])
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16, float16")
    parser.add_argument("--folder", default=None, help="where the checkpoint is written meanwhile")
    parser.add_argument("--file", default="64MB", help="export: max_shard_size")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows, passed = MEASURES[options.what](options)
    if options.json:
        print(json.dumps({"rows": rows, "passed": passed}))
    else:
        print("| " + " | ".join(rows[0]) + " |")
        print("| " + " | ".join("---" for _ in rows[0]) + " |")
        for row in rows:
            print("| " + " | ".join(str(value) for value in row.values()) + " |")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
