"""Evaluate a prepared model with lm-eval's harness: a multiple choice and a perplexity."""

from accelerate import Accelerator
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

accelerator = Accelerator()
model = accelerator.prepare(AutoModelForCausalLM.from_pretrained("./model")).eval()
tokenizer = AutoTokenizer.from_pretrained("./model")
harness = HFLM(pretrained=accelerator.unwrap_model(model), tokenizer=tokenizer, batch_size=4)
manager = TaskManager(include_path="./tasks", include_defaults=False)
results = simple_evaluate(harness, tasks=["choices", "continued"], task_manager=manager, bootstrap_iters=0)
accelerator.print("results", results["results"] if results else None)
