"""Vision models, and models made of models: which plan each part has, and that they train as under plain DDP."""

import tempfile
from functools import cache

import pytest
import torch
import torch.distributed as dist
from torch import nn
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from accel_tp_ddp import PlanError, full_gradients, parallelize, resolve_plan
from accel_tp_ddp.plans import names, shipped
from benchmarks.sweep import planned, vision
from benchmarks.sweep.cases import build, inputs, loss_of
from benchmarks.sweep.compare import gradient_errors
from benchmarks.sweep.small import small_model

from ..helpers import epochs
from ..helpers.ranks import run_on_ranks
from ..helpers.sharded import tp_mesh
from ..helpers.versions import needs_all_architectures

CLASSES, IMAGE, PLACES = 5, 3, 4  # IMAGE stands for a part of an image, PLACES times in a text
TOWER = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"image_size": 16, "patch_size": 4, "initializer_range": 0.1},
}
TEXT = {
    **{"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 67, "max_position_embeddings": 32, "sliding_window": 8},
    **{"initializer_range": 0.1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}


def vit():
    return ViTForImageClassification(ViTConfig(**TOWER, num_labels=CLASSES))


def gemma3():
    """Tied embeddings; without the pooling head of its vision tower, which gives nothing to the loss."""
    return Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config={**TEXT, "layer_types": ["sliding_attention", "full_attention"]},
            vision_config={**TOWER, "vision_use_head": False},
            **{"mm_tokens_per_image": PLACES, "image_token_index": IMAGE},
            **{"boi_token_index": 4, "eoi_token_index": 5},
        )
    )


def llava(heads=4):
    tower = CLIPVisionConfig(**{**TOWER, "num_attention_heads": heads, "hidden_size": 8 * heads})
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=tower, text_config=LlamaConfig(**TEXT), image_token_index=IMAGE)
    )


def seeded(build_model):
    """No weight is constant, and none differs over the ranks."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = build_model().float()
        for param in model.parameters():
            if param.ndim == 1 or not param.any():
                param += 0.1 * torch.randn_like(param)
    return model


def rows(build_model, count, seed):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, 16, 16, generator=generator)
    if build_model is vit:
        return [{"pixel_values": image, "labels": torch.tensor(index % CLASSES)} for index, image in enumerate(images)]
    texts = torch.randint(6, TEXT["vocab_size"], (count, 10), generator=generator)
    texts[:, 1 : 1 + PLACES] = IMAGE
    return [
        {
            "input_ids": text,
            "labels": torch.where(text == IMAGE, -100, text),
            "token_type_ids": (text == IMAGE).long(),
            "pixel_values": image,
        }
        for text, image in zip(texts, images)
    ]


def train(build_model, tp, folder=None):
    return epochs.train(seeded(build_model), rows(build_model, 18, seed=1), rows(build_model, 7, seed=2), tp, folder)


@cache
def plain(build_model):
    return run_on_ranks(train, 2, build_model, None)


@pytest.mark.parametrize(("build_model", "at_least"), [(vit, 20), (gemma3, 35)])
def test_a_multimodal_model_trains_and_saves_as_under_plain_ddp(build_model, at_least):
    with tempfile.TemporaryDirectory() as folder:
        run = run_on_ranks(train, 4, build_model, 2, folder)
    assert all(rank.reloaded and rank.sharded >= at_least for rank in run)
    epochs.assert_same(run, plain(build_model))


# --- one forward and backward, beside the unsharded model ------------------------------------------------------------

CASES = {case.name: case for case in [*planned.cases(), *vision.cases()]}
# Two towers and a contrastive loss; a bias for each head that comes from outside; packed queries, keys and values, and
# rotary positions in three dimensions for the text; norms that transformers' plan leaves out; a list of heads; an
# attention without rotary positions beside one without heads; a norm over all heads; a head tied to a whole embedding.
BESIDE = ("clip", "siglip", "beit", "qwen2_5_vl", "qwen3_vl_moe_text", "qwen3_omni_moe_talker_code_predictor")
BESIDE += ("glm5_next_text", "esmc", "t5gemma2_decoder")


def worst_errors(plans):
    """The worst relative error of a gradient, with its name, for each case; the loss counts as one."""
    worst = {}
    for name, plan in plans.items():
        case = CASES[name]
        reference = build(case)
        batch = inputs(case, reference, 0)
        loss = loss_of(reference, batch)
        loss.backward()
        expected = {key: param.grad for key, param in reference.named_parameters() if param.grad is not None}
        model = parallelize(build(case), tp_mesh(), plan)
        actual_loss = loss_of(model, batch)
        actual_loss.backward()
        errors = gradient_errors(full_gradients(model), expected)
        errors["the loss"] = abs(actual_loss.item() - loss.item()) / abs(loss.item())
        worst[name] = max((error, key) for key, error in errors.items())
    return worst


def test_the_gradients_of_a_multimodal_model_are_the_unsharded_models():
    for rank in run_on_ranks(worst_errors, 2, dict.fromkeys(BESIDE, "auto")):
        assert rank.keys() == set(BESIDE)
        assert {name: error for name, error in rank.items() if not error[0] < 1e-4} == {}


WRONG = {
    "qwen3_vl_moe_text": {"layers.*.self_attn.q_norm": "replicate"},
    "qwen2_5_vl": {"model.visual.blocks.*.attn.qkv": "colwise"},
}


def test_plans_without_their_corrections_give_wrong_gradients():
    for rank in run_on_ranks(worst_errors, 2, WRONG):
        assert all(error > 1e-2 for error, _ in rank.values())


DROPOUT = {
    "vit": {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2},
    "beit": {"hidden_dropout_prob": 0.2, "drop_path_rate": 0.4},
    "clip": {"text_config": {"attention_dropout": 0.2}, "vision_config": {"attention_dropout": 0.2}},
}


def differing_with_dropout():
    """What differs over the ranks in training mode: the loss, and gradients of what every rank holds."""
    differing = {}
    for name, rates in DROPOUT.items():
        part = vision.MODELS[name]
        rates = {
            key: {**part.sizes.get(key, {}), **rate} if isinstance(rate, dict) else rate for key, rate in rates.items()
        }
        torch.manual_seed(0)
        model = parallelize(small_model(part.folder, part.model, **{**part.sizes, **rates}), tp_mesh()).train()
        losses = set()
        for step in range(3):
            torch.manual_seed(step)
            batch = part.inputs(model)
            loss = model(**batch).loss
            loss.backward()
            losses.add(loss.item())
        held = {
            key: p.grad.tolist() for key, p in model.named_parameters() if p.tp_shard is None and p.grad is not None
        }
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, {"losses": sorted(losses), **held})
        differing[name] = [key for key in everyone[0] if any(other[key] != everyone[0][key] for other in everyone)]
        assert len(losses) == 3
    return differing


def test_what_every_rank_holds_gets_the_same_gradients_under_dropout():
    for differing in run_on_ranks(differing_with_dropout, 2):
        assert differing == {name: [] for name in DROPOUT}


# --- which plan each part has ----------------------------------------------------------------------------------------


def sources(model, tp_size=2):
    """Where the rule of each module came from, by its name."""
    return {entry.site.name: entry.source for entry in resolve_plan(model, tp_size).entries}


def test_each_part_has_the_plan_of_its_own_config():
    found = sources(llava())
    assert found["model.vision_tower.encoder.layers.1.mlp.fc1"] == "package"
    assert found["model.language_model.layers.1.mlp.up_proj"] == "model"
    assert found["lm_head"] == "model"
    assert not any("projector" in name for name in found)


def test_a_latent_attention_without_rotary_positions_is_no_error():
    rule = {"layers.*.self_attn.kv_a_proj_with_mqa": "mla_kv_a_proj"}
    styles = {entry.label for entry in resolve_plan(CASES["glm5_next_text"].build(), 2, rule).entries}
    assert "mla_kv_a_proj" in styles


class Holder(nn.Module):
    """A user's own module around models of transformers."""

    def __init__(self):
        super().__init__()
        self.models = nn.ModuleList([LlamaModel(LlamaConfig(**TEXT)), vit()])
        self.score = nn.Linear(TEXT["hidden_size"], 1)


