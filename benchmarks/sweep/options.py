"""Causal language models with optional fields on

The same architectures, each with every optional field of its config changed that can be: switches the other way round
(biases, norms of queries and keys, tied embeddings, auxiliary losses of routers, which then count in full), fields
without a value given one (clipping, soft caps, windows), scaled rotary positions. A field is changed if the model then
still runs, and has other parameters or another loss. Architectures without such a field are left out.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from . import causal
from .cases import Case, NoCase

# Switches that say what is returned or how it is computed, and not what.
NOT_SWITCHED = {
    *("return_dict", "use_cache", "is_encoder_decoder", "output_hidden_states", "output_attentions", "is_decoder"),
    *("use_mamba_kernels", "use_mambapy", "use_associative_scan", "use_bidirectional_attention"),
}
# For fields that have no value, or one with which they do nothing.
GIVEN: dict[str, Any] = {
    **{"clip_qkv": 0.5, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 2.0, "sliding_window": 8},
    **{"prefix_dense_intermediate_size": 96, "log_scaling_n_floor": 4, "moe_latent_size": 32},
    "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
}
# What goes with a field.
WITH: dict[str, dict[str, Any]] = {
    "output_router_logits": {"router_aux_loss_coef": 1.0, "aux_loss_alpha": 1.0},
    "enable_moe_block": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
    "is_moe": {"num_experts": 16, "num_experts_per_tok": 4},
    "use_sliding_window": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8},
}


def cases() -> list[Case]:
    return [Case(name, partial(model_of, name), causal.language_inputs) for name in causal.architectures()]


def model_of(architecture: str) -> nn.Module:
    config, changed = changed_config(architecture)
    model = from_config(config)
    model.case_note = ", ".join(changed)
    return model


@cache
def changed_config(architecture: str) -> tuple[Any, list[str]]:
    """The config with as many fields changed as go together, and which they are.

    Raises:
        NoCase: If there are none.
    """
    config, changed = causal.working_config(architecture), []
    seen = outcome(config)
    for name, values in candidates(config):
        try:
            trial = CONFIG_MAPPING[architecture](**{**config.to_dict(), **values})
            new = outcome(trial)
        except Exception:
            continue
        if new != seen:
            config, seen = trial, new
            changed.append(f"{name}={_short(values[name])}")
    if not changed:
        raise NoCase("no optional field that changes anything")
    return config, changed


def candidates(config: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, value in vars(config).items():
        further = {key: new for key, new in WITH.get(name, {}).items() if key in vars(config)}
        if isinstance(value, bool) and name not in NOT_SWITCHED and not name.startswith("_"):
            yield name, {name: not value, **further}
        elif name in GIVEN and (value is None or name == "rope_parameters"):
            yield name, {name: GIVEN[name], **further}


def from_config(config: Any) -> nn.Module:
    return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32)


def outcome(config: Any) -> tuple[Any, float]:
    """What a config makes of a model: its parameters, and its loss."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = from_config(config).eval()
        names = tuple((name, tuple(param.shape)) for name, param in model.named_parameters())
        with torch.no_grad():  # one that starts at zero may do nothing yet
            for param in model.parameters():
                param.copy_(torch.linspace(-0.3, 0.3, param.numel()).sin().view(param.shape) * 0.1 + param)
        torch.manual_seed(1)
        loss = model(**causal.language_inputs(model)).loss
        loss.backward()
        if not loss.isfinite():
            raise ArithmeticError("the loss is not finite")
        return names, round(loss.item(), 5)


def _short(value: Any) -> str:
    return f"{value['rope_type']} x {value['factor']:g}" if isinstance(value, dict) else str(value)
