"""Models with every kind of output layer, and what they are told in training."""

import torch
from torch.nn import functional

from ..helpers.models import VOCABULARY, build_model
from ..helpers.sharded import token_batch

FLOOR = 1e-5
# Beside the plain head: soft-capping, scales of either kind, a bias, a transposed partner, logits in float32.
MODELS = {
    "llama": {},
    "llama, tied": {"tied": True},
    "gemma2": {"final_logit_softcapping": 2.0},
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 3.0},
    "gpt2": {"tied": True},
    "phi": {},
    "mixtral": {},
}
_SIZES = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 8, "vocab_size": VOCABULARY}


def build(name):
    architecture, options = name.partition(",")[0], dict(MODELS[name])
    if architecture in ("cohere", "granite", "phi"):
        from transformers import AutoConfig, AutoModelForCausalLM

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            options |= {"intermediate_size": 96, "initializer_range": 0.1}
            config = AutoConfig.for_model(architecture, **_SIZES, **options)
            config.pad_token_id = 0
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            with torch.no_grad():
                for param in model.parameters():
                    if param.ndim == 1:
                        param += 0.1 * torch.randn_like(param)
        return model.eval().train()
    return build_model(architecture, **options).train()


def batches():
    """What the model is told beside its tokens, as Trainer, packed sequences and scripts do it."""
    batch = token_batch()
    labels = batch["labels"].clone()
    labels[:, :3] = -100
    moved = functional.pad(labels, (0, 1), value=-100)[..., 1:].contiguous()
    moved[:, 4] = -100
    return {
        "labels": {**batch, "labels": labels},
        "items": {**batch, "labels": labels, "num_items_in_batch": torch.tensor(37)},
        "shifted": {**batch, "labels": labels, "shift_labels": moved},
        "another index": {**batch, "labels": labels.masked_fill(labels == -100, 7), "ignore_index": 7},
    }