def test_models_in_a_module_of_the_users_own_bring_their_plans():
    found = sources(Holder())
    assert found["models.0.layers.1.mlp.up_proj"] == "model"
    assert found["models.1.vit.layers.1.mlp.fc1"] == "package"
    assert not any(name.startswith("score") for name in found)


def test_a_plan_set_on_a_model_is_not_added_to_by_its_parts():
    model = LlamaModel(LlamaConfig(**TEXT))
    model.tp_plan = {"layers.*.mlp.up_proj": "colwise", "layers.*.mlp.down_proj": "rowwise"}
    assert {name.split(".", 2)[2] for name in sources(model)} == {"mlp.up_proj", "mlp.down_proj"}


def test_sizes_come_from_the_config_of_the_part():
    """The merger holds no config itself, and that of the whole states no sizes."""
    model = CASES["qwen2_5_vl"].build()
    configs = {entry.site.name: entry.site.config for entry in resolve_plan(model, 2).entries}
    assert configs["model.visual.merger.mlp.0"] is model.model.visual.config


def test_heads_of_a_tower_that_the_ranks_do_not_divide_are_refused():
    with pytest.raises(
        PlanError, match=r"6 heads in the output of model\.vision_tower\.encoder.*divisible by tp_size"
    ):
        resolve_plan(llava(heads=6), 4)


def test_rules_under_a_condition_hold_where_the_config_says_so(monkeypatch):
    data = {"a": "colwise", "b": "rowwise", "if special": {"a": "replicate", "c": "colwise"}}
    data["if not special"] = {"b?": "replicate"}
    monkeypatch.setattr(shipped, "read_shipped", lambda model_type: data if model_type == "mine" else {})

    class Config:
        model_type = "mine"

        def __init__(self, special):
            self.special = special

    for special, expected in [
        (False, {"a": "colwise", "b?": "replicate"}),
        (True, {"a": "replicate", "b": "rowwise", "c": "colwise"}),
    ]:
        model = nn.Module()
        model.config = Config(special)
        assert [plan.rules for plan in shipped.shipped_plans(model)] == [expected]


@needs_all_architectures
def test_each_rule_of_the_multimodal_plans_matches_in_a_swept_model():
    missing = {}
    for case in CASES.values():
        model = case.build()
        found = names.Names(model)
        for part in model.modules():
            for plan in shipped.shipped_plans(part)[:1] if hasattr(part, "config") else ():
                for rule in plan.rules if not plan.part else ():
                    inside = f"{found.first_name[id(part)]}.{rule}".lstrip(".")
                    key = plan.model_type, shipped.unmarked(rule)
                    missing[key] = missing.get(key, True) and not found.match(inside)
    assert len(missing) > 100
    assert not [rule for rule, without in missing.items() if without]
