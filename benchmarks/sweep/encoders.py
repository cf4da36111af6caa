"""Encoders and encoder-decoders without a plan of transformers, under the plans that this package ships for them.

Each is swept under its language-modelling head, some under small heads as well: classification of sequences and
tokens, question answering, multiple choice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForAudioClassification,
    AutoModelForCausalLM,
    AutoModelForCTC,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForSpeechSeq2Seq,
    AutoModelForTextEncoding,
    AutoModelForTokenClassification,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    SpeechEncoderDecoderConfig,
    SpeechEncoderDecoderModel,
)

from .cases import Case

VOCABULARY, LENGTH, HEADS, LABELS = 99, 12, 4, 3  # 99: no number of ranks divides it
COMMON = {"vocab_size": VOCABULARY, "max_position_embeddings": 40, "initializer_range": 0.1}
ENCODER = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": HEADS, **COMMON}
DISTILBERT = {"dim": 64, "hidden_dim": 96, "n_layers": 2, "n_heads": HEADS, **COMMON}
STACKS = {
    **{"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 96, "decoder_ffn_dim": 80},
    **{"encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS, "init_std": 0.1, **COMMON},
    **{"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2},
}
T5 = {
    **{"d_model": 64, "d_kv": 12, "d_ff": 96, "num_layers": 2, "num_decoder_layers": 3, "num_heads": HEADS},
    **{"vocab_size": VOCABULARY, "relative_attention_num_buckets": 8},
    **{"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0},
}
WHISPER = {**STACKS, "num_mel_bins": 10, "max_source_positions": 15, "max_target_positions": 20}
SPEECH_TO_TEXT = {
    **{**STACKS, "input_feat_per_channel": 10, "conv_channels": 16, "num_conv_layers": 1, "conv_kernel_sizes": (3,)},
    **{"max_source_positions": 40, "max_target_positions": 20},
}
WAVES = {
    **{**ENCODER, "conv_dim": (16, 16), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_conv_pos_embeddings": 4},
    **{"num_conv_pos_embedding_groups": 4, "classifier_proj_size": 16, "ctc_loss_reduction": "mean"},
}
RELATIVE = {"relative_attention": True, "max_relative_positions": 16, "pos_att_type": ["c2p", "p2c"]}
BY_EMBEDDING = "its head multiplies with the embedding's weight"
MODERNBERT = {
    **{**ENCODER, "num_hidden_layers": 3, "local_attention": 8, "initializer_cutoff_factor": 3.0},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2},
}


def ids(length: int = LENGTH) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (2, length))


def padded(length: int = LENGTH) -> torch.Tensor:
    """A mask that hides the end of the second of two sequences."""
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, length - 3 :] = 0
    return mask


def masked_lm(model: nn.Module) -> dict[str, Any]:
    labels = ids()
    labels[:, ::3] = -100
    return {"input_ids": ids(), "attention_mask": padded(), "labels": labels}


def no_labels(model: nn.Module) -> dict[str, Any]:
    return {"input_ids": ids(), "attention_mask": padded()}


def pretraining(model: nn.Module) -> dict[str, Any]:
    return {**masked_lm(model), "next_sentence_label": torch.tensor([0, 1])}


def sentence_order(model: nn.Module) -> dict[str, Any]:
    return {**masked_lm(model), "sentence_order_label": torch.tensor([0, 1])}


def replaced_tokens(model: nn.Module) -> dict[str, Any]:
    return {"input_ids": ids(), "attention_mask": padded(), "labels": torch.randint(0, 2, (2, LENGTH))}


def one_label(model: nn.Module) -> dict[str, Any]:
    """Each sequence ends with the end-of-sequence token, whose place some heads look at."""
    tokens = ids()
    tokens[:, -1] = getattr(model.config, "eos_token_id", None) or 2
    return {"input_ids": tokens, "labels": torch.tensor([0, LABELS - 1])}


def token_labels(model: nn.Module) -> dict[str, Any]:
    return {"input_ids": ids(), "attention_mask": padded(), "labels": torch.randint(0, LABELS, (2, LENGTH))}


def span(model: nn.Module) -> dict[str, Any]:
    starts, ends = torch.tensor([1, 2]), torch.tensor([3, 8])
    return {"input_ids": ids(), "attention_mask": padded(), "start_positions": starts, "end_positions": ends}


def choices(model: nn.Module) -> dict[str, Any]:
    return {"input_ids": torch.randint(3, VOCABULARY, (2, 3, LENGTH)), "labels": torch.tensor([0, 2])}


def causal(model: nn.Module) -> dict[str, Any]:
    tokens = ids()
    return {"input_ids": tokens, "labels": tokens}


def seq2seq(model: nn.Module) -> dict[str, Any]:
    labels = ids(LENGTH - 4)
    labels[1, -2:] = -100
    return {"input_ids": ids(), "attention_mask": padded(), "labels": labels}


def speech(model: nn.Module) -> dict[str, Any]:
    config = model.config
    frames = torch.randn(2, config.num_mel_bins, 2 * config.max_source_positions)
    return {"input_features": frames, "labels": ids(8)}


def sound(model: nn.Module) -> dict[str, Any]:
    return {**speech(model), "labels": torch.tensor([0, LABELS - 1])}


def frames(model: nn.Module) -> dict[str, Any]:
    return {"input_features": torch.randn(2, 30, model.config.input_feat_per_channel), "labels": ids(8)}


def waves(model: nn.Module) -> dict[str, Any]:
    return {"input_values": torch.randn(2, 400), "labels": ids(6)}


def wave_labels(model: nn.Module) -> dict[str, Any]:
    return {**waves(model), "labels": torch.tensor([0, LABELS - 1])}


def build(kind: Any, model_type: str, sizes: dict[str, Any]) -> nn.Module:
    return kind.from_config(CONFIG_MAPPING[model_type](**sizes), dtype=torch.float32)


def head(
    name: str, kind: Any, inputs: Callable[[nn.Module], dict], sizes: dict[str, Any], note: str = "", **options: Any
) -> Case:
    """A case named after its model type, what is special about it after a space."""
    model_type = name.split(" ")[0]
    labels = {"num_labels": LABELS} if inputs in (one_label, token_labels, sound, wave_labels) else {}
    return Case(name, partial(build, kind, model_type, {**sizes, **labels, **options}), inputs, note)


def encoders() -> Iterator[Case]:
    for model_type in ("bert", "roberta", "xlm-roberta", "camembert", "electra", "mpnet"):
        yield head(model_type, AutoModelForMaskedLM, masked_lm, ENCODER)
    yield head("electra narrow", AutoModelForMaskedLM, masked_lm, ENCODER, "projected embedding", embedding_size=32)
    yield head("electra pretraining", AutoModelForPreTraining, replaced_tokens, ENCODER)
    yield head("bert pretraining", AutoModelForPreTraining, pretraining, ENCODER)
    yield head("bert classification", AutoModelForSequenceClassification, one_label, ENCODER)
    yield head("bert tokens", AutoModelForTokenClassification, token_labels, ENCODER)
    yield head("bert questions", AutoModelForQuestionAnswering, span, ENCODER)
    yield head("bert choice", AutoModelForMultipleChoice, choices, ENCODER)
    yield head("bert untied", AutoModelForMaskedLM, masked_lm, ENCODER, tie_word_embeddings=False)
    yield head("bert model", AutoModel, no_labels, ENCODER, "no head")
    yield head("bert causal", AutoModelForCausalLM, causal, ENCODER, is_decoder=True)
    yield head("roberta classification", AutoModelForSequenceClassification, one_label, ENCODER)
    yield head("distilbert", AutoModelForMaskedLM, masked_lm, DISTILBERT)
    yield head("distilbert questions", AutoModelForQuestionAnswering, span, DISTILBERT)
    narrow = {**ENCODER, "embedding_size": 32}
    yield head("albert", AutoModelForMaskedLM, masked_lm, narrow, "layers share their parameters")
    yield head(
        "albert groups", AutoModelForPreTraining, sentence_order, narrow, num_hidden_layers=4, num_hidden_groups=2
    )
    yield head("deberta", AutoModelForMaskedLM, masked_lm, {**ENCODER, **RELATIVE}, "q, k, v of a head in one weight")
    yield head("deberta absolute", AutoModelForTokenClassification, token_labels, ENCODER, "no relative positions")
    buckets = {**ENCODER, **RELATIVE, "position_buckets": 8}
    yield head("deberta-v2", AutoModelForMaskedLM, masked_lm, buckets)
    own = {"legacy": False}
    yield head("deberta embedding", AutoModelForMaskedLM, masked_lm, {**ENCODER, **RELATIVE}, BY_EMBEDDING, **own)
    yield head("deberta-v2 embedding", AutoModelForMaskedLM, masked_lm, buckets, BY_EMBEDDING, **own)
    shared = {**buckets, "share_att_key": True, "norm_rel_ebd": "layer_norm", "conv_kernel_size": 3}
    yield head("deberta-v2 v3", AutoModelForSequenceClassification, one_label, shared, "as DeBERTa-v3; convolution")
    yield head("modernbert", AutoModelForMaskedLM, masked_lm, MODERNBERT)
    biases = {"attention_bias": True, "mlp_bias": True, "norm_bias": True, "decoder_bias": True}
    yield head("modernbert biases", AutoModelForTokenClassification, token_labels, MODERNBERT, **biases)


def composed(kind: Any, config: Any, encoder: str, sizes: dict[str, Any]) -> nn.Module:
    """Of an encoder and a BERT that attends to it."""
    decoder = CONFIG_MAPPING["bert"](**{**ENCODER, "is_decoder": True, "add_cross_attention": True})
    both = config.from_encoder_decoder_configs(CONFIG_MAPPING[encoder](**sizes), decoder)
    both.decoder_start_token_id, both.pad_token_id = 1, 0
    return kind(both)


def compositions() -> Iterator[Case]:
    """Models made of two, each under its own plan."""
    text = partial(composed, EncoderDecoderModel, EncoderDecoderConfig, "roberta", ENCODER)
    yield Case("encoder-decoder", text, seq2seq, "RoBERTa and BERT")
    speech = partial(composed, SpeechEncoderDecoderModel, SpeechEncoderDecoderConfig, "wav2vec2", WAVES)
    yield Case("speech-encoder-decoder", speech, waves, "Wav2Vec2 and BERT")


def further_encoders() -> Iterator[Case]:
    """Those whose layers are much like BERT's or Wav2Vec2's."""
    for model_type in ("ernie", "megatron-bert", "roc_bert", "layoutlm", "data2vec-text"):
        yield head(model_type, AutoModelForMaskedLM, masked_lm, ENCODER)
    for model_type in ("roberta-prelayernorm", "xlm-roberta-xl"):
        yield head(model_type, AutoModelForMaskedLM, masked_lm, ENCODER)
    for model_type in ("nomic_bert", "jina_embeddings_v3", "gte"):
        yield head(model_type, AutoModelForMaskedLM, masked_lm, ENCODER)
    rotary = {"position_embedding_type": "rotary", "token_dropout": True, "mask_token_id": 4, "pad_token_id": 1}
    yield head("esm", AutoModelForMaskedLM, masked_lm, {**ENCODER, **rotary})
    narrow = {**ENCODER, "input_embedding_size": 32, "output_embedding_size": 48}
    yield head("rembert", AutoModelForMaskedLM, masked_lm, narrow, "the decoder's width is another")
    yield head("splinter", AutoModelForQuestionAnswering, span, ENCODER, question_token_id=5)
    for model_type in ("wav2vec2", "hubert", "unispeech", "data2vec-audio"):
        yield head(model_type, AutoModelForCTC, waves, WAVES)
    stable = {**WAVES, "do_stable_layer_norm": True, "feat_extract_norm": "layer"}
    yield head("wav2vec2 sounds", AutoModelForAudioClassification, wave_labels, stable, "norms before layers")


def encoder_decoders() -> Iterator[Case]:
    yield head("t5 gated", AutoModelForSeq2SeqLM, seq2seq, T5, feed_forward_proj="gated-gelu")
    for model_type in ("t5", "mt5", "umt5"):
        yield head(model_type, AutoModelForSeq2SeqLM, seq2seq, T5)
    for model_type in ("mt5", "umt5"):
        yield head(f"{model_type} ungated", AutoModelForSeq2SeqLM, seq2seq, T5, feed_forward_proj="relu")
    yield head("t5 untied", AutoModelForSeq2SeqLM, seq2seq, T5, tie_word_embeddings=False)
    yield head("t5 eager", AutoModelForSeq2SeqLM, seq2seq, T5, attn_implementation="eager")
    yield head("t5 encoder", AutoModelForTextEncoding, no_labels, T5, "no head")
    yield head("t5 classification", AutoModelForSequenceClassification, one_label, T5)
    yield head("t5 tokens", AutoModelForTokenClassification, token_labels, T5)
    yield head("t5 questions", AutoModelForQuestionAnswering, span, T5)
    for model_type in ("bart", "mbart", "pegasus", "marian", "m2m_100"):
        yield head(model_type, AutoModelForSeq2SeqLM, seq2seq, STACKS)
    for model_type in ("blenderbot", "blenderbot-small", "plbart"):
        yield head(model_type, AutoModelForSeq2SeqLM, seq2seq, STACKS)
    yield head("speech_to_text", AutoModelForSpeechSeq2Seq, frames, SPEECH_TO_TEXT)
    yield head("bart scaled", AutoModelForSeq2SeqLM, seq2seq, STACKS, scale_embedding=True)
    yield head("bart classification", AutoModelForSequenceClassification, one_label, STACKS)
    yield head("bart questions", AutoModelForQuestionAnswering, span, STACKS)
    yield head("bart causal", AutoModelForCausalLM, causal, STACKS, "the decoder alone")
    apart = {"share_encoder_decoder_embeddings": False, "decoder_vocab_size": VOCABULARY}
    yield head("marian apart", AutoModelForSeq2SeqLM, seq2seq, STACKS, "two embeddings", **apart)
    yield head("whisper", AutoModelForSpeechSeq2Seq, speech, WHISPER)
    yield head(
        "whisper heads",
        AutoModelForSpeechSeq2Seq,
        speech,
        WHISPER,
        "another number of heads in the decoder",
        decoder_attention_heads=2 * HEADS,
    )
    yield head("whisper sounds", AutoModelForAudioClassification, sound, WHISPER)


def cases() -> list[Case]:
    return [*encoders(), *further_encoders(), *encoder_decoders(), *compositions()]
