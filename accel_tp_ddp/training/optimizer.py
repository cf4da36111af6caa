"""Optimizers that were built before their model was sharded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Size, Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ..core.pieces import FlatShard
from ..core.shard import ShardInfo, full_shape, shard_info
from .full_tensor_step import steps_on_full_tensors
from .zero1 import zero1_of

__all__ = [
    "check_optimizer",
    "check_step",
    "cut_state",
    "follow_model",
    "full_optimizer_state",
    "holds_state",
    "state_shape",
    "state_shard",
    "take_full_state",
]


#: Optimizers whose step looks at a full matrix, or at a norm or a dot product over many elements: on a shard each
#: would do something else. Those that `steps_on_full_tensors` knows are right nevertheless.
LOOKS_AT_MATRICES = frozenset(
    "AdaLomo Adafactor AdamMini APOLLO CAME DAdaptAdaGrad DAdaptAdam DAdaptLion DAdaptSGD Dion DistributedShampoo "
    "GaLoreAdafactor GaLoreAdamW GaLoreAdamW8bit LAMB LARS LBFGS Lamb Lars Muon MuonWithAuxAdam NovoGrad Prodigy SAM "
    "SOAP Shampoo SingleDeviceMuon SingleDeviceMuonWithAuxAdam".split()
)


def check_optimizer(optimizer: Optimizer, models: Iterable[nn.Module]) -> None:
    """Raise unless `optimizer` is right on shards, and trains parameters of `models`, not what they had before.

    Raises:
        ValueError: With the optimizer's name, or the position and size of the first parameter that does not.
    """
    models = list(models)
    check_step(optimizer)
    for group in optimizer.param_groups:
        for param in group["params"]:
            _check_state(optimizer, param)
    known = {id(param) for model in models for param in model.parameters()}
    if _trains_all_of(models, {id(param) for group in optimizer.param_groups for param in group["params"]}):
        return  # beside them others, such as those of a loss: no model's parameter has been left behind
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


def _trains_all_of(models: list[nn.Module], trained: set[int]) -> bool:
    """Whether those models of which some parameter is trained have all trained that can be."""
    own = [{id(param) for param in model.parameters() if param.requires_grad} for model in models]
    met = [params for params in own if params & trained]
    return bool(met) and all(params <= trained for params in met)


def check_step(optimizer: Optimizer) -> None:
    """Raise if the step of `optimizer` looks at more than one element at a time, and cannot take full tensors.

    Raises:
        ValueError: With the optimizer's name.
    """
    if steps_on_full_tensors(optimizer):
        return
    for kind in type(optimizer).__mro__:
        if kind.__name__ in LOOKS_AT_MATRICES:
            raise ValueError(
                f"the optimizer {kind.__name__} works on full matrices (factored moments, orthogonalisation, norms), "
                "and a tensor-parallel rank holds parts of them: its steps would differ from those without tensor "
                "parallelism. Use one that works element by element, such as AdamW, SGD or Lion, or Adafactor, or set "
                "tp_size=1. If its update of a parameter depends on no other parameter, "
                f"`accel_tp_ddp.register_whole_step({kind.__name__})` lets it step on full tensors."
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
        info, shard = shard_info(param), state_shard(optimizer, param)
        if info is None:
            continue
        for key, value in state.items():
            if isinstance(value, DTensor) and steps_on_full_tensors(optimizer):
                state[key] = value.full_tensor()
            elif isinstance(value, DTensor):
                state[key] = value.redistribute(placements=info.placements).to_local()
        if shard is not None:
            state.update(cut_state(state, shard))


def state_shard(optimizer: Optimizer, param: Tensor) -> ShardInfo | FlatShard | None:
    """How the state of `param` is cut; None where a rank that holds any holds all of it."""
    zero = zero1_of(optimizer)
    divided = zero.shard(optimizer, param) if zero is not None else None
    return divided if divided is not None else _tp_shard(optimizer, param)


def _tp_shard(optimizer: Optimizer, param: Tensor) -> ShardInfo | None:
    info = shard_info(param)
    return info if info is not None and info.is_sharded and not steps_on_full_tensors(optimizer) else None


def holds_state(optimizer: Optimizer, param: Tensor) -> bool:
    """Whether this rank keeps any state of `param`; with zero1 another replica may."""
    zero = zero1_of(optimizer)
    return zero is None or zero.holds(optimizer, param)


def state_shape(param: Tensor, shard: ShardInfo | FlatShard | None) -> Size:
    """The shape on this rank of a state that is cut as `shard` says."""
    return shard.local_shape if isinstance(shard, FlatShard) else param.shape


def cut_state(state: Mapping[str, Any], shard: ShardInfo | FlatShard) -> dict[str, Any]:
    """One parameter's state with this rank's parts of the full tensors in it; anything else as it is."""
    return {key: shard.cut_if_full(value) for key, value in state.items()}


def take_full_state(optimizer: Optimizer) -> None:
    """Let `optimizer.load_state_dict` take unsharded state, as plain DDP writes it, as well as this rank's."""
    optimizer.register_load_state_dict_pre_hook(_cut_full_state)


def full_optimizer_state(optimizer: Optimizer, keep: bool = True) -> dict[str, Any]:
    """`optimizer.state_dict()` as it would be without tensor parallelism and zero1, on the CPU.

    Collective over the tensor-parallel group, with zero1 over all ranks, tensor by tensor.

    Args:
        optimizer: One over localized parameters.
        keep: Whether this rank wants the result; others take part, and get an empty state.
    """
    state_dict = optimizer.state_dict()
    params = dict(_numbered(optimizer, state_dict))
    zero, full = zero1_of(optimizer), dict[Any, dict[str, Any]]()
    known: Iterable[tuple[Any, str, Any]]
    if zero is None:
        states = state_dict["state"]
        known = ((index, key, value) for index in params for key, value in states.get(index, {}).items())
    else:
        known = zero.full_states(optimizer, state_dict["state"])
    for index, key, value in known:
        if isinstance(value, Tensor):
            shard = _tp_shard(optimizer, params[index])
            value = shard.full_tensor(value) if shard and value.shape == params[index].shape else value.detach()
            value = value.cpu() if keep else None
        full.setdefault(index, {})[key] = value
    return {**state_dict, "state": full if keep else {}}


def _cut_full_state(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    state = dict(state_dict["state"])
    for index, param in _numbered(optimizer, state_dict):
        if index not in state:
            continue
        if not holds_state(optimizer, param):
            del state[index]
        elif (shard := state_shard(optimizer, param)) is not None:
            state[index] = cut_state(state[index], shard)
    return {**state_dict, "state": state}


def _numbered(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> Iterator[tuple[Any, nn.Parameter]]:
    """Each parameter with the number that it has in `state_dict`."""
    for group, own in zip(state_dict["param_groups"], optimizer.param_groups):
        yield from zip(group["params"], own["params"])


def _check_state(optimizer: Optimizer, param: nn.Parameter) -> None:
    """A state tensor is a number, or has its parameter's shape, so that it can be cut as the parameter is."""
    if steps_on_full_tensors(optimizer):
        return
    full, own = full_shape(param), state_shape(param, state_shard(optimizer, param))
    for key, value in optimizer.state.get(param, {}).items():
        if isinstance(value, Tensor) and value.numel() != 1 and value.shape not in (full, param.shape, own):
            raise ValueError(
                f"the optimizer {type(optimizer).__name__} holds a state `{key}` of size {tuple(value.shape)} for a "
                f"parameter of size {tuple(full)}; it cannot be cut likewise. Prepare the model before the first "
                "optimizer step, or use an optimizer whose state has its parameter's shape."
            )
