"""One training step of a Llama under this package, torch's styles and transformers' tensor parallelism, side by side.

    torchrun --nproc_per_node 2 --rdzv-backend c10d --rdzv-endpoint localhost:0 benchmarks/peers.py

Prints, for each of them, collectives per decoder layer and the step time as a ratio to this package's in the same run
(interleaved rounds, median of the rounds' ratios), and the share of the sharded weights that one rank holds.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import AutoModelForCausalLM, LlamaConfig

from accel_tp_ddp import parallelize

COLLECTIVES = ("all_reduce", "allreduce", "all_gather", "allgather", "reduce_scatter")


def with_this_package(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    return parallelize(model, mesh)


def with_torch_styles(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    plan = {}
    for index in range(len(model.model.layers)):
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
            plan[f"model.layers.{index}.{name}"] = ColwiseParallel()
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            plan[f"model.layers.{index}.{name}"] = RowwiseParallel()
    plan["model.embed_tokens"] = RowwiseParallel(input_layouts=Replicate())
    plan["lm_head"] = ColwiseParallel(output_layouts=Replicate())
    return parallelize_module(model, mesh, plan)


def with_transformers(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    return apply_tensor_parallelism(model, mesh, model._expand_parallel_plan(model.tp_plan))


PEERS = {"accel_tp_ddp": with_this_package, "torch styles": with_torch_styles, "transformers": with_transformers}


def build(args: argparse.Namespace, layers: int) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 3,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=args.vocab,
    )
    return AutoModelForCausalLM.from_config(config)


def count_collectives(make: Callable, args: argparse.Namespace, mesh: DeviceMesh, ids: torch.Tensor) -> list[float]:
    """Collectives per layer in forward and backward: the difference between a deeper and a shallower model."""
    totals = []
    for layers in (2, 4):
        model = make(build(args, layers), mesh)
        with CommDebugMode() as mode:
            loss = model(input_ids=ids, labels=ids).loss
            forward = total(mode)
            loss.backward()
            totals.append((forward, total(mode) - forward))
    return [(deep - shallow) / 2 for shallow, deep in zip(*totals)]


def total(mode: CommDebugMode) -> int:
    return sum(n for op, n in mode.get_comm_counts().items() if any(name in str(op) for name in COLLECTIVES))


def step_seconds(model: nn.Module, ids: torch.Tensor) -> float:
    dist.barrier()
    start = time.perf_counter()
    model(input_ids=ids, labels=ids).loss.backward()
    seconds = torch.tensor(time.perf_counter() - start)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    model.zero_grad()
    return seconds.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    torch.manual_seed(1)
    ids = torch.randint(0, args.vocab, (args.batch, args.length))

    plain = build(args, args.layers)
    loss = plain(input_ids=ids, labels=ids).loss.item()
    models, counts = {}, {}
    for name, make in PEERS.items():
        counts[name] = count_collectives(make, args, mesh, ids)
        models[name] = make(copy.deepcopy(plain), mesh)
        ours = models[name](input_ids=ids, labels=ids).loss.item()
        assert abs(ours - loss) < 1e-4 * loss, f"{name}: loss {ours}, unsharded {loss}"
    rounds: dict[str, list[float]] = {name: [] for name in models}
    for index in range(args.rounds + 3):
        for name, model in models.items():
            seconds = step_seconds(model, ids)
            if index >= 3:  # the first rounds warm up
                rounds[name].append(seconds)

    if dist.get_rank() == 0:
        ours, base = models["accel_tp_ddp"], rounds["accel_tp_ddp"]
        print(f"Llama, {args.layers} layers, hidden {args.hidden}, vocabulary {args.vocab}, tp {mesh.size()}")
        print(f"{'':14} {'collectives/layer':>18} {'step time':>10} {'median':>9}")
        for name in models:
            ratio = statistics.median(a / b for a, b in zip(rounds[name], base))
            forward, backward = counts[name]
            milliseconds = statistics.median(rounds[name]) * 1000
            print(f"{name:14} {f'{forward:g} + {backward:g}':>18} {ratio:9.2f}x {milliseconds:6.0f} ms")
        sharded = [param for param in ours.parameters() if param.tp_shard is not None]
        held = sum(param.numel() for param in sharded) / sum(param.tp_shard.global_shape.numel() for param in sharded)
        print(f"share of the sharded weights on this rank: {held:.4f} (1/tp = {1 / mesh.size():.4f})")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
