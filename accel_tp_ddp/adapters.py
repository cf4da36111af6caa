"""What PEFT has put into a model: where, whether it can be sharded, and how adapters are saved.

PEFT wraps modules in place: the module `x` becomes `x.base_layer` inside a LoRA layer, or `x.original_module` beside
the trained copies `x.modules_to_save.<adapter>`, and the whole model becomes `base_model.model` of a `PeftModel`.
Plans go on naming `x`. This file and `styles/lora.py` are the only ones that know PEFT; a model can hold adapters only
if peft has been imported already, so nothing here imports it for others.
"""

from __future__ import annotations

import inspect
import os
import sys
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from .errors import PlanError
from .export import export, leave_it, save_full_checkpoints
from .loading.slices import holds_slices
from .shard import elements_elsewhere, shard_info
from .styles.adapters import can_follow
from .styles.base import Site
from .styles.kinds import is_linear

__all__ = ["Wrapping", "Wrappings", "adapted_model", "check_adapters", "look_after_adapters"]

_KNOWN = "_accel_tp_ddp_adapters"


@dataclass(frozen=True)
class Wrapping:
    """A module that PEFT has put around one of the model's own.

    Attributes:
        name: Full name of the wrapping module.
        module: The wrapping module.
        base_name: Full name of the module inside.
        base: The module inside.
    """

    name: str
    module: nn.Module
    base_name: str
    base: nn.Module

    def adapter_names(self) -> set[str]:
        adapters = getattr(self.module, "_adapters", None)  # of modules to save and trained tokens
        if adapters is None:
            parts = (getattr(self.module, name, ()) for name in getattr(self.module, "adapter_layer_names", ()))
            adapters = {adapter for part in parts for adapter in part}
        return set(adapters)


class Wrappings:
    """All that PEFT has wrapped in a model, and the names that its modules had before.

    Attributes:
        base: The model inside a `PeftModel`; the model itself otherwise.
    """

    def __init__(self, model: nn.Module):
        self.base = model
        self._plain: dict[str, str] | None = None
        self._found: list[Wrapping] = []
        self._root = ""
        if "peft" in sys.modules:
            plain: dict[str, str] = {}
            self._walk(model, "", "", plain)
            if (base := adapted_model(model)) is not model:
                self.base = base
                self._root = f"{_name_inside(model, self.base)}."
            if self._found or self._root:
                self._plain = plain

    def __iter__(self) -> Iterator[Wrapping]:
        return iter(self._found)

    def layers(self) -> list[Wrapping]:
        """The layers with adapters that have a way to follow a sharded module inside, an outer one before an inner."""
        return [found for found in self if can_follow(found.module)]

    def is_own(self, name: str) -> bool:
        """Whether the module `name` is one of the model's own, and not of PEFT's."""
        return self._plain is None or name in self._plain

    def spellings(self, name: str, is_module: bool) -> list[str]:
        """The names by which a plan may call a module or parameter: none for adapters, which follow their base."""
        if self._plain is None:
            return [name]
        owner, _, leaf = (name, "", "") if is_module else name.rpartition(".")
        if owner not in self._plain:
            return []
        plain = ".".join(part for part in (self._plain[owner], leaf) if part)
        return list(dict.fromkeys([name, plain, self._root + plain]))

    def check(self, sharded: Iterable[Site]) -> None:
        """Raise for adapters that cannot follow the module they are put around.

        Args:
            sharded: The sites that a style other than `replicate` runs.

        Raises:
            PlanError: With the module, its style, and what to change.
        """
        sharded = list(sharded)
        for found in self:
            if can_follow(found.module) or _is_auxiliary(found.module):
                continue
            inside = set(map(id, found.base.modules()))  # by identity: a wrapper may hold a module under two names
            for site in sharded:
                if id(site.module) in inside:
                    kind = type(found.module)
                    raise site.error(
                        f"PEFT has put a {kind.__module__}.{kind.__name__} around it, which cannot follow a sharded "
                        "module; LoRA of linear layers (target_modules) and modules_to_save can.",
                        "Leave the module out of the PEFT config, or set its style to `replicate`.",
                    )

    def _walk(self, module: nn.Module, name: str, plain: str, names: dict[str, str]) -> None:
        if isinstance(module, _peft_models()):
            base = module.get_base_model()
            self._walk(base, _join(name, _name_inside(module, base)), plain, names)
            return
        inside = _wrapped_in(module)
        for key, child in inside:
            self._found.append(Wrapping(name, module, _join(name, key), child))
            self._walk(child, _join(name, key), plain, names)
        if not inside:
            names[name] = plain
            for key, child in module._modules.items():
                if child is not None:
                    self._walk(child, _join(name, key), _join(plain, key), names)


