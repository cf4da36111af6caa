"""Vision models without a plan in transformers, and models for images, sound and text, by the plans of their parts."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from .cases import Case
from .planned import LLAMA4_IMAGE, Part
from .small import HIDDEN, patches, pixels, small_model, tokens, vectors

__all__ = ["cases"]

LENGTH = 24
IMAGE, VIDEO = 3, 4  # tokens that stand for a part of an image


def classified(model: nn.Module) -> dict[str, Tensor]:
    return {"pixel_values": pixels(), "labels": torch.randint(0, 5, (2,))}


def contrasted(model: nn.Module) -> dict[str, Any]:
    """Texts of 8 tokens that end with the one that CLIP pools at, and their images."""
    ids = tokens(length=8)
    ids[:, -1] = 2
    return {"input_ids": ids, "pixel_values": pixels(), "return_loss": True}


def contrasted_patches(model: nn.Module) -> dict[str, Any]:
    mask, shapes = torch.ones(2, 16, dtype=torch.long), torch.tensor([[4, 4], [2, 8]])
    image = {"pixel_values": vectors(2, 16, 48), "pixel_attention_mask": mask, "spatial_shapes": shapes}
    return {"input_ids": tokens(length=8), **image, "return_loss": True}


def text_around(count: int) -> dict[str, Tensor]:
    """Ids and labels of two texts, each with one image of `count` tokens."""
    ids = tokens(length=LENGTH)
    ids[:, 2 : 2 + count] = IMAGE
    labels = torch.where(ids == IMAGE, -100, ids)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def with_image(model: nn.Module, count: int, types: bool = False) -> dict[str, Tensor]:
    text = text_around(count)
    kinds = {"token_type_ids": (text["input_ids"] == IMAGE).long()} if types else {}
    return {**text, **kinds, "pixel_values": pixels()}


def with_image_beside_experts(model: nn.Module) -> dict[str, Tensor]:
    """transformers 5.24.0 reads `image_outputs` from the text model's output, which has none, and raises."""
    if not hasattr(MoeCausalLMOutputWithPast, "image_outputs"):
        MoeCausalLMOutputWithPast.image_outputs = None
    return with_image(model, count=4)


def with_images(model: nn.Module, count: int) -> dict[str, Tensor]:
    """Several images a text, in a dimension of their own; here one."""
    return {**text_around(count), "pixel_values": pixels()[:, None]}


def with_sized_image(model: nn.Module, count: int) -> dict[str, Tensor]:
    return {**with_image(model, count), "image_sizes": torch.tensor([[16, 16]] * 2)}


def with_packed_image(model: nn.Module, width: int = 96) -> dict[str, Tensor]:
    """Images of 4 x 4 patches, of which 2 x 2 make one token."""
    text = text_around(4)
    kinds = (text["input_ids"] == IMAGE).int()
    return {
        **text,
        "mm_token_type_ids": kinds,
        "pixel_values": patches(32, width),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
    }


def with_tiles(model: nn.Module) -> dict[str, Tensor]:
    """Images of one and of two tiles, which some of the text's layers attend to from where the image stands."""
    text = text_around(1)
    seen = torch.zeros(2, LENGTH, 1, 2, dtype=torch.long)
    seen[0, 2:, 0, :1] = seen[1, 2:, 0] = 1
    return {
        **text,
        "pixel_values": torch.randn(2, 1, 2, 3, 16, 16),
        "aspect_ratio_ids": torch.tensor([[1], [2]]),
        "aspect_ratio_mask": torch.tensor([[[1, 0]], [[1, 1]]]),
        "cross_attention_mask": seen,
    }


def with_sound(model: nn.Module) -> dict[str, Tensor]:
    """Spectrograms of 32 frames, of which four make one token."""
    mask = torch.ones(2, 32, dtype=torch.long)
    return {**text_around(8), "input_features": vectors(2, 8, 32), "feature_attention_mask": mask}


def with_heard(model: nn.Module) -> dict[str, Tensor]:
    return {**text_around(8), "input_features": vectors(2, 8, 32)}


def with_placed_image(model: nn.Module) -> dict[str, Tensor]:
    """Images of 6 x 6 patches with their places, of which 3 x 3 make one token."""
    text = text_around(4)
    places = torch.stack(torch.meshgrid(torch.arange(6), torch.arange(6), indexing="xy"), -1).reshape(1, 36, 2)
    return {
        **text,
        "mm_token_type_ids": (text["input_ids"] == IMAGE).int(),
        "pixel_values": vectors(2, 36, 48),
        "image_position_ids": places.repeat(2, 1, 1),
    }


