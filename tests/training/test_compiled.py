"""What Accelerate compiles trains as plain DDP does, and is one graph, or one for all layers."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import TorchDynamoPlugin
from torch._dynamo.utils import counters

from accel_tp_ddp import TensorParallelDDPPlugin, full_state_dict

from ..helpers.compare import assert_tensors_close
from ..helpers.models import VOCABULARY, build_model
from ..helpers.ranks import run_on_ranks

LAYERS, STEPS = 3, 3


def trained(tp, how, backend, loss_parallel=False):
    """Losses over all replicas, full weights, the number of graphs and of breaks, and whether logits were deferred."""
    torch._dynamo.reset()
    counters.clear()
    dynamo = TorchDynamoPlugin(backend=backend, use_regional_compilation=how == "by layer") if how else None
    plugin = TensorParallelDDPPlugin(tp_size=tp, loss_parallel=loss_parallel) if tp else None
    accelerator = Accelerator(cpu=True, dynamo_plugin=dynamo, parallelism_config=plugin)
    model = build_model("llama", layers=LAYERS, use_cache=False)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    generator = torch.Generator().manual_seed(1)
    losses, deferred = [], False
    for _ in range(STEPS):
        ids = torch.randint(1, VOCABULARY, (2, 4, 10), generator=generator)[accelerator.process_index]
        output = model(input_ids=ids, labels=ids)
        deferred = hasattr(output.logits, "full_tensor")
        accelerator.backward(output.loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(output.loss.detach(), "mean").item())
    graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    weights = {name: value.clone() for name, value in full_state_dict(model).items()}
    return SimpleNamespace(losses=losses, weights=weights, graphs=graphs, breaks=breaks, deferred=deferred)


def assert_same_training(sharded, plain):
    for own in sharded:
        assert own.losses == pytest.approx(plain.losses, rel=1e-5)
        assert own.weights.keys() == plain.weights.keys()
        assert_tensors_close(own.weights, plain.weights, 1e-4)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("how, graphs", [("whole", 1), ("by layer", 7)])
def test_a_compiled_model_trains_as_plain_ddp(how, graphs, backend):
    """By layer: the two embeddings, the first layer, in which late adapters are looked for, the others, the norm, and
    two of the head, whose entry is a hook."""
    plain, compiled = (run_on_ranks(trained, 2, None, *each)[0] for each in ((None, None), (how, "eager")))
    sharded = run_on_ranks(trained, 4, 2, how, backend)
    assert_same_training(sharded, plain)
    assert {(own.graphs, own.breaks) for own in sharded} == {(graphs, compiled.breaks)}


def test_a_loss_of_parts_of_the_vocabulary_stays_where_layers_are_compiled():
    plain = run_on_ranks(trained, 2, None, None, None)[0]
    sharded = run_on_ranks(trained, 4, 2, "by layer", "eager", True)
    assert_same_training(sharded, plain)
    assert {(own.graphs, own.breaks, own.deferred) for own in sharded} == {(5, 0, True)}
