"""Tiny causal language models from configs with seeded random weights: no hub, no files."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 131  # odd, so that no split of it is even
LAYERS = 2

_SIZES = {
    "hidden_size": 64,
    "num_attention_heads": 8,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,  # large enough for each weight to matter to the loss
}
_GROUPED = {"num_key_value_heads": 4, "intermediate_size": 96, "pad_token_id": 0}
_PHI3 = {"model_type": "phi3", "bos_token_id": 1, "eos_token_id": 2, "sliding_window": None}
_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _GROUPED,
    "qwen3": {**_GROUPED, "head_dim": 16},
    "mistral": {**_GROUPED, "sliding_window": 8},
    "gpt_neox": {"intermediate_size": 128, "rotary_pct": 0.5, "hidden_dropout": 0.0, "attention_dropout": 0.0},
    "gemma2": {**_GROUPED, "head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16},
    "phi3": {**_GROUPED, **_PHI3},
}
ARCHITECTURES = tuple(_CONFIGS)
_EXPERTS = {**_GROUPED, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LATENT = {**_EXPERTS, "kv_lora_rank": 24, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 12}
_LATENT |= {"num_key_value_heads": 8, "n_routed_experts": 4, "n_shared_experts": 2, "first_k_dense_replace": 1}
_FURTHER: dict[str, dict[str, Any]] = {
    "mixtral": {**_EXPERTS, "num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 0.5},
    "qwen3_moe": {**_EXPERTS, "head_dim": 16, "num_experts": 4, "decoder_sparse_step": 1, "norm_topk_prob": True},
    "gpt_oss": {
        **{**_EXPERTS, "head_dim": 16, "num_local_experts": 4, "intermediate_size": 32, "sliding_window": 8},
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "deepseek_v2": {**_LATENT, "q_lora_rank": None, "n_group": 2, "topk_group": 1},
    "deepseek_v3": {**_LATENT, "q_lora_rank": 24, "n_group": 2, "topk_group": 1, "rope_interleave": True},
    "longcat_flash": {
        **{**_LATENT, "q_lora_rank": 24, "n_routed_experts": 3, "zero_expert_num": 2, "moe_topk": 2},
        **{"ffn_hidden_size": 48, "expert_ffn_hidden_size": 32, "num_layers": 1, "head_dim": 4},
    },
    "apertus": _GROUPED,  # whose activation has parameters
    "llama_one_key": {**_GROUPED, "model_type": "llama", "num_key_value_heads": 1},
    "phi3_one_key": {**_GROUPED, "model_type": "phi3", "num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2},
    "phi3_two_keys": {
        **_GROUPED,
        "model_type": "phi3",
        "num_key_value_heads": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "qwen3_two_keys": {**_GROUPED, "model_type": "qwen3", "head_dim": 16, "num_key_value_heads": 2},
    "qwen2_one_key": {**_GROUPED, "model_type": "qwen2", "num_key_value_heads": 1},
}
_NO_DROPOUT = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
_CURATED: dict[str, dict[str, Any]] = {
    "gpt2": {**_NO_DROPOUT, "tie_word_embeddings": True},
    "gpt2_dropout": {"model_type": "gpt2", "tie_word_embeddings": True},
    "bloom": {"hidden_dropout": 0.0, "attention_dropout": 0.0},
    "codegen": {**_NO_DROPOUT, "num_attention_heads": 16, "n_ctx": 64, "rotary_dim": 4},
    "falcon_one_key": {"model_type": "falcon", "alibi": False, "multi_query": True, "bias": True},
    "falcon_two_keys": {"model_type": "falcon", "new_decoder_architecture": True, "num_kv_heads": 2, "alibi": True},
    "mpt": {"max_seq_len": 64},
    "openai_gpt": {**_NO_DROPOUT, "model_type": "openai-gpt"},
    "stablelm": {**_GROUPED, "qk_layernorm": True},
}
#: Of a plan of this package: transposed, fused and grouped projections, alibi, norms by head.
CURATED = tuple(name for name in _CURATED if name != "gpt2_dropout")
#: Experts, latent attention, attention sinks, few key/value heads. Not in every cross product of the tests.
FURTHER = tuple(_FURTHER)


def build_config(architecture: str, *, tied: bool = False, layers: int = LAYERS, **overrides: Any) -> Any:
    known = _CONFIGS | _FURTHER | _CURATED
    sizes = {**_SIZES, "num_hidden_layers": layers, "tie_word_embeddings": tied, **known[architecture]}
    return AutoConfig.for_model(sizes.pop("model_type", architecture), **{**sizes, **overrides})


def build_model(
    architecture: str,
    *,
    tied: bool = False,
    layers: int = LAYERS,
    attention: str | None = None,
    seed: int = 0,
    noise: float = 0.0,
    **overrides: Any,
) -> PreTrainedModel:
    """The same weights wherever it is called; the global random state is left alone.

    Norm weights and biases start at one and zero, where a swapped, doubled or dropped one would not show, so they are
    moved off by a tenth, and so is what else starts at zero. `attention` None: what transformers takes by itself, sdpa
    where there is one. `noise` changes every weight by about so much, relatively.
    """
    config = build_config(architecture, tied=tied, layers=layers, **overrides)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.ndim == 1 or not (parameter.is_meta or parameter.any()):
                parameter += 0.1 * torch.randn_like(parameter)
        if noise:
            for parameter in model.parameters():
                parameter *= 1 + noise * torch.randn_like(parameter)
    return model
