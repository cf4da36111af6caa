"""Train a sentence embedding model and save it: `sentence_transformer.py LOSS [gathered] [evaluated]`."""

import inspect
import sys

from datasets import load_dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator

name, gathered, evaluated = sys.argv[1], "gathered" in sys.argv, "evaluated" in sys.argv
model = SentenceTransformer("./bert-base-cased")
loss_class = getattr(losses, name)
options = {"gather_across_devices": True} if gathered else {}
known = inspect.signature(loss_class).parameters
options |= {"mini_batch_size": 2} if "mini_batch_size" in known else {}
options |= {"guide": SentenceTransformer("./bert-base-cased")} if "guide" in known else {}
data = load_dataset("./data/scored" if name == "CoSENTLoss" else "./data/triplets")
scored = load_dataset("./data/scored", split="test")
evaluator = EmbeddingSimilarityEvaluator(scored["sentence1"], scored["sentence2"], scored["score"], name="scored")
arguments = SentenceTransformerTrainingArguments(
    output_dir="out",
    max_steps=4,
    per_device_train_batch_size=4,
    per_device_eval_batch_size=4,
    learning_rate=1e-3,
    logging_steps=1,
    eval_strategy="steps",
    eval_steps=2,
    save_strategy="steps",
    save_steps=2,
    use_cpu=True,
    report_to=[],
    disable_tqdm=True,
    seed=7,
)
trainer = SentenceTransformerTrainer(
    model=model,
    args=arguments,
    train_dataset=data["train"],
    eval_dataset=data["test"],
    loss=loss_class(model, **options),
    evaluator=evaluator if evaluated else None,
)
trainer.train()
trainer.save_model("out/final")
model.save("out/saved")  # as its documentation does, on every rank
