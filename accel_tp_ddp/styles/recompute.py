"""Activation checkpointing computes a layer again up to the last tensor that was saved, on every rank alike.

Without that, a hook on one rank alone (a main process that logs the norm of an output) saves a tensor behind the
layer's last all-reduce, and that rank computes, and so sends, more than the others: see `torch.utils.checkpoint`, on
`early_stop`. So what hooks of a user's save is kept by their own graph, as without checkpointing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.compiler import is_compiling

from .hooks import users_hooks

__all__ = ["Checkpointed"]


class Checkpointed:
    """The parts of a model that can be computed again, as transformers marks them."""

    def __init__(self, model: nn.Module):
        self.parts = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]

    def set_hooks_apart(self, model: nn.Module, args: Any) -> None:
        """Forward pre-hook of the model: let hooks in parts that are to be computed again keep what they save."""
        if is_compiling() or not torch.is_grad_enabled():
            return
        for part in self.parts:
            if part.training and part.gradient_checkpointing:
                for module in part.modules():
                    for hooks, key, hook in users_hooks(module):
                        if type(hook) is not _Apart:
                            hooks[key] = _Apart(hook)  # in its place: the table keeps its size and its order


class _Apart:
    """A hook whose saved tensors are none of the layer's."""

    def __init__(self, hook: Any):
        self.hook = hook

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with saved_tensors_hooks(_itself, _itself):
            return self.hook(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "hook":  # not there yet, while it is unpickled
            raise AttributeError(name)
        return getattr(self.hook, name)


def _itself(saved: Any) -> Any:
    return saved
