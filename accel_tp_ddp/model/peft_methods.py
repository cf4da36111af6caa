"""Methods of a PeftModel that have to know that its adapters are sharded."""

from __future__ import annotations

import inspect
import os
import sys
import weakref
from collections.abc import Callable
from typing import Any, Literal

from torch import nn

from ..checkpoint.export import export, leave_it
from ..core.override import Override
from ..core.shard import elements_elsewhere, shard_info
from ..plans.peft import _KNOWN, Wrappings, _configs, _peft_models, _refuse_late_adapters
from ..styles.conv1d import is_linear

__all__ = ["OVERRIDES", "watch_adapters"]


def watch_adapters(model: nn.Module) -> list[nn.Module]:
    """Let the forward of a sharded model raise where an adapter has been added to it since.

    Returns:
        The `PeftModel`s in it.
    """
    for found in (wrappings := Wrappings(model)):
        found.module.__dict__[_KNOWN] = found.adapter_names()
    for module in model.modules():  # one that no forward can do without
        weight = module._parameters.get("weight")
        if is_linear(module) and weight is not None and shard_info(weight) is not None:
            module.register_forward_pre_hook(_LookForLateAdapters(wrappings.base), prepend=True)
            break
    kinds = _peft_models() if "peft" in sys.modules else ()
    return [module for module in model.modules() if isinstance(module, kinds)]


class _LookForLateAdapters:
    """Forward pre-hook that costs one comparison, until PEFT has left its mark on the model."""

    reads_input = False  # see `ParallelForward`

    def __init__(self, base: nn.Module):
        self.base: weakref.ref[nn.Module] | None = weakref.ref(base)
        self.known = set(_configs(base))

    def __call__(self, module: nn.Module, args: Any) -> None:
        base = self.base() if self.base is not None else None
        if base is not None and not self.known.issuperset(base.__dict__.get("peft_config") or ()):
            _refuse_late_adapters(Wrappings(base))
            self.known.update(_configs(base))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "base": None}  # a copied module must not bring its whole model along


def save_adapters(
    stock: Callable,
    model: Any,
    /,
    save_directory: str | os.PathLike,
    safe_serialization: bool = True,
    selected_adapters: list[str] | None = None,
    save_embedding_layers: bool | Literal["auto"] = "auto",
    is_main_process: bool = True,
    path_initial_model_for_weight_conversion: str | None = None,
    **kwargs: Any,
) -> None:
    """`PeftModel.save_pretrained`, with the full adapters. Collective: call it on every rank; the main one writes."""
    if path_initial_model_for_weight_conversion is not None:
        raise ValueError(
            "path_initial_model_for_weight_conversion loads another adapter into the model, which a sharded model "
            "cannot take. Save without it, and convert the adapter in a single process afterwards."
        )

    def write(state: dict[str, Any]) -> None:
        kwargs["state_dict"] = state
        options = (safe_serialization, selected_adapters, save_embedding_layers, is_main_process)
        stock(save_directory, *options, **kwargs)

    if kwargs.get("state_dict") is None:
        adapters = selected_adapters if selected_adapters is not None else list(model.peft_config)
        chosen = _written(model, adapters, save_embedding_layers)
        if not is_main_process:
            write = leave_it
        export(model, "save_pretrained", write, save_directory, chosen)
    elif is_main_process:
        write(kwargs["state_dict"])


def _written(model: Any, adapters: list[str], save_embedding_layers: bool | Literal["auto"]) -> dict[str, Any]:
    """Of the model's own state dict, what PEFT will write."""
    from peft import get_peft_model_state_dict

    state = model.state_dict(keep_vars=True)
    written: set[int] = set()
    for adapter in adapters:
        if adapter in model.peft_config:  # PEFT's own `save_pretrained` refuses others
            chosen = get_peft_model_state_dict(
                model, dict(state), adapter_name=adapter, save_embedding_layers=save_embedding_layers
            )
            written.update(map(id, chosen.values()))
    unknown = written - set(map(id, state.values()))
    if unknown:
        raise RuntimeError(
            f"PEFT would write {len(unknown)} tensors that are not in the model's state dict, so they cannot be "
            "joined from their shards. Pass `state_dict=accelerator.get_state_dict(model)`."
        )
    return {name: value for name, value in state.items() if id(value) in written}


def load_adapter(stock: Callable, model: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
    """`PeftModel.load_adapter`, into adapters that are sharded already: each rank takes its parts of what is read."""
    given = inspect.signature(stock).bind(*args, **kwargs)
    if given.arguments.get("kwargs", {}).get("ignore_mismatched_sizes"):
        raise ValueError(
            "load_adapter(ignore_mismatched_sizes=True) would compare the adapter's sizes with this rank's parts, "
            "and leave all that is sharded as it was. Leave it out, or load the adapter before `prepare`."
        )
    if given.arguments["adapter_name"] in model.peft_config:
        given.arguments["low_cpu_mem_usage"] = False  # which puts other objects in the place of the parameters
    return stock(*given.args, **given.kwargs)


def count_parameters(stock: Callable, model: nn.Module, /) -> tuple[int, int]:
    """`PeftModel.get_nb_trainable_parameters`, of the unsharded model."""
    trainable, total = stock()
    for param in model.parameters():
        total += elements_elsewhere(param)
        trainable += elements_elsewhere(param) if param.requires_grad else 0
    return trainable, total


def _row(name: str, function: Callable[..., Any], line: int, reason: str) -> Override:
    return Override("peft.PeftModel", name, function, f"peft 0.21, peft_model.py:{line}", reason)


OVERRIDES = (
    _row("save_pretrained", save_adapters, 238, "writes this rank's part of the adapters"),
    _row("load_adapter", load_adapter, 1417, "puts other objects in the place of the parameters, or skips shards"),
    _row("get_nb_trainable_parameters", count_parameters, 932, "counts this rank's shards"),
)
