"""What `prepare` costs for Llamas of 8 B and 70 B parameters, without their weights: seconds and memory of a rank.

    python -m benchmarks.prepare_cost [--models "8 B" "70 B"] [--tp 2 8] [--rounds 3]

One rank of `tp`, whose group sends nothing (torch's fake process group), shards a model of fake tensors: they have
shapes and no contents, so what is measured is the work on the host, and memory is counted: the largest sum of the
bytes of all fake tensors that are alive at one time, beside the unsharded model. Not in it: the proof of a plan that
is not known to be right (`benchmarks.proof_cost`), and DDP's broadcast of the weights.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
import weakref
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig

from accel_tp_ddp import resolve_plan
from accel_tp_ddp.model.check import check_model
from accel_tp_ddp.model.parallelize import shard

from .zero1 import GIB, LLAMAS


class Alive(TorchDispatchMode):
    """Counts the bytes of all storages that operations make, as long as they live."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()
        for param in model.parameters():
            self._add(param)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        return result

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._known:
            self._known.add(key)
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._remove, key, storage.nbytes())

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prepare_cost", description=__doc__)
    parser.add_argument("--models", nargs="*", default=list(LLAMAS), choices=list(LLAMAS))
    parser.add_argument("--tp", type=int, nargs="*", default=[2, 8])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args(argv)
    for tp in args.tp:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=tp)
        for name in args.models:
            print(measure(name, tp, args.rounds), flush=True)
        dist.destroy_process_group()
    return 0


def measure(name: str, tp: int, rounds: int) -> str:
    config = LlamaConfig(**LLAMAS[name], num_key_value_heads=8, vocab_size=128256)
    mesh = init_device_mesh("cpu", (tp,), mesh_dim_names=("tp",))
    planned, sharded, copied = [], [], []
    with FakeTensorMode():
        for _ in range(rounds):
            model = AutoModelForCausalLM.from_config(config)
            full = sum(param.nbytes for param in model.parameters())
            start = time.perf_counter()
            resolve_plan(model, tp)
            planned.append(time.perf_counter() - start)
            start = time.perf_counter()
            copy.deepcopy(model)
            copied.append(time.perf_counter() - start)
            start = time.perf_counter()
            shard(model, mesh, check_model(model, mesh, "auto"))
            sharded.append(time.perf_counter() - start)
        model = AutoModelForCausalLM.from_config(config)
        with Alive(model) as alive:
            before = alive.now
            shard(model, mesh, check_model(model, mesh, "auto"))
        own = sum(param.nbytes for param in model.parameters())
    seconds = {k: statistics.median(v) for k, v in {"plan": planned, "all": sharded, "copy": copied}.items()}
    full, own = full / GIB, own / GIB
    most = (alive.most - before) / GIB
    return (
        f"{name}, tp {tp}: {seconds['all']:.2f} s, of them {seconds['plan']:.2f} s for a plan (a deep copy takes "
        f"{seconds['copy']:.2f} s); at most {most:.2f} GiB beside the {full:.1f} GiB given, {own:.1f} GiB left"
    )


if __name__ == "__main__":
    sys.exit(main())
