"""`benchmarks.peers`: its counts are exact, a contender that fails or trains wrongly is told, the command runs."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._functional_collectives import all_gather_tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from benchmarks.peers.contenders import CONTENDERS, LOCAL, OURS, PLAIN, VARIANTS, plain_ddp
from benchmarks.peers.observe import MemoryOf, RecordCollectives, replay
from benchmarks.peers.rounds import enter, interleave
from benchmarks.peers.sizes import SIZES, Setting, training_step
from benchmarks.peers.table import SAME_LOSS, as_json

from ..helpers.ranks import run_on_ranks

ROOT = Path(__file__).parents[2]
TINY = SIZES["tiny"]
FLOAT = 4


# --- what one step does ----------------------------------------------------------------------------------------------


def test_memory_is_counted_to_the_byte():
    """A weight, its gradient and two moments, each of `size` bytes; what there was before does not count."""
    size = 300 * 300 * FLOAT
    before = torch.zeros(5 * size)
    with MemoryOf() as memory:
        linear = nn.Linear(300, 300, bias=False)
        optimizer = torch.optim.AdamW(linear.parameters(), fused=True)
        inputs = torch.ones(1, 300)

        def step():
            linear(inputs).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

        step()
        memory.step(step)
    found, small = memory.result(), 10 * inputs.nbytes  # the inputs, the output, the count of steps
    assert 0 < found.held - 3 * size < small
    assert 0 < found.peak - 4 * size < small
    del before


def collectives_of_every_way():
    """Through DDP's reducer, which is C++, through torch.distributed, and as a functional collective."""
    model = DistributedDataParallel(nn.Linear(8, 4, bias=False))
    for _ in range(2):  # DDP lays its buckets out anew before the second step, and says so to the other ranks
        model(torch.ones(2, 8)).sum().backward()
    halves = [torch.zeros(3), torch.zeros(3)]
    with RecordCollectives() as recorded:
        model(torch.ones(2, 8)).sum().backward()
        dist.all_gather(halves, torch.ones(3))
        all_gather_tensor(torch.ones(5, dtype=torch.bfloat16), 0, dist.group.WORLD).sum()
        dist.barrier()
    with RecordCollectives() as again:
        replay(recorded.found)()
    rows = [[(each.kind, each.bytes, each.ranks) for each in mode.found] for mode in (recorded, again)]
    return rows


def test_every_collective_is_recorded_with_its_bytes_and_replayed():
    for recorded, replayed in run_on_ranks(collectives_of_every_way, 2):
        assert recorded == [
            ("all-reduce", 8 * 4 * FLOAT, (0, 1)),
            ("all-gather", 6 * FLOAT, (0, 1)),
            ("all-gather", 10 * 2, (0, 1)),
        ]
        assert replayed == recorded


# --- contenders that fail --------------------------------------------------------------------------------------------


def raises_on_rank_1(setting):
    if dist.get_rank() == 1:
        raise KeyError("a part")
    return does_not_average(setting)


def raises_when_timed(setting):
    step, calls = plain_ddp(setting), []

    def failing():
        calls.append(None)
        if len(calls) > 5:
            raise OSError("too late")
        return step()

    return failing


def does_not_train(setting):
    model = setting.model()
    return training_step(model, torch.optim.SGD(model.parameters(), lr=0.0), setting.rank_ids)


def does_not_average(setting):
    """Every rank trains on its own part of the batch alone."""
    model = setting.model()
    return training_step(model, setting.optimizer(model.parameters()), setting.rank_ids)


def figures_of(*builds):
    control = dist.new_group()
    mesh = init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("dp_replicate", "tp"))
    setting = Setting(TINY, mesh, "no folder")
    entrants = [enter(build.__name__, build, setting, control) for build in builds]
    return as_json("tiny", setting, entrants, interleave(entrants, 2, 60, control))["contenders"]


def test_a_contender_that_fails_is_a_line_and_the_others_go_on():
    for plain, early, late, last in run_on_ranks(
        figures_of, 2, plain_ddp, raises_on_rank_1, raises_when_timed, plain_ddp
    ):
        assert early == {"name": "raises_on_rank_1", "error": "KeyError: 'a part'"}
        assert late == {"name": "raises_when_timed", "error": "OSError: too late"}
        assert plain["milliseconds"] > 0 and last["milliseconds"] > 0 and last["same losses"]


def test_a_contender_that_trains_wrongly_is_told_by_its_losses():
    for right, still, alone in run_on_ranks(figures_of, 2, plain_ddp, does_not_train, does_not_average):
        assert right["same losses"] and right["loss off by"] == 0
        assert not still["same losses"] and not alone["same losses"]
        assert min(still["loss off by"], alone["loss off by"]) > 2 * SAME_LOSS


# --- the command -----------------------------------------------------------------------------------------------------


def run(*options, folder):
    file = folder / "figures.json"
    command = [sys.executable, "-m", "benchmarks.peers", "--size", "tiny", "--json", str(file), *options]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr[-8000:]
    return {figures.pop("name"): figures for figures in json.loads(file.read_text())["contenders"]}, done.stdout


#: One of each kind: the features of this package are compared with plain DDP by other tests.
SOME = [PLAIN, OURS, "torch styles + DDP", "transformers tp x dp_replicate", LOCAL]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("only", [SOME, pytest.param(list(CONTENDERS), marks=pytest.mark.slow)], ids=["some", "all"])
def test_the_command_compares_those_that_are_installed(only, tmp_path):
    found, table = run("--rounds", "1", "--only", *only, folder=tmp_path)
    assert list(found) == only and all(name in table for name in only)
    here = {name: figures for name, figures in found.items() if "error" not in figures}
    absent = {name for name in only if name.startswith("DeepSpeed") and find_spec("deepspeed") is None}
    for name in found.keys() - here.keys() - absent:
        assert name in VARIANTS and name != OURS, found[name]["error"]
        assert "not available" in found[name]["error"] or "unexpected keyword" in found[name]["error"]
    for name, figures in here.items():
        assert name == LOCAL or figures["same losses"], f"{name}: {figures['loss off by']}"

    # Embedding, two a layer, the gathered logits; the head, two a layer; gradients of what is replicated, guarded.
    assert here[OURS]["collectives"]["tp"]["number"] == (1 + 2 * TINY.layers + 1) + (1 + 2 * TINY.layers) + 1
    assert here[LOCAL]["collectives"] == {} and "tp" not in here[PLAIN]["collectives"]
    model = Setting(TINY, None, "no folder").model()
    weights = sum(param.nbytes for param in model.parameters())
    assert here[PLAIN]["collectives"]["all"]["bytes"] == weights + sum(buffer.nbytes for buffer in model.buffers())
    assert weights / 2 < here[OURS]["collectives"]["dp"]["bytes"] < 0.55 * weights
    # Weights, two moments, and DDP's buckets: of the whole model, or of half of it and the norms.
    assert 4 * weights <= here[PLAIN]["held"] < here[PLAIN]["peak"]
    assert 2 * weights <= here[OURS]["held"] < here[OURS]["peak"] < here[PLAIN]["held"]
