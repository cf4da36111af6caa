"""What TRL needs where vLLM generates: full weights, and completions that are drawn once for each replica.

vLLM knows nothing of replicas. It takes the ranks of `torch.distributed` in their order, and makes an engine of each
`vllm_tensor_parallel_size` neighbours. So an engine is a part of a replica, a replica, or several of them. Among the
engines of one replica the first one generates. Ranks of one engine get the same prompts and draw the same, as vLLM
wants it; and what the first rank of a replica has got is what its peers take.

A server serves all replicas as processes. There only the weights need a word: the main process sends them, and its
peers give it their parts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ..core.collectives import object_of_first_rank
from ..core.override import Override, attributes, overridden
from ..model.full_parameters import full_parameters

__all__ = ["OVERRIDES", "OVERRIDES_OF_ENGINE"]


class Sizes(Protocol):
    """What is needed of the plugin."""

    device_mesh: DeviceMesh


def sync_weights(plugin: Sizes, stock: Callable, owner: Any, /) -> None:
    """Walks over the model's `named_parameters` on all ranks, and gives each to the engine, or to the server."""
    with full_parameters(owner.model):
        stock()


def init_vllm(plugin: Sizes, stock: Callable, generation: Any, /) -> None:
    """`_init_vllm` counts ranks for vLLM, in RANK and WORLD_SIZE and where it groups the ranks of an engine.

    Raises:
        ValueError: If neither an engine is made of replicas, nor a replica of engines.
    """
    if generation.mode != "colocate":
        return stock()
    engine, replica = generation.tensor_parallel_size, plugin.device_mesh["tp"].size()
    if engine % replica and replica % engine:
        raise ValueError(
            f"vllm_tensor_parallel_size={engine} and tp_size={replica}: an engine would have parts of replicas. Set "
            f"vllm_tensor_parallel_size={replica}, for one engine for each replica, or to a divisor or multiple of it."
        )
    replicas = max(1, engine // replica)
    seed = plugin.device_mesh.get_local_rank("dp_replicate") // replicas
    rows = [row for row in OVERRIDES_OF_ENGINE if row.is_loaded()]  # without vLLM TRL has its own word
    with attributes(generation, accelerator=_AmongRanks(generation.accelerator)), overridden(rows, seed):
        stock()
    if replicas > 1:
        firsts = range(0, dist.get_world_size(), engine)
        groups = [[first + own + i * replica for i in range(replicas)] for first in firsts for own in range(replica)]
        generation.tp_group, _ = dist.new_subgroups_by_enumeration(groups)


def init_engine(seed: int, stock: Callable, llm: Any, /, *args: Any, **kwargs: Any) -> None:
    """TRL's `LLM(seed=...)` is the engine's number, where under plain DDP it is that of the process."""
    stock(*args, **{**kwargs, "seed": seed})


def generate(plugin: Sizes, stock: Callable, generation: Any, /, *args: Any, **kwargs: Any) -> Any:
    """`generate` joins the prompts of the ranks of an engine, and takes what is its own of what they draw."""
    if generation.mode != "colocate":
        return stock(*args, **kwargs)
    tp_mesh, engine = plugin.device_mesh["tp"], generation.tensor_parallel_size
    if engine > 1:
        # As TRL, which leaves it out where it is to see one rank: gradients' all-reduces end before vLLM's begin.
        generation.accelerator.wait_for_everyone()
    generates = tp_mesh.get_local_rank() < engine
    llm = generation.llm if generates else _Idle(generation.llm)
    with attributes(generation, llm=llm, tensor_parallel_size=max(1, engine // tp_mesh.size())):
        drawn = stock(*args, **kwargs)
    return object_of_first_rank(tp_mesh, drawn)


def generate_in_replica(plugin: Sizes, stock: Callable, trainer: Any, /, *args: Any, **kwargs: Any) -> Any:
    """OnlineDPO's `_generate_vllm_colocate` draws on each rank by itself.

    Raises:
        ValueError: If engines have several ranks: they were given the numbers of processes.
    """
    if trainer.vllm_tensor_parallel_size > 1:
        raise ValueError(
            f"OnlineDPOTrainer with vllm_tensor_parallel_size={trainer.vllm_tensor_parallel_size} and "
            f"tp_size={plugin.device_mesh['tp'].size()}: it gives vLLM the numbers of processes where vLLM wants "
            'those of ranks. Set vllm_tensor_parallel_size=1, or vllm_mode="server".'
        )
    return object_of_first_rank(plugin.device_mesh["tp"], stock(*args, **kwargs))


class _AmongRanks:
    """An accelerator that counts ranks where it counts replicas."""

    def __init__(self, accelerator: Any):
        self._accelerator = accelerator
        self.num_processes = dist.get_world_size()
        self.process_index = dist.get_rank()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._accelerator, name)


class _Idle:
    """An engine that leaves the prompts to the first one of its replica."""

    def __init__(self, llm: Any):
        self._llm = llm

    def generate(self, *args: Any, **kwargs: Any) -> list[Any]:
        return []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llm, name)


def _trl(owner: str, name: str, function: Callable[..., Any], line: int, reason: str, **options: Any) -> Override:
    file = owner.removeprefix("trl.").rpartition(".")[0].replace(".", "/")
    # Whoever has imported TRL may train by something else.
    return Override(owner, name, function, f"trl 1.16, {file}.py:{line}", reason, counts=False, **options)


def _engine(name: str, function: Callable[..., Any], line: int, reason: str, *needs: str) -> Override:
    return _trl("trl.generation.vllm_generation.VLLMGeneration", name, function, line, reason, needs=needs)


_OF_ENGINE = ("llm", "tensor_parallel_size")
_SENDS = "sends this rank's shards"
_ONLINE_DPO = "trl.experimental.online_dpo.online_dpo_trainer.OnlineDPOTrainer"
_ASYNC_GRPO = "trl.experimental.async_grpo.async_grpo_trainer.AsyncGRPOTrainer"
_ASYNC_DISTILLATION = "trl.experimental.async_distillation.async_distillation_trainer.AsyncDistillationTrainer"

OVERRIDES = (
    _engine("_init_vllm", init_vllm, 289, "counts replicas where vLLM counts ranks", "accelerator"),
    _engine("sync_weights", sync_weights, 481, _SENDS, "named_parameters"),
    _engine("generate", generate, 550, "draws on each rank, and joins the prompts of peers", *_OF_ENGINE),
    _trl(_ONLINE_DPO, "_move_model_to_vllm", sync_weights, 799, _SENDS),
    _trl(_ONLINE_DPO, "_generate_vllm_colocate", generate_in_replica, 735, "draws on each rank by itself"),
    _trl(_ASYNC_GRPO, "_sync_weight", sync_weights, 1733, _SENDS),
    _trl(_ASYNC_DISTILLATION, "_sync_weight", sync_weights, 1902, _SENDS, since="1.11"),
)

#: While TRL makes one.
OVERRIDES_OF_ENGINE = (
    Override(
        *("vllm.LLM", "__init__", init_engine, "vllm 0.22, entrypoints/llm.py"),
        "is given the number of the engine for a seed, not that of the replica",
        counts=False,
    ),
)
