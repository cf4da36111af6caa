"""Models for what no architecture of the tests has: every style, and head counts that an attention keeps."""

from functools import cache, partial

import torch
from torch import nn
from torch.nn import functional as F
from transformers import OPTConfig, OPTForCausalLM

from .gradients import BATCH
from .models import VOCABULARY


def seeded(make, seed=0):
    """A model of weights that all matter, norms and biases included."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = make()
        for param in model.parameters():
            param += 0.1 * torch.randn_like(param)
    return model


OPT_PLAN = {
    **{f"model.decoder.layers.*.self_attn.{name}_proj": "colwise" for name in "qkv"},
    "model.decoder.layers.*.self_attn.out_proj": "rowwise",
    "model.decoder.layers.*.fc1": "colwise",
    "model.decoder.layers.*.fc2": "rowwise",
}


def build_opt():
    """Its attention takes `view(batch, -1, num_heads, head_dim)`, where -1 is the length."""
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_attention_heads": 4}
    config = OPTConfig(vocab_size=VOCABULARY, num_hidden_layers=2, max_position_embeddings=16, dropout=0.0, **sizes)
    return seeded(lambda: OPTForCausalLM(config)).train()


def unmasked_loss(model, seed):
    """Without padding attention gets no mask, whose size would show that the length is wrong."""
    ids = torch.randint(1, VOCABULARY, (BATCH, 8), generator=torch.Generator().manual_seed(seed))
    return model(input_ids=ids, labels=ids).loss


class HeadNorm(nn.Module):
    """A norm over heads: its parameters are replicated, its input is this rank's heads."""

    def __init__(self, width):
        super().__init__()
        self.width = width
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x):
        heads = x.unflatten(-1, (-1, self.width))
        return F.layer_norm(heads, (self.width,), self.weight, self.bias).flatten(-2)


class SumOfFeatures(nn.Module):
    def forward(self, x):
        return x.sum(dim=-1, keepdim=True)


class Toy(nn.Module):
    """A residual stream of width 16 that passes every style."""

    WIDTH = 16

    def __init__(self, padding_idx=None, frozen=()):
        super().__init__()
        width = self.WIDTH
        self.tokens = nn.Embedding(129, width, padding_idx=padding_idx)
        self.words = nn.Embedding(129, 18, padding_idx=padding_idx)
        self.join = nn.Linear(width + 18, width)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 24)
        self.head_norm = HeadNorm(6)
        self.down = nn.Linear(24, width)
        self.gate_up = nn.Linear(width, 2 * 20)
        self.gated_down = nn.Linear(20, width)
        self.three = nn.Linear(width, 3 * 8, bias=False)
        self.three_down = nn.Linear(8, width)
        self.pair = nn.Linear(width, 2 * 12)
        self.pair_down = nn.Linear(2 * 12, width)
        self.spread = nn.Linear(width, 8)
        self.total = SumOfFeatures()
        self.narrow = nn.Linear(width, 19)  # uneven at 2 and at 4
        self.wide = nn.Linear(19, width)
        self.whole = nn.Linear(width, width)
        self.head = nn.Linear(width, 129)
        for name in frozen:
            self.get_parameter(name).requires_grad_(False)

    def forward(self, ids):
        x = self.norm(self.join(torch.cat([self.tokens(ids), self.words(ids)], dim=-1)))
        x = x + self.down(F.gelu(self.head_norm(self.up(x))))
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        x = x + self.gated_down(F.silu(gate) * up)
        a, b, c = self.three(x).chunk(3, dim=-1)
        x = x + self.three_down(a * b.tanh() * c.sigmoid())
        x = x + self.pair_down(F.gelu(self.pair(x)))
        x = x + self.total(self.spread(x).tanh())
        x = x + self.wide(self.narrow(x).cumsum(dim=-1).tanh())  # needs the whole width
        return self.head(x + self.whole(x).tanh())


TOY_PLAN = {
    "tokens": "embedding_rowwise",
    "words": "embedding_colwise",
    "up": "colwise",
    "head_norm": "replicated_with_grad_allreduce",
    "down": "rowwise",
    "gate_up": "packed_colwise",
    "gated_down": "rowwise",
    "three": "packed_in_three",
    "three_down": "rowwise",
    "pair": "packed_colwise",
    "pair_down": "packed_rowwise",
    "spread": "colwise",
    "total": "all_reduce",
    "narrow": "colwise_gather_output",
    "wide": "rowwise_split_input",
    "whole": "replicate",
    "head": "colwise_rep",
}


@cache
def toy(padding_idx=None, frozen=()):
    return partial(build_toy, padding_idx, frozen)


def build_toy(padding_idx, frozen):
    return seeded(lambda: Toy(padding_idx, frozen))
