"""When a model goes to the device: after it has been sharded, one tensor at a time before that.

Trainer moves the model that it is given to the GPU at once, where all of a large one has no room. `prepare` needs it
nowhere in particular, so it waits there until then; or until it is called unsharded, as a script may, and TRL for the
log-probabilities of a reference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

__all__ = ["empty_cache", "end_waiting", "move_but_for", "wait_for_prepare", "waits_for"]


class _MoveBeforeForward:
    """Moves the module that is called, once; found on it by its class, so that it is copied and pickled with it."""

    def __init__(self, device: torch.device):
        self.device = device

    def __call__(self, module: nn.Module, args: Any) -> None:
        end_waiting(module)
        module.to(self.device)


def wait_for_prepare(model: nn.Module, device: torch.device) -> None:
    """Leave `model` where it is until it is prepared, or called."""
    end_waiting(model)
    model.register_forward_pre_hook(_MoveBeforeForward(device), prepend=True)


def waits_for(model: nn.Module) -> torch.device | None:
    """The device to which a waiting model goes."""
    return next((hook.device for _, _, hook in _hooks(model)), None)


def end_waiting(model: nn.Module) -> torch.device | None:
    """As `waits_for`; the model waits no more, and whoever asks moves it."""
    device = waits_for(model)
    for module, key, _ in _hooks(model):
        del module._forward_pre_hooks[key]
    return device


def _hooks(model: nn.Module) -> list[tuple[nn.Module, int, _MoveBeforeForward]]:
    found = ((m, key, hook) for m in model.modules() for key, hook in m._forward_pre_hooks.items())
    return [(module, key, hook) for module, key, hook in found if isinstance(hook, _MoveBeforeForward)]


def move_but_for(model: nn.Module, around: nn.Module, device: torch.device) -> None:
    """Move what `around` holds beside `model`."""
    own = set(model.modules())
    for module in around.modules():
        if module not in own:
            module._apply(lambda tensor: tensor.to(device), recurse=False)


def empty_cache(device_type: str) -> None:
    """Give back what full tensors have taken on the device, for tensors of other sizes and for other libraries."""
    empty: Callable[[], None] | None = getattr(torch.get_device_module(device_type), "empty_cache", None)
    if empty is not None:
        empty()
