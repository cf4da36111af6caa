"""Train a cross-encoder that scores pairs, and save it."""

from datasets import load_dataset
from sentence_transformers.cross_encoder import CrossEncoder, CrossEncoderTrainer, CrossEncoderTrainingArguments
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss

model = CrossEncoder("./bert-base-cased", num_labels=1, model_kwargs={"ignore_mismatched_sizes": True})
data = load_dataset("./data/scored")
arguments = CrossEncoderTrainingArguments(
    output_dir="out",
    max_steps=4,
    per_device_train_batch_size=4,
    per_device_eval_batch_size=4,
    learning_rate=1e-3,
    logging_steps=1,
    eval_strategy="steps",
    eval_steps=2,
    save_strategy="no",
    use_cpu=True,
    report_to=[],
    disable_tqdm=True,
    # The outputs are a `BatchEncoding`, in which DDP finds no tensors: it would take all parameters for unused.
    ddp_find_unused_parameters=False,
    seed=7,
)
trainer = CrossEncoderTrainer(
    model=model,
    args=arguments,
    train_dataset=data["train"],
    eval_dataset=data["test"],
    loss=BinaryCrossEntropyLoss(model),
)
trainer.train()
trainer.save_model("out/final")