HEARD = {"audio_token_id": IMAGE, "audio_token_index": IMAGE, "audio_config": {"max_source_positions": 16}}
HEARD["audio_config"] |= {"encoder_layers": 2, "encoder_attention_heads": 8, "encoder_ffn_dim": 128, "num_mel_bins": 8}
TOWERS = {"text_config": {"projection_dim": 32}, "vision_config": {"projection_dim": 32}, "projection_dim": 32}
MIXED = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
TOKENS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": 5, "vision_end_token_id": 6}

MODELS: dict[str, Part] = {
    "vit": Part("vit", "ViTForImageClassification", classified, {"num_labels": 5}),
    "deit": Part("deit", "DeiTForImageClassification", classified, {"num_labels": 5}),
    "beit": Part(
        "beit", "BeitForImageClassification", classified, {"num_labels": 5, "use_relative_position_bias": True}
    ),
    "beit, shared position bias": Part(
        "beit", "BeitForImageClassification", classified, {"num_labels": 5, "use_shared_relative_position_bias": True}
    ),
    "dinov2": Part("dinov2", "Dinov2ForImageClassification", classified, {"num_labels": 5}),
    "dinov2, gated": Part(
        "dinov2", "Dinov2ForImageClassification", classified, {"num_labels": 5, "use_swiglu_ffn": True}
    ),
    "dinov2_with_registers": Part(
        "dinov2_with_registers", "Dinov2WithRegistersForImageClassification", classified, {"num_labels": 5}
    ),
    "dinov2_with_registers, gated": Part(
        "dinov2_with_registers",
        "Dinov2WithRegistersForImageClassification",
        classified,
        {"num_labels": 5, "use_swiglu_ffn": True},
    ),
    "dinov3_vit": Part("dinov3_vit", "DINOv3ViTModel", lambda model: {"pixel_values": pixels()}),
    "dinov3_vit, gated": Part(
        "dinov3_vit", "DINOv3ViTModel", lambda model: {"pixel_values": pixels()}, {"use_gated_mlp": True}
    ),
    "clip": Part("clip", "CLIPModel", contrasted, TOWERS),
    "clip, classification": Part("clip", "CLIPForImageClassification", classified, {**TOWERS, "num_labels": 5}),
    "metaclip_2": Part("metaclip_2", "MetaClip2Model", contrasted, TOWERS),
    "siglip": Part("siglip", "SiglipModel", contrasted, {"text_config": {"projection_size": HIDDEN}}),
    "siglip2": Part(
        "siglip2",
        "Siglip2Model",
        contrasted_patches,
        {"text_config": {"projection_size": HIDDEN}, "vision_config": {"num_patches": 16}},
    ),
    "gemma3": Part(
        "gemma3",
        "Gemma3ForConditionalGeneration",
        partial(with_image, count=4, types=True),
        {"mm_tokens_per_image": 4, "image_token_id": IMAGE, "boi_token_index": 5, "eoi_token_index": 6},
    ),
    "gemma4": Part(
        "gemma4",
        "Gemma4ForConditionalGeneration",
        with_placed_image,
        {"vision_config": {"position_embedding_size": 16}, "image_token_id": IMAGE, "video_token_id": VIDEO}
        | {"audio_token_id": 5, "boi_token_id": 6, "eoi_token_id": 7},
    ),
    "qwen2_vl": Part(
        "qwen2_vl", "Qwen2VLForConditionalGeneration", with_packed_image, {"text_config": MIXED, **TOKENS}
    ),
    "qwen2_5_vl": Part(
        "qwen2_5_vl",
        "Qwen2_5_VLForConditionalGeneration",
        with_packed_image,
        {
            "text_config": MIXED,
            "vision_config": {"out_hidden_size": HIDDEN, "window_size": 16, "fullatt_block_indexes": [1]},
            **TOKENS,
        },
    ),
    "qwen3_vl": Part(
        "qwen3_vl",
        "Qwen3VLForConditionalGeneration",
        with_packed_image,
        {
            "text_config": {"rope_parameters": {**MIXED["rope_parameters"], "mrope_section": [4, 2, 2]}},
            "vision_config": {
                "out_hidden_size": HIDDEN,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0],
            },
            **TOKENS,
        },
    ),
    "qwen3_vl_moe": Part(
        "qwen3_vl_moe",
        "Qwen3VLMoeForConditionalGeneration",
        with_packed_image,
        {
            "text_config": {"rope_parameters": {**MIXED["rope_parameters"], "mrope_section": [4, 2, 2]}},
            "vision_config": {
                "out_hidden_size": HIDDEN,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0],
            },
            **TOKENS,
        },
    ),
    "llama4": Part(
        "llama4",
        "Llama4ForConditionalGeneration",
        with_image_beside_experts,
        {
            "text_config": {"intermediate_size_mlp": 128, "attention_chunk_size": 16, "moe_layers": [1]},
            "vision_config": LLAMA4_IMAGE,
            "image_token_index": IMAGE,
        },
    ),
    "phi4_multimodal (text)": Part(
        "phi4_multimodal",
        "Phi4MultimodalForCausalLM",
        lambda model: text_around(0),
        {
            "vision_config": {"crop_size": 16},
            "audio_config": {
                **{"num_blocks": 1, "ext_pw_out_channel": 64, "depthwise_separable_out_channel": 64},
                **{"nemo_conv_channels": 16, "input_size": 16},
            },
        },
    ),
    "llava": Part(
        "llava",
        "LlavaForConditionalGeneration",
        partial(with_image, count=16),
        {"image_token_index": IMAGE},
    ),
    "idefics3": Part(
        "idefics3",
        "Idefics3ForConditionalGeneration",
        partial(with_images, count=4),
        {"image_token_id": IMAGE, "scale_factor": 2, "pad_token_id": 0},
    ),
    "idefics2": Part(
        "idefics2",
        "Idefics2ForConditionalGeneration",
        partial(with_images, count=4),
        {
            "image_token_id": IMAGE,
            "perceiver_config": {"resampler_n_latents": 4, "resampler_n_heads": 4, "resampler_head_dim": 16}
            | {"resampler_depth": 1, "num_key_value_heads": 2},
        },
    ),
    "smolvlm": Part(
        "smolvlm",
        "SmolVLMForConditionalGeneration",
        partial(with_images, count=4),
        {"image_token_id": IMAGE, "scale_factor": 2, "pad_token_id": 0},
    ),
    "paligemma": Part(
        "paligemma",
        "PaliGemmaForConditionalGeneration",
        partial(with_image, count=16, types=True),
        {"image_token_index": IMAGE, "projection_dim": HIDDEN, "vision_config": {"projection_dim": HIDDEN}},
    ),
    "mllama": Part(
        "mllama",
        "MllamaForConditionalGeneration",
        with_tiles,
        {
            "text_config": {"cross_attention_layers": [1]},
            "vision_config": {"attention_heads": 8, "num_global_layers": 1, "vision_output_dim": 2 * HIDDEN}
            | {"intermediate_layers_indices": [0], "max_num_tiles": 2, "supported_aspect_ratios": [[1, 1], [1, 2]]},
            "image_token_index": IMAGE,
        },
    ),
    "qwen2_audio": Part("qwen2_audio", "Qwen2AudioForConditionalGeneration", with_sound, HEARD),
    "voxtral": Part("voxtral", "VoxtralForConditionalGeneration", with_heard, HEARD),
    "internvl": Part(
        "internvl",
        "InternVLForConditionalGeneration",
        partial(with_image, count=4),
        {"image_token_id": IMAGE, "vision_config": {"image_size": [16, 16], "patch_size": [4, 4]}},
    ),
    "internvl, norm over all heads": Part(
        "internvl",
        "InternVLForConditionalGeneration",
        partial(with_image, count=4),
        {
            "image_token_id": IMAGE,
            "vision_config": {"image_size": [16, 16], "patch_size": [4, 4], "use_qk_norm": True},
        },
    ),
    "mistral3": Part(
        "mistral3",
        "Mistral3ForConditionalGeneration",
        partial(with_sized_image, count=4),
        {"image_token_index": IMAGE, "vision_config": {"head_dim": 8}},
    ),
}


def cases() -> list[Case]:
    return [
        Case(name, partial(small_model, part.folder, part.model, **part.sizes), part.inputs)
        for name, part in MODELS.items()
    ]
