"""What TRL's trainers need beside a model: a tokenizer of its vocabulary, texts, and a reward."""

from __future__ import annotations

from typing import Any

import torch

from .models import VOCABULARY

WORDS = [f"w{index}" for index in range(VOCABULARY - 3)]
ROWS = 27


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: index + 3 for index, word in enumerate(WORDS)}
    words.update({"<pad>": 0, "<eos>": 1, "<unk>": 2})
    bare = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    bare.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=bare, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def dataset(*columns: str) -> Any:
    """Texts of uneven length, seeded; all but a prompt begin with a space, as completions do."""
    from datasets import Dataset

    generator = torch.Generator().manual_seed(1)

    def text(name: str) -> str:
        count = 4 if name == "prompt" else int(torch.randint(3, 9, (), generator=generator))
        return " ".join(WORDS[i] for i in torch.randint(0, 60, (count,), generator=generator))

    return Dataset.from_list(
        [{name: ("" if name in ("prompt", "text") else " ") + text(name) for name in columns} for _ in range(ROWS)]
    )


def reward(completions: list[str], **kwargs: Any) -> list[float]:
    return [
        sum(completion.count(word) for word in ("w1", "w2", "w3")) + len(completion) / 50 for completion in completions
    ]


def without_noise(row: dict[str, float]) -> dict[str, float]:
    """RLOO's loss is a sum of advantages that cancel; gradient norms tell what it does."""
    return {name: 0.0 if "loss" in name and abs(value) < 1e-6 else value for name, value in row.items()}
