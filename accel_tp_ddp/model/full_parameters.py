"""Full weights to who walks over `named_parameters()` to send them somewhere else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn

from ..core.override import Override, install, uninstall
from ..core.shard import holds_shards, shard_info
from ..core.wrappers import unwrap

__all__ = ["OVERRIDES", "full_parameters"]


@contextmanager
def full_parameters(model: nn.Module) -> Iterator[None]:
    """Let `named_parameters` of a sharded model give full tensors within the block, each joined when its turn comes.

    Names, order and ties are the usual ones, and what is replicated comes as it is. Every rank of a replica has to
    walk as far as its peers do, and holds no more than the tensor that is due and those that the caller has kept.
    `parameters`, which the merging of adapters may go by, still gives this rank's shards.

    Args:
        model: Bare model, or its DDP wrapper; one that is not sharded is left alone.
    """
    model = unwrap(model)
    rows = OVERRIDES if holds_shards(model) else ()
    install(model, rows)
    try:
        yield
    finally:
        uninstall(model, rows)


def named_parameters(
    stock: Callable, model: nn.Module, /, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
) -> Iterator[tuple[str, nn.Parameter]]:
    """`named_parameters`, of full tensors. Collective over the tensor-parallel group, one for each that is sharded."""
    for name, param in stock(prefix, recurse, remove_duplicate):
        yield name, _full(param)  # which is not kept here


def _full(param: nn.Parameter) -> nn.Parameter:
    info = shard_info(param)
    if info is None or not info.is_sharded:
        return param
    return nn.Parameter(info.full_tensor(param), requires_grad=param.requires_grad)


def parameters(stock: Callable, model: nn.Module, /, recurse: bool = True) -> Iterator[nn.Parameter]:
    """`parameters`, which goes by `named_parameters`: this rank's shards, as ever."""
    for _, param in type(model).named_parameters(model, recurse=recurse):
        yield param


def _row(name: str, function: Callable, line: int, reason: str) -> Override:
    return Override("torch.nn.Module", name, function, f"torch 2.13, nn/modules/module.py:{line}", reason)


OVERRIDES = (
    _row("named_parameters", named_parameters, 2690, "gives this rank's shards to who sends weights away"),
    _row("parameters", parameters, 2665, "goes by `named_parameters`, and would join all tensors at once"),
)
