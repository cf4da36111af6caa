"""The two kinds of linear layers: torch's, and transformers' `Conv1D`, whose weight is transposed."""

from __future__ import annotations

import sys
from abc import ABC
from typing import Any

import torch
from torch import Tensor, nn

from .forward import ParallelForward

__all__ = [
    "LINEAR",
    "TransposedLinear",
    "in_features",
    "input_dim",
    "is_linear",
    "no_bias",
    "out_features",
    "output_dim",
    "show_local_outputs",
]


class TransposedLinear(ABC):
    """What `transformers.pytorch_utils.Conv1D` is an instance of: a linear layer with a weight `[inputs, outputs]`.

    A model can hold one only if that module has been imported already, so nothing here imports it for others.
    """

    spelled = "transformers.pytorch_utils.Conv1D"
    nf: int  # outputs
    nx: int  # inputs

    @classmethod
    def __subclasshook__(cls, other: type) -> bool:
        known = sys.modules.get("transformers.pytorch_utils")
        return known is not None and issubclass(other, known.Conv1D)


#: Module types that column-parallel and row-parallel styles take.
LINEAR = (nn.Linear, TransposedLinear)


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, LINEAR)


def output_dim(module: nn.Module) -> int:
    """The dimension of the outputs in the weight of a linear layer."""
    return int(isinstance(module, TransposedLinear))


def input_dim(module: nn.Module) -> int:
    return 1 - output_dim(module)


def out_features(module: Any) -> int:
    """Number of outputs of a linear layer that has not been sharded."""
    return module.nf if isinstance(module, TransposedLinear) else module.out_features


def in_features(module: Any) -> int:
    return module.nx if isinstance(module, TransposedLinear) else module.in_features


def show_local_outputs(module: nn.Module, features: int) -> None:
    """Let the layer know how many outputs are left, where its forward shapes by their number."""
    if isinstance(module, TransposedLinear):
        module.nf = features


def no_bias(call: ParallelForward) -> Tensor | None:
    """What a linear layer computes with in the place of its bias, so as to leave it out; some cannot do without."""
    return torch.zeros_like(call.held("bias")) if isinstance(call.module, TransposedLinear) else None
