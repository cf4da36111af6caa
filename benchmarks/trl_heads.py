"""TRL's SFT and DPO with the output layer computed from its parts, against gathering it: time of a step, and logs.

    python -m benchmarks.trl_heads [--kinds SFT DPO] [--vocab 65536] [--hidden 256] [--rounds 6]

Unmodified trainers train on four gloo ranks, tp 2 x dp 2, once with `loss_parallel="auto"`, the default, and once with
`False`, in turns of a few steps, each with a trainer of its own. The first step of a turn is not counted. Printed are
medians and quartiles of the ratios of neighbouring turns, of time on the clock and of CPU time of all ranks, and the
largest relative difference of what they log.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, TrainerCallback, set_seed
from transformers.utils import logging

from accel_tp_ddp import TensorParallelDDPPlugin

from .launch import start_ranks
from .peers.rounds import spread

WAYS: dict[str, Any] = {"from its parts": "auto", "gathered": False}
WORDS = 1000


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trl_heads", description=__doc__)
    parser.add_argument("--kinds", nargs="*", choices=["SFT", "DPO"], default=["SFT", "DPO"])
    parser.add_argument("--vocab", type=int, default=65_536)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch", type=int, default=2, help="of a replica; of pairs, for DPO")
    parser.add_argument("--steps", type=int, default=4, help="of a turn")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--budget", type=float, default=180, help="seconds for a kind")
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=4)
    given = parser.parse_args(argv)
    if "RANK" not in os.environ:
        return start_ranks("benchmarks.trl_heads", given.ranks, sys.argv[1:] if argv is None else argv)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    for kind in given.kinds:
        compare(kind, given)
    dist.barrier()
    dist.destroy_process_group()
    return 0


def compare(kind: str, given: argparse.Namespace) -> None:
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in WAYS}
    logs: dict[str, list[dict[str, float]]] = {}
    start, rounds = time.perf_counter(), 0
    for rounds in range(1, given.rounds + 1):
        for name, mode in WAYS.items():
            seconds, logs[name] = turn(kind, mode, given)
            found[name].append(seconds)
        over = torch.tensor(time.perf_counter() - start > given.budget)
        dist.broadcast(over, 0)
        if over:
            break
    if dist.get_rank() == 0:
        print(f"{kind}: vocabulary {given.vocab}, hidden {given.hidden}, {given.layers} layers, {rounds} turns each")
        for index, what in enumerate(("time", "CPU time")):
            own = {name: [each[index] for each in times] for name, times in found.items()}
            low, middle, high = spread([b / a for a, b in zip(own["from its parts"], own["gathered"])])
            medians = " and ".join(f"{spread(times)[1] * 1000:.0f}" for times in own.values())
            print(f"  {what}: {middle:.2f} x faster ({low:.2f} to {high:.2f}); medians {medians} ms")
        print(f"  logs: {', '.join(sorted(logs['gathered'][0]))}; largest difference {difference(*logs.values())}")
        sys.stdout.flush()


def turn(kind: str, mode: Any, given: argparse.Namespace) -> tuple[tuple[float, float], list[dict[str, float]]]:
    """The median step, on the clock of the slowest rank and on the processors of all, and what was logged."""
    AcceleratorState._reset_state()
    with tempfile.TemporaryDirectory() as folder:
        trainer, watch = make_trainer(kind, mode, folder, given), StepTimes()
        trainer.add_callback(watch)
        trainer.train()
    seconds = torch.tensor(watch.seconds[1:], dtype=torch.float64)
    used = torch.tensor(watch.used[1:], dtype=torch.float64)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    dist.all_reduce(used)
    rows = [row for row in trainer.state.log_history if "loss" in row]
    return (statistics.median(seconds.tolist()), statistics.median(used.tolist())), [untimed(row) for row in rows]


class StepTimes(TrainerCallback):
    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.used: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        dist.barrier()
        self._start, self._used = time.perf_counter(), time.process_time()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self._start)
        self.used.append(time.process_time() - self._used)


def untimed(row: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in row.items() if not name.endswith(("runtime", "_per_second", "step_time"))}


def difference(some: list[dict[str, float]], others: list[dict[str, float]]) -> str:
    """Of a DPO reward, a small difference of large log-probabilities, the absolute one says more."""
    assert [row.keys() for row in some] == [row.keys() for row in others], "they log the same names"
    pairs = [(name, a[name], b[name]) for a, b in zip(some, others) for name in a]
    name, a, b = max(pairs, key=lambda pair: abs(pair[1] - pair[2]) / max(abs(pair[2]), 1e-3))
    return f"{name}, {abs(a - b):.1e} of {b:.3g}"


def make_trainer(kind: str, mode: Any, folder: str, given: argparse.Namespace) -> Any:
    import trl

    model, data = build(given), texts(given, ("prompt", "chosen", "rejected") if kind == "DPO" else ("text",))
    shared: dict[str, Any] = {"train_dataset": data, "processing_class": tokenizer()}
    arguments: dict[str, Any] = {
        "output_dir": folder,
        "per_device_train_batch_size": given.batch,
        "max_steps": given.steps,
        "max_length": given.length,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "parallelism_config": TensorParallelDDPPlugin(tp_size=given.tp, loss_parallel=mode),
    }
    if kind == "SFT":
        return trl.SFTTrainer(model, trl.SFTConfig(**arguments), **shared)
    return trl.DPOTrainer(model, build(given), trl.DPOConfig(**arguments), **shared)


def build(given: argparse.Namespace) -> Any:
    set_seed(0)
    config = LlamaConfig(
        hidden_size=given.hidden,
        intermediate_size=given.hidden * 3,
        num_hidden_layers=given.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=given.vocab,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def tokenizer() -> Any:
    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2, **{f"w{index}": index + 3 for index in range(WORDS)}}
    bare = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    bare.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=bare, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def texts(given: argparse.Namespace, columns: Sequence[str]) -> Dataset:
    """Of the full length; a prompt is a quarter of it."""
    generator = torch.Generator().manual_seed(1)

    def text(name: str) -> str:
        count = given.length // 4 if name == "prompt" else given.length * 3 // 4 if len(columns) > 1 else given.length
        words = " ".join(f"w{index}" for index in torch.randint(WORDS, (count,), generator=generator).tolist())
        return words if name in ("prompt", "text") else f" {words}"

    rows = given.batch * given.steps * given.ranks
    return Dataset.from_list([{name: text(name) for name in columns} for _ in range(rows)])


if __name__ == "__main__":
    sys.exit(main())
