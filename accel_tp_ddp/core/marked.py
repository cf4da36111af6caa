"""What `model.state_dict()` has of a sharded weight: a tensor that is not written to a file as if it were the weight.

It computes as any tensor, on this rank's shard, and so do copies of the dictionary (averages, a restart from memory).
Only pickling (`torch.save`) is something else: on the main process it gives the full weight, of which its peers send
their parts (`serving`), and anywhere else it is an error. So is `safetensors` everywhere: it takes the shape it sees.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from . import store
from .errors import CheckpointError
from .serving import NotServed, Parts, is_served
from .shard import ShardInfo, remembered_shards

__all__ = ["MarkedShard", "mark_state_dict"]


class MarkedShard(Tensor):
    """A shard, or an unchanged copy of one: it is marked as long as it is that, and what is computed of it is not."""

    _name: str
    _info: ShardInfo
    #: The parameter, and how often the parameter and this copy had been changed when it was made.
    _origin: tuple[weakref.ref[Tensor], int, int] | None

    @staticmethod
    def of(value: Tensor, name: str, param: Tensor | None, info: ShardInfo) -> MarkedShard:
        made = value.as_subclass(MarkedShard)
        origin = (weakref.ref(param), param._version, made._version) if param is not None else None
        made._name, made._info, made._origin = name, info, origin
        return made

    def plain(self) -> Tensor:
        """The same without the mark."""
        return self.as_subclass(Tensor)

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            outcome = func(*args, **(kwargs or {}))
        source = args[0] if args else None
        if func in _COPIES and type(outcome) is Tensor and isinstance(source, MarkedShard):
            param = source._param() if func in _FOR_FILES and outcome.dtype == source.dtype else None
            return MarkedShard.of(outcome, source._name, param, source._info)
        return outcome

    @property
    def layout(self) -> torch.layout:  # type: ignore[override]  # what safetensors, and DCP, ask of what they write
        raise self._refusal()

    def __reduce_ex__(self, protocol: Any) -> Any:
        param = self._param()
        if param is None or dist.get_rank() != 0 or not is_served(self._info.mesh):
            raise self._refusal()
        return _full(param, self._info).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> MarkedShard:
        memo[id(self)] = made = self.clone()
        return made

    def __copy__(self) -> MarkedShard:
        return self.detach()

    def _param(self) -> Tensor | None:
        """The parameter, if this has its values still."""
        if self._origin is None:
            return None
        reference, changes, own = self._origin
        param = reference()
        if param is not None and param.data_ptr() == self.data_ptr():
            return param
        return param if param is not None and (param._version, self._version) == (changes, own) else None

    def _refusal(self) -> CheckpointError:
        return CheckpointError(
            f"`{self._name}` of this state dict is one rank's part, of size {tuple(self.shape)}, of a weight of size "
            f"{tuple(self._info.global_shape)}, and must not be saved as if it were the weight. Save what "
            "`accelerator.get_state_dict(model)` or `full_state_dict(model)` gives, or call `accelerator.save_model` "
            "or the model's `save_pretrained`."
        )


_FOR_FILES = {Tensor.clone, Tensor.contiguous, Tensor.cpu, Tensor.to, torch.clone}
_COPIES = _FOR_FILES | {Tensor.bfloat16, Tensor.cuda, Tensor.detach, Tensor.double, Tensor.float, Tensor.half}
_COPIES |= {torch.detach, Tensor.data.__get__}  # type: ignore[attr-defined]
_in_use: dict[int, tuple[weakref.ref[Tensor], int, StorageWeakRef]] = {}


def _full(param: Tensor, info: ShardInfo) -> Tensor:
    """The full weight, on the main process; the same tensor again as long as it is in use, as for tied weights."""
    known = _in_use.get(id(param))
    if known is not None and known[0]() is param and known[1] == param._version:
        storage = torch.UntypedStorage._new_with_weak_ptr(known[2].cdata)
        if storage is not None:
            return torch.empty(0, dtype=param.dtype).set_(storage, 0, info.global_shape)
    try:
        parts = Parts(None, info.mesh, [(param, info)])
        parts.start(store.PEERS_TIMEOUT)
        full = parts.collect(0)
        parts.finish()
    except NotServed as error:
        raise CheckpointError(
            f"the main process saves a state dict, but of its tensor-parallel peers {error} within "
            f"{store.PEERS_TIMEOUT:.0f} s. Call `accelerator.get_state_dict(model)` on every rank, and save what it "
            "gives."
        ) from None
    _in_use[id(param)] = weakref.ref(param), param._version, StorageWeakRef(full.untyped_storage())
    return full


def mark_state_dict(module: nn.Module) -> None:
    """Let `state_dict()` mark the shards of this module's own parameters. `keep_vars=True` gives the parameters."""
    if remembered_shards(module) and _mark not in module._state_dict_hooks.values():
        module.register_state_dict_post_hook(_mark)
        module.register_load_state_dict_pre_hook(_unmark)


def _mark(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    for name, info in remembered_shards(module).items():
        value, param = state_dict.get(prefix + name), module._parameters.get(name)
        if type(value) is Tensor and param is not None and info.is_sharded and value.shape == param.shape:
            state_dict[prefix + name] = MarkedShard.of(value, prefix + name, param, info)


def _unmark(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    for name in remembered_shards(module):
        value = state_dict.get(prefix + name)
        if isinstance(value, MarkedShard):
            state_dict[prefix + name] = value.plain()
