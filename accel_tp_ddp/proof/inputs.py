"""What a model's forward takes: tensors of small sizes, told by its signature and its config."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from .sizes import parts_of

__all__ = ["example_inputs", "plain_inputs"]

BATCH, LENGTH, FRAMES = 2, 16, 32
_IMAGE_TOKENS = ("image_token_id", "image_token_index", "media_placeholder_token_id", "image_patch_id")
_AUDIO_TOKENS = ("audio_token_id", "audio_token_index")


def example_inputs(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Keyword arguments for the forward of `model`, the most telling first: with images or sound, then with labels.

    Which of them a model takes is to be tried. Draws from torch's default generator.
    """
    taken = _parameters(model)
    seen: set[tuple] = set()
    for make in (_with_media, _text, _media, _by_vectors):
        for inputs in make(model, taken):
            inputs = {**inputs, **_options(taken)}
            key = tuple(
                (name, tuple(value.shape) if isinstance(value, Tensor) else value) for name, value in inputs.items()
            )
            if key not in seen and not _required(taken) - inputs.keys():
                seen.add(key)
                yield inputs


def plain_inputs(model: nn.Module) -> Iterator[dict[str, Any]]:
    """The same for a module without a config, whose layers alone say what it takes.

    Each required argument gets token ids, if it embeds any, or vectors as wide as its first linear layer takes.
    """
    taken = _parameters(model)
    needed = [name for name in taken if name in _required(taken)] or list(taken)[:1]
    tables = [each.num_embeddings for each in model.modules() if isinstance(each, nn.Embedding)]
    widths = [each.in_features for each in model.modules() if isinstance(each, nn.Linear)]
    made = []
    if tables:
        made.append(torch.randint(min(max(tables), 128), (BATCH, min(LENGTH, *tables))))
    if widths:
        made += [torch.randn(BATCH, LENGTH, widths[0]), torch.randn(BATCH, widths[0])]
    for tensor in made:
        labels = {"labels": tensor} if "labels" in taken and not tensor.is_floating_point() else {}
        for further in (labels, {}) if labels else ({},):
            yield {**dict.fromkeys(needed, tensor), **further}


def _parameters(model: nn.Module) -> dict[str, inspect.Parameter]:
    """Those of forward by name; where it hands on what it does not name, those of the model inside, as optional."""
    own = inspect.signature(type(model).forward).parameters
    found = {name: each for name, each in own.items() if name != "self"}
    inner = getattr(model, "base_model", None)
    if inner is not model and inner is not None and any(each.kind is each.VAR_KEYWORD for each in own.values()):
        further = inspect.signature(type(inner).forward).parameters
        optional = {name: each for name, each in further.items() if name != "self" and each.default is not each.empty}
        found = {**optional, **found}
    return {name: each for name, each in found.items() if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)}


def _required(taken: dict[str, inspect.Parameter]) -> set[str]:
    return {name for name, each in taken.items() if each.default is each.empty}


def _options(taken: dict[str, inspect.Parameter]) -> dict[str, Any]:
    return {"use_cache": False} if "use_cache" in taken else {}


def field(model: nn.Module, *names: str) -> Any:
    """The first of these fields that the model's config or one inside it has and does not leave open."""
    for name in names:
        for _, own in parts_of(model.config):
            value = own.get(name)
            if value is None and name in own.get("attribute_map", ()):
                value = own.get(own["attribute_map"][name])
            if value is not None:
                return value
        value = _read(model.config, name)
        if value is not None:
            return value
    return None


