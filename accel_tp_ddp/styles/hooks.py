"""Hooks of modules: how this package's are told from a user's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

__all__ = ["has_users_hooks", "hook_around", "users_hooks"]


def hook_around(module: nn.Module, before: Callable, after: Callable | None = None) -> None:
    """Register a first forward pre-hook, given keyword arguments too, and a last forward hook that is always called.

    With keys that are the same in all layers, as `ParallelForward.install_on` says, and negative, as torch's are not.
    """
    hooks: Any = module._forward_pre_hooks
    key = min([0, *hooks, *module._forward_hooks]) - 1
    hooks[key] = before
    hooks.move_to_end(key, last=False)
    module._forward_pre_hooks_with_kwargs[key] = True
    if after is not None:
        module._forward_hooks[key] = after
        module._forward_hooks_always_called[key] = True


def users_hooks(module: nn.Module) -> Iterator[tuple[dict[int, Any], int, Any]]:
    """Forward hooks that may read what the module is given or gives, each with its table and its key there.

    Not those of `hook_around`, nor others of this package that say by `reads_input` that they do not.
    """
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key, hook in hooks.items():
            if key >= 0 and getattr(hook, "reads_input", True):
                yield hooks, key, hook


def has_users_hooks(module: nn.Module) -> bool:
    """Whether there are any, on this rank; see `users_hooks`."""
    return any(True for _ in users_hooks(module))
