"""`mixed_precision="fp8"`: modules are converted before they are sharded, by torchao, whose linear layers can be.

Accelerate converts what `prepare` is given in the middle of it, by putting other modules in the place of linear
layers: in a model that is sharded these would run as if they held all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from accelerate import Accelerator
from accelerate.utils.dataclasses import FP8BackendType
from torch import nn

from ..core.agreement import Ranks
from ..core.override import attributes, stock_of
from ..core.shard import holds_shards
from ..core.slices import slices_kept
from ..plans.plan import Plan

__all__ = ["check_fp8", "check_fp8_sizes", "convert_to_fp8", "converted_already"]

#: What the matrix products of float8 take: sizes of which this is a divisor.
_MULTIPLE = 16


def convert_to_fp8(accelerator: Accelerator, models: Iterable[nn.Module]) -> None:
    """Let the linear layers of `models` compute in float8, if the accelerator is to do that by torchao."""
    fresh = [model for model in models if not holds_shards(model) and not _float8_layers(model)]
    if accelerator.fp8_backend != FP8BackendType.AO or not fresh:
        return
    handler = accelerator.ao_recipe_handler

    def convert() -> None:
        # FSDP's tensors for weights would take the place of the parameters that an optimizer trains.
        config = replace(handler.config, enable_fsdp_float8_all_gather=False)
        with ExitStack() as stack:
            stack.enter_context(attributes(handler, config=config))
            for model in fresh:
                stack.enter_context(slices_kept(model))
            stock_of(accelerator, "_prepare_ao")(*fresh)

    Ranks(failed="rank {rank} cannot prepare: {problem}", otherwise=ValueError).together(convert)


def converted_already(hooks: Any, stock: Callable, accelerator: Accelerator, /, *args: Any) -> tuple[Any, ...]:
    """`_prepare_ao`, for models that are sharded by then."""
    return args


def check_fp8(accelerator: Accelerator, model: nn.Module) -> None:
    """Raise if `model` cannot be trained in float8 as the accelerator is to do it.

    Raises:
        ValueError: For a backend other than torchao, or a model that has been sharded without.
    """
    backend = accelerator.fp8_backend
    if backend in (FP8BackendType.TE, FP8BackendType.MSAMP):
        name = {FP8BackendType.TE: "Transformer Engine", FP8BackendType.MSAMP: "MS-AMP"}[backend]
        raise ValueError(
            f'mixed_precision="fp8" by {name} ({backend.value}) replaces modules and parameters, and is not supported '
            "with tensor parallelism. Take torchao: kwargs_handlers=[AORecipeKwargs()], ACCELERATE_FP8_BACKEND=AO or "
            '`fp8_config: {backend: AO}` in the config file; or mixed_precision="bf16".'
        )
    if backend == FP8BackendType.AO and holds_shards(model) and not _float8_layers(model):
        raise ValueError(
            f"this {type(model).__name__} has been sharded before its linear layers were converted to float8, as an "
            "evaluation before training does. Give it to `prepare` first; or convert it yourself before, by "
            "torchao.float8.convert_to_float8_training."
        )


def check_fp8_sizes(model: nn.Module, plan: Plan) -> None:
    """Raise if a rank's part of a layer has a size that float8 matrix products do not take.

    Raises:
        ValueError: With the layer, and the sizes of its parts.
    """
    layouts = plan.layouts_by_parameter
    for name, layer in _float8_layers(model).items():
        layout = layouts.get(layer.weight)
        if layout is None or layer.config.emulate or not any(size % _MULTIPLE for size in layout.sizes):
            continue
        raise ValueError(
            f"`{name}` is to compute in float8, and its weight of size {tuple(layer.weight.shape)} leaves the ranks "
            f"{sorted(set(layout.sizes))} of dimension {layout.dim}, which has to be a multiple of {_MULTIPLE}. Leave "
            "it out by AORecipeKwargs(module_filter_func=...), or choose a smaller tp_size."
        )


def _float8_layers(model: nn.Module) -> dict[str, Any]:
    """The layers that torchao has converted."""
    return {name: module for name, module in model.named_modules() if _is_float8(module)}


def _is_float8(module: nn.Module) -> bool:
    return any(kind.__module__.startswith("torchao.float8.") for kind in type(module).__mro__)
