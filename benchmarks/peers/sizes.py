"""The models and batches that are compared, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import AdamW, Optimizer
from transformers import AutoModelForCausalLM, LlamaConfig

__all__ = ["SIZES", "Setting", "Size", "Step", "training_step"]

HEADS, KEY_VALUE_HEADS = 8, 4

#: One training step: forward, backward, optimizer. It returns the loss.
Step = Callable[[], Tensor]


@dataclass(frozen=True)
class Size:
    """A Llama, and the batch of one replica."""

    hidden: int
    layers: int
    vocab: int
    batch: int
    length: int

    def config(self, shards: int = 1) -> LlamaConfig:
        """Of the whole model, or of one rank's part of it: an ordinary Llama with a share of the heads."""
        return LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.hidden * 3 // shards,
            num_hidden_layers=self.layers,
            num_attention_heads=HEADS // shards,
            num_key_value_heads=KEY_VALUE_HEADS // shards,
            head_dim=self.hidden // HEADS,
            vocab_size=self.vocab // shards,
            max_position_embeddings=max(2048, self.length),
            tie_word_embeddings=False,
            use_cache=False,
        )


#: A dozen contenders are in memory at once, with weights, moments and buckets on every rank: 12 GiB at most.
SIZES = {
    "host-bound": Size(hidden=256, layers=4, vocab=4096, batch=4, length=128),
    "compute-bound": Size(hidden=1024, layers=2, vocab=4096, batch=4, length=128),
    "vocab-64k": Size(hidden=256, layers=2, vocab=65_536, batch=2, length=128),
    "vocab-128k": Size(hidden=128, layers=2, vocab=131_072, batch=2, length=128),
    "long": Size(hidden=256, layers=1, vocab=1024, batch=2, length=4096),
    "tiny": Size(hidden=64, layers=2, vocab=512, batch=2, length=16),
}


@dataclass(frozen=True)
class Setting:
    """What all contenders share: weights, data, ranks, type and optimizer.

    Args:
        mesh: `("dp_replicate", "tp")`, over all ranks.
        folder: A checkpoint of the model, for who shards while loading.
        fused: Whether AdamW is torch's fused one, which Trainer takes, or a loop over the parameters.
    """

    size: Size
    mesh: DeviceMesh
    folder: str
    fused: bool = True

    @property
    def tp(self) -> int:
        return self.mesh["tp"].size()

    @property
    def dp(self) -> int:
        return self.mesh["dp_replicate"].size()

    @property
    def tokens(self) -> int:
        """Of one step, over all replicas."""
        return self.dp * self.size.batch * self.size.length

    @cached_property
    def _ids(self) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return torch.randint(self.size.vocab, (self.dp * self.size.batch, self.size.length), generator=generator)

    @property
    def replica_ids(self) -> Tensor:
        """This replica's part of the global batch."""
        return self._ids.chunk(self.dp)[self.mesh["dp_replicate"].get_local_rank()]

    @property
    def rank_ids(self) -> Tensor:
        """This rank's part, where every rank is a replica."""
        if self.size.batch % self.tp:
            raise ValueError(
                f"{self.size.batch} sequences a replica cannot be shared by {self.tp} ranks, as plain DDP has to. "
                f"Set --batch to a multiple of {self.tp}."
            )
        return self._ids.chunk(dist.get_world_size())[dist.get_rank()]

    def model(self, shards: int = 1) -> nn.Module:
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(self.size.config(shards), dtype=torch.float32)

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        return AdamW(parameters, lr=1e-4, fused=self.fused, foreach=False)


def training_step(model: nn.Module, optimizer: Optimizer, ids: Tensor, backward: Callable = Tensor.backward) -> Step:
    def step() -> Tensor:
        loss = model(input_ids=ids, labels=ids).loss
        backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step
