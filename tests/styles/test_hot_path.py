"""What a sharded layer costs besides its collectives: copies, bytes of a collective, memory that gradients hold."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from accel_tp_ddp import parallelize
from accel_tp_ddp.core.collectives import reduce_from_tp

from ..helpers.fake_group import BATCH, LENGTH, Operations, batch, fake_tp, sharded
from ..helpers.models import build_model
from ..helpers.ranks import run_on_ranks

HIDDEN_STATES = (BATCH, LENGTH, 64)
LAYERS = 4


def operations(name, autocast=False, **config):
    """Those of a forward and of a backward."""
    with fake_tp() as mesh:
        model = sharded(build_model(name, layers=LAYERS, **config), mesh)
        with Operations() as forward, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(**batch()).loss
        with Operations() as backward:
            loss.backward()
        wasted = sum(p.grad.untyped_storage().nbytes() > p.grad.nbytes for p in model.parameters())
    return forward, backward, wasted


def copies_of_hidden_states(name):
    forward, _, _ = operations(name)
    return forward.count("aten::clone", shape=HIDDEN_STATES), forward.count("c10d::allreduce_")


@pytest.mark.parametrize("model", ["llama", "gpt_neox"])  # without and with biases
def test_no_hidden_states_are_copied_before_they_are_summed(model):
    assert run_on_ranks(copies_of_hidden_states, 1, model) == [(0, 1 + 2 * LAYERS)]


def all_reduces_in_float32(name):
    forward, backward, _ = operations(name, autocast=True)
    counts = [each.count("c10d::allreduce_", dtype=torch.float32, shape=HIDDEN_STATES) for each in (forward, backward)]
    return counts, backward.count("c10d::allreduce_", dtype=torch.bfloat16)


@pytest.mark.parametrize("model", ["llama", "qwen3"])
def test_under_autocast_hidden_states_are_summed_in_bf16_but_for_the_embeddings(model):
    assert run_on_ranks(all_reduces_in_float32, 1, model) == [([1, 0], 1 + 2 * LAYERS)]


def gradients_in_larger_buffers(name):
    return operations(name)[2]


def test_no_gradient_keeps_a_larger_buffer_in_memory():
    assert run_on_ranks(gradients_in_larger_buffers, 1, "qwen3") == [0]


def autocast_both_ways(name):
    """How far the gradients under bf16 autocast are from those in float32, sharded and not, relatively."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    model = build_model(name)
    exact, plain = copy.deepcopy(model), copy.deepcopy(model)
    parallelize(model, mesh)
    for each, autocast in ((exact, False), (plain, True), (model, True)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = each(**batch()).loss
        loss.backward()
    errors = {"plain": [], "sharded": []}
    for (_, param), of_plain, of_exact in zip(model.named_parameters(), plain.parameters(), exact.parameters()):
        grad = param.tp_shard.full_tensor(param.grad) if param.tp_shard else param.grad
        assert grad.dtype is torch.float32
        for kind, other in (("plain", of_plain.grad), ("sharded", grad)):
            errors[kind].append(((other - of_exact.grad).norm() / of_exact.grad.norm()).item())
    return max(errors["plain"]), max(errors["sharded"])


@pytest.mark.parametrize("model", ["llama", "qwen3"])
def test_gradients_under_autocast_are_as_near_to_those_in_float32_as_without_sharding(model):
    for plain, own in run_on_ranks(autocast_both_ways, 2, model):
        assert own < 1.5 * plain


def dtypes_seen():
    with fake_tp() as mesh:
        model = sharded(build_model("llama"), mesh)
        seen = []
        attention = model.model.layers[0].self_attn
        attention.k_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
        attention.v_proj.register_forward_hook(lambda module, args, output: seen.append(args[0].dtype))
        with torch.autocast("cpu", torch.bfloat16):
            model(**batch()).loss.backward()
    return seen


def test_a_hook_sees_the_input_as_without_sharding_under_autocast_too():
    assert run_on_ranks(dtypes_seen, 1) == [[torch.float32, torch.float32]]


def sums_in_place():
    """Whether the result is the input: in a forward that wants gradients, one that wants none; of a view, a leaf."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    weight, x = torch.ones(3, 2, requires_grad=True), torch.full((4, 2), 1.0 + dist.get_rank())
    same = {}
    product = torch.nn.functional.linear(x, weight)
    total = reduce_from_tp(mesh, product, fresh=True)
    (2 * total).sum().backward()
    right = total.tolist() == [[6.0] * 3] * 4 and weight.grad.tolist() == [(8 * x[0]).tolist()] * 3
    same["product"] = total is product, right
    with torch.no_grad():
        product = torch.nn.functional.linear(x, weight)
        same["without gradients"] = reduce_from_tp(mesh, product, fresh=True) is product
    view = torch.nn.functional.linear(x, weight)[:2]
    same["view"] = reduce_from_tp(mesh, view, fresh=True) is view
    same["leaf"] = reduce_from_tp(mesh, weight, fresh=True) is weight
    same["not fresh"] = reduce_from_tp(mesh, x) is x
    return same


def test_only_a_fresh_tensor_that_is_no_view_and_no_leaf_is_summed_in_place():
    for same in run_on_ranks(sums_in_place, 2):
        assert same == {
            "product": (True, True),
            "without gradients": True,
            "view": False,
            "leaf": False,
            "not fresh": False,
        }