def _read(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except (RuntimeError, AttributeError):
        return None


def special_tokens(model: nn.Module) -> set[int]:
    found: set[int] = set()
    for _, own in parts_of(model.config):
        for name, value in own.items():
            if "token" in name or name.endswith(("_id", "_ids", "_index")):
                values = value if isinstance(value, (list, tuple)) else [value]
                found |= {each for each in values if isinstance(each, int) and not isinstance(each, bool)}
    return found


def _vocabulary(model: nn.Module) -> int:
    """How many tokens there are to draw from."""
    try:
        embedding = model.get_input_embeddings()
    except Exception:
        embedding = None
    sizes = [own["vocab_size"] for _, own in parts_of(model.config) if isinstance(own.get("vocab_size"), int)]
    text = _text_config(model)
    own = [_read(text, name) for name in ("vocab_size", "unpadded_vocab_size")]
    sizes = [size for size in own if isinstance(size, int)] or sizes
    if getattr(embedding, "num_embeddings", 0):
        sizes.append(embedding.num_embeddings)
    return min(sizes, default=64)


def _text_config(model: nn.Module) -> Any:
    find = getattr(model.config, "get_text_config", None)
    try:
        return find() if find is not None else model.config
    except Exception:
        return model.config


def _tokens(model: nn.Module, *size: int) -> Tensor:
    """Ids that stand for nothing special."""
    special, vocabulary = special_tokens(model), _vocabulary(model)
    plain = [number for number in range(vocabulary) if number not in special and number > 2] or list(range(vocabulary))
    return torch.tensor(plain)[torch.randint(len(plain), size)]


def _padded(model: nn.Module, length: int) -> tuple[Tensor, Tensor]:
    """Ids and their mask: two rows that end with the end-of-sequence token, the second one padded."""
    ids, mask = _tokens(model, BATCH, length), torch.ones(BATCH, length, dtype=torch.long)
    mask[1, length - 3 :] = 0
    text, vocabulary = _text_config(model), _vocabulary(model)
    end = _read(text, "eos_token_id")
    end = end[0] if isinstance(end, (list, tuple)) and end else end
    if isinstance(end, int) and 0 <= end < vocabulary:
        ids[0, -1] = ids[1, length - 4] = end
    pad = _read(text, "pad_token_id")
    ids[1, length - 3 :] = pad if isinstance(pad, int) and 0 <= pad < vocabulary else 0
    return ids, mask


def _labels(model: nn.Module, taken: dict[str, Any], ids: Tensor | None, mask: Tensor | None) -> Iterator[dict]:
    """What the loss is to be computed with, by the model's task; at last nothing."""
    task, classes = type(model).__name__, _read(model.config, "num_labels") or 2
    if {"start_positions", "end_positions"} <= taken.keys():
        yield {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 5])}
    if "labels" in taken:
        text = None
        if ids is not None and ids.ndim == 2:
            text = ids.masked_fill(mask == 0, -100) if mask is not None else ids
            image = field(model, *_IMAGE_TOKENS)
            if isinstance(image, int):
                text = text.masked_fill(text == image, -100)
        classed = torch.arange(BATCH) % classes
        if classes == 1:
            classed = torch.tensor([0.3, -1.2])
        elif _read(model.config, "problem_type") == "multi_label_classification":
            classed = torch.nn.functional.one_hot(classed, classes).float()
        tokenwise = None if ids is None else torch.randint(0, max(classes, 1), ids.shape)
        more = {
            name: torch.tensor([0, 1]) for name in ("next_sentence_label", "sentence_order_label") if name in taken
        }
        spoken = _tokens(model, BATCH, 6)
        byname: list[tuple[str, Tensor | None]] = [
            ("TokenClassification", tokenwise),
            ("AudioFrameClassification", None),
            ("MultipleChoice", classed),
            ("Classification", classed),
            ("CTC", spoken),
            ("", text if text is not None else spoken),
        ]
        value = next(value for name, value in byname if name in task)
        if "Pretraining" in task or "PreTraining" in task:
            if more:
                yield {"labels": text, **more}
            else:
                yield {"labels": (tokenwise > 0).long()} if tokenwise is not None else {}
        if value is not None:
            yield {"labels": value, **more}
    if "return_loss" in taken:
        yield {"return_loss": True}
    yield {}


