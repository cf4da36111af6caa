"""Sampling in `generate()`: the ranks that hold one replica draw the same tokens and stop together."""

from __future__ import annotations

import copy
import inspect
import pickle
import time

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import MaxTimeCriteria, StoppingCriteria, StoppingCriteriaList

from accel_tp_ddp import TensorParallelDDPPlugin, parallelize

from ..helpers.faults import injected
from ..helpers.models import VOCABULARY, build_model
from ..helpers.ranks import run_on_ranks
from ..helpers.sharded import tp_mesh

NEW_TOKENS = 12


def prompt(seed=0):
    ids = torch.randint(3, VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pad_token_id": 0}


def sample(model, **options):
    return model.generate(**prompt(), do_sample=True, max_new_tokens=NEW_TOKENS, **options).tolist()


def sampled(seeding: str, fault: str | None = None):
    """The tokens of two calls on each rank, and what torch draws after them."""
    accelerator = Accelerator(parallelism_config=TensorParallelDDPPlugin(tp_size=2, replica_check_steps=0))
    with injected(fault):
        model = accelerator.unwrap_model(accelerator.prepare(build_model("llama"))).eval()
        set_seed(5 + (dist.get_rank() if seeding == "by rank" else 0))
        tokens = [sample(model), sample(model, temperature=1.3, top_k=50)]
    return tokens, float(torch.rand(()))


def test_ranks_of_a_replica_draw_the_same_tokens_whatever_their_seeds():
    first, second, third, fourth = run_on_ranks(sampled, 4, "by rank")
    assert first == second and third == fourth
    assert first != third, "replicas have random states of their own"
    assert first[0][0] != first[0][1]


def test_one_seed_gives_one_sequence_everywhere_as_under_plain_ddp():
    ranks = run_on_ranks(sampled, 4, "alike")
    assert all(rank == ranks[0] for rank in ranks)


def test_without_an_agreement_the_tokens_would_differ():
    first, second, *_ = run_on_ranks(sampled, 4, "by rank", "generation draws by itself")
    assert first != second


def stopping_early(seeding: str):
    """Every token may be the last one, so sequences end at a random length."""
    accelerator = Accelerator(parallelism_config=TensorParallelDDPPlugin(tp_size=2, replica_check_steps=0))
    model = accelerator.unwrap_model(accelerator.prepare(build_model("llama"))).eval()
    set_seed(5 + (dist.get_rank() if seeding == "by rank" else 0))
    return [sample(model, eos_token_id=list(range(1, VOCABULARY, 8)), synced_gpus=synced) for synced in (False, True)]


def test_ranks_of_a_replica_stop_at_the_same_token():
    results = run_on_ranks(stopping_early, 4, "by rank")
    assert results[0] == results[1] and results[2] == results[3]
    lengths = [len(sequences[0]) for rank in results for sequences in rank[:1]]
    assert min(lengths) < 6 + NEW_TOKENS


class AfterSeconds(StoppingCriteria):
    """By the clock of the rank that it runs on."""

    def __init__(self, seconds):
        self.until = time.time() + seconds

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), time.time() > self.until, dtype=torch.bool)


def by_the_clock(how: str):
    """Rank 1's clock goes otherwise: its time is up at once, or never."""
    model = parallelize(build_model("llama"), tp_mesh()).eval()
    own = (0.3, 0.0) if how.endswith("late") else (0.0, 1e6)
    seconds = own[dist.get_rank()]
    options = {"max_new_tokens": 50, **{k: v for k, v in prompt().items() if k != "max_new_tokens"}}
    if how.startswith("max_time"):
        options["max_time"] = seconds
    elif how.startswith("in the config"):
        model.generation_config.max_time = seconds
    elif how.startswith("given config"):
        options["generation_config"] = copy.deepcopy(model.generation_config)
        options["generation_config"].max_time = seconds
    elif how.startswith("MaxTimeCriteria"):
        options["stopping_criteria"] = StoppingCriteriaList([MaxTimeCriteria(seconds)])
    else:
        options["stopping_criteria"] = [AfterSeconds(seconds)]
    return model.generate(**options).tolist()


@pytest.mark.parametrize("when", ["early", "late"])
@pytest.mark.parametrize("how", ["max_time", "in the config", "given config", "MaxTimeCriteria", "a criterion"])
def test_the_first_ranks_clock_stops_all(how, when):
    first, second = run_on_ranks(by_the_clock, 2, f"{how}, {when}")
    assert first == second
    assert (len(first[0]) == 7) == (when == "early"), "one token where the time is up, else more"


def copies():
    model = parallelize(build_model("llama"), tp_mesh()).eval()
    twin = copy.deepcopy(model)
    loaded = pickle.loads(pickle.dumps(model))
    assert twin.generate.owner is twin and loaded.generate.owner is loaded
    assert inspect.signature(model.generate) == inspect.signature(build_model("llama").generate)
    results = []
    for each in (model, twin, loaded):
        set_seed(5 + dist.get_rank())
        results.append(sample(each))
    assert results[0] == results[1] == results[2]
    return results


def test_a_copy_of_a_model_samples_alike_too():
    first, second = run_on_ranks(copies, 2)
    assert first == second


# --- parameters that come after `prepare` ----------------------------------------------------------------------------


def late_layer(when: str):
    accelerator = Accelerator(parallelism_config=TensorParallelDDPPlugin(tp_size=2))
    if when != "after prepare":
        set_seed(3, device_specific=when == "before prepare, by rank")
    accelerator.prepare(build_model("llama"))
    if when == "after prepare":
        set_seed(3)
    return torch.nn.Linear(8, 8).weight.tolist()


@pytest.mark.parametrize("when", ["before prepare, by rank", "before prepare", "after prepare"])
def test_a_layer_that_is_made_after_prepare_is_the_same_on_the_ranks_of_a_replica(when):
    first, second, third, fourth = run_on_ranks(late_layer, 4, when)
    assert first == second and third == fourth
    assert (first != third) == (when == "before prepare, by rank"), "under plain DDP too"
