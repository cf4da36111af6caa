"""Host time of a sharded layer over that of the same layer of local size, with no tensor parallelism.

    python -m benchmarks.host_time --model llama --hidden 64

One rank of a fake process group of two: collectives cost their launch only. It is the second layer, as the first has
the one hook that looks for adapters of the whole model. The time is that of the thread on its core. Both layers run in
turns, so that what else the machine does meets both; printed are medians, and the median of the ratios of neighbours.
On CUDA the difference of the two, in microseconds, is what counts, wherever the host is what a step waits for.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig, AutoModelForCausalLM

from accel_tp_ddp.model.check import check_model
from accel_tp_ddp.model.parallelize import shard

TP = 2


def build(model: str, hidden: int, part: int):
    config = AutoConfig.for_model(
        model,
        hidden_size=hidden,
        num_hidden_layers=2,
        num_attention_heads=8 // part,
        num_key_value_heads=4 // part,
        head_dim=hidden // 8,
        intermediate_size=2 * hidden // part,
        vocab_size=128,
        pad_token_id=0,
    )
    return AutoModelForCausalLM.from_config(config)


def step(layer, states, positions, autocast: bool) -> tuple[float, float]:
    """Seconds of one forward and of one backward."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        start = time.thread_time()
        output = layer(states, position_embeddings=positions)
        middle = time.thread_time()
    output = output[0] if isinstance(output, tuple) else output
    grad = torch.ones_like(output)
    before = time.thread_time()
    output.backward(grad)
    return middle - start, time.thread_time() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="llama")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--length", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=2000)
    parser.add_argument("--autocast", action="store_true", help="bf16 autocast")
    parser.add_argument("--overlap", action="store_true", help="with weight gradients beside the sums")
    args = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=TP)
    mesh = init_device_mesh("cpu", (TP,), mesh_dim_names=("tp",))
    whole = build(args.model, args.hidden, 1)
    shard(whole, mesh, replace(check_model(whole, mesh, "auto"), overlap=0 if args.overlap else None))
    models = {"unsharded": build(args.model, args.hidden, TP), "sharded": whole}
    states = torch.randn(1, args.length, args.hidden, requires_grad=True)
    positions = models["unsharded"].model.rotary_emb(states, torch.arange(args.length)[None])
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for name, model in models.items():  # not counted: first calls
        for _ in range(20):
            step(model.model.layers[1], states, positions, args.autocast)
    for _ in range(args.repeats):
        for name, model in models.items():
            times[name].append(step(model.model.layers[1], states, positions, args.autocast))
    print(f"{args.model}, hidden {args.hidden}, tp {TP}, one layer, {args.repeats} interleaved repeats, us")
    kinds = {"forward": lambda pair: pair[0], "backward": lambda pair: pair[1], "both": sum}
    for kind, of in kinds.items():
        plain, tp = ([1e6 * of(pair) for pair in times[name]] for name in ("unsharded", "sharded"))
        ratio = statistics.median(b / a for a, b in zip(plain, tp))
        print(
            f"{kind:8}  unsharded {statistics.median(plain):7.1f}  sharded {statistics.median(tp):7.1f}  "
            f"median ratio {ratio:.2f} ({100 * (ratio - 1):+.0f} %)  minima {min(plain):.1f} {min(tp):.1f}"
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
