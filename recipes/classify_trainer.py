# 4 ranks on CPU, tensor parallelism 2 x data parallelism 2 (no network; about a minute on two cores):
#   accelerate launch --config_file recipes/configs/cpu_tp2_dp2.yaml -m accel_tp_ddp.launch \
#       recipes/classify_trainer.py --output_dir outputs/classify --use_cpu
"""Train a sequence classifier with transformers' Trainer: which module of Python's standard library is a line from?

`AutoModelForSequenceClassification` on a small Qwen3 from scratch, byte by byte; accuracy on lines it has not seen.
"""

import json
import random
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    ByT5Tokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    Qwen3Config,
    Trainer,
    TrainingArguments,
    set_seed,
)

MODULES = ("argparse", "turtle", "_pydecimal")


@dataclass
class Training(TrainingArguments):
    """Trainer's own arguments, with defaults for the small Qwen3."""

    learning_rate: float = 2e-3
    max_steps: int = 120
    warmup_steps: int = 10
    per_device_train_batch_size: int = 16
    per_device_eval_batch_size: int = 32
    logging_steps: int = 20
    eval_on_start: bool = True
    save_strategy: str = "no"
    report_to: str = "none"


def lines(tokenizer):
    """Samples of three lines each, of uneven length, with the number of the module they are from."""
    samples = []
    for label, name in enumerate(MODULES):
        source = Path(sysconfig.get_paths()["stdlib"], f"{name}.py").read_text(encoding="utf-8").splitlines()
        texts = ["\n".join(source[start : start + 3]) for start in range(0, len(source) - 2, 3)]
        kept = [text for text in texts if len(text) > 40][:600]
        samples += [{**tokenizer(text, truncation=True, max_length=96), "label": label} for text in kept]
    random.Random(0).shuffle(samples)
    return Dataset.from_list(samples)


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main():
    (training,) = HfArgumentParser(Training).parse_args_into_dataclasses()
    set_seed(training.seed)
    tokenizer = ByT5Tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        num_labels=len(MODULES),
        pad_token_id=tokenizer.pad_token_id,
        **{"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 32},
        **{"num_attention_heads": 4, "num_key_value_heads": 2},
    )
    data = lines(tokenizer).train_test_split(0.15, seed=training.seed)
    trainer = Trainer(
        AutoModelForSequenceClassification.from_config(config),
        training,
        train_dataset=data["train"],
        eval_dataset=data["test"],
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_metrics=accuracy,
    )
    trainer.train()
    after = trainer.evaluate()["eval_accuracy"]
    trainer.save_model()
    if trainer.is_world_process_zero():
        before = trainer.state.log_history[0]["eval_accuracy"]
        results = {"accuracy_before": before, "accuracy_after": after, "steps": trainer.state.global_step}
        Path(training.output_dir, "results.json").write_text(json.dumps(results, indent=2) + "\n")
        print(f"accuracy {before:.3f} before, {after:.3f} after {trainer.state.global_step} steps")


if __name__ == "__main__":
    main()
    # Not `trainer.end()` while there is a model: DDP can hang where it is the last to hold its group (pytorch#56297).
    PartialState().destroy_process_group()
