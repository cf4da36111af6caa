"""Where the host waits for the device: counted on the CPU, where nothing waits."""

from __future__ import annotations

import torch
from torch.overrides import TorchFunctionMode

# What fetches from a device; and what makes a tensor there of values that the host has, in memory that is not pinned.
_FETCHING = {"item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__"}
_FETCHING |= {"__contains__", "equal", "allclose", "nonzero", "masked_select", "unique"}
_SENDING = {"tensor", "as_tensor", "asarray", "from_numpy"}


class HostWaits(TorchFunctionMode):
    """Counts in its block the calls that would make the host wait for an accelerator, by the names of the functions.

    `mode.calls` has them in turn. `to("cpu")` is not counted: on CPU ranks it also stands for the mesh's own device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _FETCHING | _SENDING:
            self.calls.append(name)
        elif name == "__getitem__" and any(_is_mask(index) for index in _indices(args[1])):
            self.calls.append("a mask as index")
        return func(*args, **kwargs)


def _indices(index):
    return index if isinstance(index, tuple) else (index,)


def _is_mask(index) -> bool:
    return isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)
