"""Train with one of TRL's experimental trainers that has no script of its own: `trl_experimental.py FOLDER NAME`."""

import importlib
import inspect
import runpy
import sys

from datasets import load_dataset
from transformers import AutoTokenizer

folder, name = sys.argv[1:]
module = importlib.import_module(f"trl.experimental.{folder}")
config_class, trainer_class = getattr(module, f"{name}Config"), getattr(module, f"{name}Trainer")
known = inspect.signature(config_class).parameters
arguments = {
    "output_dir": "out",
    "per_device_train_batch_size": 4,
    "max_steps": 3,
    "logging_steps": 1,
    "learning_rate": 1e-2,
    "report_to": [],
    "use_cpu": True,
    "disable_tqdm": True,
    "seed": 7,
    "bf16": False,
    "gradient_checkpointing": False,
    "num_generations": 4,
    "num_completions": 4,
    "max_completion_length": 6,
    "max_new_tokens": 6,
    "max_length": 24,
    "beta": 0.1,
    "save_strategy": "no",
}
arguments = {key: value for key, value in arguments.items() if key in known}
taken = inspect.signature(trainer_class).parameters
rewarded = "reward_funcs" in taken or "reward_funcs" in inspect.signature(trainer_class.__mro__[1]).parameters
options = {"reward_funcs": runpy.run_path("rewards.py")["liked"]} if rewarded else {"teacher_model": "./teacher"}
trainer = trainer_class(
    model="./model",
    args=config_class(**arguments),
    train_dataset=load_dataset("./data/prompts" if rewarded else "./data/chats", split="train"),
    processing_class=AutoTokenizer.from_pretrained("./model", padding_side="left"),
    **options,
)
trainer.train()
trainer.save_model("out/final")
