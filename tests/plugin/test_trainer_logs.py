"""Trainer logs what it logs under plain DDP, also where it evaluates first."""

import pytest
import torch
from accelerate.utils import set_seed

from accel_tp_ddp import TensorParallelDDPPlugin

from ..helpers.compare import assert_tensors_close
from ..helpers.models import VOCABULARY, build_model
from ..helpers.prepared import REPLICAS, plain_and_sharded
from ..helpers.sharded import TOLERANCE


def trainer_run(tp, folder, evaluate_first):
    from transformers import Trainer, TrainingArguments

    set_seed(0)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, VOCABULARY, (16,), generator=generator) for _ in range(27)]
    data = [{"input_ids": row, "labels": row} for row in rows]
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        max_steps=4,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        learning_rate=1e-3,
        max_grad_norm=0.5,
        parallelism_config=TensorParallelDDPPlugin(tp_size=tp) if tp else None,
    )
    trainer = Trainer(build_model("llama"), arguments, train_dataset=data, eval_dataset=data)
    before = trainer.evaluate()["eval_loss"] if evaluate_first else None
    trainer.train()
    metrics = trainer.evaluate()
    names = ("loss", "grad_norm", "learning_rate")
    logs = [[row[name] for name in names] for row in trainer.state.log_history if "loss" in row]
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    return logs, before, metrics["eval_loss"], {name: tensor.clone() for name, tensor in weights.items()}


@pytest.mark.parametrize("evaluate_first", [False, True], ids=["", "evaluated before"])
@REPLICAS
def test_trainer_logs_what_it_logs_under_plain_ddp(dp, evaluate_first, tmp_path):
    if evaluate_first and dp > 1:
        pytest.skip("plain DDP itself never wraps a model that was evaluated first")
    plain, sharded = plain_and_sharded(trainer_run, dp, str(tmp_path), evaluate_first)
    logs, before, loss, weights = plain[0]
    assert len(logs) == 4
    ours = sharded[0]
    assert [row[2] for row in ours[0]] == [row[2] for row in logs]
    assert torch.allclose(torch.tensor(ours[0]), torch.tensor(logs), rtol=1e-4, atol=0)  # Trainer rounds what it logs
    assert ours[1] == (pytest.approx(before, rel=TOLERANCE) if evaluate_first else None)
    assert ours[2] == pytest.approx(loss, rel=TOLERANCE)
    assert_tensors_close(ours[3], weights, 1e-4)
