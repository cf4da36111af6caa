"""TRL with vLLM under the plugin: the engine gets the weights of plain DDP, and draws once for each replica.

vLLM needs a GPU, so the engine is a recorder (`helpers/engines.py`). All that comes before it is TRL's own.
"""

from __future__ import annotations

import collections
import contextlib
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from accel_tp_ddp import TensorParallelDDPPlugin
from accel_tp_ddp.core.override import stock_of
from accel_tp_ddp.core.shard import shard_info
from accel_tp_ddp.plugin.vllm import OVERRIDES, sync_weights

from ..helpers.compare import relative_error
from ..helpers.engines import LLM, LONGEST, Recorder, Server, recorded
from ..helpers.models import build_model
from ..helpers.ranks import run_on_ranks
from ..helpers.sharded import accelerator_for
from ..helpers.trainer import assert_same, untimed
from ..helpers.trl import dataset, reward, tokenizer, without_noise
from ..helpers.versions import needs_async_trainers

pytest.importorskip("trl")

LAYOUTS = [(2, 2), (2, 1), (4, 1)]


@dataclass(frozen=True)
class Case:
    architecture: str = "llama"
    tied: bool = False
    lora: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32

    def build(self) -> torch.nn.Module:
        model = build_model(self.architecture, tied=self.tied).to(self.dtype)
        if not self.lora:
            return model
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(1)
        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=16, task_type="CAUSAL_LM", **self.lora))
        with torch.no_grad():
            for name, param in model.named_parameters():
                if param.requires_grad:  # B starts at zero, and merging would change nothing
                    param += 0.05 * torch.randn(param.shape)
        return model


def send(case: Case, tp: int | None, mode: str) -> dict[str, Any]:
    from trl.generation.vllm_generation import VLLMGeneration

    with recorded():
        accelerator = accelerator_for(tp)
        model = case.build()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        wrapped, _ = accelerator.prepare(model, optimizer)
        before = {name: (param, param.detach().clone()) for name, param in model.named_parameters()}
        generation = VLLMGeneration(accelerator.unwrap_model(wrapped), accelerator, None, mode=mode)
        made = LLM.made if mode == "colocate" else Server.made
        for engine in made:
            engine.own = {param.untyped_storage().data_ptr() for param in model.parameters()}
        generation.sync_weights()
        after = dict(model.named_parameters())
        assert len(made) == (accelerator.is_main_process if mode == "server" else 1)
        return {
            "weights": [each for engine in made for each in engine.weights],
            "kept": [engine.kept for engine in made],
            "announced": [each for server in Server.made for each in server.announced],
            "resets": sum(engine.resets for engine in made),
            "sharded": sum(getattr(shard_info(param), "is_sharded", False) for param in after.values()),
            "same": list(after) == list(before) and all(after[name] is param for name, (param, _) in before.items()),
            "moved": max(float((after[name].detach() - value).abs().max()) for name, (_, value) in before.items()),
            "own": vars(model).keys() & {"named_parameters", "parameters"},
        }


def assert_equal_streams(ours: list[tuple[str, Tensor]], plain: list[tuple[str, Tensor]]) -> None:
    assert [name for name, _ in ours] == [name for name, _ in plain] and plain
    for (name, tensor), (_, expected) in zip(ours, plain):
        assert (tensor.dtype, tensor.shape) == (expected.dtype, expected.shape), name
        assert torch.equal(tensor, expected), f"{name}: {(tensor - expected).abs().max()}"


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
CASES = {
    "llama": Case(),
    "tied": Case(tied=True),
    "transposed, tied": Case("gpt2"),
    "fused": Case("phi3"),
    "one key": Case("llama_one_key"),
    "experts": Case("qwen3_moe"),
    "experts with biases, sinks": Case("gpt_oss"),
    "LoRA": Case(lora={"target_modules": "all-linear"}),
    "LoRA, tied": Case(tied=True, lora={"target_modules": "all-linear"}),
    "LoRA with a trained head": Case(lora={"target_modules": ATTENTION, "modules_to_save": ["lm_head"]}),
    "LoRA of the embedding": Case(lora={"target_modules": [*ATTENTION, "embed_tokens"]}),
    "LoRA, bf16": Case(lora={"target_modules": "all-linear"}, dtype=torch.bfloat16),
    "LoRA of experts": Case("qwen3_moe", lora={"target_parameters": ["mlp.experts.gate_up_proj"]}),
}


