"""Time that the fingerprint of a model takes, and a look into the ledger: what a proved model pays at `prepare`.

    python -m benchmarks.fingerprint [--layers 80] [--tp 4]

Builds a Llama on the meta device, so no weights are needed. The first call reads the source files.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from accel_tp_ddp import resolve_plan
from accel_tp_ddp.proof.fingerprint import fingerprint
from accel_tp_ddp.proof.ledger import Known, Ledger


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--tp", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    config = LlamaConfig(
        num_hidden_layers=args.layers,
        hidden_size=8192,
        intermediate_size=28672,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    start = time.perf_counter()
    plan = resolve_plan(model, args.tp)
    print(f"{args.layers} layers, {len(list(model.modules()))} modules, tp {args.tp}")
    print(f"  resolve_plan               {1000 * (time.perf_counter() - start):8.1f} ms")
    first, *warm = timed(lambda: fingerprint(model, plan), args.repeats + 1)
    print(f"  fingerprint, first call    {first:8.1f} ms")
    print(
        f"  fingerprint, warm          {statistics.median(warm):8.1f} ms, median of {len(warm)} (best {min(warm):.1f})"
    )
    with tempfile.TemporaryDirectory() as folder:
        found = fingerprint(model, plan)
        Ledger(folder).remember(found, "benchmark")
        hits = timed(lambda: Ledger(folder).known(found), args.repeats)
        assert Ledger(folder).known(found) == Known("cache")
    print(f"  a look into the cache      {statistics.median(hits):8.2f} ms")


def timed(call: Callable[[], object], times: int) -> list[float]:
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        taken.append(1000 * (time.perf_counter() - start))
    return taken


if __name__ == "__main__":
    main()
