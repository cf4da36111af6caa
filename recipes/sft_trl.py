# 4 ranks on CPU, tensor parallelism 2 x data parallelism 2 (no network; about two minutes on two cores):
#   accelerate launch --config_file recipes/configs/cpu_tp2_dp2.yaml -m accel_tp_ddp.launch recipes/sft_trl.py \
#       --output_dir outputs/sft --use_cpu
# With LoRA adapters, and a model from the hub, on 8 GPUs:
#   accelerate launch --config_file recipes/configs/node8_tp2_dp4.yaml -m accel_tp_ddp.launch recipes/sft_trl.py \
#       --output_dir outputs/sft --model_name_or_path Qwen/Qwen3-8B --lora --learning_rate 1e-4 --bf16
"""Supervised fine-tuning with TRL's SFTTrainer: write the docstring of a function of Python's standard library.

Each sample is a prompt, a function's signature, and its completion, the first line of its docstring; the loss is that
of the completions alone. Without `--model_name_or_path` a small Qwen3 is trained from scratch, byte by byte.
"""

import ast
import json
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer, HfArgumentParser, Qwen3Config, set_seed
from trl import SFTConfig, SFTTrainer


@dataclass
class Arguments:
    model_name_or_path: str | None = None
    lora: bool = field(default=False, metadata={"help": "train LoRA adapters on all linear layers"})


@dataclass
class Training(SFTConfig):
    """SFTTrainer's own arguments, with defaults for the small Qwen3."""

    learning_rate: float = 3e-3
    max_steps: int = 100
    warmup_steps: int = 10
    per_device_train_batch_size: int = 8
    per_device_eval_batch_size: int = 8
    max_length: int = 192
    logging_steps: int = 10
    eval_on_start: bool = True
    save_strategy: str = "no"
    bf16: bool = False
    gradient_checkpointing: bool = False
    report_to: str = "none"


def documented_functions():
    samples = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8", errors="ignore"))):
            text = ast.get_docstring(node) if isinstance(node, ast.FunctionDef) else None
            if text:
                signature = f"def {node.name}({ast.unparse(node.args)}):"
                samples.append({"prompt": signature, "completion": f"  # {text.splitlines()[0]}"})
    return Dataset.from_list(samples[:2000])


def main():
    args, training = HfArgumentParser((Arguments, Training)).parse_args_into_dataclasses()
    set_seed(training.seed)
    if args.model_name_or_path:
        tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
        model = AutoModelForCausalLM.from_pretrained(args.model_name_or_path)
    else:
        tokenizer = ByT5Tokenizer()
        sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3, "head_dim": 32}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        model = AutoModelForCausalLM.from_config(Qwen3Config(vocab_size=len(tokenizer), **sizes, **heads))
    data = documented_functions().train_test_split(0.05, seed=training.seed)
    trainer = SFTTrainer(
        model,
        training,
        train_dataset=data["train"],
        eval_dataset=data["test"],
        processing_class=tokenizer,
        peft_config=LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM") if args.lora else None,
    )
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model()
    if trainer.is_world_process_zero():
        before = trainer.state.log_history[0]["eval_loss"]
        results = {"loss_before": before, "loss_after": after, "steps": trainer.state.global_step}
        Path(training.output_dir, "results.json").write_text(json.dumps(results, indent=2) + "\n")
        print(f"evaluation loss {before:.3f} before, {after:.3f} after {trainer.state.global_step} steps")


if __name__ == "__main__":
    main()
    # Not `trainer.end()` while there is a model: DDP can hang where it is the last to hold its group (pytorch#56297).
    PartialState().destroy_process_group()
