"""TRL's trainers under the plugin log what they log under plain DDP."""

from types import MethodType

import pytest
import torch.distributed as dist

from accel_tp_ddp import TensorParallelDDPPlugin
from accel_tp_ddp.core.override import stock_of

from ..helpers.compare import assert_tensors_close
from ..helpers.models import build_model
from ..helpers.ranks import RanksError, run_on_ranks
from ..helpers.trainer import assert_same, untimed
from ..helpers.trl import dataset, reward, tokenizer

pytest.importorskip("trl")


def make_trainer(kind, tp, folder, judge=reward):
    import trl
    from transformers import AutoModelForSequenceClassification, set_seed

    set_seed(0)
    model = build_model("llama")
    arguments = {
        "output_dir": folder,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "max_steps": 3,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "learning_rate": 1e-2,
        "max_grad_norm": 0.5,
        "bf16": False,
        "gradient_checkpointing": False,
        "parallelism_config": TensorParallelDDPPlugin(tp_size=tp) if tp else None,
    }
    shared = {"processing_class": tokenizer()}
    if kind.startswith("SFT"):
        data = dataset("prompt", "completion") if "completions" in kind else dataset("text")
        arguments |= {"max_length": 16, "packing": "packed" in kind}
        if "LoRA" in kind:
            from peft import LoraConfig

            shared["peft_config"] = LoraConfig(target_modules="all-linear", r=4, task_type="CAUSAL_LM")
        return trl.SFTTrainer(model, trl.SFTConfig(**arguments), train_dataset=data, eval_dataset=data, **shared)
    if kind == "reward":
        model.config.num_labels, model.config.pad_token_id = 1, 0
        set_seed(0)
        model = AutoModelForSequenceClassification.from_config(model.config)
        data = dataset("chosen", "rejected")
        return trl.RewardTrainer(model, trl.RewardConfig(**arguments), train_dataset=data, eval_dataset=data, **shared)
    if kind == "DPO":
        data, reference = dataset("prompt", "chosen", "rejected"), build_model("llama")
        config = trl.DPOConfig(**arguments)
        return trl.DPOTrainer(model, reference, config, train_dataset=data, eval_dataset=data, **shared)
    model.config._name_or_path = f"{folder}/model"  # from where GRPO loads its reference model
    arguments |= {"num_generations": 8 if "over replicas" in kind else 4, "max_completion_length": 6, "beta": 0.1}
    arguments["gradient_accumulation_steps"] = 2 if "over replicas" in kind else 1
    return trl.GRPOTrainer(model, judge, trl.GRPOConfig(**arguments), train_dataset=dataset("prompt"), **shared)


@pytest.fixture
def folder_with_model(tmp_path):
    build_model("llama").save_pretrained(tmp_path / "model")
    return str(tmp_path)


def run(kind, tp, folder):
    trainer = make_trainer(kind, tp, folder)
    trainer.train()
    if not kind.startswith("GRPO"):
        trainer.evaluate()
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    return [untimed(row) for row in trainer.state.log_history], {name: w.clone() for name, w in weights.items()}


KINDS = ["SFT", "SFT packed", "SFT completions", "SFT LoRA", "DPO", "reward", "GRPO", "GRPO, a group over replicas"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_of_trl_is_that_of_plain_ddp(kind, folder_with_model):
    plain = run_on_ranks(run, 2, kind, None, folder_with_model)
    ours = run_on_ranks(run, 4, kind, 2, folder_with_model)
    for rank, (logs, weights) in enumerate(ours):
        expected, expected_weights = plain[rank // 2]
        assert sum("loss" in row for row in expected) == 3
        assert_same(logs, expected, 5e-4)
        if rank == 0:
            assert_tensors_close(weights, expected_weights, 1e-3)


def run_without_whole_reads(kind, tp, folder):
    from unittest import mock

    from accel_tp_ddp.styles import base

    with mock.patch.object(base, "read_full", lambda module, call: None):
        return run(kind, tp, folder)


def test_without_reads_of_full_weights_the_loss_of_trl_is_another(folder_with_model):
    import trl

    if trl.SFTConfig.loss_type == "nll":
        pytest.skip(
            f"the loss of TRL {trl.__version__} reads the head in the model's forward only, unless it is told to"
        )
    plain = run_on_ranks(run, 2, "SFT", None, folder_with_model)
    with pytest.raises((AssertionError, RanksError)):
        ours = run_on_ranks(run_without_whole_reads, 4, "SFT", 2, folder_with_model)
        assert_same(ours[0][0], plain[0][0], 5e-3)


def fickle(completions, **kwargs):
    """A judge that says something else to a peer."""
    peer = dist.get_rank() % 2 if dist.get_world_size() == 4 else 0
    return [value * (1 + 3 * peer) - 7 * peer * index for index, value in enumerate(reward(completions))]


def run_judged(tp, folder, stock=False):
    trainer = make_trainer("GRPO, a group over replicas", tp, folder, judge=fickle)
    if stock:
        trainer._calculate_rewards = MethodType(stock_of(type(trainer), "_calculate_rewards"), trainer)
    trainer.train()
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    return [untimed(row) for row in trainer.state.log_history], {name: w.clone() for name, w in weights.items()}


def test_the_first_ranks_judge_decides_in_a_replica(folder_with_model):
    plain = run_on_ranks(run_judged, 2, None, folder_with_model)
    ours = run_on_ranks(run_judged, 4, 2, folder_with_model)
    for rank, (logs, _) in enumerate(ours):
        assert_same(logs, plain[rank // 2][0], 5e-4)
    assert_tensors_close(ours[0][1], plain[0][1], 1e-3)
    with pytest.raises((AssertionError, RanksError)):
        assert_tensors_close(run_on_ranks(run_judged, 4, 2, folder_with_model, stock=True)[0][1], plain[0][1], 1e-3)


def run_with_a_fault(fault, tp, folder):
    from ..helpers.faults import injected

    with injected(fault):
        trainer = make_trainer("GRPO, a group over replicas", tp, folder)
        trainer.train()
    return [untimed(row) for row in trainer.state.log_history]


@pytest.mark.parametrize("fault", ["ranks that count themselves", "metrics with duplicates"])
def test_without_the_view_grpo_is_not_that_of_plain_ddp(fault, folder_with_model):
    plain = run_on_ranks(run, 2, "GRPO, a group over replicas", None, folder_with_model)
    with pytest.raises((AssertionError, RanksError)):
        assert_same(run_on_ranks(run_with_a_fault, 4, fault, 2, folder_with_model)[0], plain[0][0], 5e-3)
