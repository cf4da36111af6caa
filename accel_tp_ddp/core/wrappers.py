"""What wraps a model."""

from __future__ import annotations

from torch import nn

__all__ = ["unwrap"]


def unwrap(model: nn.Module) -> nn.Module:
    """The bare module inside DDP and `torch.compile` wrappers.

    Where Accelerate compiles layer by layer, it leaves the model as it is and gives a copy with wrappers in the places
    of layers, which remembers the model.
    """
    while True:
        if "_orig_mod" in model.__dict__:
            model = model.__dict__["_orig_mod"]
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = model.get_submodule("_orig_mod")
        else:
            return model
