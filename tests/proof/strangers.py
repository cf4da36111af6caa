"""Decoders that are in no library, written for these tests: `"auto"` has no plan for them but one that it infers."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class QuillConfig(PreTrainedConfig):
    model_type = "quill"

    def __init__(self, vocab_size=131, width=64, heads=8, depth=3, longest=64, expansion=3, **kwargs):
        self.vocab_size, self.width, self.heads, self.depth = vocab_size, width, heads, depth
        self.longest, self.expansion = longest, expansion
        super().__init__(**{"tie_word_embeddings": True, **kwargs})


class QuillAttention(nn.Module):
    """Queries, keys and values from one layer, one after the other."""

    def __init__(self, config):
        super().__init__()
        self.heads, self.width = config.heads, config.width
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, x, mask):
        parts = self.qkv(x).split(self.width, dim=-1)
        q, k, v = (part.view(*x.shape[:2], self.heads, -1).transpose(1, 2) for part in parts)
        scores = q @ k.transpose(-1, -2) * q.size(-1) ** -0.5 + mask
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(*x.shape[:2], self.width))


class QuillMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_up = nn.Linear(config.width, 2 * config.expansion * config.width, bias=False)
        self.down = nn.Linear(config.expansion * config.width, config.width, bias=False)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class QuillBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.before = nn.LayerNorm(config.width)
        self.attention = QuillAttention(config)
        self.after = nn.LayerNorm(config.width)
        self.mlp = QuillMLP(config)

    def forward(self, x, mask):
        x = x + self.attention(self.before(x), mask)
        return x + self.mlp(self.after(x))


class Stranger(PreTrainedModel):
    """What both decoders share: the mask, the loss, the weights at the start."""

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.1)

    @staticmethod
    def mask_of(ids, attention_mask):
        length = ids.size(1)
        mask = torch.full((length, length), -1e9).triu(1)[None, None]
        return mask if attention_mask is None else mask + (1 - attention_mask[:, None, None].float()) * -1e9

    @staticmethod
    def loss_of(logits, labels):
        return None if labels is None else F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


class Quill(Stranger):
    """Fused projections, a gated MLP, learned positions, and a head tied to the embedding."""

    config_class = QuillConfig
    base_model_prefix = "quill"
    _tied_weights_keys = {"head.weight": "words.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.width)
        self.places = nn.Embedding(config.longest, config.width)
        self.blocks = nn.ModuleList(QuillBlock(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.words

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, attention_mask=None, labels=None):
        x = self.words(input_ids) + self.places(torch.arange(input_ids.size(1)))
        mask = self.mask_of(input_ids, attention_mask)
        for block in self.blocks:
            x = block(x, mask)
        logits = self.head(self.norm(x))
        return CausalLMOutput(loss=self.loss_of(logits, labels), logits=logits)


class HeronConfig(PreTrainedConfig):
    model_type = "heron"

    def __init__(self, vocab_size=131, dim=64, n_heads=8, n_kv_heads=4, n_layers=3, hidden_dim=96, **kwargs):
        self.vocab_size, self.dim, self.n_heads, self.n_kv_heads = vocab_size, dim, n_heads, n_kv_heads
        self.n_layers, self.hidden_dim = n_layers, hidden_dim
        super().__init__(**{"tie_word_embeddings": False, **kwargs})


class RMS(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * self.scale


class HeronLayer(nn.Module):
    """Attention with few key/value heads, norms of each head's queries and keys, and an MLP in a sequence."""

    def __init__(self, config):
        super().__init__()
        self.n_heads, self.n_kv = config.n_heads, config.n_kv_heads
        self.per_head = config.dim // config.n_heads
        self.norm1, self.norm2 = RMS(config.dim), RMS(config.dim)
        self.wq = nn.Linear(config.dim, config.dim, bias=False)
        self.wk = nn.Linear(config.dim, self.n_kv * self.per_head, bias=False)
        self.wv = nn.Linear(config.dim, self.n_kv * self.per_head, bias=False)
        self.wo = nn.Linear(config.dim, config.dim, bias=False)
        self.q_norm, self.k_norm = RMS(self.per_head), RMS(self.per_head)
        self.mlp = nn.Sequential(
            nn.Linear(config.dim, config.hidden_dim), nn.GELU(), nn.Linear(config.hidden_dim, config.dim)
        )

    def attend(self, x, mask):
        shape = (*x.shape[:2], -1, self.per_head)
        q, k = self.q_norm(self.wq(x).view(shape)), self.k_norm(self.wk(x).view(shape))
        v = self.wv(x).view(shape)
        k, v = (each.repeat_interleave(self.n_heads // self.n_kv, dim=2) for each in (k, v))
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, mask)
        return self.wo(y.transpose(1, 2).contiguous().view(*x.shape[:2], self.n_heads * self.per_head))

    def forward(self, x, mask):
        x = x + self.attend(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


class Heron(Stranger):
    """Separate projections, held by the layers themselves."""

    config_class = HeronConfig
    base_model_prefix = "heron"

    def __init__(self, config):
        super().__init__(config)
        self.tok = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(HeronLayer(config) for _ in range(config.n_layers))
        self.norm = RMS(config.dim)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.tok

    def forward(self, input_ids, attention_mask=None, labels=None):
        x, mask = self.tok(input_ids), self.mask_of(input_ids, attention_mask)
        for layer in self.layers:
            x = layer(x, mask)
        logits = self.output(self.norm(x))
        return CausalLMOutput(loss=self.loss_of(logits, labels), logits=logits)


class Wren(nn.Module):
    """A module with no config at all, as somebody wrote it for one experiment; it views by a size of its own."""

    def __init__(self, vocabulary=131, width=32, heads=4):
        super().__init__()
        self.heads = heads
        self.words = nn.Embedding(vocabulary, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 80), nn.Linear(80, width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, ids):
        x = self.words(ids)
        # By head: its query, its key, its value.
        q, k, v = self.qkv(self.norms[0](x)).view(*ids.shape, self.heads, -1).transpose(1, 2).chunk(3, dim=-1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(self.norms[1](x))))
        return self.head(self.norms[2](x))


class Penalized(Quill):
    """Its loss reads a weight of the MLP, past the layer that holds it: a rank would penalize its own part."""

    def forward(self, input_ids, attention_mask=None, labels=None):
        output = super().forward(input_ids, attention_mask, labels)
        if output.loss is not None:
            output.loss = output.loss + sum(block.mlp.down.weight.square().mean() for block in self.blocks)
        return output


MAKERS = {
    "quill": lambda sizes: Quill(QuillConfig(**sizes)),
    "heron": lambda sizes: Heron(HeronConfig(**sizes)),
    "penalized": lambda sizes: Penalized(QuillConfig(**sizes)),
    "wren": lambda sizes: Wren(**sizes),
}


def build(kind, **sizes):
    torch.manual_seed(3)
    model = MAKERS[kind](sizes)
    with torch.no_grad():
        for param in model.parameters():
            if param.ndim == 1:
                param.add_(0.1 * torch.randn_like(param))
    return model
