"""Weight gradients computed beside the sum of input gradients: the same values, in another order."""

import copy
import gc
import os
import weakref
from dataclasses import replace
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from accel_tp_ddp import TensorParallelDDPPlugin, full_gradients
from accel_tp_ddp.model.check import check_model
from accel_tp_ddp.model.parallelize import parallelize_with_map
from accel_tp_ddp.tools.simulate import Setting, simulate

from ..helpers.compare import assert_tensors_close
from ..helpers.fake_group import batch, fake_tp
from ..helpers.fake_group import sharded as shard
from ..helpers.models import build_config, build_model
from ..helpers.ranks import run_on_ranks
from ..helpers.sharded import TOLERANCE, token_batch, tp_mesh
from ..helpers.training import Spec, assert_same_run, train

FLOOR = 1e-5


def sharded(model, overlap, sequence_parallel=False):
    mesh = tp_mesh()
    least = 0 if overlap else None
    plan = replace(check_model(model, mesh), overlap=least, sequence_parallel=sequence_parallel)
    parallelize_with_map(model, mesh, plan)
    return model


class Passed(torch.autograd.graph.saved_tensors_hooks):
    """Shapes of what the graph keeps for its backward."""

    def __init__(self):
        self.shapes = []
        super().__init__(self._pack, lambda tensor: tensor)

    def _pack(self, tensor):
        self.shapes.append(tuple(tensor.shape))
        return tensor


def gradients(model):
    return {name: param.grad for name, param in model.named_parameters() if param.grad is not None}


def doubled(module, args):
    return (2 * args[0], *args[1:])


def compared(
    name,
    sequence_parallel=False,
    checkpointing=None,
    autocast=False,
    lora=False,
    hooked=False,
    length=10,
    dtype=torch.float32,
    **options,
):
    """Against the unsharded model, and to the bit against the sharded one that does not overlap."""
    reference = build_model(name, **options).to(dtype).train()
    if lora:
        torch.manual_seed(0)
        reference = get_peft_model(
            reference, LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False)
        )
    models = [sharded(copy.deepcopy(reference), overlap, sequence_parallel) for overlap in (True, False)]
    for model in (reference, *models):
        if hooked:  # a user's, by which one layer gets something else than the region
            model.model.layers[0].self_attn.k_proj.register_forward_pre_hook(doubled)
        if checkpointing is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
            model.enable_input_require_grads()
    for step in range(3):  # which layers share an input is learned in the first forward
        tokens = token_batch(step, length=length)
        losses = []
        for model in (reference, *models):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                losses.append(model(**tokens).loss)
            losses[-1].backward()
        assert losses[1].item() == losses[2].item()
        for (name, own), (_, other) in zip(models[0].named_parameters(), models[1].named_parameters()):
            assert (own.grad is None) == (other.grad is None), name
            assert own.grad is None or torch.equal(own.grad, other.grad), (name, step)
        if not autocast:
            assert_tensors_close(full_gradients(models[0]), gradients(reference), TOLERANCE, FLOOR)
    return True


OPTIONS = {
    "alone": {},
    "autocast": {"autocast": True},
    "autocast, which leaves float64 alone": {"autocast": True, "dtype": torch.float64},
    "sequence": {"sequence_parallel": True},
    "checkpointed": {"checkpointing": False},
    "checkpointed, reentrant": {"checkpointing": True},
    "sequence, checkpointed, autocast": {"sequence_parallel": True, "checkpointing": False, "autocast": True},
    "sequence, uneven": {"sequence_parallel": True, "length": 11},
    "a user's hook": {"hooked": True},
    "sequence, a user's hook": {"sequence_parallel": True, "hooked": True},
    "sequence, a user's hook, autocast": {"sequence_parallel": True, "hooked": True, "autocast": True},
    "adapters": {"lora": True},
    "tied": {"tied": True},
}


@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_are_those_without_to_the_bit(options):
    assert all(run_on_ranks(compared, 2, "llama", **OPTIONS[options]))


@pytest.mark.parametrize("model", ["qwen3", "gpt_neox", "phi3", "gpt2", "mixtral"])
def test_other_architectures(model):
    """Norms within heads, biases, fused projections, layers that are no `nn.Linear`, experts."""
    assert all(run_on_ranks(compared, 2, model))


