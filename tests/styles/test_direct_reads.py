"""Code that reads a sharded weight outside its module's forward gets what it would get without tensor parallelism."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.functional import cross_entropy, linear

from accel_tp_ddp import full_gradients, parallelize

from ..helpers.compare import assert_tensors_close
from ..helpers.models import VOCABULARY, build_model
from ..helpers.ranks import run_on_ranks

IDS = torch.arange(24).view(2, 12) % VOCABULARY


class FusedLoss(nn.Module):
    """A loss that never calls the output layer, as TRL's and Liger's do not."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        hidden = self.model.model(input_ids=ids).last_hidden_state[:, :-1]
        head = self.model.get_output_embeddings()
        assert head.weight.shape == (VOCABULARY, hidden.size(-1))
        assert head.weight is head.weight  # gathered once
        return cross_entropy(linear(hidden, head.weight, head.bias).flatten(0, 1), ids[:, 1:].flatten())


def loss_and_gradients(tp, tied):
    torch.manual_seed(0)
    model = FusedLoss(build_model("llama", tied=tied))
    local = None
    if tp > 1:
        mesh = init_device_mesh("cpu", (tp,), mesh_dim_names=("tp",))
        plan = {f"model.{name}": style for name, style in model.model.tp_plan.items()}
        parallelize(model, mesh, plan)
        head = model.model.get_output_embeddings()
        local = (tuple(head.weight.shape), head.weight is dict(head.named_parameters())["weight"], repr(head))
        assert isinstance(head, nn.Linear) and type(head).__name__ == "Linear"
    loss = model(IDS)
    loss.backward()
    gradients = full_gradients(model) if tp > 1 else {n: p.grad for n, p in model.named_parameters()}
    return loss.item(), gradients, local


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("tp", [2, 4])
def test_a_fused_loss_reads_the_full_output_weight(tp, tied):
    loss, gradients, _ = loss_and_gradients(1, tied)
    for actual, grads, (shape, is_parameter, shown) in run_on_ranks(loss_and_gradients, tp, tp, tied):
        assert actual == pytest.approx(loss, rel=1e-6)
        assert_tensors_close(grads, gradients, 1e-5)
        assert shape[0] < VOCABULARY and is_parameter, "outside a forward it is this rank's parameter"
        assert shown == f"Linear(in_features={shape[1]}, out_features={VOCABULARY}, bias=False)"


class Distilled(nn.Module):
    """A student whose loss multiplies with its teacher's output weight, after the teacher's own forward."""

    def __init__(self, student, teacher):
        super().__init__()
        self.model = student
        self.teacher = [teacher]  # no submodule of it

    def forward(self, ids):
        (teacher,) = self.teacher
        with torch.no_grad():
            theirs = teacher.model(input_ids=ids).last_hidden_state
            target = linear(theirs, teacher.get_output_embeddings().weight).softmax(-1)
        hidden = self.model.model(input_ids=ids).last_hidden_state
        return cross_entropy(
            linear(hidden, self.model.get_output_embeddings().weight).flatten(0, 1), target.flatten(0, 1)
        )


def distilled(tp):
    student, teacher = build_model("llama"), build_model("qwen3", seed=3).requires_grad_(False)
    model = Distilled(student, teacher)
    if tp > 1:
        mesh = init_device_mesh("cpu", (tp,), mesh_dim_names=("tp",))
        parallelize(model, mesh, {f"model.{name}": style for name, style in student.tp_plan.items()})
        parallelize(teacher, mesh)
    loss = model(IDS)
    loss.backward()
    outside = tuple(teacher.lm_head.weight.shape)
    gradients = full_gradients(model) if tp > 1 else {n: p.grad for n, p in model.named_parameters()}
    return loss.item(), gradients, outside


def test_a_students_loss_reads_the_full_weight_of_its_teacher():
    loss, gradients, _ = distilled(1)
    for actual, grads, outside in run_on_ranks(distilled, 2, 2):
        assert actual == pytest.approx(loss, rel=1e-6) and outside[0] < VOCABULARY
        assert_tensors_close(grads, gradients, 1e-5)


def gathered_reads():
    """How often a forward gathers the weight, and whether anything of it is left after an exception."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    model = FusedLoss(build_model("llama"))
    parallelize(model, mesh, {f"model.{name}": style for name, style in model.model.tp_plan.items()})
    head = model.model.lm_head

    def fail(*args):
        raise KeyError("on purpose")

    with torch.no_grad():
        model(IDS)
    handle = model.model.model.norm.register_forward_hook(fail)
    with pytest.raises(KeyError):
        model(IDS)
    handle.remove()
    region = head.forward.__self__.region
    after = (region.running, len(region.full), head.weight.shape[0])
    copied = copy.deepcopy(model)
    loss, other = model(IDS).item(), copied(IDS).item()
    types = type(copied.model.lm_head) is type(head), type(head) is not nn.Linear
    return after, loss == other, types


def test_no_full_weight_is_left_after_an_exception_and_copies_read_full_weights_too():
    for after, same, types in run_on_ranks(gathered_reads, 2):
        assert after[:2] == (0, 0) and after[2] < VOCABULARY
        assert same and all(types)


def pickled_head():
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    model = parallelize(build_model("llama"), mesh)
    head = model.lm_head
    call = head.forward.__self__
    call.region.mesh = call.shards = None  # a mesh is not pickled
    state = head.__reduce_ex__(2)
    rebuild, arguments = state[0], state[1]
    return isinstance(rebuild(*pickle.loads(pickle.dumps(arguments))), type(head))


def test_a_module_with_direct_reads_can_be_pickled():
    assert run_on_ranks(pickled_head, 2) == [True, True]


def resized():
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    model = build_model("llama")
    model.resize_token_embeddings(VOCABULARY + 8)
    parallelize(model, mesh).resize_token_embeddings(VOCABULARY)


def test_resizing_a_sharded_vocabulary_is_refused():
    for raised in run_on_ranks(resized, 2, expect_raise=True):
        assert "Call it before `prepare`" in raised.message
