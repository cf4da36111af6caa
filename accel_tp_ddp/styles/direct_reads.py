"""Weights that other code reads directly: `model.get_output_embeddings().weight` within a forward.

Fused losses (TRL's, Liger's) and models with an output layer of their own multiply with a weight instead of calling
its module. A shard there gives a wrong loss and no error. So, while the forward of a sharded model runs, such a read
gives the full weight, gathered once a forward when it is first used, also of another model: a student's loss reads its
teacher's weight. The module's own forward and all code outside of forwards see this rank's shard.

The module is given a class derived from its own, with a property for each such parameter. Python looks properties up
on the class alone, and the parameter itself has to stay in `_parameters`, where optimizers and state dicts find it;
`torch.nn.utils.parametrize` swaps the class for the same reasons.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from ..core.gathered import gathered_when_used
from .forward import ParallelForward, call_behind
from .region import running_region

__all__ = ["read_full"]


def read_full(module: nn.Module, call: ParallelForward) -> None:
    """Let direct reads of the sharded parameters of `module` give full ones while a forward runs."""
    names = tuple(name for name, info in call.shards.items() if info.layout.contiguous)
    if names:
        module.__class__ = _type_that_reads_full(type(module), names)  # type: ignore[arg-type]  # classes are hashable


@functools.cache
def _type_that_reads_full(base: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """`base` with a property in the place of each parameter; the parameter itself stays in `_parameters`."""
    body: dict[str, Any] = {name: property(functools.partial(_read, name=name)) for name in names}
    body["__reduce_ex__"] = functools.partialmethod(_reduce, base=base, names=names)
    body["__module__"], body["__qualname__"], body["__doc__"] = base.__module__, base.__qualname__, base.__doc__
    return type(base.__name__, (base,), body)


def _read(module: nn.Module, name: str) -> Tensor | None:
    param = module._parameters[name]
    call = call_behind(module.__dict__.get("forward"))
    region = running_region()
    if region is None or call is None or call.computing or call.idle:
        return param
    full, key = region.full, (id(param), param._version, torch.is_grad_enabled())
    if key not in full:
        layout, shared = call.shards[name].layout, call.facts.get("loss_parallel", False)
        assert layout is not None, "what is read so is sharded"
        full[key] = gathered_when_used(call.mesh, call.held(name), layout, lambda: region.running > 0, shared)
    return full[key]


def _reduce(module: nn.Module, protocol: int, base: type[nn.Module], names: tuple[str, ...]) -> tuple:
    """Such a type has no name to be pickled by."""
    return _rebuild, (base, names), module.__dict__


def _rebuild(base: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    kind = _type_that_reads_full(base, names)  # type: ignore[arg-type]  # classes are hashable
    return kind.__new__(kind)
