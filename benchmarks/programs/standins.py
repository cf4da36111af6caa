"""Small models, data sets and a metric under the names by which programs ask a hub for the real ones.

They lie in the folder that a program is started in, so that `from_pretrained("bert-base-cased")` and
`load_dataset("nyu-mll/glue", "mrpc")` find them there. Weights are random, seeded, without dropout.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    T5Config,
)

__all__ = ["build"]

PAD, EOS, UNKNOWN, CLS, SEP = range(5)
SPECIAL = ("[PAD]", "[EOS]", "[UNK]", "[CLS]", "[SEP]")
WORDS = [f"w{index}" for index in range(126)]  # 131 tokens: no split of them is even
SIZES: dict[str, Any] = {"vocab_size": len(SPECIAL) + len(WORDS), "hidden_size": 64, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 8, "intermediate_size": 96, "initializer_range": 0.1, "pad_token_id": PAD}

REWARDS = '''"""Rewards for completions: some words are liked."""


def liked(completions, **kwargs):
    return [sum(text.count(word) for word in ("w1", "w2", "w3")) + len(text) / 50 for text in completions]
'''

CHAT = (
    "{% for message in messages %}{{ message['content'] + ' ' }}{% endfor %}"
    "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
)
# A stand-in for the library of the same name, which would fetch its metrics from the hub. It also says how many rows
# it was given: a metric over doubled rows may be the right one by chance.
METRIC = '''"""Accuracy, F1 and the number of rows, in the place of the metrics that `evaluate` fetches."""

import torch


class Metric:
    def __init__(self):
        self.rows = []

    def add_batch(self, predictions, references):
        self.rows += zip(torch.as_tensor(predictions).tolist(), torch.as_tensor(references).tolist())

    def compute(self, predictions=None, references=None):
        if predictions is not None:
            self.add_batch(predictions, references)
        hits = sum(p == r for p, r in self.rows)
        right = sum(p == r == 1 for p, r in self.rows)
        claimed = sum((p == 1) + (r == 1) for p, r in self.rows)
        found = {"accuracy": hits / len(self.rows), "f1": 2 * right / max(claimed, 1), "rows": len(self.rows)}
        self.rows = []
        return found


def load(*names, **kwargs):
    return Metric()
'''

# Tasks of lm-eval's harness.
TASKS = {
    "choices": """task: choices
dataset_path: json
dataset_kwargs: {data_files: {test: data/choices/test.json}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}]
metadata: {version: 1}
""",
    "continued": """task: continued
dataset_path: json
dataset_kwargs: {data_files: {test: data/text/test.json}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}]
metadata: {version: 1}
""",
}


def build(folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write all of them into `folder`, the models in `dtype`."""
    folder.mkdir(parents=True, exist_ok=True)
    bert = BertConfig(**SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=2)
    llama = LlamaConfig(**SIZES, num_key_value_heads=4, eos_token_id=EOS, bos_token_id=None, tie_word_embeddings=False)
    scored = LlamaConfig(**{**llama.to_dict(), "num_labels": 1})
    by_bytes = LlamaConfig(**{**llama.to_dict(), "vocab_size": len(SPECIAL) + 256})
    t5 = T5Config(vocab_size=SIZES["vocab_size"], d_model=64, d_ff=96, d_kv=8, num_layers=2, num_heads=8)
    t5.dropout_rate, t5.pad_token_id, t5.eos_token_id, t5.decoder_start_token_id = 0.0, PAD, EOS, PAD
    kinds: dict[str, tuple[Any, Any, int]] = {
        "bert-base-cased": (AutoModelForSequenceClassification, bert, 1),
        "model": (AutoModelForCausalLM, llama, 2),
        "teacher": (AutoModelForCausalLM, llama, 3),
        "HuggingFaceTB/SmolLM-360M": (AutoModelForCausalLM, llama, 4),
        "reward": (AutoModelForSequenceClassification, scored, 5),
        "t5": (AutoModelForSeq2SeqLM, t5, 6),
        "masked": (AutoModelForMaskedLM, bert, 7),
        "bytes": (AutoModelForCausalLM, by_bytes, 8),
        "bytes-teacher": (AutoModelForCausalLM, by_bytes, 9),
    }
    for name, (auto, config, seed) in kinds.items():
        torch.manual_seed(seed)
        model = auto.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():  # norms and biases that are all alike would hide a swap
                if parameter.ndim == 1:
                    parameter += 0.1 * torch.randn_like(parameter)
        model.to(dtype).save_pretrained(folder / name)
        (_byte_tokenizer() if config is by_bytes else _tokenizer(config is bert)).save_pretrained(folder / name)
    _write_data(folder)
    (folder / "rewards.py").write_text(REWARDS)
    (folder / "evaluate.py").write_text(METRIC)
    (folder / "tasks").mkdir()
    for name, text in TASKS.items():
        (folder / "tasks" / f"{name}.yaml").write_text(text)


