"""The other configs of transformers with a plan: encoders, the vision and audio parts and the text parts of others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING

from .cases import Case
from .small import HIDDEN, patches, pixels, small_model, tokens, vectors

__all__ = ["cases"]

Inputs = Callable[[nn.Module], dict[str, Tensor]]


@dataclass(frozen=True)
class Part:
    """A model class, what its config needs besides the common sizes, and what its forward takes."""

    folder: str
    model: str
    inputs: Inputs
    sizes: dict[str, Any] = field(default_factory=dict)


def ids(model: nn.Module) -> dict[str, Tensor]:
    return {"input_ids": tokens()}


def labelled(model: nn.Module) -> dict[str, Tensor]:
    return {"input_ids": tokens(), "labels": tokens()}


def packed_image(model: nn.Module, name: str = "pixel_values", width: int = 3 * 4 * 4) -> dict[str, Tensor]:
    """Two images of 4 x 4 and 2 x 4 patches in one row."""
    return {name: patches(16 + 8, width), "grid_thw": torch.tensor([[1, 4, 4], [1, 2, 4]])}


def with_packed_image(model: nn.Module) -> dict[str, Tensor]:
    """Text around two images of 4 x 4 patches, of which 2 x 2 make one token."""
    ids = tokens()
    ids[:, 2:6] = model.config.image_token_id
    return {
        "input_ids": ids,
        "labels": tokens(),
        "pixel_values": patches(32, 96),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
    }


def spoken(model: nn.Module) -> dict[str, Tensor]:
    """Text with five frames of audio codes in each sample."""
    ids = tokens()
    ids[:, 4:9] = model.config.audio_token_id
    codes = torch.randint(0, 32, (2, 5, model.config.num_codebooks))
    mask = torch.ones(2, 5, dtype=torch.bool)
    return {
        "input_ids": ids,
        "audio_input_ids": codes,
        "audio_input_ids_mask": mask,
        "labels": tokens(),
        "audio_labels": codes,
    }


def coded(model: nn.Module) -> dict[str, Tensor]:
    """The hidden state and the code groups before the one to be predicted, as vectors."""
    return {"inputs_embeds": vectors(2, 10, HIDDEN), "labels": tokens(length=10)}


def embedded(model: nn.Module) -> dict[str, Tensor]:
    return {"inputs_embeds": vectors(2, 16, HIDDEN)}


def drafted(model: nn.Module) -> dict[str, Tensor]:
    return {"noise_embeds": vectors(2, 4, HIDDEN), "context_hidden_states": vectors(2, 12, 2 * HIDDEN)}


def timed(model: nn.Module) -> dict[str, Tensor]:
    return {"input_ids": tokens(), "t_cond": vectors(1, HIDDEN)}


def placed_image(model: nn.Module) -> dict[str, Tensor]:
    """An image of 6 x 6 patches, each with its place."""
    places = torch.stack(torch.meshgrid(torch.arange(6), torch.arange(6), indexing="xy"), -1).reshape(1, 36, 2)
    return {"pixel_values": vectors(1, 36, 48), "pixel_position_ids": places}


def mixed(sections: list[int], **more: Any) -> dict[str, Any]:
    """Rotary positions in three dimensions, which cut the width of a head."""
    return {"rope_parameters": {"mrope_section": sections, **more}}


LLAMA4_IMAGE = {
    "intermediate_size": 256,
    "projector_input_dim": 64,
    "projector_output_dim": 64,
    "vision_output_dim": 64,
}
MUSE_IMAGE = {"pos_emb_height": 4, "pos_emb_width": 4}
MUSE = {
    "text_config": {},
    "vision_config": MUSE_IMAGE,
    "image_token_id": 3,
    "video_token_id": 4,
    "out_hidden_size": 4 * HIDDEN,
    "projector_hidden_size": HIDDEN,
}
MUSE_EXPERTS = {"moe_hidden_size": 32}
MUSE_SOUND = {"patch_sizes": [4, 2], "hidden_sizes": [16, 32], "depths": [1, 1], "out_hidden_size": HIDDEN}
TALKER = {"num_experts": 4, "shared_expert_intermediate_size": 32}
STEP = {
    "layer_types": ["full_attention", "sliding_attention"],
    "sliding_window": 8,
    "num_sliding_attention_heads": 8,
    "share_expert_dim": 32,
    "rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}},
}

PARTS: dict[str, Part] = {
    "cosmos3_edge_text": Part("cosmos3_edge", "Cosmos3EdgeTextModel", ids, mixed([4, 2, 2])),
    "deepseek_ocr2_encoder": Part(
        "deepseek_ocr2",
        "DeepseekOcr2VisionEncoder",
        lambda model: {"inputs_embeds": vectors(2, 32, 64), "num_patches": 16},
    ),
    "deepseek_ocr2_text": Part(
        "deepseek_ocr2",
        "DeepseekOcr2TextModel",
        ids,
        {"num_experts_per_tok": 2, "mlp_layer_types": ["dense", "sparse"]},
    ),
    "diffusion_gemma_text": Part(
        "diffusion_gemma",
        "DiffusionGemmaEncoderTextModel",
        ids,
        {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
    ),
    "dots3_note_vision_encoder": Part(
        "dots3_note", "Dots3NoteVisionModel", packed_image, {"adapter_in_dim": HIDDEN, "adapter_out_dim": HIDDEN}
    ),
    "embedding_gemma2_text": Part("embedding_gemma2", "EmbeddingGemma2TextModel", ids),
    "ernie4_5_vl_moe_vision": Part(
        "ernie4_5_vl_moe",
        "Ernie4_5_VLMoeVisionTransformerPretrainedModel",
        partial(packed_image, name="hidden_states"),
    ),
    "ernie4_5_vl_moe_text": Part(
        "ernie4_5_vl_moe", "Ernie4_5_VLMoeTextModel", ids, {"moe_intermediate_size": [32, 16], **mixed([1, 1, 2])}
    ),
    "esmc": Part("esmc", "EsmcForMaskedLM", labelled, {"num_key_value_heads": 8, "head_dim": 8}),
    "eurobert": Part("eurobert", "EuroBertForMaskedLM", labelled),
    "gemma4_vision": Part("gemma4", "Gemma4VisionModel", placed_image),
    "glm4v_text": Part("glm4v", "Glm4vTextModel", ids, mixed([2, 1, 1])),
    "glm4v_moe_text": Part("glm4v_moe", "Glm4vMoeTextModel", ids, {"head_dim": 16, **mixed([2, 1, 1])}),
    "glm5_next_text": Part(
        "glm5_next",
        "Glm5NextTextModel",
        ids,
        {
            "num_key_value_heads": 8,
            "index_kpool": 4,
            "qk_rope_head_dim": 0,
            "head_dim": 0,
            "linear_num_heads": 8,
            "linear_head_dim": 8,
        },
    ),
    "glm_image_text": Part("glm_image", "GlmImageTextModel", ids, mixed([2, 1, 1])),
    "glm_ocr_text": Part("glm_ocr", "GlmOcrTextModel", ids, mixed([2, 1, 1])),
    "granite4_vision_text": Part("granite4_vision", "Granite4VisionTextModel", ids),
    "granite_docling_text": Part("granite_docling", "GraniteDoclingTextModel", ids),
    "higgs_audio_v2": Part(
        "higgs_audio_v2",
        "HiggsAudioV2ForConditionalGeneration",
        spoken,
        {
            "codebook_size": 32,
            "num_codebooks": 4,
            "audio_token_id": 3,
            "audio_delay_token_id": 4,
            "audio_bos_token_id": 5,
        },
    ),
    "llama4_vision_model": Part("llama4", "Llama4VisionModel", lambda model: {"pixel_values": pixels()}, LLAMA4_IMAGE),
    "mistral4": Part("mistral4", "Mistral4ForCausalLM", labelled),
    "mistral_large4_text": Part("mistral_large4", "MistralLarge4TextModel", ids, {"num_key_value_heads": 8}),
    "muse_glimmer_vision": Part("muse_glimmer", "MuseGlimmerVisionModel", partial(packed_image, width=96), MUSE_IMAGE),
    "muse_glimmer_text": Part("muse_glimmer", "MuseGlimmerTextModel", ids),
    "muse_glimmer": Part("muse_glimmer", "MuseGlimmerForConditionalGeneration", with_packed_image, MUSE),
    "muse_glimmer_assistant": Part(
        "muse_glimmer_assistant", "MuseGlimmerAssistantModel", drafted, {"target_layer_ids": [0, 1], "block_size": 4}
    ),
    "muse_spark_text": Part("muse_spark", "MuseSparkTextModel", ids, MUSE_EXPERTS),
    "muse_spark": Part(
        "muse_spark",
        "MuseSparkForConditionalGeneration",
        with_packed_image,
        {**MUSE, "text_config": MUSE_EXPERTS, "audio_config": MUSE_SOUND},
    ),
    "neomme": Part("neomme", "NeoMMEForMaskedLM", labelled),
    "paddleocr_vl_text": Part("paddleocr_vl", "PaddleOCRTextModel", ids, mixed([4, 2, 2])),
    "qwen2_5_omni_text": Part("qwen2_5_omni", "Qwen2_5OmniThinkerTextModel", ids, mixed([2, 1, 1])),
    "qwen2_5_vl_text": Part("qwen2_5_vl", "Qwen2_5_VLTextModel", ids, mixed([2, 1, 1])),
    "qwen2_vl_text": Part("qwen2_vl", "Qwen2VLTextModel", ids, mixed([2, 1, 1])),
    "qwen3_omni_moe_text": Part("qwen3_omni_moe", "Qwen3OmniMoeThinkerTextModel", ids),
    "qwen3_omni_moe_talker_code_predictor": Part(
        "qwen3_omni_moe",
        "Qwen3OmniMoeTalkerCodePredictorModelForConditionalGeneration",
        coded,
        {"num_code_groups": 16},
    ),
    "qwen3_omni_moe_talker_text": Part("qwen3_omni_moe", "Qwen3OmniMoeTalkerModel", embedded, TALKER),
    "qwen3_vl_moe_text": Part("qwen3_vl_moe", "Qwen3VLMoeTextModel", ids),
    "step3p5 (step3p7)": Part("step3p7", "Step3p7TextModel", ids, STEP),
    "t5_gemma_module": Part("t5gemma", "T5GemmaForConditionalGeneration", labelled),
    "t5gemma2_text": Part("t5gemma2", "T5Gemma2TextEncoder", ids, {"dropout_rate": 0.0}),
    "t5gemma2_decoder": Part("t5gemma2", "T5Gemma2ForConditionalGeneration", labelled),
    "ultrabert": Part("ultrabert", "UltrabertForMaskedLM", labelled),
    "unlimited_ocr_text": Part("unlimited_ocr", "UnlimitedOcrTextModel", ids),
    "voxtral_realtime_text": Part("voxtral_realtime", "VoxtralRealtimeTextModel", timed),
}

# Which have a plan in later versions of transformers only, or are not in the others at all.
LATER: dict[str, Part] = {
    "emu3_text_model": Part("emu3", "Emu3TextModel", ids),
    "hunyuan_vl_text": Part(
        "hunyuan_vl", "HunYuanVLTextModel", ids, {"num_key_value_heads": 4, "head_dim": 16, **mixed([4, 2, 2])}
    ),
    "hy_v4_vl_text": Part("hy_v4_vl", "HYV4VLTextModel", ids, mixed([2, 1, 1])),
}


def cases() -> list[Case]:
    known = {name: CONFIG_MAPPING[name] for name in LATER if name in CONFIG_MAPPING}
    planned = {name: LATER[name] for name, kind in known.items() if getattr(kind, "base_model_tp_plan", None)}
    return [
        Case(name, partial(small_model, part.folder, part.model, **part.sizes), part.inputs)
        for name, part in {**PARTS, **planned}.items()
    ]
