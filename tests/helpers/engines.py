"""vLLM replaced by a recorder: nothing else, neither TRL's `VLLMGeneration` nor the part of its client that sends."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

LONGEST = 6


class Recorder:
    """Keeps the weights it is given, and draws tokens that follow from its seed, the prompts, and all those before."""

    def __init__(self, seed: int = 0):
        self.seed = seed
        self.weights: list[tuple[str, Tensor]] = []
        self.kept = 0  # the most of the tensors before that were in memory when one came, but for the model's own
        self.own: set[int] = set()  # addresses of the model's
        self.prompts: list[list[int]] = []
        self.resets = 0
        self._given: list[StorageWeakRef] = []
        self._generator = torch.Generator().manual_seed(seed)

    def receive(self, name: str, tensor: Tensor) -> None:
        self.kept = max(self.kept, self._held())
        if (storage := tensor.untyped_storage()).data_ptr() not in self.own:
            self._given.append(StorageWeakRef(storage))
        self.weights.append((name, tensor.clone()))

    def _held(self) -> int:
        """How many of the tensors before are in memory; gloo's thread lets go of one a moment after its rank does."""
        deadline = time.monotonic() + 0.2
        while (held := sum(not given.expired() for given in self._given)) and time.monotonic() < deadline:
            time.sleep(0.001)
        return held

    def draw(self, prompt: list[int]) -> list[int]:
        self.prompts.append(prompt)
        length = int(torch.randint(2, LONGEST + 1, (), generator=self._generator))
        drawn = torch.randint(3, 60, (length,), generator=self._generator)
        return (drawn + sum(prompt) % 40).tolist()


def logprob(token: int) -> float:
    return -1 - token / 64


class LLM(Recorder):
    """In the place of `vllm.LLM`: the engine that a rank has."""

    made: list[LLM] = []

    def __init__(self, model: str, *, seed: int = 0, tensor_parallel_size: int = 1, **options: Any):
        super().__init__(seed)
        self.size = tensor_parallel_size
        self.options = options
        self.environment = {name: os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
        runner = SimpleNamespace(model_runner=SimpleNamespace(model=self))
        self.llm_engine = SimpleNamespace(
            model_executor=SimpleNamespace(driver_worker=runner), model_config=SimpleNamespace(max_model_len=64)
        )
        self.sleeps: list[str] = []
        LLM.made.append(self)

    def load_weights(self, weights: list[tuple[str, Tensor]]) -> None:
        for name, tensor in weights:
            self.receive(name, tensor)

    def generate(self, prompts: list[dict], sampling_params: Any, use_tqdm: bool) -> list[Any]:
        return [self._answer(prompt["prompt_token_ids"], sampling_params.n) for prompt in prompts]

    def _answer(self, prompt: list[int], count: int) -> Any:
        outputs = []
        for tokens in (self.draw(prompt) for _ in range(count)):
            chosen = [{token: SimpleNamespace(logprob=logprob(token), rank=1)} for token in tokens]
            outputs.append(SimpleNamespace(token_ids=tokens, logprobs=chosen))
        return SimpleNamespace(prompt_token_ids=prompt, outputs=outputs)

    def reset_prefix_cache(self) -> None:
        self.resets += 1

    def sleep(self, level: int) -> None:
        self.sleeps.append(f"asleep {level}")

    def wake_up(self, tags: list[str]) -> None:
        self.sleeps.append(f"awake {' '.join(tags)}")


class Server(Recorder):
    """What the one server sees of what TRL's `VLLMClient` sends by HTTP and by NCCL."""

    made: list[Server] = []

    def __init__(self):
        super().__init__()
        self.announced: list[dict[str, Any]] = []
        Server.made.append(self)

    def post(self, url: str, json: dict | None = None) -> dict:
        if url.endswith("/update_weights"):
            self.announced.append(json["update_info"])
        return {"success": True}

    def send_weights(self, iterator: Iterator[tuple[str, Tensor]], trainer_args: Any) -> None:
        for name, tensor in iterator:
            self.receive(name, tensor)


def _client_type() -> type:
    from trl.generation.vllm_client import VLLMClient

    class Client(VLLMClient):
        def __init__(self, **options: Any):
            self.server = Server()
            self.base_url, self.communicator, self._updating_weights = "http://server", None, False

        def _post(self, url: str, **kwargs: Any) -> dict:
            return self.server.post(url, **kwargs)

        def get_server_info(self) -> dict:
            return {"model_config": {"logprobs_mode": "processed_logprobs"}}

        def init_communicator(self, device: Any = 0) -> None:
            pass

        def reset_prefix_cache(self) -> None:
            self.server.resets += 1

        def generate(self, prompts: list[list[int]], n: int = 1, **options: Any) -> dict[str, Any]:
            drawn = [self.server.draw(prompt) for prompt in prompts for _ in range(n)]
            logprobs = [[[logprob(token)] for token in tokens] for tokens in drawn]
            ids = [[[token] for token in tokens] for tokens in drawn]
            return {
                "prompt_ids": prompts,
                "completion_ids": drawn,
                "logprobs": logprobs,
                "logprob_token_ids": ids,
            }

    return Client


@contextmanager
def recorded() -> Iterator[None]:
    """Within the block TRL finds vLLM, which is a recorder. `LLM.made` and `Server.made` are what it has made."""
    from trl.generation import vllm_client, vllm_generation

    module: Any = ModuleType("vllm")
    module.LLM, module.__spec__ = LLM, ModuleSpec("vllm", None)
    LLM.made, Server.made = [], []
    engine = SimpleNamespace(
        trainer_send_weights=lambda iterator, trainer_args: Server.made[-1].send_weights(iterator, trainer_args)
    )
    found = {"is_vllm_available": lambda *args, **kwargs: True, "LLM": LLM, "SamplingParams": SimpleNamespace}
    sending = {"NCCLWeightTransferEngine": engine, "NCCLTrainerSendWeightsArgs": SimpleNamespace}
    before, sys.modules["vllm"] = sys.modules.get("vllm"), module
    try:
        with (
            mock.patch.multiple(vllm_generation, create=True, VLLMClient=_client_type(), **found),
            mock.patch.multiple(vllm_client, create=True, _HAS_STATEFUL_TRAINER_ENGINE=False, **sending),
        ):
            yield
    finally:
        del sys.modules["vllm"]
        if before is not None:
            sys.modules["vllm"] = before
