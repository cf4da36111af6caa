"""Causal language models

All of transformers whose config has a `base_model_tp_plan` (100 of them in 5.23, 115 in 5.24), and gpt_oss, whose
config has none and for which this package ships one. A config of several parts has a case of its own only where its
own config has the plan (llama4, phi4_multimodal); otherwise its text part is the case.
Eight query heads and two key/value heads, where a config allows it: as many as ranks at tp 2, fewer at tp 4. Layers
are at least two, and of every kind that the default config has.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from functools import cache, partial
from itertools import cycle, islice
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .cases import Case
from .processes import first_line

VOCABULARY, LENGTH = 128, 16

# Small values for whatever of these a config has. Head widths are unlike each other where a config allows it. The two
# key/value heads are as many as ranks at tp 2, and fewer at tp 4.
SIZES: dict[str, Any] = {
    **{"hidden_size": 64, "n_embd": 64, "d_model": 64, "intermediate_size": 128, "ffn_hidden_size": 128},
    **{"num_hidden_layers": 2, "n_layer": 2, "num_layers": 2, "vocab_size": VOCABULARY, "initializer_range": 0.1},
    **{"num_attention_heads": 8, "n_head": 8, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "sliding_window": 8, "attention_chunk_size": 16},
    **{"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "expert_ffn_hidden_size": 32},
    **{"moe_num_experts": 4, "num_experts": 4, "n_routed_experts": 4, "num_local_experts": 4, "n_shared_experts": 1},
    **{"num_experts_per_tok": 2, "moe_k": 2, "moe_topk": 2, "num_experts_per_token": 2, "n_group": 1, "topk_group": 1},
    **{"first_k_dense_replace": 1, "moe_layer_start_index": 0, "shared_intermediate_size": 64},
    **{"kv_lora_rank": 24, "q_lora_rank": 24, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16},
    **{"index_n_heads": 4, "index_head_dim": 16, "index_topk": 8, "zero_expert_num": 2, "intermediate_size_mlp": 128},
    **{"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    **{"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_expand": 2},
    **{"mamba_d_ssm": 128, "rotary_dim": 8, "unpadded_vocab_size": VOCABULARY},
    **{"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": VOCABULARY, "laurel_rank": 8},
    **{"partial_rotary_factor": 0.5, "rotary_pct": 0.5, "swa_num_attention_heads": 8, "swa_num_key_value_heads": 2},
    **{"swa_head_dim": 16, "swa_v_head_dim": 16, "num_nextn_predict_layers": 0, "num_kv_shared_layers": 0},
    **{"num_dense_layers": 1, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
    **{"expert_layer_offset": 1, "block_size": 8, "num_expert_group": 1, "num_shared_experts": 1},
}

# What an architecture needs beside that.
SPECIAL: dict[str, dict[str, Any]] = {
    "codegen": {"num_attention_heads": 16, "n_head": 16, "rotary_dim": 4},  # four times as many as ranks at tp 4
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
            for kind in ("sliding_attention", "full_attention")
        },
    },
    "deepseek_v4": {
        "layer_types": ["sliding_attention", "heavily_compressed_attention", "compressed_sparse_attention"],
        "mlp_layer_types": ["hash_moe", "moe", "moe"],
        "num_hidden_layers": 3,
    },
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "phi4_multimodal": {
        "vision_config": {
            **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
            **{"image_size": 28, "crop_size": 28, "image_token_id": 1},
        },
        "audio_config": {
            **{"hidden_size": 32, "intermediate_size": 64, "num_blocks": 2, "num_attention_heads": 4},
            **{"ext_pw_out_channel": 32, "depthwise_separable_out_channel": 32, "nemo_conv_channels": 32},
            "audio_token_id": 2,
        },
    },
    "qwen4_exp_text": {
        **{"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8},
        "indexer_compress_ratio": 2,
    },
    "gemma3n_text": {"activation_sparsity_pattern": [0.9, 0.0]},
}


def cases() -> list[Case]:
    return [Case(name, partial(model_of, name), language_inputs) for name in architectures()]


def architectures() -> list[str]:
    """Model types with a plan, in alphabetical order."""
    types = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    return [name for name in types if name == "gpt_oss" or getattr(CONFIG_MAPPING[name], "base_model_tp_plan", None)]


def language_inputs(model: nn.Module) -> dict[str, Any]:
    ids = torch.randint(3, VOCABULARY, (2, LENGTH))
    return {"input_ids": ids, "labels": ids, "use_cache": False}


def model_of(architecture: str) -> nn.Module:
    return AutoModelForCausalLM.from_config(copy.deepcopy(working_config(architecture)), dtype=torch.float32)


@cache
def working_config(architecture: str) -> Any:
    """The first small config that runs.

    Raises:
        RuntimeError: With the first problem, if no config works.
    """
    problem = None
    for config in tiny_configs(architecture):
        try:
            with torch.random.fork_rng():
                model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32)
                model(**language_inputs(model)).loss.backward()
            return config
        except Exception as error:
            problem = problem or error
    raise RuntimeError(f"not at this size: {first_line(problem)}")


def tiny_configs(architecture: str) -> Iterator[Any]:
    """Small configs; the first that runs is taken, as few of an architecture's sizes may be set freely."""
    kind = CONFIG_MAPPING[architecture]
    default = kind()
    known = set(inspect.signature(kind.__init__).parameters) | set(vars(default)) | set(dir(kind))
    optional = {name: value for name, value in SIZES.items() if name in known}
    given = {name: value for name, value in optional.items() if vars(default).get(name) is not None}
    latent = {"num_key_value_heads": SIZES["num_attention_heads"]} if "kv_lora_rank" in given else {}
    if {"head_dim", "qk_rope_head_dim"} <= given.keys() and vars(default)["head_dim"] == default.qk_rope_head_dim:
        latent["head_dim"] = given["qk_rope_head_dim"]
    lists = [name for name in ("layer_types", "mlp_layer_types", "layers_block_type") if name in vars(default)]
    kinds = {name: list(dict.fromkeys(getattr(default, name) or ())) for name in lists}
    number = max(2, *map(len, kinds.values())) if kinds else 2
    every = {name: list(islice(cycle(values), number)) for name, values in kinds.items() if values}
    anew = {name: None for name in lists}  # one for each layer
    first = {name: list(getattr(default, name) or ())[:2] or None for name in lists}
    narrow = {"head_dim": SIZES["hidden_size"] // SIZES["num_attention_heads"]} if "head_dim" in given else {}
    parts = {
        name: next(tiny_configs(part.model_type)).to_dict()
        for name, part in kind.sub_configs.items()
        if getattr(part, "base_model_tp_plan", None)
    }
    for sizes in (given, optional, {**given, **narrow}, {**optional, "q_lora_rank": None}):
        for layers in (
            {**every, "num_hidden_layers": number},
            anew,
            first,
            {},
            {"layer_types": ["full_attention"] * 2},
        ):
            try:
                yield kind(**{**sizes, **latent, **layers, **parts, **SPECIAL.get(architecture, {})})
            except Exception:
                continue
