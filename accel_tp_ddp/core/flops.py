"""Floating-point operations of kernels: of matrix products, convolutions and attention, by torch's formulas."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import flop_counter

__all__ = ["factors", "flops"]

_IN_PLACE = {"aten::addmm_": torch.ops.aten.addmm, "aten::baddbmm_": torch.ops.aten.baddbmm}


def flops(func: Any, args: tuple, kwargs: Mapping[str, Any], result: Any, skips_masked: bool = False) -> int:
    """Floating-point operations of a kernel as `torch.utils.flop_counter` counts them; 0 if it is no matrix product.

    Args:
        func, args, kwargs, result: What a dispatch mode sees.
        skips_masked: Whether attention that is causal is half of that: its kernels leave out the tiles beyond the
            diagonal.
    """
    name = func._schema.name
    if name == "aten::_grouped_mm":  # each row of one meets one matrix of the other
        rows, inner = args[0].shape[-2:]
        groups = args[0].size(0) if args[0].ndim == 3 else 1
        return 2 * groups * rows * inner * args[1].size(-1)
    if "_scaled_dot_product" in name:
        backward = name.endswith("backward")
        query, key, value = (tensor.shape for tensor in args[backward : backward + 3])
        whole = flop_counter.sdpa_flop_count(query, key, value)
        if backward:
            whole = flop_counter.sdpa_backward_flop_count(args[0].shape, query, key, value)
        given = {arg.name: value for arg, value in zip(func._schema.arguments, args)} | dict(kwargs)
        return whole // 2 if skips_masked and given.get("is_causal") else whole
    # In place it is the same product; torch has formulas for what returns a new tensor alone.
    formula = flop_counter.flop_registry.get(_IN_PLACE.get(name, func._overloadpacket))
    return formula(*args, **kwargs, out_val=result) if formula else 0


def factors(func: Any, args: tuple) -> tuple[Tensor, ...]:
    """What a kernel multiplies. The gradient of each factor takes as many operations as the kernel itself."""
    adds = func._schema.name.rstrip("_") in ("aten::addmm", "aten::baddbmm")
    return args[adds : adds + 2]
