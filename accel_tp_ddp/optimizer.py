"""Optimizers that were built before their model was sharded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from .shard import ShardInfo, shard_info

__all__ = ["check_optimizer", "follow_model"]


#: Optimizers whose step looks at a whole matrix, or at a norm of it: on a shard each would do something else.
LOOKS_AT_MATRICES = frozenset(
    "AdaLomo Adafactor AdamMini APOLLO CAME GaLoreAdafactor GaLoreAdamW GaLoreAdamW8bit LAMB LARS Lamb Lars Muon SOAP "
    "Shampoo DistributedShampoo".split()
)


def check_optimizer(optimizer: Optimizer, models: Iterable[nn.Module]) -> None:
    """Raise unless `optimizer` is right on shards, and every parameter that it trains belongs to one of `models`.

    Raises:
        ValueError: With the optimizer's name, or the position and size of the first parameter that does not.
    """
    models = list(models)
    for kind in type(optimizer).__mro__:
        if kind.__name__ in LOOKS_AT_MATRICES:
            raise ValueError(
                f"the optimizer {kind.__name__} works on whole matrices (factored moments, orthogonalisation, norms), "
                "and a tensor-parallel rank holds parts of them: its steps would differ from those without tensor "
                "parallelism. Use one that works element by element, such as AdamW, SGD or Lion, or set tp_size=1."
            )
    for group in optimizer.param_groups:
        for param in group["params"]:
            _check_state(optimizer, param)
    known = {id(param) for model in models for param in model.parameters()}
    for group_index, group in enumerate(optimizer.param_groups):
        for index, param in enumerate(group["params"]):
            if id(param) in known:
                continue
            same_size = [
                name for model in models for name, own in model.named_parameters() if own.shape == param.shape
            ]
            hint = f" Parameters of that size in the model: {', '.join(same_size[:3])}." if same_size else ""
            raise ValueError(
                f"the optimizer {type(optimizer).__name__} trains a parameter that is in no model given to `prepare`: "
                f"number {index} of group {group_index}, of size {tuple(param.shape)}.{hint} Build the optimizer from "
                "`model.parameters()` of the model that you prepare, after anything that replaces its parameters, and "
                "prepare the model before the optimizer or together with it."
            )


def follow_model(optimizer: Optimizer, mapping: Mapping[nn.Parameter, nn.Parameter]) -> None:
    """Let `optimizer` train the sharded parameters: put new objects for old ones, and cut its state to the shards.

    Groups, hyper-parameters and their order stay. Does nothing to what has been done already.
    """
    for group in optimizer.param_groups:
        group["params"] = [mapping.get(param, param) for param in group["params"]]
    for old, new in mapping.items():
        if old in optimizer.state:
            optimizer.state[new] = optimizer.state.pop(old)
    for param, state in optimizer.state.items():
        info = shard_info(param) if isinstance(param, Tensor) else None
        if info is None:
            continue
        for key, value in state.items():
            if isinstance(value, Tensor):
                state[key] = _local_state(value, param, info)


def _check_state(optimizer: Optimizer, param: nn.Parameter) -> None:
    """A state tensor is a number, or has its parameter's shape, so that it can be cut as the parameter is."""
    info = shard_info(param)
    full = info.global_shape if info is not None else param.shape
    for key, value in optimizer.state.get(param, {}).items():
        if isinstance(value, Tensor) and value.numel() != 1 and value.shape not in (full, param.shape):
            raise ValueError(
                f"the optimizer {type(optimizer).__name__} holds a state `{key}` of size {tuple(value.shape)} for a "
                f"parameter of size {tuple(full)}; it cannot be cut likewise. Prepare the model before the first "
                "optimizer step, or use an optimizer whose state has its parameter's shape."
            )


def _local_state(value: Tensor, param: nn.Parameter, info: ShardInfo) -> Tensor:
    if isinstance(value, DTensor):
        value = value.redistribute(placements=info.placements).to_local()
    whole = not info.is_sharded or value.numel() == 1 or value.shape == param.shape
    return value if whole else info.local_part(value)
