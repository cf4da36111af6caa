"""What a proof costs: seconds at tp 2 and 4, milliseconds of a ledger hit, their shares of `prepare`, and memory.

    python -m benchmarks.proof_cost [--layers 32] [--hidden 512] [--tp 2 4]

A Llama with that many layers is prepared on CPU ranks three times in each process: with prove="never", with "auto" and
an empty cache, which proves, and with "auto" again, which knows. Memory: how much the peak of a process grows by it.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import time
from collections.abc import Sequence
from tempfile import TemporaryDirectory
from typing import Any

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from transformers import LlamaConfig, LlamaForCausalLM

from accel_tp_ddp import TensorParallelDDPPlugin, resolve_plan
from accel_tp_ddp.proof import ledger
from accel_tp_ddp.proof.fingerprint import fingerprint
from accel_tp_ddp.proof.ledger import Ledger

from .sweep.processes import on_ranks


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.proof_cost", description=__doc__)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--tp", type=int, nargs="*", default=[2, 4])
    args = parser.parse_args(argv)
    for tp in args.tp:
        answer = on_ranks(measure, tp, 600.0, args.layers, args.hidden)
        print(f"tp {tp}: {answer.get('reason') or answer['line']}", flush=True)
    return 0


def measure(layers: int, hidden: int) -> dict[str, Any]:
    heads = hidden // 64
    config = LlamaConfig(
        **{"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": 4 * hidden, "vocab_size": 32000},
        **{"num_attention_heads": heads, "num_key_value_heads": heads // 2, "pad_token_id": 0},
    )
    ledger.read_shipped = dict  # type: ignore[assignment]  # as if nothing were known
    with TemporaryDirectory() as folder:
        os.environ["ACCEL_TP_DDP_CACHE"] = _same_everywhere(folder)
        _prepare(config, "never")  # what is imported and connected the first time
        never = _prepare(config, "never")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        proved = _prepare(config, "auto")
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        known = _prepare(config, "auto")
        model = LlamaForCausalLM(config)
        plan = resolve_plan(model, dist.get_world_size())
        started = time.perf_counter()
        assert Ledger().known(fingerprint(model, plan)) is not None
        hit = time.perf_counter() - started
        dist.barrier()
    line = (
        f"prepare without a proof {never:.2f} s; with one {proved:.2f} s, of it the proof {proved - never:.2f} s "
        f"({(proved - never) / proved:.0%}); known {known:.2f} s, of it the look {1000 * hit:.0f} ms "
        f"({hit / known:.1%}); peak memory grows by {grown / 1024:.0f} MiB"
    )
    return {"result": "pass", "line": line, "reason": ""}


def _same_everywhere(folder: str) -> str:
    folders: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(folders, folder)
    return str(folders[0])


def _prepare(config: LlamaConfig, prove: str) -> float:
    accelerator = Accelerator(
        cpu=True, parallelism_config=TensorParallelDDPPlugin(tp_size=dist.get_world_size(), prove=prove)
    )
    model = LlamaForCausalLM(config)
    dist.barrier()
    started = time.perf_counter()
    accelerator.prepare(model)
    dist.barrier()
    took = time.perf_counter() - started
    AcceleratorState._reset_state(reset_partial_state=True)  # or the next one would have the same plugin
    return took


if __name__ == "__main__":
    sys.exit(main())
