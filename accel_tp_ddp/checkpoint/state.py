"""Models and optimizers as names and tensors, and back.

A tensor is called after its parameter: `models.0.lm_head.weight`, `optimizers.0.0.lm_head.weight.exp_avg` (the first
optimizer's state for the first model's parameter). What an optimizer keeps beside tensors of its parameter's shape
(steps, hyper-parameters, which parameters are in which group) is one small object for each optimizer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Size, Tensor, nn
from torch.optim import Optimizer

from ..core.errors import CheckpointError, nearest
from ..core.pieces import FlatShard
from ..core.shard import ShardInfo, full_shape, restore_shards, shard_info
from ..core.wrappers import unwrap
from ..training.optimizer import cut_state, holds_state, state_shape, state_shard
from .dcp import Part

__all__ = ["ModelState", "OptimizerState", "parameter_names", "summary_keys"]


class ModelState:
    """The parameters and persistent buffers of one model.

    Args:
        model: Bare model or its DDP wrapper.
        prefix: What its names begin with in a checkpoint.
    """

    def __init__(self, model: nn.Module, prefix: str):
        self.model = unwrap(model)
        self.prefix = prefix
        restore_shards(self.model)
        self.tensors: dict[str, Tensor] = {}
        self.objects: dict[str, Any] = {}
        self.aliases: dict[str, str] = {}  # tied weights: further name to the one that is kept
        first: dict[int, str] = {}
        for name, value in self.model.state_dict(keep_vars=True).items():
            if not isinstance(value, Tensor):
                self.objects[name] = value
            elif id(value) in first:
                self.aliases[name] = first[id(value)]
            else:
                first[id(value)] = name
                self.tensors[name] = value

    def values(self, keep: Iterable[str] | None = None) -> dict[str, Any]:
        """What DCP saves, and where it loads to. `keep`: only these names."""
        kept = None if keep is None else set(keep)
        values: dict[str, Any] = {name: Part(tensor, shard_info(tensor)) for name, tensor in self.tensors.items()}
        values.update(self.objects)
        names = {name: {name, *(a for a, to in self.aliases.items() if to == name)} for name in values}
        return {self.prefix + name: v for name, v in values.items() if kept is None or kept & names[name]}

    def check(self, stored: Mapping[str, Size | None], strict: bool) -> None:
        """Raise unless a checkpoint with the names and shapes `stored` has this model's tensors.

        Raises:
            CheckpointError: With the names that are missing or unexpected, or the first shape that differs.
        """
        own = {name.removeprefix(self.prefix): v for name, v in self.values().items()}
        own = {name: v for name, v in own.items() if not (isinstance(v, Part) and v.is_empty)}
        there = {name.removeprefix(self.prefix): s for name, s in stored.items() if name.startswith(self.prefix)}
        kind = type(self.model).__name__
        if strict:
            _check_names(kind, own, there)
        for name in own.keys() & there.keys():
            wanted = own[name].global_shape if isinstance(own[name], Part) else None
            if wanted != there[name]:
                raise CheckpointError(
                    f"`{name}` of this {kind} has the size {_size(wanted)}, but {_size(there[name])} in the "
                    "checkpoint. Build the model as it was when the state was saved."
                )

    def take_objects(self, loaded: Mapping[str, Any]) -> None:
        """Give what is no tensor (`get_extra_state`) back to the model."""
        objects = {name: loaded[self.prefix + name] for name in self.objects if self.prefix + name in loaded}
        if objects:
            self.model.load_state_dict(objects, strict=False)


def parameter_names(models: Sequence[nn.Module]) -> dict[int, str]:
    """The name of each parameter by its id: the model's number and the parameter's own name."""
    names: dict[int, str] = {}
    for index, model in enumerate(models):
        for name, param in unwrap(model).named_parameters():
            names.setdefault(id(param), f"{index}.{name}")
    return names


class OptimizerState:
    """The state of one optimizer, by parameter name.

    Args:
        optimizer: Bare, or as Accelerate prepared it.
        names: See `parameter_names`.
        prefix: What its names begin with in a checkpoint.
    """

    def __init__(self, optimizer: Optimizer, names: Mapping[int, str], prefix: str):
        self.optimizer = optimizer
        self.prefix = prefix
        self.kind = type(getattr(optimizer, "optimizer", optimizer)).__name__
        self.groups = [
            [names.get(id(param), f"group {index}, number {place}") for place, param in enumerate(group["params"])]
            for index, group in enumerate(optimizer.param_groups)
        ]
        self.params = {
            name: param
            for group, own in zip(optimizer.param_groups, self.groups)
            for name, param in zip(own, group["params"])
        }
        self.names = [name for group in self.groups for name in group]  # by the numbers that `state_dict` uses

    @property
    def summary_name(self) -> str:
        return self.prefix + "summary"

    def values(self) -> tuple[dict[str, Part], dict[str, Any]]:
        """The tensors by name, and the summary of all that is no tensor of its parameter's shape.

        Raises:
            CheckpointError: With the first state of a sharded parameter that is not cut as the parameter is.
        """
        packed = self.optimizer.state_dict()
        tensors: dict[str, Part] = {}
        summary: dict[str, Any] = {"kind": self.kind, "tensors": {}, "values": {}, "others": {}}
        for number, state in packed["state"].items():
            if not isinstance(number, int):
                summary["others"][number] = state
                continue
            name = self.names[number]
            param = self.params[name]
            info = state_shard(self.optimizer, param)
            summary["tensors"][name], summary["values"][name] = [], {}
            for key, value in state.items():
                if is_part(value, param, info):
                    summary["tensors"][name].append(key)
                    tensors[self._tensor_name(name, key)] = state_part(value, info)
                else:
                    self._check_value(name, key, value, param)
                    summary["values"][name][key] = _copy_on_cpu(value)
        hyper = [{k: _copy_on_cpu(v) for k, v in group.items() if k != "params"} for group in packed["param_groups"]]
        summary["groups"] = [{**group, "params": own} for group, own in zip(hyper, self.groups)]
        summary["rest"] = {key: value for key, value in packed.items() if key not in ("state", "param_groups")}
        return tensors, summary

    def _check_value(self, name: str, key: str, value: Any, param: nn.Parameter) -> None:
        if state_shard(self.optimizer, param) is None:
            return
        for tensor in _tensors_in(value):
            if tensor.numel() != 1:
                raise CheckpointError(
                    f"the optimizer {self.kind} holds a state `{key}` of size {tuple(tensor.shape)} for `{name}`, of "
                    f"which this rank has a part of size {tuple(param.shape)}. Only single numbers and tensors of the "
                    "parameter's own shape can be saved by parts. Use an optimizer with such a state, or tp_size=1."
                )

    def _tensor_name(self, name: str, key: str) -> str:
        return f"{self.prefix}{name}.{key}"

    def check(self, summary: Mapping[str, Any], stored: Mapping[str, Size | None]) -> None:
        """Raise unless the state that was saved belongs to the same parameters, in the same groups.

        Raises:
            CheckpointError: It says which parameters or groups differ.
        """
        groups = [group["params"] for group in summary["groups"]]
        if len(groups) != len(self.groups):
            raise CheckpointError(
                f"this {self.kind} has {len(self.groups)} parameter groups, but {len(groups)} in the checkpoint. "
                "Build the optimizer as it was when the state was saved."
            )
        for index, (own, there) in enumerate(zip(self.groups, groups)):
            _check_names(f"{self.kind}, group {index}", dict.fromkeys(own), dict.fromkeys(there))
        for name, keys in summary["tensors"].items():
            for key in keys:
                shape, size = full_shape(self.params[name]), stored.get(self._tensor_name(name, key))
                sharded = state_shard(self.optimizer, self.params[name]) is not None
                if shape.numel() and (size is None or sharded and size != shape):
                    raise CheckpointError(
                        f"the state `{key}` of `{name}` in this {self.kind} has the size {_size(shape)}, but "
                        f"{_size(size)} in the checkpoint."
                    )

    def targets(
        self, summary: Mapping[str, Any], stored: Mapping[str, Size | None], dtypes: Mapping[str, torch.dtype]
    ) -> dict[str, Part]:
        """Tensors to load into: those that the optimizer has, new ones where it has none or others."""
        parts: dict[str, Part] = {}
        self._loaded: dict[str, dict[str, Tensor]] = {}
        for name, keys in summary["tensors"].items():
            param = self.params[name]
            if not holds_state(self.optimizer, param):
                continue
            own = self._loaded[name] = {}
            for key in keys:
                full = self._tensor_name(name, key)
                info, size = state_shard(self.optimizer, param), stored.get(full)
                shape = state_shape(param, info) if info is not None or size is None else size
                own[key] = self._room(param, key, shape, dtypes.get(full, param.dtype))
                parts[full] = state_part(own[key], info)
        return parts

    def _room(self, param: nn.Parameter, key: str, shape: Size, dtype: torch.dtype) -> Tensor:
        existing = self.optimizer.state.get(param, {}).get(key)
        if isinstance(existing, Tensor) and existing.shape == shape and existing.dtype == dtype:
            return existing
        return torch.empty(shape, dtype=dtype, device=param.device)

    def take(self, summary: Mapping[str, Any]) -> None:
        """Put the loaded tensors and the values of `summary` in place, by the optimizer's own `load_state_dict`."""
        state: dict[Any, Any] = {
            number: {**self._loaded[name], **summary["values"][name]}
            for number, name in enumerate(self.names)
            if name in self._loaded
        }
        groups, number = [], 0
        for own, group, present in zip(self.groups, summary["groups"], self.optimizer.param_groups):
            hyper = {key: _to_place_of(value, present.get(key)) for key, value in group.items()}
            groups.append({**hyper, "params": list(range(number, number + len(own)))})
            number += len(own)
        state.update(summary["others"])
        self.optimizer.load_state_dict({"state": state, "param_groups": groups, **summary["rest"]})

    def take_plain(self, saved: Mapping[str, Any]) -> None:
        """Take an ordinary `optimizer.state_dict()` of the unsharded model: cut what is of a parameter's shape.

        Raises:
            CheckpointError: If it is of other parameters.
        """
        self.check_plain(saved)
        state = {
            number: self._cut(number, values) if isinstance(number, int) else values
            for number, values in saved["state"].items()
            if not isinstance(number, int) or holds_state(self.optimizer, self.params[self.names[number]])
        }
        self.optimizer.load_state_dict({**saved, "state": state})

    def check_plain(self, saved: Mapping[str, Any]) -> None:
        """Raise unless `saved` has the groups and shapes of this optimizer."""
        own, there = [len(group) for group in self.groups], [len(group["params"]) for group in saved["param_groups"]]
        if own != there:
            raise CheckpointError(
                f"the parameter groups of this {self.kind} have {own} parameters, those in the checkpoint {there}. "
                "Build the optimizer as it was when the state was saved."
            )
        for number, values in saved["state"].items():
            if isinstance(number, int):
                self._check_plain_state(self.names[number], values)

    def _check_plain_state(self, name: str, values: Mapping[str, Any]) -> None:
        info = state_shard(self.optimizer, self.params[name])
        if info is None:
            return
        for key, value in values.items():
            for tensor in _tensors_in(value):
                if tensor.numel() != 1 and (tensor is not value or value.shape != info.global_shape):
                    raise CheckpointError(
                        f"the state `{key}` of `{name}` has the size {tuple(tensor.shape)} in the checkpoint, and the "
                        f"parameter {tuple(info.global_shape)}: it cannot be cut as the parameter is."
                    )

    def _cut(self, number: int, values: Mapping[str, Any]) -> dict[str, Any]:
        param = self.params[self.names[number]]
        shard, existing = state_shard(self.optimizer, param), self.optimizer.state.get(param, {})
        result = dict(values) if shard is None else cut_state(values, shard)
        for key, value in result.items():
            present = existing.get(key)
            if not isinstance(value, Tensor):
                continue
            if isinstance(present, Tensor) and (present.shape, present.dtype) == (value.shape, value.dtype):
                result[key] = present.copy_(value)
            elif value is values[key]:
                result[key] = value.clone()  # not the file itself, mapped into memory
        return result