@pytest.mark.parametrize("mode", ["colocate", "server"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("tp, dp", LAYOUTS, ids=lambda n: str(n))
def test_the_engine_gets_the_weights_of_plain_ddp(tp, dp, case, mode):
    plain = run_on_ranks(send, dp, case, None, mode)
    ours = run_on_ranks(send, tp * dp, case, tp, mode)
    for rank, seen in enumerate(ours):
        expected = plain[rank // tp]
        if mode == "server" and rank > 0:
            assert seen["weights"] == []
        else:
            assert_equal_streams(seen["weights"], expected["weights"])
            assert seen["resets"] == expected["resets"] == 1
            assert max(seen["kept"]) == 0
        assert seen["sharded"] and seen["same"] and not seen["own"]
        # Merged and unmerged again, weights come back to rounding.
        assert seen["moved"] == expected["moved"] if not case.lora else seen["moved"] < 8 * torch.finfo(case.dtype).eps
    assert ours[0]["announced"] == plain[0]["announced"]


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_merged_dora_is_that_of_plain_ddp_but_for_the_norm_s_rounding(mode):
    case = Case(lora={"target_modules": "all-linear", "use_dora": True})
    plain, ours = run_on_ranks(send, 2, case, None, mode), run_on_ranks(send, 4, case, 2, mode)
    assert [name for name, _ in ours[0]["weights"]] == [name for name, _ in plain[0]["weights"]]
    for (name, tensor), (_, expected) in zip(ours[0]["weights"], plain[0]["weights"]):
        assert relative_error(tensor, expected) < 1e-6, name
    assert not all(torch.equal(a, b) for (_, a), (_, b) in zip(ours[0]["weights"], Case().build().named_parameters()))


def send_from(owner: str, method: str, case: Case, tp: int | None, **attributes: Any) -> list[tuple[str, Tensor]]:
    """By a trainer's own method, of which nothing but that runs."""
    import pkgutil

    kind, sent = pkgutil.resolve_name(owner), Recorder()
    accelerator = accelerator_for(tp)
    model = case.build()
    wrapped = accelerator.prepare(model)
    trainer = kind.__new__(kind)
    transfer = SimpleNamespace(
        **dict.fromkeys(("pause", "resume"), lambda: None),
        send_weights=lambda stream: [sent.receive(*each) for each in stream],
        weight_update=contextlib.nullcontext,
        update_named_param=sent.receive,
        reset_prefix_cache=lambda: None,
    )
    vars(trainer).update(accelerator=accelerator, weight_transfer=transfer, vllm_client=transfer, vllm_mode="server")
    vars(trainer).update(_metrics={"train": collections.defaultdict(list)}, _lora_sync=False, rollout_worker=None)
    vars(trainer).update(model_version=0, is_fsdp_enabled=False, model=wrapped if "async" in owner else model)
    getattr(trainer, method)()
    return sent.weights


SENDERS = [
    pytest.param(row, id=row.owner.rpartition(".")[2], marks=needs_async_trainers if "async" in row.owner else ())
    for row in OVERRIDES
    if row.function is sync_weights and "experimental" in row.owner
]


@pytest.mark.parametrize("row", SENDERS)
@pytest.mark.parametrize("case", ["llama", "LoRA"])
def test_other_trainers_send_the_weights_of_plain_ddp(row, case):
    plain = run_on_ranks(send_from, 2, row.owner, row.name, CASES[case], None)
    ours = run_on_ranks(send_from, 4, row.owner, row.name, CASES[case], 2)
    assert_equal_streams(ours[0], plain[0])
    assert ours[1:] == [[]] * 3


# --- drawing ---------------------------------------------------------------------------------------------------------


def draw(tp: int | None, size: int, sleeps: bool = False, lora: bool = False) -> dict[str, Any]:
    """Two generations of three prompts for each replica, and what this rank's engine has seen."""
    from trl.generation import vllm_generation

    with recorded(), mock.patch.object(vllm_generation, "empty_cache", lambda: None):
        accelerator = accelerator_for(tp)
        model = accelerator.unwrap_model(accelerator.prepare(CASES["LoRA" if lora else "llama"].build()))
        generation = vllm_generation.VLLMGeneration(
            model, accelerator, None, mode="colocate", tensor_parallel_size=size, enable_sleep_mode=sleeps
        )
        (engine,) = LLM.made
        replica = accelerator.data_parallel_rank if tp else accelerator.process_index
        prompts = [[10 * replica + 3, 4, 5], [6], [10 * replica + 7, 8]]
        generations = [generation.generate(prompts, None, 1) for _ in range(2)]
        return {
            "drawn": generations,
            "asked": engine.prompts,
            "seed": engine.seed,
            "size": engine.size,
            "environment": engine.environment,
            "sleeps": engine.sleeps,
            "weights": len(engine.weights),
            "left": (generation.llm is engine, generation.tensor_parallel_size, generation.accelerator is accelerator),
        }


@pytest.mark.parametrize("tp, dp, size", [(2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 1, 1), (2, 1, 2), (4, 1, 1), (4, 1, 2)])
def test_completions_are_drawn_once_for_each_replica(tp, dp, size):
    replicas = max(1, size // tp)
    plain = run_on_ranks(draw, dp, None, replicas)
    ours = run_on_ranks(draw, tp * dp, tp, size)
    for rank, seen in enumerate(ours):
        expected = plain[rank // tp]
        assert seen["drawn"] == expected["drawn"]
        assert len(seen["drawn"][0][1]) == 3 and len(set(map(str, seen["drawn"]))) == 2
        # Each prompt once for each replica, by all the ranks of one engine.
        assert seen["asked"] == (expected["asked"] if rank % tp < size else [])
        assert (seen["seed"], seen["size"]) == (expected["seed"], size)
        assert seen["environment"] == {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(tp * dp)}
        assert seen["left"] == (True, size, True)
    if dp > replicas:
        assert ours[0]["drawn"] != ours[-1]["drawn"]


@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_engines_that_sleep_get_their_weights_back_on_every_rank(size):
    plain, ours = run_on_ranks(draw, 2, None, 1, sleeps=True), run_on_ranks(draw, 4, 2, size, sleeps=True)
    for rank, seen in enumerate(ours):
        expected = plain[rank // 2]
        assert (seen["drawn"], seen["sleeps"]) == (expected["drawn"], expected["sleeps"])
        assert seen["weights"] == expected["weights"] > 0


def test_an_adapted_model_draws_too():
    plain, ours = run_on_ranks(draw, 2, None, 1, lora=True), run_on_ranks(draw, 4, 2, 2, lora=True)
    assert [seen["drawn"] for seen in ours] == [plain[rank // 2]["drawn"] for rank in range(4)]


def ask_server(tp: int | None) -> tuple[Any, list[list[int]]]:
    from trl.generation.vllm_generation import VLLMGeneration

    with recorded():
        accelerator = accelerator_for(tp)
        generation = VLLMGeneration(build_model("llama"), accelerator, None, mode="server")
        replica = accelerator.data_parallel_rank if tp else accelerator.process_index
        prompts = [[10 * replica + 3, 4]] * 2 + [[10 * replica + 7, 8]] * 2
        drawn = generation.generate(prompts, None, 2)
        return drawn, [prompt for server in Server.made for prompt in server.prompts]


@pytest.mark.parametrize("tp, dp", LAYOUTS, ids=lambda n: str(n))
def test_a_server_draws_once_for_each_replica(tp, dp):
    plain, ours = run_on_ranks(ask_server, dp, None), run_on_ranks(ask_server, tp * dp, tp)
    for rank, (drawn, asked) in enumerate(ours):
        assert drawn == plain[rank // tp][0] and len(drawn[1]) == 4
        assert asked == (plain[0][1] if rank == 0 else [])


def test_an_engine_of_parts_of_replicas_is_refused():
    for raised in run_on_ranks(draw, 4, 4, 3, expect_raise=True):
        assert raised.type_name == "ValueError" and "vllm_tensor_parallel_size=4" in raised.message


def draw_for_online_dpo(size: int) -> tuple[Any, list[list[int]]]:
    from trl.experimental.online_dpo import OnlineDPOTrainer

    accelerator = accelerator_for(2)
    engine = LLM("", seed=accelerator.data_parallel_rank)
    if accelerator.tensor_parallel_rank:
        engine.draw([3, 4])  # so that it would draw something else than the first rank's
    trainer = OnlineDPOTrainer.__new__(OnlineDPOTrainer)
    args = SimpleNamespace(vllm_enable_sleep_mode=False)
    vars(trainer).update(accelerator=accelerator, args=args, llm=engine, vllm_tensor_parallel_size=size)
    vars(trainer).update(state=SimpleNamespace(global_step=0), _last_loaded_step=0)
    vars(trainer).update(generation_config=SimpleNamespace(n=2))
    prompts = [{"prompt_token_ids": [3 + accelerator.data_parallel_rank]}, {"prompt_token_ids": [7]}]
    with mock.patch("trl.experimental.online_dpo.online_dpo_trainer.is_conversational", lambda example: False):
        return trainer._generate_vllm_colocate(prompts), engine.prompts


def test_online_dpo_takes_what_the_first_rank_has_drawn():
    ours = run_on_ranks(draw_for_online_dpo, 4, 1)
    assert ours[0][0] == ours[1][0] != ours[2][0] == ours[3][0]
    assert ours[0][1] != ours[1][1]
    for raised in run_on_ranks(draw_for_online_dpo, 2, 2, expect_raise=True):
        assert raised.type_name == "ValueError" and "vllm_tensor_parallel_size=1" in raised.message


# --- in a trainer ----------------------------------------------------------------------------------------------------


def train(kind: str, mode: str, tp: int | None, size: int, folder: str) -> dict[str, Any]:
    import trl
    from transformers import set_seed

    with recorded():
        set_seed(0)
        model = build_model("llama")
        model.config._name_or_path = f"{folder}/model"  # from where the reference model is loaded
        arguments = {"output_dir": folder, "per_device_train_batch_size": 4, "max_steps": 3, "logging_steps": 1}
        arguments |= {"report_to": [], "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "bf16": False}
        arguments |= {"learning_rate": 1e-2, "max_grad_norm": 0.5, "gradient_checkpointing": False, "beta": 0.1}
        arguments |= {"num_generations": 4, "max_completion_length": LONGEST, "use_vllm": True, "vllm_mode": mode}
        arguments |= {"vllm_tensor_parallel_size": size, "model_init_kwargs": None}
        arguments["parallelism_config"] = TensorParallelDDPPlugin(tp_size=tp) if tp else None
        config = getattr(trl, f"{kind}Config")(**arguments)
        trainer = getattr(trl, f"{kind}Trainer")(
            model, reward, config, train_dataset=dataset("prompt"), processing_class=tokenizer()
        )
        trainer.train()
        engines = LLM.made if mode == "colocate" else Server.made
        return {
            "logs": [without_noise(untimed(row)) for row in trainer.state.log_history],
            "weights": [each for engine in engines for each in engine.weights],
            "asked": [prompt for engine in engines for prompt in engine.prompts],
        }


@pytest.fixture
def folder_with_model(tmp_path):
    build_model("llama").save_pretrained(tmp_path / "model")
    return str(tmp_path)


IN_CI = [("colocate", 2, "GRPO")]
ELSEWHERE = [("server", 1, "RLOO"), ("colocate", 1, "GRPO"), ("colocate", 1, "RLOO"), ("colocate", 2, "RLOO")]
ELSEWHERE += [("server", 1, "GRPO")]


@pytest.mark.parametrize(
    "mode, size, kind", [*IN_CI, *(pytest.param(*case, marks=pytest.mark.slow) for case in ELSEWHERE)]
)
def test_a_run_is_that_of_plain_ddp(kind, mode, size, folder_with_model):
    plain = run_on_ranks(train, 2, kind, mode, None, 1, folder_with_model)
    ours = run_on_ranks(train, 4, kind, mode, 2, size, folder_with_model)
    for rank, seen in enumerate(ours):
        expected = plain[rank // 2]
        assert sum("loss" in row for row in seen["logs"]) == 3
        assert_same(seen["logs"], expected["logs"], 5e-4)
        draws = rank == 0 if mode == "server" else rank % 2 < size
        assert seen["asked"] == (expected["asked"] if draws else [])
        sent = expected["weights"] if mode == "colocate" or rank == 0 else []
        assert [name for name, _ in seen["weights"]] == [name for name, _ in sent]
        for (name, tensor), (_, wanted) in zip(seen["weights"], sent):
            assert relative_error(tensor, wanted) < 1e-3, name
    assert ours[0]["asked"] and len(ours[0]["weights"]) == 3 * len(list(build_model("llama").parameters()))


# --- what a fault would do -------------------------------------------------------------------------------------------


def with_stock(name: str, function: Any, *args: Any) -> Any:
    from trl.generation.vllm_generation import VLLMGeneration

    from accel_tp_ddp.plugin import trainer

    accelerator_for(2)  # which replaces it, and so would the next one
    stock = mock.patch.object(VLLMGeneration, name, stock_of(VLLMGeneration, name))
    with stock, mock.patch.object(trainer, "install_for_all", lambda rows, context_of: None):
        return function(*args)


def test_without_the_override_the_engine_gets_shards():
    plain, ours = (
        run_on_ranks(send, 2, Case(), None, "colocate"),
        run_on_ranks(with_stock, 4, "sync_weights", send, Case(), 2, "colocate"),
    )
    with pytest.raises(AssertionError):
        assert_equal_streams(ours[0]["weights"], plain[0]["weights"])


def test_without_the_override_each_rank_draws_by_itself():
    plain, ours = run_on_ranks(draw, 2, None, 1), run_on_ranks(with_stock, 4, "generate", draw, 2, 1)
    assert all(seen["asked"] for seen in ours)
    assert ours[1]["drawn"] == plain[0]["drawn"]  # as long as the engines of peers agree by themselves
    plain, ours = run_on_ranks(draw, 2, None, 1), run_on_ranks(with_stock, 4, "generate", draw, 2, 2)
    assert ours[1]["drawn"] != plain[0]["drawn"]


def joined_at_once(case: Case) -> dict[str, Any]:
    from accel_tp_ddp.core.override import Override
    from accel_tp_ddp.model import full_parameters

    def at_once(*args: Any, **kwargs: Any) -> Any:
        return iter(list(full_parameters.named_parameters(*args, **kwargs)))

    rows = (Override("torch.nn.Module", "named_parameters", at_once, "", ""), full_parameters.OVERRIDES[1])
    with mock.patch.object(full_parameters, "OVERRIDES", rows):
        return send(case, 2, "colocate")


def test_more_than_one_full_tensor_at_a_time_is_noticed():
    assert max(run_on_ranks(joined_at_once, 2, Case())[0]["kept"]) > 10
