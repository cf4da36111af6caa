"""Odd sizes

What does not divide by the ranks: vocabularies, intermediate sizes, numbers of experts; padding rows on other ranks
than the first, resized embeddings, and packed projections with fewer key/value heads than ranks.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from . import causal
from .cases import Case

VOCABULARY = 131  # a prime
EAGER = {"experts_implementation": "eager"}  # the default one takes rows of whole 16 bytes only
CHANGES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama: vocabulary 131": ("llama", {}),
    "llama: vocabulary 131, tied": ("llama", {"tie_word_embeddings": True}),
    "llama: padding row 100": ("llama", {"pad_token_id": 100}),
    "llama: padding row 100, tied": ("llama", {"pad_token_id": 100, "tie_word_embeddings": True}),
    "llama: resized from 120": ("llama", {"vocab_size": 120}),
    "llama: resized from 120, tied": ("llama", {"vocab_size": 120, "tie_word_embeddings": True}),
    "llama: intermediate size 130": ("llama", {"intermediate_size": 130}),
    "llama: intermediate size 127, biases": ("llama", {"intermediate_size": 127, "mlp_bias": True}),
    "gpt_neox: intermediate size 131": ("gpt_neox", {"intermediate_size": 131}),
    "phi3: intermediate size 130": ("phi3", {"intermediate_size": 130}),
    "phi3: one key/value head": ("phi3", {"num_key_value_heads": 1}),
    "llama: one key/value head": ("llama", {"num_key_value_heads": 1}),
    "mixtral: 3 experts": ("mixtral", {"num_local_experts": 3}),
    "mixtral: 5 experts, 3 a token": ("mixtral", {"num_local_experts": 5, "num_experts_per_tok": 3}),
    "qwen2_moe: 7 experts, shared one of 34": (
        "qwen2_moe",
        {"num_experts": 7, "num_experts_per_tok": 3, "shared_expert_intermediate_size": 34},
    ),
    "deepseek_v3: 5 experts of 48": ("deepseek_v3", {"n_routed_experts": 5, "moe_intermediate_size": 48}),
    "gpt_oss: 3 experts": ("gpt_oss", {"num_local_experts": 3}),
    "cohere: norm of each head": ("cohere", {"use_qk_norm": True}),
    "glm4_moe: norm of queries and keys": ("glm4_moe", {"use_qk_norm": True}),
    "phi: norm of queries and keys": ("phi", {"qk_layernorm": True}),
    "mixtral: experts of 31": ("mixtral", {"intermediate_size": 31, **EAGER}),
    "gpt_oss: experts of 30": ("gpt_oss", {"intermediate_size": 30, **EAGER}),
    "gpt_oss: experts of 31": ("gpt_oss", {"intermediate_size": 31, **EAGER}),
    "gemma2: vocabulary 131": ("gemma2", {}),
    "llama: embedding cut along the hidden size, tied": ("llama", {"tie_word_embeddings": True}),
}


PLANS: dict[str, dict[str, str]] = {
    "llama: embedding cut along the hidden size, tied": {
        "embed_tokens": "embedding_colwise",
        "lm_head": "rowwise_split_input",
    },
}


def cases() -> list[Case]:
    return [
        Case(name, partial(model_of, *change), inputs, plan=PLANS.get(name, "auto"))
        for name, change in CHANGES.items()
    ]


def model_of(architecture: str, changes: dict[str, Any]) -> nn.Module:
    config = causal.working_config(architecture)
    options = {name: value for name, value in changes.items() if name in EAGER}
    changes = {name: value for name, value in changes.items() if name not in EAGER}
    changed = type(config)(**{**config.to_dict(), "vocab_size": VOCABULARY, **changes})
    model = AutoModelForCausalLM.from_config(changed, dtype=torch.float32, **options)
    if changed.vocab_size != VOCABULARY:
        model.resize_token_embeddings(VOCABULARY, mean_resizing=False)
    return model


def inputs(model: nn.Module) -> dict[str, Any]:
    """Padding and the last of the vocabulary among the ids."""
    ids = torch.randint(3, VOCABULARY, (2, causal.LENGTH))
    ids[:, -2:] = torch.tensor([VOCABULARY - 1, 100])
    return {"input_ids": ids, "labels": ids, "use_cache": False}
