"""What PEFT has put into a model: where, whether it can be sharded, and how adapters are saved.

PEFT wraps modules in place: the module `x` becomes `x.base_layer` inside a LoRA layer, or `x.original_module` beside
the trained copies `x.modules_to_save.<adapter>`, and the whole model becomes `base_model.model` of a `PeftModel`.
Plans still name `x`. This file and `styles/peft` are the only ones that know PEFT; a model can hold adapters only
if peft has been imported already, so nothing here imports it for others.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from ..core.errors import PlanError
from ..core.shard import shard_info
from ..core.slices import holds_slices
from ..styles.base import Site
from ..styles.peft import can_follow

__all__ = ["Wrapping", "Wrappings", "adapted_model", "check_adapters", "unwrapped"]

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
            for key, inner in module._modules.items():
                if inner is not None:
                    self._walk(inner, _join(name, key), _join(plain, key), names)


def adapted_model(model: nn.Module) -> nn.Module:
    """The model inside a `PeftModel`; any other model itself."""
    return model.get_base_model() if "peft" in sys.modules and isinstance(model, _peft_models()) else model


def unwrapped(module: nn.Module) -> nn.Module:
    """The model's own module that PEFT has wrapped in `module`; any other module itself."""
    while "peft" in sys.modules and (inside := _wrapped_in(module)):
        module = inside[0][1]
    return module


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
                "made of full weights, but the model was loaded in slices. Load it without sharded_loading, or take "
                "adapters that are drawn at random (init_lora_weights=True)."
            )
    if list(wrappings) and any(isinstance(param, DTensor) for param in model.parameters()):
        raise PlanError(
            f"tensor parallelism: this {type(model).__name__} has adapters on modules whose parameters are DTensors. "
            "Load the base model unsharded, and let this package shard it together with its adapters."
        )
    _refuse_late_adapters(wrappings)


def _refuse_late_adapters(wrappings: Wrappings) -> None:
    for found in wrappings:
        late = found.adapter_names() - found.module.__dict__.get(_KNOWN, set())
        if late and any(info.is_sharded for p in found.base.parameters() if (info := shard_info(p)) is not None):
            raise ValueError(
                f"the adapter {min(late)!r} was added to `{found.name or found.base_name}` after the model had been "
                "sharded, so it would be neither cut nor the same on all ranks. Call `get_peft_model`, `add_adapter` "
                "and `load_adapter` first, and `prepare` (or `parallelize`) after them, with tp_size as it is."
            )


def _peft_models() -> tuple[type[nn.Module], ...]:
    peft = sys.modules["peft"]
    return peft.PeftModel, peft.PeftMixedModel


def _configs(module: nn.Module) -> dict[str, Any]:
    """The adapters' configs by name; PEFT keeps them on its own models and on the model that it adapts."""
    outer = "peft" in sys.modules and isinstance(module, _peft_models())
    configs: Any = module.peft_config if outer else module.__dict__.get("peft_config")
    return dict(configs or {})


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
        return [("base_layer", module.get_submodule("base_layer"))]
    if isinstance(module, AuxiliaryTrainingWrapper):
        copies: Any = module._modules.get("modules_to_save", {})
        inside = [(key, child) for key, child in module._modules.items() if child is not None and child is not copies]
        return [*inside, *((f"modules_to_save.{adapter}", copied) for adapter, copied in copies.items())]
    return []


def _name_inside(model: nn.Module, base: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is base)


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)
