"""Train a sparse encoder on top of a masked language model's vocabulary, with gathered negatives, and save it."""

from datasets import load_dataset
from sentence_transformers import SparseEncoder, SparseEncoderTrainer, SparseEncoderTrainingArguments
from sentence_transformers.sparse_encoder.losses import SparseMultipleNegativesRankingLoss, SpladeLoss

model = SparseEncoder("./masked")
data = load_dataset("./data/triplets")
ranking = SparseMultipleNegativesRankingLoss(model, gather_across_devices=True)
loss = SpladeLoss(model, loss=ranking, query_regularizer_weight=5e-3, document_regularizer_weight=3e-3)
arguments = SparseEncoderTrainingArguments(
    output_dir="out",
    max_steps=4,
    per_device_train_batch_size=4,
    per_device_eval_batch_size=4,
    learning_rate=1e-3,
    logging_steps=1,
    save_strategy="no",
    use_cpu=True,
    report_to=[],
    disable_tqdm=True,
    seed=7,
)
trainer = SparseEncoderTrainer(model=model, args=arguments, train_dataset=data["train"], loss=loss)
trainer.train()
trainer.save_model("out/final")
