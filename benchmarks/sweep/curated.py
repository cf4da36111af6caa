"""Decoders with a plan of this package, and heads

Decoders that transformers ships no plan for, in the variants that their configs allow, and classification, question
answering and reward heads on decoders.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig

from .cases import Case

VOCABULARY, LENGTH, BATCH, LABELS = 128, 12, 3, 4

# 8 heads of width 8, but where an architecture needs more.
_SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 64, "n_head": 8, "n_layer": 2, "n_positions": 32},
    "openai-gpt": {"n_embd": 64, "n_head": 8, "n_layer": 2, "n_positions": 32},
    "opt": {
        **{"hidden_size": 64, "num_attention_heads": 8, "num_hidden_layers": 2, "ffn_dim": 128},
        **{"max_position_embeddings": 32, "word_embed_proj_dim": 64},
    },
    "bloom": {"hidden_size": 64, "n_head": 8, "n_layer": 2},
    "falcon": {
        **{"hidden_size": 64, "num_attention_heads": 8, "num_hidden_layers": 2, "max_position_embeddings": 32},
        **{"alibi": False, "multi_query": False, "new_decoder_architecture": False, "parallel_attn": True},
    },
    "gptj": {"n_embd": 64, "n_head": 8, "n_layer": 2, "n_positions": 32, "rotary_dim": 4},
    "gpt_neo": {
        **{"hidden_size": 64, "num_heads": 8, "num_layers": 2, "attention_types": [[["global", "local"], 1]]},
        **{"intermediate_size": 128, "window_size": 6, "max_position_embeddings": 32},
    },
    "codegen": {"n_embd": 64, "n_head": 16, "n_layer": 2, "n_positions": 32, "n_ctx": 32, "rotary_dim": 4},
    "mpt": {"d_model": 64, "n_heads": 8, "n_layers": 2, "expansion_ratio": 4, "max_seq_len": 32},
    "stablelm": {
        **{"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 2},
        **{"intermediate_size": 128, "max_position_embeddings": 32},
    },
    "gpt_bigcode": {"n_embd": 64, "n_head": 8, "n_layer": 2, "n_positions": 32},
    "xglm": {"d_model": 64, "attention_heads": 8, "num_layers": 2, "ffn_dim": 128, "max_position_embeddings": 32},
    "biogpt": {
        **{"hidden_size": 64, "num_attention_heads": 8, "num_hidden_layers": 2, "intermediate_size": 128},
        "max_position_embeddings": 32,
    },
    "ctrl": {"n_embd": 64, "n_head": 8, "n_layer": 2, "n_positions": 32, "dff": 128},
    "persimmon": {
        **{"hidden_size": 64, "num_attention_heads": 8, "num_hidden_layers": 2, "intermediate_size": 128},
        "max_position_embeddings": 32,
    },
    "gpt_neox": {
        **{"hidden_size": 64, "num_attention_heads": 8, "num_hidden_layers": 2, "intermediate_size": 128},
        "max_position_embeddings": 32,
    },
    "gpt_neox_japanese": {
        **{"hidden_size": 64, "num_attention_heads": 8, "num_hidden_layers": 2, "max_position_embeddings": 32},
    },
    "hunyuan_v1_dense": {
        **{"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 2},
        **{"intermediate_size": 128, "max_position_embeddings": 32, "head_dim": 8},
    },
    "lfm2": {
        **{"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 2},
        **{"intermediate_size": 128, "max_position_embeddings": 32, "block_auto_adjust_ff_dim": False},
        "layer_types": ["conv", "full_attention"],
    },
    "bamba": {
        **{"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 2},
        **{"intermediate_size": 128, "max_position_embeddings": 32, "attn_layer_indices": [1], "mamba_n_heads": 8},
        **{"mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_expand": 2, "mamba_chunk_size": 8},
    },
    "llama": {
        **{"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 2},
        **{"intermediate_size": 128, "max_position_embeddings": 32},
    },
}
_ALIBI = {"alibi": True, "parallel_attn": False}
_EAGER = {"attn_implementation": "eager"}
# By case name: model type, what it changes of the sizes above, and of how the model is built.
_LANGUAGE_MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    **{model_type: (model_type, {}, {}) for model_type in _SIZES if model_type != "llama"},
    "gpt2, eager": ("gpt2", {}, _EAGER),
    "gpt2, untied": ("gpt2", {"tie_word_embeddings": False}, {}),
    "gpt2, cross-attention": ("gpt2", {"add_cross_attention": True}, {}),
    "gpt2, scaled by layer, upcast": (
        *("gpt2", {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True}, _EAGER),
    ),
    "opt, eager, post-norm, projected": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 32}, _EAGER),
    "bloom, residual after the norm": ("bloom", {"apply_residual_connection_post_layernorm": True}, {}),
    "falcon, alibi": ("falcon", _ALIBI, {}),
    "falcon, alibi, eager": ("falcon", _ALIBI, _EAGER),
    "falcon, multi-query, eager": ("falcon", {"multi_query": True, "bias": True}, _EAGER),
    "falcon, new, 4 key/value heads": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 4}, {}),
    "falcon, new, 2 key/value heads": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}, {}),
    "mpt, clipped": ("mpt", {"attn_config": {"clip_qkv": 0.5, "softmax_scale": 0.2}}, {}),
    "stablelm, 1 key/value head, biases": ("stablelm", {"num_key_value_heads": 1, "use_qkv_bias": True}, {}),
    "stablelm, norms by head": ("stablelm", {"qk_layernorm": True}, {}),
    "stablelm, norms by head, 1 key/value head": ("stablelm", {"qk_layernorm": True, "num_key_value_heads": 1}, {}),
    "stablelm, parallel, eager": ("stablelm", {"use_parallel_residual": True}, _EAGER),
    "gpt_bigcode, eager": ("gpt_bigcode", {}, _EAGER),
    "gpt_bigcode, multi-head": ("gpt_bigcode", {"multi_query": False}, {}),
    "biogpt, eager": ("biogpt", {}, _EAGER),
    "ctrl, eager": ("ctrl", {}, _EAGER),
    "persimmon, no query norms, eager": ("persimmon", {"qk_layernorm": False}, _EAGER),
}
# Heads: class, model type, labels as wide as the input or one a sample.
_HEADS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2, sequence classes": ("GPT2ForSequenceClassification", "gpt2", {"num_labels": LABELS}),
    "gpt2, token classes": ("GPT2ForTokenClassification", "gpt2", {"num_labels": LABELS}),
    "gpt2, question answering": ("GPT2ForQuestionAnswering", "gpt2", {}),
    "gpt2, reward": ("GPT2ForSequenceClassification", "gpt2", {"num_labels": 1}),
    "opt, sequence classes": ("OPTForSequenceClassification", "opt", {"num_labels": LABELS}),
    "opt, question answering": ("OPTForQuestionAnswering", "opt", {}),
    "bloom, token classes": ("BloomForTokenClassification", "bloom", {"num_labels": LABELS}),
    "falcon, reward": ("FalconForSequenceClassification", "falcon", {"num_labels": 1, "multi_query": True}),
    "gptj, question answering": ("GPTJForQuestionAnswering", "gptj", {}),
    "gpt_neo, sequence classes": ("GPTNeoForSequenceClassification", "gpt_neo", {"num_labels": LABELS}),
    "mpt, token classes": ("MptForTokenClassification", "mpt", {"num_labels": LABELS}),
    "stablelm, reward": ("StableLmForSequenceClassification", "stablelm", {"num_labels": 1}),
    "persimmon, token classes": ("PersimmonForTokenClassification", "persimmon", {"num_labels": LABELS}),
    "gpt_bigcode, sequence classes": ("GPTBigCodeForSequenceClassification", "gpt_bigcode", {"num_labels": LABELS}),
    "biogpt, sequence classes": ("BioGptForSequenceClassification", "biogpt", {"num_labels": LABELS}),
    "ctrl, sequence classes": ("CTRLForSequenceClassification", "ctrl", {"num_labels": LABELS}),
    "llama, sequence classes": ("LlamaForSequenceClassification", "llama", {"num_labels": LABELS}),
    "llama, token classes": ("LlamaForTokenClassification", "llama", {"num_labels": LABELS}),
    "llama, question answering": ("LlamaForQuestionAnswering", "llama", {}),
    "llama, reward": ("LlamaForSequenceClassification", "llama", {"num_labels": 1}),
}


def cases() -> list[Case]:
    models = [
        Case(name, partial(build_language_model, model_type, changes, options), language_inputs)
        for name, (model_type, changes, options) in _LANGUAGE_MODELS.items()
    ]
    heads = [
        Case(name, partial(build_head, kind, model_type, changes), _HEAD_INPUTS[kind.partition("For")[2]])
        for name, (kind, model_type, changes) in _HEADS.items()
    ]
    return models + heads


def config_for(model_type: str, changes: dict[str, Any]) -> Any:
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": VOCABULARY}
    return AutoConfig.for_model(model_type, **{**special, **_SIZES[model_type], "initializer_range": 0.1, **changes})


def build_language_model(model_type: str, changes: dict[str, Any], options: dict[str, Any]) -> nn.Module:
    config = config_for(model_type, changes)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, **options)


def build_head(kind: str, model_type: str, changes: dict[str, Any]) -> nn.Module:
    return getattr(transformers, kind)._from_config(config_for(model_type, changes), dtype=torch.float32)


def token_inputs(model: nn.Module) -> dict[str, Any]:
    """Ids padded on the right, of different lengths; what a model with cross-attention looks at, too."""
    ids = torch.randint(3, VOCABULARY, (BATCH, LENGTH))
    mask = (torch.arange(LENGTH) < LENGTH - 2 * torch.arange(BATCH)[:, None]).long()
    inputs = {"input_ids": ids * mask, "attention_mask": mask}
    if getattr(model.config, "add_cross_attention", False):
        inputs["encoder_hidden_states"] = torch.randn(BATCH, 5, model.config.hidden_size)
    return inputs


def language_inputs(model: nn.Module) -> dict[str, Any]:
    inputs = token_inputs(model)
    return {**inputs, "labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}


def sequence_inputs(model: nn.Module) -> dict[str, Any]:
    regression = model.config.num_labels == 1
    labels = torch.tensor([0.3, -1.2, 0.8]) if regression else torch.arange(BATCH) % LABELS
    return {**token_inputs(model), "labels": labels}


def token_class_inputs(model: nn.Module) -> dict[str, Any]:
    return {**token_inputs(model), "labels": torch.arange(BATCH * LENGTH).view(BATCH, LENGTH) % LABELS}


def answer_inputs(model: nn.Module) -> dict[str, Any]:
    return {**token_inputs(model), "start_positions": torch.arange(BATCH), "end_positions": torch.arange(BATCH) + 2}


_HEAD_INPUTS: dict[str, Callable[[nn.Module], dict[str, Any]]] = {
    "SequenceClassification": sequence_inputs,
    "TokenClassification": token_class_inputs,
    "QuestionAnswering": answer_inputs,
}
