"""Fit a few-shot classifier: an embedding model by contrast, then a head on its embeddings."""

from accelerate import PartialState
from datasets import load_dataset
from setfit import SetFitModel, Trainer, TrainingArguments

model = SetFitModel.from_pretrained("./bert-base-cased")
data = load_dataset("./data/classes")
arguments = TrainingArguments(
    output_dir="out",
    batch_size=4,
    max_steps=4,
    body_learning_rate=1e-3,
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    seed=7,
)
trainer = Trainer(
    model=model, args=arguments, train_dataset=data["train"], eval_dataset=data["test"], metric="accuracy"
)
trainer.train()
print("accuracy", trainer.evaluate())
if PartialState().is_main_process:
    model.save_pretrained("out/final")
PartialState().wait_for_everyone()
