"""Small models of any architecture of transformers: sizes that suit all, and by case what one needs besides."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

__all__ = ["VOCABULARY", "patches", "pixels", "small_config", "small_model", "tokens", "vectors"]

VOCABULARY, LENGTH, HIDDEN = 128, 16, 64

# Small values for whatever of these a config has and does not leave open.
SIZES: dict[str, Any] = {
    **{
        "hidden_size": HIDDEN,
        "d_model": HIDDEN,
        "embed_dim": HIDDEN,
        "intermediate_size": 128,
        "vocab_size": VOCABULARY,
    },
    **{"num_hidden_layers": 2, "num_layers": 2, "depth": 2, "max_position_embeddings": 64, "initializer_range": 0.1},
    **{"num_attention_heads": 8, "num_heads": 8, "num_key_value_heads": 4, "head_dim": 16, "sliding_window": 8},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "hidden_size_per_layer_input": 16},
    **{"vocab_size_per_layer_input": VOCABULARY, "num_kv_shared_layers": 0, "moe_intermediate_size": 32},
    **{"num_experts": 4, "n_routed_experts": 4, "num_local_experts": 4, "moe_num_experts": 4, "n_shared_experts": 1},
    **{"num_experts_per_tok": 2, "top_k_experts": 2, "moe_k": 2, "n_group": 1, "topk_group": 1},
    **{"first_k_dense_replace": 1, "kv_lora_rank": 24, "q_lora_rank": 24, "qk_nope_head_dim": 8, "v_head_dim": 16},
    **{"qk_rope_head_dim": 8, "index_n_heads": 4, "index_head_dim": 16, "index_topk": 8},
    **{"image_size": 16, "patch_size": 4, "num_channels": 3, "in_channels": 3},
}


def small_config(kind: type[PretrainedConfig], **overrides: Any) -> PretrainedConfig:
    """A config of `kind` with `SIZES` where it has such fields, made of small configs where it is made of configs.

    Lists with one element for each layer keep one of every value.

    Args:
        overrides: Fields that are to be otherwise; for a config inside, a mapping of its fields. A `rope_parameters`
            mapping is added to the default one.
    """
    default = kind()
    parts = {}
    for name, part in kind.sub_configs.items():
        if isinstance(own := getattr(default, name), PretrainedConfig):
            part = type(own)
        elif name not in overrides:
            continue
        parts[name] = part
    given = {name: size for name, size in SIZES.items() if _read(default, name) is not None}
    layers = getattr(default, "num_hidden_layers", None)
    lists = {
        name: list(dict.fromkeys(value))
        for name, value in vars(default).items()
        if isinstance(value, list) and layers and len(value) == layers and name != "target_layer_ids"
    }
    varied = max([2, *(len(values) for values in lists.values() if len(values) <= 4)])
    lists = {name: [*values, *[values[-1]] * varied][:varied] for name, values in lists.items()}
    inside = {name: small_config(part, **overrides.pop(name, {})) for name, part in parts.items()}
    if "rope_parameters" in overrides:
        overrides["rope_parameters"] = {**(default.rope_parameters or {}), **overrides["rope_parameters"]}
    if layers:
        given["num_hidden_layers"] = varied
    return kind(**{**given, **lists, **inside, **overrides})


def _read(config: PretrainedConfig, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except RuntimeError:  # transformers' word for what may be another value in each layer
        return vars(config).get(name)


def small_model(folder: str, name: str, **overrides: Any) -> nn.Module:
    """The model class `name` of `transformers.models.<folder>`, of a small config of its own kind."""
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    kind = getattr(module, name)
    model = kind(small_config(kind.config_class, **overrides)).float()
    with torch.no_grad():
        for param in model.parameters():
            if param.ndim == 3:  # stacked experts, which some architectures leave as the memory was
                param.normal_(std=0.1)
    return model


def tokens(samples: int = 2, length: int = LENGTH, low: int = 8, high: int = VOCABULARY) -> Tensor:
    """Ids `[samples, length]`; below `low` are those of padding, images and the like."""
    return torch.randint(low, high, (samples, length))


def pixels(samples: int = 2, side: int = 16, channels: int = 3) -> Tensor:
    """Images `[samples, channels, side, side]`."""
    return torch.randn(samples, channels, side, side)


def patches(count: int, width: int) -> Tensor:
    """Image patches in one row, `[count, width]`."""
    return torch.randn(count, width)


def vectors(*size: int) -> Tensor:
    """Embeddings, hidden states, spectrograms."""
    return torch.randn(*size)