class Order(TorchDispatchMode):
    """Names and shapes of the products and collectives within, in order."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        name = operation.overloadpacket.__name__
        if name == "mm":
            self.seen.append((name, tuple(result.shape)))
        elif name in ("allreduce_", "_reduce_scatter_base_", "_allgather_base_"):
            self.seen.append((name, None))
        return result


def order_in_the_backward(sequence_parallel, deterministic=False, least=0):
    """What follows the collectives of a layer's input gradients, before the next collective."""
    with fake_tp() as mesh:
        model = build_model("llama", layers=2)
        shard(model, mesh, overlap=least, sequence_parallel=sequence_parallel)
        torch.use_deterministic_algorithms(deterministic)
        try:
            for _ in range(2):
                loss = model(**batch()).loss
                with Order() as order:
                    loss.backward()
        finally:
            torch.use_deterministic_algorithms(False)
        layer = model.model.layers[0]
        shapes = {
            name: tuple(module.weight.shape)
            for name, module in layer.named_modules()
            if isinstance(module, nn.Linear) and name.rpartition(".")[2] not in ("o_proj", "down_proj")
        }
    return order.seen, shapes


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["all-reduce", "reduce-scatter"])
def test_a_layers_weight_gradients_follow_the_start_of_its_collective(sequence_parallel):
    ((seen, shapes),) = run_on_ranks(order_in_the_backward, 1, sequence_parallel)
    kind = "_reduce_scatter_base_" if sequence_parallel else "allreduce_"
    after = []
    for index, (name, _) in enumerate(seen):
        if name == kind:
            run = []
            for follower, shape in seen[index + 1 :]:
                if follower != "mm":
                    break
                run.append(shape)
            after.append(run)
    attention = sorted(shape for name, shape in shapes.items() if "attn" in name)
    mlp = sorted(shape for name, shape in shapes.items() if "mlp" in name)
    # Each run begins with the weights' gradients, and goes on with the products of the layer before.
    assert sum(sorted(run[: len(attention)]) == attention for run in after) == 2
    assert sum(sorted(run[: len(mlp)]) == mlp for run in after) == 2


@pytest.mark.parametrize("why", [{"deterministic": True}, {"least": 2 * 10 * 64 + 1}], ids=["deterministic", "small"])
def test_it_is_off_where_algorithms_are_to_be_deterministic_and_for_small_inputs(why):
    ((seen, shapes),) = run_on_ranks(order_in_the_backward, 1, False, **why)
    weights = set(shapes.values())
    starts = [index for index, (name, _) in enumerate(seen) if name == "allreduce_"]
    assert starts and not any(seen[index + 1][1] in weights for index in starts if index + 1 < len(seen))


def uneven_slices(least):
    """Of nine tokens the first rank has five and the second four; whether the input is small is not of the slice."""
    model, plain = build_model("llama").train(), build_model("llama").train()
    mesh = tp_mesh()
    parallelize_with_map(model, mesh, replace(check_model(model, mesh), overlap=least, sequence_parallel=True))
    kinds = []
    for step in range(2):
        ids = token_batch(step, samples=2, length=9)
        for each in (model, plain):
            each.zero_grad()
            with Order() as order:
                each(**ids).loss.backward()
            kinds += [[name for name, _ in order.seen if name != "mm"]] if each is model else []
    assert_tensors_close(full_gradients(model), gradients(plain), TOLERANCE, FLOOR)
    return kinds[-1]


@pytest.mark.parametrize("smaller", [0, 1], ids=["large", "small"])
def test_ranks_agree_on_what_is_large_where_they_have_slices_of_several_lengths(smaller):
    whole = 2 * 9 * 64
    first, second = run_on_ranks(uneven_slices, 2, whole + smaller)
    assert first == second
    regathered = first.count("_allgather_base_") > run_on_ranks(uneven_slices, 2, None)[0].count("_allgather_base_")
    assert regathered is not bool(smaller)


