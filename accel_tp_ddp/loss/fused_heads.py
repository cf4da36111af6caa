"""Losses of other packages that multiply with the output layer's weight by themselves, computed from its parts.

TRL's trainers score tokens by a function of hidden states and `lm_head.weight` (`trl/kernels/chunked_logprob.py`).
Read within a forward, that weight is a `GatheredWhenUsed`: given to the function as it is, it would be gathered, and
every rank would score the whole vocabulary. What the function gives is `token_statistics`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core.collectives import copy_to_tp
from ..core.gathered import GatheredWhenUsed
from ..core.override import Override
from .projection import Chain, LinearProjection
from .vocab_parallel import Vocabulary, token_statistics

__all__ = ["OVERRIDES"]

_ARGUMENTS = (
    *("hidden", "weight", "bias", "targets", "temperature", "chunk_size"),
    *("final_logit_softcapping", "logit_scale", "outputs"),
)
_OUTPUTS = {"log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1"}


def _log_probs(stock: Callable, function: type, /, *args: Any, **kwargs: Any) -> Any:
    """`ChunkedLogProbFunction.apply`, of a weight that is spread over the ranks."""
    given = _known(function, args) if not kwargs else None
    if given is None or not is_spread(given["weight"], given["bias"]) or not set(given["outputs"]) <= _OUTPUTS:
        return stock(*args, **kwargs)
    weight, bias, dtype = given["weight"], given["bias"], compute_dtype(given["hidden"])
    (hidden,) = copy_to_tp(weight.mesh, given["hidden"])
    found = token_statistics(
        Vocabulary(weight.mesh, weight.spread.sizes),
        LinearProjection(weight.local, bias.local if bias is not None else None, dtype),
        hidden,
        given["targets"],
        chain_of(given["logit_scale"], given["final_logit_softcapping"], 1 / given["temperature"]),
        given["outputs"],
    )
    mean = found.mean_logits.detach() if found.mean_logits is not None else None
    return found.log_probs, found.entropy, found.log_sum_sq_probs, mean, found.is_top1


def _known(function: Any, args: tuple) -> dict[str, Any] | None:
    """The arguments by name, if they are those that this was written for."""
    signature = inspect.signature(function.forward)
    if tuple(signature.parameters)[1:] != _ARGUMENTS:
        return None
    bound = signature.bind(None, *args)
    bound.apply_defaults()
    return bound.arguments


def is_spread(weight: Any, bias: Any) -> bool:
    """Whether these are of an output layer that may be computed with in parts."""
    if not isinstance(weight, GatheredWhenUsed) or not weight.shared or weight.spread.dim != 0:
        return False
    return bias is None or isinstance(bias, GatheredWhenUsed)


def compute_dtype(hidden: Tensor) -> torch.dtype:
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def chain_of(scale: float, cap: float | None, factor: float) -> Chain:
    """Scale, soft-capping, and one over the temperature, in float32 as TRL's kernels take them."""
    chain = Chain((("to", torch.float32),))
    if scale != 1:
        chain = chain.then("mul", scale)
    if cap is not None:
        chain = chain.then("div", cap).then("tanh").then("mul", cap)
    return chain if factor == 1 else chain.then("mul", factor)


OVERRIDES = (
    Override(
        *("trl.kernels.chunked_logprob.ChunkedLogProbFunction", "apply", _log_probs),
        *("trl 1.16, kernels/chunked_logprob.py:299", "gathers the output layer, and scores all of it on every rank"),
        since="1.16",
        counts=False,
    ),
)
