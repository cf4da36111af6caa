"""`generate()` on a sharded model: the ranks of a group draw the same tokens and stop together."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ..core.collectives import send_first_rank
from ..core.randomness import agree_on_randomness

__all__ = ["generate"]


def generate(mesh: DeviceMesh, stock: Callable, model: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
    """The model's own `generate`, the same on all ranks of `mesh`. Collective: call it on every rank of a replica.

    Each call starts from the first rank's random state, so sampling draws the same tokens however the ranks were
    seeded; replicas keep states of their own. What stops a generation by a clock is decided by the first rank.
    """
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [name for name, each in inspect.signature(stock).parameters.items() if each.kind in positional]
    kwargs.update(zip(names, args))
    agree_on_randomness(mesh)
    _agree_on_the_end(model, mesh, kwargs)
    return stock(*args[len(names) :], **kwargs)


def _agree_on_the_end(model: nn.Module, mesh: DeviceMesh, kwargs: dict[str, Any]) -> None:
    criteria = list(kwargs.get("stopping_criteria") or ())
    timed = any(hasattr(each, "max_time") for each in criteria)  # which beats the config's limit
    criteria = [each if _follows_from_tokens(each) else _FirstRankDecides(each, mesh) for each in criteria]
    configs = (kwargs.get("generation_config"), getattr(model, "generation_config", None))
    limits = [kwargs.get("max_time"), *(getattr(config, "max_time", None) for config in configs)]
    seconds = next((limit for limit in limits if limit is not None), None)
    if seconds is not None:
        kwargs["max_time"] = math.inf  # beats what the configs say
        if not timed:
            criteria.append(_FirstRankDecides(_TimeLimit(seconds), mesh))
    if criteria:
        kind = type(kwargs.get("stopping_criteria") or criteria)
        kwargs["stopping_criteria"] = kind(criteria)


def _follows_from_tokens(criterion: Any) -> bool:
    """Whether the criterion's answer is the same on all ranks by itself: the library's own, but for its clock."""
    return type(criterion).__module__.startswith("transformers.") and not hasattr(criterion, "max_time")


class _TimeLimit:
    def __init__(self, seconds: float):
        self.until = time.time() + seconds

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((input_ids.shape[0],), time.time() > self.until, device=input_ids.device)


class _FirstRankDecides:
    """A stopping criterion by the word of the first rank of `mesh`; other attributes are the criterion's own."""

    def __init__(self, criterion: Callable, mesh: DeviceMesh):
        self.criterion = criterion
        self.mesh = mesh

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        done = torch.as_tensor(self.criterion(input_ids, scores, **kwargs), device=input_ids.device)
        done = done.to(torch.uint8)
        send_first_rank(self.mesh, done)
        return done.bool()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.__dict__["criterion"], name)