def _tokenizer(pairs: bool) -> PreTrainedTokenizerFast:
    bare = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate((*SPECIAL, *WORDS))}, unk_token="[UNK]")  # type: ignore[call-arg]
    )
    bare.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    names = {"pad_token": "[PAD]", "eos_token": "[EOS]", "unk_token": "[UNK]"}
    if pairs:
        bare.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)],
        )
        names |= {"cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, model_max_length=64, **names)
    if not pairs:
        tokenizer.chat_template = CHAT
    return tokenizer


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    """Each byte is a token, as some losses between tokenizers want it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bare = Tokenizer(models.BPE({token: i for i, token in enumerate((*SPECIAL, *alphabet))}, []))
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    bare.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    names = {"pad_token": "[PAD]", "eos_token": "[EOS]", "unk_token": "[UNK]"}
    return PreTrainedTokenizerFast(tokenizer_object=bare, model_max_length=64, chat_template=CHAT, **names)


def _write_data(folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)

    def words(low: int, high: int, start: str = "") -> str:
        count = int(torch.randint(low, high, (), generator=generator))
        return start + " ".join(WORDS[i] for i in torch.randint(0, 60, (count,), generator=generator))

    def pair(index: int) -> dict[str, Any]:
        return {"sentence1": words(4, 12), "sentence2": words(4, 12), "label": index * 7 % 3 % 2, "idx": index}

    def chosen() -> dict[str, Any]:
        return {"prompt": words(3, 6), "chosen": words(3, 9, " "), "rejected": words(3, 9, " ")}

    rows: dict[str, Callable[[int], dict[str, Any]]] = {
        "data/text": lambda index: {"text": words(5, 14)},
        "data/prompts": lambda index: {"prompt": words(4, 5)},
        "data/completions": lambda index: {"prompt": words(3, 6), "completion": words(3, 9, " ")},
        "data/preferences": lambda index: chosen(),
        "data/triples": lambda index: {**chosen(), "reference": words(3, 9, " ")},
        "data/ranked": lambda index: {"chosen": words(5, 12), "rejected": words(5, 12)},
        "data/labelled": lambda index: {
            "prompt": words(3, 6),
            "completion": words(3, 9, " "),
            "label": index % 2 == 0,
        },
        "data/triplets": lambda index: {"anchor": words(4, 9), "positive": words(4, 9), "negative": words(4, 9)},
        "data/scored": lambda index: {"sentence1": words(4, 9), "sentence2": words(4, 9), "score": index % 5 / 4},
        "data/classes": lambda index: {"text": words(4, 9), "label": index % 3},
        "data/chats": lambda index: {
            "messages": [{"role": "user", "content": words(3, 6)}, {"role": "assistant", "content": words(3, 9)}]
        },
        "data/instructions": lambda index: {"instruction": words(3, 6), "input": words(2, 4), "output": words(3, 9)},
        "data/choices": lambda index: {
            "prompt": words(4, 9),
            "choices": [words(1, 3), words(1, 3)],
            "answer": index % 2,
        },
        "data/privileged": lambda index: {"prompt": words(4, 5), "privileged_context": words(3, 6)},
    }
    for name, row in rows.items():
        _write_splits(folder / name, {split: [row(i) for i in range(n)] for split, n in (("train", 27), ("test", 13))})
    # Sizes that leave an uneven last batch, on each replica another.
    splits = {split: [pair(i) for i in range(n)] for split, n in (("train", 135), ("validation", 77), ("test", 33))}
    for name in ("nyu-mll/glue", "glue"):
        _write_splits(folder / name, splits, "mrpc")
    lines = {split: [{"text": words(4, 12)} for _ in range(n)] for split, n in (("train", 500), ("validation", 100))}
    _write_splits(folder / "Salesforce/wikitext", lines, "wikitext-2-v1")


def _write_splits(folder: Path, splits: dict[str, list[dict[str, Any]]], config: str = "default") -> None:
    folder.mkdir(parents=True)
    for split, rows in splits.items():
        (folder / f"{split}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = "".join(f"  - split: {split}\n    path: {split}.json\n" for split in splits)
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: {config}\n  data_files:\n{files}---\n")
