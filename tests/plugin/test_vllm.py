"""TRL with vLLM under the plugin: the engine gets the weights of plain DDP, and draws once for each replica.

vLLM needs a GPU, so the engine is a recorder (`helpers/engines.py`). All that comes before it is TRL's own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from accel_tp_ddp.core.override import stock_of
from accel_tp_ddp.core.shard import shard_info

from ..helpers.engines import LLM, Server, recorded
from ..helpers.models import build_model
from ..helpers.ranks import run_on_ranks
from ..helpers.sharded import accelerator_for

pytest.importorskip("trl")

LAYOUTS = [(2, 2), (2, 1), (4, 1)]


@dataclass(frozen=True)
class Case:
    architecture: str = "llama"
    tied: bool = False
    lora: dict[str, Any] = field(default_factory=dict)

    def build(self) -> torch.nn.Module:
        model = build_model(self.architecture, tied=self.tied)
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
        assert seen["moved"] == expected["moved"] if not case.lora else seen["moved"] < 1e-6
    assert ours[0]["announced"] == plain[0]["announced"]
