"""What a model needs that transformers' own tensor parallelism has parallelized, beyond localizing its DTensors."""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from ..styles.region import Region
from ..styles.registry import get_style

__all__ = ["adopt"]


def adopt(model: nn.Module, mesh: DeviceMesh) -> None:
    """Replace transformers' sum of partial gradients of replicated parameters by ours.

    Its hook all-reduces the accumulated `.grad` again at every backward, so what an earlier microbatch has contributed
    is counted tp times (transformers `distributed/tensor_parallel.py`, `ReplicatedWithGradAllReduce`). The modules are
    those that the model's public `tp_plan` names with that style and whose forward has been replaced.
    """
    rules = getattr(model, "tp_plan", None) or {}
    wanted = {rule for rule, style in rules.items() if style == "replicated_with_grad_allreduce"}
    for name, module in model.named_modules():
        generic = ".".join("*" if part.isdigit() else part for part in name.split("."))
        if (name in wanted or generic in wanted) and "forward" in module.__dict__:
            del module.forward
            for param in module.parameters(recurse=False):
                _remove_its_hooks(param)
            get_style("replicated_with_grad_allreduce", name).install(module, Region(mesh), {})


def _remove_its_hooks(param: nn.Parameter) -> None:
    """A forward before `prepare` has hung transformers' sum on the parameter already."""
    hooks = getattr(param, "_post_accumulate_grad_hooks", None) or {}
    for key, hook in list(hooks.items()):
        if getattr(hook, "__qualname__", "").startswith("ReplicatedWithGradAllReduce."):
            del hooks[key]
