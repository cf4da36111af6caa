"""`torch.compile` makes one graph of a sharded model, with the same numbers as without."""

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import init_device_mesh

from accel_tp_ddp import parallelize
from accel_tp_ddp.training.same_batch import watch_batches

from ..helpers.fake_group import batch, fake_tp, sharded
from ..helpers.models import build_model
from ..helpers.ranks import run_on_ranks

TOLERANCE = 1e-5


def graphs(name, watched=False, steps=2, **config):
    """How many graphs there are after each step."""
    torch._dynamo.reset()
    with fake_tp() as mesh:
        model = sharded(build_model(name, **config), mesh)
        if watched:
            watch_batches(model, mesh, 1)
        backend = CompileCounterWithBackend("aot_eager")
        compiled, counts = torch.compile(model, backend=backend), []
        for step in range(steps):
            compiled(**batch(step)).loss.backward()
            counts.append(backend.frame_count)
        gradients = [param.grad is not None for param in model.parameters()]
    return counts, all(gradients)


@pytest.mark.parametrize("model, watched", [("llama", False), ("qwen3", True)])
def test_a_training_step_is_one_graph_and_is_not_compiled_again(model, watched):
    assert run_on_ranks(graphs, 1, model, watched) == [([1, 1], True)]


def both_ways(name, **config):
    """The largest difference that compiling makes, of the loss and of the gradients, and how many graphs there are."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    model = parallelize(build_model(name, **config), mesh)
    torch._dynamo.reset()
    backend = CompileCounterWithBackend("aot_eager")
    results = []
    for called in (model, torch.compile(model, backend=backend)):
        model.zero_grad()
        loss = called(**batch()).loss
        loss.backward()
        results.append([loss.detach(), *(param.grad for param in model.parameters())])
    return max((a - b).abs().max().item() for a, b in zip(*results)), backend.frame_count


@pytest.mark.parametrize("model", ["llama", "qwen3"])
def test_a_compiled_model_gives_the_loss_and_the_gradients_of_the_eager_one(model):
    for difference, count in run_on_ranks(both_ways, 2, model):
        assert difference < TOLERANCE and count == 1


def compiled_forwards(every):
    """The batch depends on the rank from the second forward on."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    model = parallelize(build_model("llama"), mesh)
    watch_batches(model, mesh, every)
    compiled = torch.compile(model, backend="eager")
    for step in range(3):
        compiled(**batch(step and dist.get_rank()))


def test_the_batches_of_a_compiled_model_are_compared():
    for error in run_on_ranks(compiled_forwards, 2, 2, expect_raise=True):
        assert error.type_name == "ValueError" and "forward number 3" in error.message