def _text(model: nn.Module, taken: dict[str, Any], length: int = LENGTH) -> Iterator[dict[str, Any]]:
    name = next((name for name in ("input_ids", "text_input_ids") if name in taken), None)
    if name is None:
        return
    ids, mask = _padded(model, length)
    if "MultipleChoice" in type(model).__name__:
        ids, mask = ids[:, None].repeat(1, 3, 1), mask[:, None].repeat(1, 3, 1)
    inputs: dict[str, Any] = {name: ids}
    if "attention_mask" in taken:
        inputs["attention_mask"] = mask
    inputs |= _required_beside(model, taken, inputs, length)
    states = _states(model, taken, inputs)
    for further in [states, {}] if states else [{}]:
        for labels in _labels(model, taken, ids, mask):
            decoder = _decoder(model, taken) if "labels" not in labels else {}
            yield {**inputs, **further, **decoder, **labels}
    if "attention_mask" in inputs:
        inputs.pop("attention_mask")
        for labels in _labels(model, taken, ids, None):
            yield {**inputs, **(_decoder(model, taken) if "labels" not in labels else {}), **labels}


def _states(model: nn.Module, taken: dict[str, Any], inputs: dict[str, Any]) -> dict[str, Any]:
    """The states of an encoder, which a decoder may attend to; one that cannot raises, or passes them over."""
    width = field(model, "cross_hidden_size", "hidden_size", "d_model", "n_embd")
    names = [name for name in ("encoder_hidden_states", "encoder_outputs") if name in taken and name not in inputs]
    if not names or "decoder_input_ids" in taken or not isinstance(width, int):
        return {}
    states = torch.randn(BATCH, 5, width)
    return {names[0]: states if names[0] == "encoder_hidden_states" else (states,)}


def _decoder(model: nn.Module, taken: dict[str, Any]) -> dict[str, Any]:
    return {"decoder_input_ids": _tokens(model, BATCH, LENGTH - 4)} if "decoder_input_ids" in taken else {}


def _required_beside(model: nn.Module, taken: dict, inputs: dict, length: int) -> dict[str, Any]:
    """What else forward demands, and what tells a model with cross-attention what to look at."""
    width = field(model, "hidden_size", "d_model", "n_embd") or 0
    known: dict[str, Callable[[], Any]] = {
        "encoder_hidden_states": lambda: torch.randn(BATCH, 5, field(model, "cross_hidden_size") or width),
        "encoder_outputs": lambda: (torch.randn(BATCH, 5, width),),
        "hidden_states": lambda: torch.randn(BATCH, length, width),
        "inputs_embeds": lambda: torch.randn(BATCH, length, width),
        "position_ids": lambda: torch.arange(length)[None].repeat(BATCH, 1),
        "attention_mask": lambda: torch.ones(BATCH, length, dtype=torch.long),
        "token_type_ids": lambda: torch.zeros(BATCH, length, dtype=torch.long),
        "bbox": lambda: torch.tensor([1, 2, 30, 40]).repeat(BATCH, length, 1),
        "t_cond": lambda: torch.randn(1, width),
        "num_patches": lambda: length // 2,
    }
    wanted = _required(taken) - inputs.keys()
    if (_read(model.config, "add_cross_attention")) and "encoder_hidden_states" in taken:
        wanted.add("encoder_hidden_states")
    if "t_cond" in taken:
        wanted.add("t_cond")
    return {name: known[name]() for name in sorted(wanted) if name in known}