def adapted_model(model: nn.Module) -> nn.Module:
    """The model inside a `PeftModel`; any other model itself."""
    return model.get_base_model() if "peft" in sys.modules and isinstance(model, _peft_models()) else model


def check_adapters(model: nn.Module) -> None:
    """Raise for adapters that tensor parallelism cannot carry, wherever they are.

    Raises:
        PlanError: (a ValueError) for a PEFT method other than LoRA, for tied adapters, and for a model whose
            parameters are DTensors.
        ValueError: For adapters that were added to a model that had been sharded before.
    """
    if "peft" not in sys.modules:
        return
    wrappings = Wrappings(model)
    for adapter, config in [item for module in model.modules() for item in _configs(module).items()]:
        method = getattr(config.peft_type, "value", config.peft_type)
        if method != "LORA":
            raise PlanError(
                f"tensor parallelism: the adapter {adapter!r} of this {type(model).__name__} is of the PEFT method "
                f"{method}; only LORA can be sharded. Use peft.LoraConfig, or set tp_size=1."
            )
        if getattr(config, "ensure_weight_tying", False):
            raise PlanError(
                f"tensor parallelism: the adapter {adapter!r} of this {type(model).__name__} has "
                "ensure_weight_tying=True, and tied adapters cannot be cut alike. Set ensure_weight_tying=False."
            )
        if (option := _made_of_whole_weights(config)) is not None and holds_slices(model):
            raise PlanError(
                f"tensor parallelism: the adapter {adapter!r} of this {type(model).__name__} has {option}, which is "
                "made of whole weights, but the model was loaded in slices. Load it without sharded_loading, or take "
                "adapters that are drawn at random (init_lora_weights=True)."
            )
    if list(wrappings) and any(isinstance(param, DTensor) for param in model.parameters()):
        raise PlanError(
            f"tensor parallelism: this {type(model).__name__} has adapters on modules whose parameters are DTensors. "
            "Load the base model unsharded, and let this package shard it together with its adapters."
        )
    _refuse_late_adapters(wrappings)


def look_after_adapters(model: nn.Module) -> None:
    """Let a sharded model save its adapters as PEFT does, and refuse adapters that are added from now on."""
    for found in (wrappings := Wrappings(model)):
        found.module.__dict__[_KNOWN] = found.adapter_names()
    for module in model.modules():
        if "peft" in sys.modules and isinstance(module, _peft_models()):
            module.save_pretrained = _SaveAdapters(module)
            module.load_adapter = _LoadAdapter(module)
            module.get_nb_trainable_parameters = _CountParameters(module)
            save_full_checkpoints(module.get_base_model())
    for module in model.modules():  # one that no forward can do without
        weight = module._parameters.get("weight")
        if is_linear(module) and shard_info(weight) is not None:
            module.register_forward_pre_hook(_LookForLateAdapters(wrappings.base), prepend=True)
            break


class _LookForLateAdapters:
    """Forward pre-hook that costs one comparison, until PEFT has left its mark on the model."""

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


def _refuse_late_adapters(wrappings: Wrappings) -> None:
    for found in wrappings:
        late = found.adapter_names() - found.module.__dict__.get(_KNOWN, set())
        if late and any(info.is_sharded for p in found.base.parameters() if (info := shard_info(p)) is not None):
            raise ValueError(
                f"the adapter {min(late)!r} was added to `{found.name or found.base_name}` after the model had been "
                "sharded, so it would be neither cut nor the same on all ranks. Call `get_peft_model`, `add_adapter` "
                "and `load_adapter` first, and `prepare` (or `parallelize`) after them, with tp_size as it is."
            )