def summary_keys(summary: Mapping[str, Any]) -> list[tuple]:
    """What a summary has, without the values: for which parameters it holds which states."""
    return sorted(
        (name, kind, *map(str, keys)) for kind in ("tensors", "values") for name, keys in summary[kind].items()
    )


def is_part(value: Any, param: nn.Parameter, info: ShardInfo | FlatShard | None) -> bool:
    """Whether a state, cut as `info` says, is a tensor to be saved by parts: of the parameter's shape, or full."""
    if not isinstance(value, Tensor) or value.dim() == 0:
        return False
    return value.shape == state_shape(param, info) or (info is None and value.numel() > 1)


def state_part(value: Tensor, info: ShardInfo | FlatShard | None) -> Part:
    """The state tensor `value` as the part of a full one that `info` tells."""
    return Part(value, info)


def _tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [tensor for item in value.values() for tensor in _tensors_in(item)]
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in _tensors_in(item)]
    return []


def _copy_on_cpu(value: Any) -> Any:
    return value.detach().cpu().clone() if isinstance(value, Tensor) else value


def _to_place_of(value: Any, present: Any) -> Any:
    both = isinstance(value, Tensor) and isinstance(present, Tensor)
    return value.to(present.device) if both else value


def _check_names(what: str, own: Mapping[str, Any], there: Mapping[str, Any]) -> None:
    missing, unexpected = [n for n in own if n not in there], [n for n in there if n not in own]
    if missing or unexpected:
        lines = [f"missing from the checkpoint: {', '.join(missing[:3])} ({len(missing)})."] if missing else []
        lines += [f"only in the checkpoint: {', '.join(unexpected[:3])} ({len(unexpected)})."] if unexpected else []
        hint = nearest(missing[0], there) if missing else ""
        raise CheckpointError(f"the checkpoint is not one of this {what}: {' '.join(lines)}{hint}")


def _size(shape: Size | None) -> str:
    return "none (it is no tensor)" if shape is None else str(tuple(shape))
