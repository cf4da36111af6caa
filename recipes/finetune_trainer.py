# 4 ranks on CPU, tensor parallelism 2 x data parallelism 2 (no network; about two minutes on two cores):
#   accelerate launch --config_file recipes/configs/cpu_tp2_dp2.yaml -m accel_tp_ddp.launch \
#       recipes/finetune_trainer.py --output_dir outputs/finetune_trainer --use_cpu
# A model and a text of your own, on 8 GPUs:
#   accelerate launch --config_file recipes/configs/node8_tp2_dp4.yaml -m accel_tp_ddp.launch \
#       recipes/finetune_trainer.py --output_dir outputs/qwen --model_name_or_path Qwen/Qwen3-1.7B \
#       --text_file book.txt --learning_rate 2e-5 --bf16
"""Fine-tune a causal language model with transformers' Trainer. It takes every option of `TrainingArguments`.

Without `--model_name_or_path` a small Llama is trained from scratch, byte by byte; without `--text_file`, on the
source text of Python's standard library.
"""

import json
import math
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ByT5Tokenizer,
    HfArgumentParser,
    LlamaConfig,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)


@dataclass
class Arguments:
    model_name_or_path: str | None = None
    text_file: str | None = None
    block_size: int = 128
    max_blocks: int = 2000


@dataclass
class Training(TrainingArguments):
    """Trainer's own arguments, with defaults for the small Llama."""

    learning_rate: float = 3e-3
    max_steps: int = 120
    warmup_steps: int = 10
    per_device_train_batch_size: int = 8
    per_device_eval_batch_size: int = 16
    logging_steps: int = 10
    eval_on_start: bool = True  # not by `evaluate()` before `train()`, after which Trainer would not wrap it in DDP
    eval_strategy: str = "steps"
    eval_steps: int = 60
    save_steps: int = 60
    save_total_limit: int = 1
    report_to: str = "none"


def read_text(path):
    if path:
        return Path(path).read_text(encoding="utf-8")
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:40]
    return "".join(file.read_text(encoding="utf-8", errors="ignore") for file in files)


def main():
    parser = HfArgumentParser((Arguments, Training))
    args, training = parser.parse_args_into_dataclasses()
    set_seed(training.seed)
    if args.model_name_or_path:
        tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
        model = AutoModelForCausalLM.from_pretrained(args.model_name_or_path)
    else:
        tokenizer = ByT5Tokenizer()
        sizes = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 6}
        model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=len(tokenizer), **sizes))

    ids = tokenizer(read_text(args.text_file), add_special_tokens=False)["input_ids"]
    starts = range(0, len(ids) - args.block_size + 1, args.block_size)
    blocks = [ids[start : start + args.block_size] for start in starts][: args.max_blocks]
    data = Dataset.from_dict({"input_ids": blocks, "labels": blocks}).train_test_split(0.05, seed=training.seed)

    trainer = Trainer(
        model,
        training,
        train_dataset=data["train"],
        eval_dataset=data["test"],
        data_collator=default_data_collator,
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    after = math.exp(trainer.evaluate()["eval_loss"])
    trainer.save_model()
    if trainer.is_world_process_zero():
        before = math.exp(next(row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row))
        results = {"perplexity_before": before, "perplexity_after": after, "steps": trainer.state.global_step}
        Path(training.output_dir, "results.json").write_text(json.dumps(results, indent=2) + "\n")
        print(f"perplexity {before:.2f} before, {after:.2f} after {trainer.state.global_step} steps")


if __name__ == "__main__":
    main()
    # Not `trainer.end()` while there is a model: DDP can hang where it is the last to hold its group (pytorch#56297).
    PartialState().destroy_process_group()