class _SaveAdapters:
    """`PeftModel.save_pretrained`, with the full adapters. Collective: call it on every rank; the main one writes.

    An object and no bound function, so that it is copied and pickled together with its model.
    """

    def __init__(self, model: nn.Module):
        self.model = model

    def __call__(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        **kwargs: Any,
    ) -> None:
        stock = type(self.model).save_pretrained
        if path_initial_model_for_weight_conversion is not None:
            raise ValueError(
                "path_initial_model_for_weight_conversion loads another adapter into the model, which a sharded model "
                "cannot take. Save without it, and convert the adapter in a single process afterwards."
            )

        def write(state: dict[str, Any]) -> None:
            kwargs["state_dict"] = state
            stock(
                self.model,
                save_directory,
                safe_serialization,
                selected_adapters,
                save_embedding_layers,
                is_main_process,
                **kwargs,
            )

        if kwargs.get("state_dict") is None:
            adapters = selected_adapters if selected_adapters is not None else list(self.model.peft_config)
            chosen = self._written(adapters, save_embedding_layers)
            if not is_main_process:
                write = leave_it
            export(self.model, "save_pretrained", write, save_directory, chosen)
        elif is_main_process:
            write(kwargs["state_dict"])

    def _written(self, adapters: list[str], save_embedding_layers: str | bool) -> dict[str, Any]:
        """Of the model's own state dict, what PEFT will write."""
        from peft import get_peft_model_state_dict

        state = self.model.state_dict(keep_vars=True)
        written: set[int] = set()
        for adapter in adapters:
            if adapter in self.model.peft_config:  # PEFT's own `save_pretrained` refuses others
                chosen = get_peft_model_state_dict(
                    self.model, dict(state), adapter_name=adapter, save_embedding_layers=save_embedding_layers
                )
                written.update(map(id, chosen.values()))
        unknown = written - set(map(id, state.values()))
        if unknown:
            raise RuntimeError(
                f"PEFT would write {len(unknown)} tensors that are not in the model's state dict, so they cannot be "
                "joined from their shards. Pass `state_dict=accelerator.get_state_dict(model)`."
            )
        return {name: value for name, value in state.items() if id(value) in written}


class _LoadAdapter:
    """`PeftModel.load_adapter`, into adapters that are sharded already: each rank takes its parts of what is read."""

    def __init__(self, model: nn.Module):
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        stock = type(self.model).load_adapter
        given = inspect.signature(stock).bind(self.model, *args, **kwargs)
        if given.arguments.get("kwargs", {}).get("ignore_mismatched_sizes"):
            raise ValueError(
                "load_adapter(ignore_mismatched_sizes=True) would compare the adapter's sizes with this rank's parts, "
                "and leave all that is sharded as it was. Leave it out, or load the adapter before `prepare`."
            )
        if given.arguments["adapter_name"] in self.model.peft_config:
            given.arguments["low_cpu_mem_usage"] = False  # which puts other objects in the place of the parameters
        return stock(*given.args, **given.kwargs)


class _CountParameters:
    """`PeftModel.get_nb_trainable_parameters`, of the unsharded model."""

    def __init__(self, model: nn.Module):
        self.model = model

    def __call__(self) -> tuple[int, int]:
        trainable, total = type(self.model).get_nb_trainable_parameters(self.model)
        for param in self.model.parameters():
            total += elements_elsewhere(param)
            trainable += elements_elsewhere(param) if param.requires_grad else 0
        return trainable, total


def _peft_models() -> tuple[type[nn.Module], ...]:
    peft = sys.modules["peft"]
    return peft.PeftModel, peft.PeftMixedModel


def _configs(module: nn.Module) -> dict[str, Any]:
    """The adapters' configs by name; PEFT keeps them on its own models and on the model that it adapts."""
    if "peft" in sys.modules and isinstance(module, _peft_models()):
        return dict(module.peft_config)
    return dict(module.__dict__.get("peft_config") or {})


def _made_of_whole_weights(config: Any) -> str | None:
    """What of an adapter's config makes PEFT compute with the weights, or ask for their sizes, as it is added."""
    drawn = getattr(config, "init_lora_weights", True)
    if not isinstance(drawn, bool) and drawn not in ("gaussian", "orthogonal"):
        return f"init_lora_weights={drawn!r}"
    options = ("use_dora", "target_parameters", "trainable_token_indices")
    return next((f"{name}={value!r}" for name in options if (value := getattr(config, name, None))), None)


def _is_auxiliary(module: nn.Module) -> bool:
    """A module to save, or the outer one of the two around a module with trained tokens."""
    from peft.utils import ModulesToSaveWrapper
    from peft.utils.other import TrainableTokensWrapper

    return isinstance(module, (ModulesToSaveWrapper, TrainableTokensWrapper))


def _wrapped_in(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """What `module` has been put around, by name: one module, or an original and its copies; none for a plain one."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    if isinstance(module, BaseTunerLayer):
        return [("base_layer", module.base_layer)]
    if isinstance(module, AuxiliaryTrainingWrapper):
        copies = module._modules.get("modules_to_save", {})
        inside = [(key, child) for key, child in module._modules.items() if child is not None and child is not copies]
        return [*inside, *((f"modules_to_save.{adapter}", copied) for adapter, copied in copies.items())]
    return []


def _name_inside(model: nn.Module, base: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is base)


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)