def _media(model: nn.Module, taken: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Images, videos or sound alone, with labels where the loss is of those."""
    for inputs in _media_tensors(model, taken):
        for labels in _labels(model, taken, None, None):
            decoder = _decoder(model, taken) if "labels" not in labels else {}
            text = next(_text(model, taken), {}) if "input_ids" in _required(taken) else {}
            yield {**text, **inputs, **decoder, **labels}


def _with_media(model: nn.Module, taken: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Text in which tokens stand for parts of an image or of a sound, as many as the model makes of one."""
    if "input_ids" not in taken or not any(name in taken for name in ("pixel_values", "input_features")):
        return
    for media in _media_tensors(model, taken):
        sound = not any(name.startswith("pixel") for name in media)
        token = field(model, *(_AUDIO_TOKENS if sound else _IMAGE_TOKENS))
        counts = _media_tokens(model, media, sound) if isinstance(token, int) else [0]
        for count in counts:
            length = max(LENGTH, 2 + count + 8)
            ids, mask = _padded(model, length)
            if count:
                ids[:, 2 : 2 + count] = token
            inputs: dict[str, Any] = {"input_ids": ids}
            if "attention_mask" in taken:
                inputs["attention_mask"] = mask
            for name in ("token_type_ids", "mm_token_type_ids"):
                if name in taken and count:
                    inputs[name] = (ids == token).long()
            inputs |= media
            inputs |= _required_beside(model, taken, inputs, length)
            for labels in _labels(model, taken, ids, mask):
                yield {**inputs, **labels, **(_decoder(model, taken) if "labels" not in labels else {})}
                if len(counts) > 1:
                    break


def _media_tokens(model: nn.Module, media: dict[str, Any], sound: bool) -> list[int]:
    """How many tokens may stand for what one row has of `media`: one number where the model says it."""
    names = ("get_audio_features", "get_audio_embeds") if sound else ("get_image_features",)
    owners = [model, *(getattr(model, name) for name in ("model", "thinker") if hasattr(model, name))]
    for find in (getattr(owner, name) for name in names for owner in owners if hasattr(owner, name)):
        taken = inspect.signature(find).parameters
        named = {key: value for key, value in media.items() if key in taken}
        for given in (named, media):
            try:
                with torch.no_grad():
                    return [_rows(find(**given)) // BATCH]
            except Exception:
                continue
    return [1, 2, 4, 8, 16, 32, 64]


def _rows(result: Any) -> int:
    if isinstance(result, Tensor):
        return result.shape[:-1].numel()
    for name in ("pooler_output", "last_hidden_state"):
        if getattr(result, name, None) is not None:
            return _rows(getattr(result, name))
    if isinstance(result, dict):
        return _rows(next(iter(result.values())))
    if isinstance(result, (list, tuple)):
        if len(result) and isinstance(result[0], Tensor):
            return sum(_rows(each) for each in result)
        return _rows(result[0])
    raise ValueError("no tensors")


def _media_tensors(model: nn.Module, taken: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What a model sees or hears, in the shapes that are common."""
    channels = field(model, "num_channels", "in_channels", "in_chans")
    channels = channels if isinstance(channels, int) else 3
    if "pixel_values_videos" in taken and "pixel_values" not in taken:
        frames = field(model, "frames_per_clip", "num_frames") or 4
        yield {"pixel_values_videos": torch.randn(BATCH, frames, channels, *_image_size(model))}
    if "pixel_values" in taken:
        grid = next((name for name in ("image_grid_thw", "grid_thw") if name in taken), None)
        patch, merge = field(model, "patch_size"), field(model, "spatial_merge_size", "merge_size") or 1
        patch = patch if isinstance(patch, int) else (patch or [14])[0]
        if grid is not None and isinstance(merge, int):
            times = field(model, "temporal_patch_size", "patch_temporal") or 1
            side = 2 * merge if merge > 1 else 4
            shapes = torch.tensor([[1, side, side]] * BATCH)
            for width in dict.fromkeys([channels * times * patch * patch, channels * patch * patch]):
                yield {"pixel_values": torch.randn(BATCH * side * side, width), grid: shapes}
        height, width = _image_size(model)
        image = torch.randn(BATCH, channels, height, width)
        beside: dict[str, Any] = {}
        if "image_sizes" in taken:
            beside["image_sizes"] = torch.tensor([[height, width]] * BATCH)
        if {"pixel_attention_mask", "spatial_shapes"} <= taken.keys():
            flat = torch.randn(BATCH, 16, channels * patch * patch)
            yield {
                "pixel_values": flat,
                "pixel_attention_mask": torch.ones(BATCH, 16, dtype=torch.long),
                "spatial_shapes": torch.tensor([[4, 4], [2, 8]]),
            }
        if {"aspect_ratio_ids", "aspect_ratio_mask"} <= taken.keys():
            tiles = field(model, "max_num_tiles") or 1
            seen = torch.zeros(BATCH, LENGTH, 1, tiles, dtype=torch.long)
            seen[0, 2:, 0, :1] = seen[1, 2:, 0] = 1
            yield {
                "pixel_values": torch.randn(BATCH, 1, tiles, channels, *_image_size(model)),
                "aspect_ratio_ids": torch.tensor([[1], [2]]),
                "aspect_ratio_mask": torch.tensor([[[1] + [0] * (tiles - 1)], [[1] * tiles]]),
                **({"cross_attention_mask": seen} if "cross_attention_mask" in taken else {}),
            }
        for name in ("image_position_ids", "pixel_position_ids"):
            if name in taken:
                pool = field(model, "pooling_kernel_size") or 1
                side = 2 * pool if pool > 1 else 4
                across = torch.arange(side)
                places = torch.stack(torch.meshgrid(across, across, indexing="xy"), -1).reshape(1, side * side, 2)
                flat = torch.randn(BATCH, side * side, channels * patch * patch)
                yield {"pixel_values": flat, name: places.repeat(BATCH, 1, 1)}
        for sizes in [{}, *([beside] if beside else [])]:
            yield {"pixel_values": image, **sizes}
            yield {"pixel_values": image[:, None], **sizes}
        frames = field(model, "num_frames", "frames_per_clip")
        if isinstance(frames, int):
            yield {"pixel_values": torch.randn(BATCH, frames, channels, height, width)}
    if "hidden_states" in taken and ("grid_thw" in taken) and "input_ids" not in taken:
        patch, merge = field(model, "patch_size") or 14, field(model, "spatial_merge_size") or 1
        times, side = field(model, "temporal_patch_size") or 1, 2 * merge
        for width in dict.fromkeys([channels * times * patch * patch, channels * patch * patch]):
            rows = torch.randn(BATCH * side * side, width)
            yield {"hidden_states": rows, "grid_thw": torch.tensor([[1, side, side]] * BATCH)}
    if "input_values" in taken:
        strides = [each for each in field(model, "conv_stride") or [] if isinstance(each, int)]
        yield {"input_values": torch.randn(BATCH, 20 * max(prod(strides), 40))}
        bins = field(model, "num_mel_bins") or 128
        yield {"input_values": torch.randn(BATCH, field(model, "max_length") or 64, bins)}
    if "input_features" in taken:
        bins = field(model, "num_mel_bins", "input_feat_size", "input_size", "feature_size")
        per = field(model, "input_feat_per_channel", "feature_projection_input_dim", "input_dim") or bins or 80
        length = field(model, "max_source_positions")
        mask = next((name for name in ("feature_attention_mask", "input_features_mask") if name in taken), None)
        if isinstance(length, int) and bins:
            sound = {"input_features": torch.randn(BATCH, bins, 2 * length)}
            if mask:
                yield {**sound, mask: torch.ones(BATCH, 2 * length, dtype=torch.long)}
            yield sound
        for width in dict.fromkeys([per, bins or 80]):
            sound = {"input_features": torch.randn(BATCH, FRAMES, width)}
            if mask:
                yield {**sound, mask: torch.ones(BATCH, FRAMES, dtype=torch.bool)}
            yield sound


def _image_size(model: nn.Module) -> tuple[int, int]:
    size = field(model, "image_size", "crop_size", "img_size", "input_size")
    if isinstance(size, dict):
        size = [size.get("height"), size.get("width")]
    if isinstance(size, (list, tuple)) and len(size) == 2:
        return int(size[0]), int(size[1])
    if isinstance(size, int):
        return size, size
    patch = field(model, "patch_size")
    return (8 * patch, 8 * patch) if isinstance(patch, int) else (32, 32)


def _by_vectors(model: nn.Module, taken: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Embeddings, for a model that reads no tokens, or whose tokens are of another model."""
    width = field(model, "hidden_size", "d_model", "n_embd", "embed_dim")
    if not isinstance(width, int):
        return
    for name in ("inputs_embeds", "hidden_states", "noise_embeds"):
        if name in taken:
            inputs: dict[str, Any] = {name: torch.randn(BATCH, LENGTH, width)}
            if name == "noise_embeds":
                layers = field(model, "target_layer_ids") or [0]
                inputs = {name: torch.randn(BATCH, 4, width)}
                inputs["context_hidden_states"] = torch.randn(BATCH, LENGTH, width * len(layers))
            inputs |= _required_beside(model, taken, inputs, LENGTH)
            if "labels" in taken:
                yield {**inputs, "labels": _tokens(model, BATCH, LENGTH)}
            yield {**inputs, **_decoder(model, taken)}
