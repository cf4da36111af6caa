"""Two all-reduces forward and two backward per decoder layer, one for the embedding, one and a gather for the head."""

from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode

from accel_tp_ddp import parallelize

from ..helpers.collectives import CollectiveCalls
from ..helpers.models import ARCHITECTURES, VOCABULARY, build_model
from ..helpers.ranks import run_on_ranks

BATCH, LENGTH, HIDDEN = 2, 10, 64
MODEL = pytest.mark.parametrize("model", ARCHITECTURES)
TP = pytest.mark.parametrize("tp", [2, 4])


def build(model, layers, tied=False):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    return parallelize(build_model(model, layers=layers, tied=tied), mesh)


def inputs():
    ids = torch.randint(1, VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


def counted_by_torch(model, layers, tied=False):
    """Forward and backward within one `with`: the mode cannot be entered a second time for the backward."""
    built, batch = build(model, layers, tied), inputs()
    with CommDebugMode() as mode:
        loss = built(**batch).loss
        forward = Counter({operation.__name__: count for operation, count in mode.get_comm_counts().items()})
        loss.backward()
        both = Counter({operation.__name__: count for operation, count in mode.get_comm_counts().items()})
    return forward, both - forward


def counted_by_calls(model, layers, training=True):
    built, batch = build(model, layers), inputs()
    with torch.set_grad_enabled(training), CollectiveCalls() as recorded:
        loss = built(**batch).loss
        forward = recorded.sizes
        if training:
            loss.backward()
    return forward, recorded.sizes[len(forward) :]


@TP
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@MODEL
def test_a_layer_takes_two_all_reduces_forward_and_two_backward(model, tied, tp):
    forward, backward = {}, {}
    for layers in (2, 4):
        counts = run_on_ranks(counted_by_torch, tp, model, layers, tied)
        assert all(other == counts[0] for other in counts)
        forward[layers], backward[layers] = counts[0]
    assert forward[4] - forward[2] == {"allreduce_": 4}
    assert backward[4] - backward[2] == {"allreduce_": 4}
    assert forward[2] == {"allreduce_": 1 + 2 * 2, "_allgather_base_": 1}
    assert backward[2] == {"allreduce_": 1 + 2 * 2}


@TP
@MODEL
def test_each_all_reduce_carries_the_hidden_states_and_no_more(model, tp):
    """Counted without a debug mode, whose module hooks might hide a collective or make one."""
    hidden = BATCH * LENGTH * HIDDEN
    logits = BATCH * LENGTH * -(-VOCABULARY // tp)  # padded to the longest slice
    summed = 1 + 2 * 2  # the embedding, and attention and MLP of each layer
    head_norms = 2 * 16 if model == "qwen3" else 0  # ride along with the gradient of their attention's input
    for forward, backward in run_on_ranks(counted_by_calls, tp, model, 2):
        assert forward == [("all_reduce", hidden)] * summed + [("all_gather_into_tensor", logits)]
        mlp, attention = ("all_reduce", hidden), ("all_reduce", hidden + head_norms)
        assert backward == [("all_reduce", hidden), mlp, attention, mlp, attention]


# Per layer: attention, then the MLP or the experts. Each carries the hidden states, but for what rides along.
HIDDEN_STATES, TOKENS = BATCH * LENGTH * HIDDEN, BATCH * LENGTH


def attention_gradients(model):
    """What is all-reduced in the backward of an attention block."""
    latent = 24 * TOKENS  # the up-projection's input
    return {
        "deepseek_v2": [4 * TOKENS, latent, HIDDEN_STATES],  # shared rotary keys; keys and values; queries
        "llama_one_key": [HIDDEN_STATES + 2 * 8 * HIDDEN],  # with the gradients of both shared heads
    }.get(model, [HIDDEN_STATES])


@pytest.mark.parametrize("model", ["mixtral", "gpt_oss", "deepseek_v2", "llama_one_key"])
def test_experts_latent_attention_and_shared_heads_add_only_their_own_collectives(model):
    routed = HIDDEN_STATES + 2 * TOKENS  # the two experts' weights for each token ride along
    last = [HIDDEN_STATES] if model == "llama_one_key" else [routed]
    if model == "deepseek_v2":
        last = [HIDDEN_STATES, routed]  # the shared experts, which run after the routed ones
    for forward, backward in run_on_ranks(counted_by_calls, 2, model, 2):
        reductions = 1 + 4 + (model == "deepseek_v2")  # whose second layer has shared experts too
        assert [name for name, _ in forward] == ["all_reduce"] * reductions + ["all_gather_into_tensor"]
        assert {size for name, size in forward if name == "all_reduce"} == {HIDDEN_STATES}
        sizes = [size for name, size in backward if name == "all_reduce"]
        assert len(sizes) == len(backward)
        layer = sorted([*last, *attention_gradients(model)])
        assert sizes[0] == HIDDEN_STATES and sorted(sizes[1 : 1 + len(layer)]) == layer


@TP
@MODEL
def test_without_gradients_there_are_forward_collectives_only(model, tp):
    with_gradients = run_on_ranks(counted_by_calls, tp, model, 2)
    without = run_on_ranks(counted_by_calls, tp, model, 2, training=False)
    assert [forward for forward, _ in without] == [forward for forward, _ in with_gradients]
    assert all(backward == [] for _, backward in without)
