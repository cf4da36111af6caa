"""What a model needs that transformers' own tensor parallelism has parallelized, beyond localizing its DTensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from ..styles.region import Region
from ..styles.registry import get_style

__all__ = ["adopt"]


def adopt(model: nn.Module, mesh: DeviceMesh) -> None:
    """Replace transformers' sum of partial gradients of replicated parameters by ours.

    Its hook all-reduces the accumulated `.grad` again at every backward, so what an earlier microbatch has contributed
    is counted tp times (transformers `distributed/tensor_parallel.py`, `ReplicatedWithGradAllReduce`). The modules are
    those that the model's public `tp_plan` names with that style and that have the sum: by a forward that hangs it on
    their parameters, in older releases (5.20) by a hook of the module.
    """
    rules = getattr(model, "tp_plan", None) or {}
    wanted = {rule for rule, style in rules.items() if style == "replicated_with_grad_allreduce"}
    for name, module in model.named_modules():
        generic = ".".join("*" if part.isdigit() else part for part in name.split("."))
        if (name in wanted or generic in wanted) and _remove_its_sum(module):
            get_style("replicated_with_grad_allreduce", name).install(module, Region(mesh), {})


def _remove_its_sum(module: nn.Module) -> bool:
    """Whether transformers had given the module its sum. A forward before `prepare` has hung it on the parameters."""
    removed = _remove_its_hooks(module._backward_hooks) or "forward" in module.__dict__
    module.__dict__.pop("forward", None)
    for param in module.parameters(recurse=False):
        _remove_its_hooks(getattr(param, "_post_accumulate_grad_hooks", None) or {})
    return removed


def _remove_its_hooks(hooks: dict[int, Callable[..., Any]]) -> bool:
    """Whether there were any."""
    names = {key: getattr(hook, "__qualname__", "") for key, hook in hooks.items()}
    its = [key for key, name in names.items() if name.startswith("ReplicatedWithGradAllReduce.")]
    for key in its:
        del hooks[key]
    return bool(its)