def kept_for_the_backward(sequence_parallel):
    """Elements that the graph keeps, of the first forward and of the second."""
    with fake_tp() as mesh:
        model = build_model("llama", layers=2)
        shard(model, mesh, overlap=0, sequence_parallel=sequence_parallel)
        counts = []
        for _ in range(2):
            passed = Passed()
            with passed:
                model(**batch()).loss
            counts.append(sum(torch.Size(shape).numel() for shape in passed.shapes))
    return counts


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_the_graph_keeps_as_much_in_the_first_step_as_later(sequence_parallel):
    """Or what is computed again by checkpointing, once it is known who shares an input, would not fit."""
    ((first, second),) = run_on_ranks(kept_for_the_backward, 1, sequence_parallel)
    assert first == second


def kept_by_layers(overlap):
    """Bytes that four layers keep for the backward on one of four ranks, the sequence spread."""

    def build(layers):
        return AutoModelForCausalLM.from_config(build_config("llama", layers=layers, hidden_size=128))

    plugin = {"sequence_parallel": True, "overlap": overlap}
    few, many = (simulate(partial(build, layers), Setting(4, 1, 2, 64, plugin=plugin)) for layers in (2, 6))
    return many.kept - few.kept


@pytest.mark.usefixtures("no_accelerator")
def test_with_the_sequence_spread_a_layer_keeps_its_slice_of_what_blocks_are_given():
    whole = 2 * 64 * 128 * 4  # of a block's input, in float32
    assert kept_by_layers(False) - kept_by_layers(True) == 4 * 2 * (whole - whole // 4)


def gradients_in_parts():
    """Of a retained graph: of an activation alone, then of everything, then once more."""
    model, plain = build_model("llama").train(), build_model("llama").train()
    sharded(model, True)
    found = []
    for each in (model, plain):
        each(**token_batch()).loss.backward()
        each.zero_grad()
        inside = []
        hook = each.model.layers[1].mlp.register_forward_hook(lambda module, args, output: inside.append(args[0]))
        loss = each(**token_batch()).loss
        hook.remove()
        (of_input,) = torch.autograd.grad(loss, inside, retain_graph=True)
        (of_weight,) = torch.autograd.grad(loss, [each.model.norm.weight], retain_graph=True)
        loss.backward(retain_graph=True)
        loss.backward()
        found.append((of_input, of_weight))
    for own, other in zip(*found):
        assert torch.allclose(own, other, atol=1e-6)
    assert_tensors_close(full_gradients(model), gradients(plain), TOLERANCE, FLOOR)
    return True


def test_a_graph_may_be_walked_in_parts_and_twice():
    assert all(run_on_ranks(gradients_in_parts, 2))


def frozen_and_thawed():
    """A layer's weights train or not from step to step, and a layer that shares an input may be left out."""
    model, plain = build_model("llama").train(), build_model("llama").train()
    sharded(model, True)
    for step in range(4):
        for each in (model, plain):
            each.model.layers[0].self_attn.k_proj.requires_grad_(step % 2 == 1)
            each.model.layers[1].mlp.gate_proj.requires_grad_(step % 2 == 0)
            each(**token_batch(step)).loss.backward()
        assert_tensors_close(full_gradients(model), gradients(plain), TOLERANCE, FLOOR)
    return True


def test_weights_that_are_frozen_in_between():
    assert all(run_on_ranks(frozen_and_thawed, 2))


def train_overlapping(spec):
    os.environ["ACCEL_TP_DDP_OVERLAP"] = "true"
    return train(spec)


def test_a_run_over_replicas_is_that_of_plain_ddp():
    """With accumulation and clipping; DDP's buckets start in between."""
    spec = Spec(model="llama", accumulation=2)
    assert_same_run(run_on_ranks(train_overlapping, 4, replace(spec, tp=2)), run_on_ranks(train, 2, spec))


def nothing_is_left():
    """How many graphs are alive after a step: cycles would keep them until Python looks for them."""
    model = sharded(build_model("llama").train(), True)
    alive = []
    gc.collect()
    gc.disable()
    try:
        for step in range(3):
            output = model(**token_batch(step))
            alive.append(weakref.ref(output.logits))
            output.loss.backward()
            del output
            model.zero_grad()
        return [each() is None for each in alive]
    finally:
        gc.enable()


def test_a_graph_is_freed_by_itself():
    for freed in run_on_ranks(nothing_is_left, 2):
        assert all(freed)


def test_what_it_may_be():
    for value in ("sometimes", 2):
        with pytest.raises(ValueError, match='overlap is .* it has to be "auto", true or false'):
            TensorParallelDDPPlugin(tp_size=1, overlap=value)
