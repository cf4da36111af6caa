"""Methods of a transformers model that have to know that its weights are sharded."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.export import export, leave_it, takes_state_dict
from ..core.shard import elements_elsewhere, shard_info

__all__ = ["save_full_checkpoints"]


def save_full_checkpoints(model: nn.Module) -> None:
    """Let `model.save_pretrained`, where there is one that takes a state dict, write the full weights."""
    if takes_state_dict(model):
        model.save_pretrained = _SavePretrained(model)
        model.num_parameters = _NumParameters(model)


class _SavePretrained:
    """The model's own `save_pretrained`, with the full weights. Collective: call it on every rank.

    An object and no bound function, so that it is copied and pickled together with its model.
    """

    def __init__(self, model: nn.Module):
        self.model = model

    def __call__(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        stock = type(self.model).save_pretrained
        if kwargs.get("distributed_checkpoint"):
            raise ValueError(
                "save_pretrained(distributed_checkpoint=True) knows only models that transformers has sharded. Leave "
                "it out for an ordinary checkpoint, or save by accelerator.save_state to resume from."
            )

        def write(state: dict[str, Any]) -> None:
            with _whole_parameters(self.model):
                stock(self.model, save_directory, is_main_process, state, *args, **kwargs)

        if state_dict is not None:
            write(state_dict)
        else:
            export(self.model, "save_pretrained", write if is_main_process else leave_it, save_directory)


@contextmanager
def _whole_parameters(model: nn.Module) -> Iterator[None]:
    """Let `model.get_parameter`, which some conversions ask for a shape, give one with the unsharded shape."""
    model.get_parameter = partial(_whole_parameter, model)
    try:
        yield
    finally:
        del model.get_parameter


def _whole_parameter(model: nn.Module, name: str) -> nn.Parameter:
    param = type(model).get_parameter(model, name)
    info = shard_info(param)
    if info is None or not info.is_sharded:
        return param
    return nn.Parameter(torch.empty(info.global_shape, dtype=param.dtype, device="meta"), requires_grad=False)


class _NumParameters:
    """The model's own `num_parameters`, of the unsharded model: it goes into checkpoints and FLOP counts."""

    def __init__(self, model: nn.Module):
        self.model = model

    def __call__(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        count = type(self.model).num_parameters(self.model, only_trainable, exclude_embeddings)
        left_out: set[int] = set()
        if exclude_embeddings:
            left_out = {id(m.weight) for m in self.model.modules() if isinstance(m, nn.Embedding)}
        for param in self.model.parameters():
            if id(param) not in left_out and (param.requires_grad or not only_trainable):
                count += elements_elsewhere(param)
        return count
