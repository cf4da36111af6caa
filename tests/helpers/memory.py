"""How many bytes of new tensors there are at once, exactly: counted as operations make them, whatever the device."""

from __future__ import annotations

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakBytes(TorchDispatchMode):
    """Within the block, `peak` is the most that was alive of the storages made in it; `operations` names what ran."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self.operations: list[str] = []
        self._given: set[int] = set()
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self._alive:
                self._given.add(tensor.untyped_storage()._cdata)
        outcome = func(*args, **(kwargs or {}))
        self.operations.append(func._schema.name)
        for tensor in tree_leaves(outcome):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._given:
                    self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._alive = {key: each for key, each in self._alive.items() if not each[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return outcome
