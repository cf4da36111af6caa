"""`torch.compile` makes one graph of a sharded model, with the same numbers as without."""

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.fx_passes.micro_pipeline_tp import find_all_gather_patterns, find_reduce_scatter_patterns
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.functional import dropout, scaled_dot_product_attention

from accel_tp_ddp import parallelize
from accel_tp_ddp.core.randomness import RandomStream, _DropoutOfRank
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


@pytest.mark.parametrize(
    "model, watched, config",
    [
        ("llama", False, {}),
        ("qwen3", True, {}),
        ("gpt_neox", False, {"hidden_dropout": 0.1, "attention_dropout": 0.1}),
        ("llama", False, {"attention_dropout": 0.1}),
        ("llama", False, {"attention_dropout": 0.1, "attn_implementation": "eager"}),
    ],
)
def test_a_training_step_is_one_graph_and_is_not_compiled_again(model, watched, config):
    assert run_on_ranks(graphs, 1, model, watched, **config) == [([1, 1], True)]


def graphs_by_layer(name, config, layers, **switches):
    """How many graphs there are after each step, where each layer is compiled by itself, as Accelerate can do it."""
    torch._dynamo.reset()
    with fake_tp() as mesh:
        model = sharded(build_model(name, layers=layers, use_cache=False, **config), mesh, **switches)
        backend, counts = CompileCounterWithBackend("eager"), []
        for layer in model.base_model.layers:
            layer.compile(backend=backend)
        for step in range(2):
            model(**batch(step)).loss.backward()
            counts.append(backend.frame_count)
    return counts


@pytest.mark.parametrize(
    "model, config", [("llama", {}), ("qwen3", {}), ("gpt_neox", {"hidden_dropout": 0.1, "attention_dropout": 0.1})]
)
def test_layers_that_are_compiled_by_themselves_are_one_graph(model, config):
    """Were it one for each, dynamo would give up after eight, and run the rest as if it were not compiled."""
    assert run_on_ranks(graphs_by_layer, 1, model, config, 3) == [[1, 1]]


def test_with_the_sequence_spread_there_are_as_many_graphs_for_any_number_of_layers():
    """The first layer's and the others', each with its hooks, which are compiled as functions of their own."""
    few, many = (run_on_ranks(graphs_by_layer, 1, "llama", {}, layers, sequence_parallel=True) for layers in (3, 6))
    assert few == many


def found_by_async_tp():
    """Collectives of a compiled layer's graphs, forward and backward, and how many torch's pass for async-TP knows."""
    counts = []

    def look(graph):
        names = [str(node.target) for node in graph.nodes]
        there = [sum(kind in name for name in names) for kind in ("all_gather_into_tensor", "reduce_scatter_tensor")]
        known = [find_all_gather_patterns(graph), find_reduce_scatter_patterns(graph)]
        counts.append((there, [len(each) for each in known]))

    torch._dynamo.reset()
    with fake_tp() as mesh, torch._inductor.config.patch(post_grad_custom_post_pass=look, fx_graph_cache=False):
        model = sharded(build_model("llama", layers=1, use_cache=False), mesh, sequence_parallel=True)
        torch.compile(model)(**batch()).loss.backward()
    return counts


@pytest.mark.slow
def test_collectives_of_a_spread_sequence_have_the_form_that_async_tp_looks_for():
    ((forward, backward),) = run_on_ranks(found_by_async_tp, 1)
    for there, known in (forward, backward):
        assert there == known and there[0] >= 2 and there[1] == 2


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


def masks(p):
    """What dropout of ones gives in a compiled training step: before, within and after a region; and what it took."""
    stream = RandomStream(dist.get_rank(), "cpu", dist.get_world_size())

    def forward(ones):
        before = dropout(ones, p)
        with stream.inside():
            inside = dropout(ones, p)
        return torch.stack([before, inside, dropout(ones, p)])

    backend = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(forward, backend=backend, fullgraph=True)
    return compiled(torch.ones(64, 64)), compiled(torch.ones(64, 64)), torch.rand(3)


def test_within_a_region_each_rank_drops_out_others_and_outside_the_same():
    p = 0.25
    (first, again, then), (others, _, others_then) = run_on_ranks(masks, 2, p)
    assert first.unique().tolist() == [0, pytest.approx(1 / (1 - p))]
    shares = first.eq(0).float().mean((1, 2))
    assert (shares - p).abs().max() < 0.03
    assert first[0].equal(others[0]) and first[2].equal(others[2]) and then.equal(others_then)
    both = (first[1].eq(0) & others[1].eq(0)).float().mean().item()
    assert both == pytest.approx(p * p, abs=0.02), "drawn independently"
    assert not first.equal(again)


NOTHING = 1e-30  # a share to drop out that is not 0, and drops nothing


@pytest.mark.parametrize("heads", [4, 2])
@pytest.mark.parametrize("mask", ["none", "causal", "boolean", "added"])
def test_attention_that_is_written_out_is_torchs(mask, heads):
    query, key, value = torch.randn(2, 4, 6, 8), torch.randn(2, heads, 6, 8), torch.randn(2, heads, 6, 8)
    boolean = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()
    boolean[0, :, 0] = False  # a row of nothing but padding
    masks = {"boolean": boolean, "added": torch.randn(2, 1, 6, 6)}
    options = {"attn_mask": masks.get(mask), "is_causal": mask == "causal", "enable_gqa": heads != 4, "scale": 0.3}
    expected = scaled_dot_product_attention(query, key, value, **options)
    with _DropoutOfRank(1, 2):
        actual = scaled_dot_product_attention(query, key, value, dropout_p=NOTHING, **options)
        everything = scaled_dot_product_attention(query, key, value, dropout_p=1.0, **options)
    torch.testing.assert_close(actual, expected)
    assert everything.count_nonzero() == 0
