"""Models that torch or transformers has parallelized, and plans of torch styles, against the unsharded model.

Such models compute on DTensors; outside of a forward their parameters are local, and they train as the others do.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from transformers import AutoModelForCausalLM
from transformers.distributed.tensor_parallel import apply_tensor_parallelism

from accel_tp_ddp import TensorParallelDDPPlugin, full_gradients, full_state_dict, localize

from ..helpers.compare import assert_tensors_close, relative_error
from ..helpers.models import LAYERS, build_model
from ..helpers.ranks import run_on_ranks
from ..helpers.training import make_optimizer
from ..helpers.versions import needs_uneven_shards

VOCABULARY = 132  # torch styles in a plan have to divide evenly
UNEVEN = 131
STEPS, MICROBATCHES, BATCH, LENGTH = 3, 2, 4, 8
MAX_NORM = 0.5
GRADIENTS, RESULTS = 1e-4, 1e-3  # relative; seen: below 1e-5

KINDS = ["torch", "plan", "transformers"]
ARCHITECTURES = ["llama", "qwen3"]


def tiny(architecture: str, tied: bool = False, vocabulary: int = VOCABULARY) -> nn.Module:
    return build_model(architecture, tied=tied, vocab_size=vocabulary)


# --- the same model, parallelized in four ways -----------------------------------------------------------------------


def torch_plan() -> dict[str, Any]:
    """For `TensorParallelDDPPlugin(tp_plan=...)`: activations are replicated between the layers."""
    columns = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"]
    return {
        **{f"model.layers.*.{name}": ColwiseParallel() for name in columns},
        **{f"model.layers.*.{name}": RowwiseParallel() for name in ("self_attn.o_proj", "mlp.down_proj")},
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
        "lm_head": ColwiseParallel(output_layouts=Replicate()),
    }


def parallelize_with_torch(model: nn.Module, mesh: Any) -> None:
    """As torchtitan does it: norms and residuals are sharded over the sequence."""
    layer_plan = {
        "input_layernorm": SequenceParallel(),
        "post_attention_layernorm": SequenceParallel(),
        "self_attn": PrepareModuleInput(
            input_kwarg_layouts={"hidden_states": Shard(1)},
            desired_input_kwarg_layouts={"hidden_states": Replicate()},
        ),
        "self_attn.q_proj": ColwiseParallel(),
        "self_attn.k_proj": ColwiseParallel(),
        "self_attn.v_proj": ColwiseParallel(),
        "self_attn.o_proj": RowwiseParallel(output_layouts=Shard(1)),
        "mlp": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
        "mlp.gate_proj": ColwiseParallel(),
        "mlp.up_proj": ColwiseParallel(),
        "mlp.down_proj": RowwiseParallel(output_layouts=Shard(1)),
    }
    if hasattr(model.model.layers[0].self_attn, "q_norm"):  # sharded over the heads
        norm = {"sequence_dim": 2, "use_local_output": True}
        layer_plan |= {"self_attn.q_norm": SequenceParallel(**norm), "self_attn.k_norm": SequenceParallel(**norm)}
    parallelize_module(
        model,
        mesh,
        {
            "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
            "model.layers.0": PrepareModuleInput(
                input_layouts=(Replicate(),), desired_input_layouts=(Shard(1),), use_local_output=True
            ),
            "model.norm": SequenceParallel(),
            "lm_head": ColwiseParallel(output_layouts=Replicate()),
        },
    )
    for layer in model.model.layers:
        parallelize_module(layer, mesh, layer_plan)
    whole = PrepareModuleOutput(output_layouts=Shard(1), desired_output_layouts=Replicate())
    parallelize_module(model.model.norm, mesh, whole)


def plan_for_transformers(model: nn.Module) -> dict[str, str]:
    """The model's own plan, as transformers itself applies it: newer releases number the layers in place of `*` first.

    They also shard the input embedding without a rule in the config; here the older ones (5.20) are given one.
    """
    plan = {"model.embed_tokens": "embedding_rowwise", **model.tp_plan}
    return model._expand_parallel_plan(plan) if hasattr(model, "_expand_parallel_plan") else plan


def parallelized(kind: str, model: nn.Module, mesh: Any) -> nn.Module:
    if kind == "torch":
        parallelize_with_torch(model, mesh)
    elif kind == "transformers":
        apply_tensor_parallelism(model, mesh, plan_for_transformers(model))
    if kind != "plan" and model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight  # parallelized one by one, they have come apart
    assert (kind == "plan") != any(isinstance(param, DTensor) for param in model.parameters())
    return model


def accelerator_for(kind: str) -> Accelerator:
    plan = torch_plan() if kind == "plan" else "auto"
    return Accelerator(parallelism_config=TensorParallelDDPPlugin(tp_size=2, tp_plan=plan))


# --- what every rank does --------------------------------------------------------------------------------------------


@dataclass
class Run:
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: list[dict[str, torch.Tensor]] = field(default_factory=list)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)


def tokens(seed: int) -> torch.Tensor:
    return torch.randint(0, UNEVEN, (BATCH, LENGTH), generator=torch.Generator().manual_seed(seed))


def own(batch: torch.Tensor, accelerator: Accelerator) -> torch.Tensor:
    replicas = accelerator.parallelism_config.dp_replicate_size
    return batch.chunk(replicas)[accelerator.data_parallel_rank if replicas > 1 else 0]


def loss_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, labels=ids).loss


def gradients_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: param.grad.clone() for name, param in model.named_parameters()}


def assert_local(model: nn.Module, names: list[str], objects: list[nn.Parameter]) -> None:
    found = list(model.named_parameters())
    assert [name.removeprefix("module.") for name, _ in found] == names
    assert all(param is known for (_, param), known in zip(found, objects, strict=True)), "an object has changed"
    assert not [name for name, param in found if isinstance(param, DTensor)]
    modules = [
        name for name, module in model.named_modules() for p in module._parameters.values() if type(p) is DTensor
    ]
    assert not modules


def train_plain(architecture: str, tied: bool = False, vocabulary: int = VOCABULARY) -> Run:
    """The unsharded model in one process."""
    model, run = tiny(architecture, tied, vocabulary), Run()
    optimizer = make_optimizer(model)
    for step in range(STEPS):
        for micro in range(MICROBATCHES):
            loss = loss_of(model, tokens(10 * step + micro))
            run.losses.append(loss.item())
            (loss / MICROBATCHES).backward()
        run.gradients.append(gradients_of(model))
        run.norms.append(nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM).item())
        optimizer.step()
        optimizer.zero_grad()
    run.weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    return run


def train(
    kind: str, architecture: str, tied: bool = False, vocabulary: int = VOCABULARY, folder: str | None = None
) -> Run:
    accelerator = accelerator_for(kind)
    plain = tiny(architecture, tied, vocabulary)
    names = [name for name, _ in plain.named_parameters()]
    if folder is None:
        model = parallelized(kind, plain, accelerator.torch_device_mesh["tp"])
    else:
        from transformers.distributed import DistributedConfig

        model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=2))
        assert any(isinstance(param, DTensor) for param in model.parameters())
    before = list(model.parameters())
    optimizer = make_optimizer(model)
    model, optimizer = accelerator.prepare(model, optimizer)
    objects, run = list(model.parameters()), Run()
    if kind == "plan":
        assert all(param is known for param, known in zip(objects, before, strict=True))
    assert_local(model, names, objects)
    trained = [param for group in optimizer.param_groups for param in group["params"]]
    assert {id(param) for param in trained} == {id(param) for param in objects} and len(trained) == len(objects)
    for step in range(STEPS):
        for micro in range(MICROBATCHES):
            last = micro == MICROBATCHES - 1
            with nullcontext() if last else accelerator.no_sync(model):
                loss = loss_of(model, own(tokens(10 * step + micro), accelerator))
                assert_local(model, names, objects)
                (loss / MICROBATCHES).backward()
            run.losses.append(accelerator.gather(loss.detach()).mean().item())
        run.gradients.append(full_gradients(model))
        run.norms.append(float(accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)))
        optimizer.step()
        optimizer.zero_grad()
        assert_local(model, names, objects)
    if tied:
        bare = accelerator.unwrap_model(model)
        assert bare.lm_head.weight is bare.model.embed_tokens.weight
    run.weights = full_state_dict(model)
    return run


@pytest.fixture(scope="module")
def plain():
    """The unsharded run of each model, computed once."""
    known = {}

    def get(*model):
        if model not in known:
            (known[model],) = run_on_ranks(train_plain, 1, *model)
        return known[model]

    return get


def assert_same_run(runs: list[Run], expected: Run) -> None:
    assert len(expected.gradients) == STEPS and min(expected.norms) > MAX_NORM, "the case is to clip"
    for run in runs:
        for gradients, wanted in zip(run.gradients, expected.gradients, strict=True):
            assert_tensors_close(gradients, wanted, GRADIENTS)
        assert run.losses == pytest.approx(expected.losses, rel=RESULTS)
        assert run.norms == pytest.approx(expected.norms, rel=RESULTS)
        assert_tensors_close(run.weights, expected.weights, RESULTS)


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_was_on_dtensors_trains_as_the_unsharded_one(plain, kind, architecture):
    assert_same_run(run_on_ranks(train, 4, kind, architecture), plain(architecture))


@pytest.mark.parametrize("kind", ["torch", pytest.param("transformers", marks=needs_uneven_shards)])
def test_a_vocabulary_that_does_not_divide_is_trained_right(plain, kind):
    assert UNEVEN % 2
    assert_same_run(run_on_ranks(train, 4, kind, "llama", vocabulary=UNEVEN), plain("llama", False, UNEVEN))


@pytest.mark.parametrize("kind", ["torch", "plan"])  # transformers ties on loading, see below
def test_tied_weights_stay_one_parameter(plain, kind):
    expected = plain("llama", True)
    assert "lm_head.weight" not in expected.gradients[0] and "lm_head.weight" in expected.weights
    assert_same_run(run_on_ranks(train, 4, kind, "llama", tied=True), expected)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_model_that_transformers_has_loaded_in_parallel_trains_as_the_unsharded_one(
    plain, architecture, tied, tmp_path
):
    tiny(architecture, tied).save_pretrained(tmp_path)
    runs = run_on_ranks(train, 2, "transformers", architecture, tied=tied, folder=str(tmp_path))
    assert_same_run(runs, plain(architecture, tied))


def test_the_tolerances_have_teeth(plain):
    """A microbatch that counts twice, a gradient times tp and a drifting seed all exceed them."""
    run, other = plain("llama"), plain("qwen3")
    first = run.gradients[0]
    assert relative_error(2 * first["lm_head.weight"], first["lm_head.weight"]) > 100 * GRADIENTS
    assert relative_error(run.gradients[1]["lm_head.weight"], first["lm_head.weight"]) > 100 * GRADIENTS
    assert abs(run.norms[0] / other.norms[0] - 1) > 10 * RESULTS
    initial = tiny("llama").state_dict()
    moved = [relative_error(run.weights[name], tensor) for name, tensor in initial.items()]
    assert min(moved) > 5 * RESULTS, "a weight that was never trained would pass"


# --- around a forward ------------------------------------------------------------------------------------------------


@dataclass
class Prepared:
    accelerator: Accelerator
    model: nn.Module
    plain: nn.Module
    names: list[str]
    objects: list[nn.Parameter]

    @classmethod
    def of(cls, kind: str, architecture: str, checkpointing: bool | None = None) -> Prepared:
        accelerator, plain = accelerator_for(kind), tiny(architecture)
        model = tiny(architecture)
        if checkpointing is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
        model = accelerator.prepare(parallelized(kind, model, accelerator.torch_device_mesh["tp"]))
        names = [name for name, _ in plain.named_parameters()]
        prepared = cls(accelerator, model, plain, names, list(model.parameters()))
        prepared.check()
        return prepared

    def check(self) -> None:
        assert_local(self.model, self.names, self.objects)

    def check_gradients(self) -> None:
        self.check()
        assert_tensors_close(full_gradients(self.model), gradients_of(self.plain), GRADIENTS)
        self.model.zero_grad()
        self.plain.zero_grad()

    def check_a_step(self, seed: int) -> None:
        loss_of(self.model, own(tokens(seed), self.accelerator)).backward()
        loss_of(self.plain, tokens(seed)).backward()
        self.check_gradients()


class Interruption(Exception):
    pass


def interrupt_forwards(kind, architecture):
    here = Prepared.of(kind, architecture)
    bare = here.accelerator.unwrap_model(here.model)

    def interrupt(*args):
        raise Interruption

    layer = bare.model.layers[1]
    for module in (layer.mlp.act_fn, layer.self_attn.q_proj, layer.self_attn, bare.lm_head, bare.model.norm, bare):
        for register in (module.register_forward_pre_hook, module.register_forward_hook):
            handle = register(interrupt)
            for grad in (torch.enable_grad, torch.no_grad):
                try:
                    with grad():
                        loss_of(here.model, tokens(0))
                    raise AssertionError("the forward was to be interrupted")
                except Interruption:
                    here.check()
            handle.remove()
    here.check_a_step(1)


def checkpoint_activations(kind, architecture, reentrant):
    here = Prepared.of(kind, architecture, checkpointing=reentrant)
    here.model.train()
    calls = []
    layer = here.accelerator.unwrap_model(here.model).model.layers[0]
    layer.self_attn.q_proj.register_forward_hook(lambda *args: calls.append(1))
    here.check_a_step(0)
    assert len(calls) == 2, "the layer was to be computed again in the backward"
    here.check_a_step(1)


def forward_several_times(kind, architecture):
    here = Prepared.of(kind, architecture)
    for model, part in ((here.model, lambda ids: own(ids, here.accelerator)), (here.plain, lambda ids: ids)):
        sum(loss_of(model, part(tokens(seed))) * (seed + 1) for seed in range(3)).backward()
    here.check_gradients()


def forward_without_training(kind, architecture):
    here = Prepared.of(kind, architecture)
    ids = tokens(0)
    for evaluating in (True, False):
        for grad in (torch.no_grad, torch.inference_mode, torch.enable_grad):
            here.model.train(not evaluating)
            here.plain.train(not evaluating)
            with grad():
                logits, expected = here.model(input_ids=ids).logits, here.plain(input_ids=ids).logits
            assert not isinstance(logits, DTensor) and logits.shape == (BATCH, LENGTH, VOCABULARY)
            assert logits.requires_grad == (grad is torch.enable_grad)
            assert relative_error(logits.detach(), expected.detach()) < 1e-5
            here.check()
    here.model.train()
    here.plain.train()
    here.check_a_step(1)


def copy_deeply(kind, architecture):
    here = Prepared.of(kind, architecture)
    bare = here.accelerator.unwrap_model(here.model)
    twin = copy.deepcopy(bare)
    objects = list(twin.parameters())
    assert_local(twin, here.names, objects)
    assert not {id(param) for param in objects} & {id(param) for param in here.objects}
    before = [param.detach().clone() for param in here.objects]
    for _ in range(2):
        here.plain.zero_grad()
        twin.zero_grad()
        loss_of(twin, tokens(0)).backward()
        loss_of(here.plain, tokens(0)).backward()
        assert_local(twin, here.names, objects)
        assert_tensors_close(full_gradients(twin), gradients_of(here.plain), GRADIENTS)
        with torch.no_grad():
            for model in (twin, here.plain):
                for param in model.parameters():
                    param -= 0.1 * param.grad
    assert_tensors_close(full_state_dict(twin), here.plain.state_dict(), RESULTS)
    assert all(torch.equal(param, value) and param.grad is None for param, value in zip(here.objects, before))
    original = tiny(architecture).state_dict()
    assert_tensors_close(full_state_dict(here.model), original, 1e-7)


EVERY_WAY = pytest.mark.parametrize(
    "kind, architecture", [("torch", "llama"), ("plan", "qwen3"), ("transformers", "qwen3")]
)


@EVERY_WAY
def test_an_exception_inside_a_forward_leaves_local_parameters(kind, architecture):
    run_on_ranks(interrupt_forwards, 4, kind, architecture)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@EVERY_WAY
def test_activations_may_be_checkpointed(kind, architecture, reentrant):
    run_on_ranks(checkpoint_activations, 4, kind, architecture, reentrant)


@EVERY_WAY
def test_several_forwards_may_come_before_one_backward(kind, architecture):
    run_on_ranks(forward_several_times, 4, kind, architecture)


@EVERY_WAY
def test_without_gradients_and_in_evaluation_the_full_logits_come_out(kind, architecture):
    run_on_ranks(forward_without_training, 4, kind, architecture)


@pytest.mark.parametrize(
    "kind, architecture",
    [
        ("torch", "llama"),
        ("plan", "qwen3"),
        pytest.param(
            "transformers",
            "llama",
            marks=pytest.mark.xfail(
                strict=True, reason="transformers' forwards hold on to the modules they were made for"
            ),
        ),
    ],
)
def test_a_deep_copy_trains_by_itself(kind, architecture):
    run_on_ranks(copy_deeply, 4, kind, architecture)


# --- a module that is called twice -----------------------------------------------------------------------------------


class Recurrent(nn.Module):
    """Applies one block three times, the last time inside a module that calls it through another name."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6)
        self.block = nn.Sequential(self.up, nn.Tanh(), self.down)

    def forward(self, x):
        for _ in range(2):
            x = x + self.down(self.up(x).tanh())
        return self.block(x)


def call_modules_repeatedly(as_plan):
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    accelerator = Accelerator(
        parallelism_config=TensorParallelDDPPlugin(tp_size=2, tp_plan=plan if as_plan else "auto")
    )
    torch.manual_seed(0)
    plain = Recurrent().double()
    model = copy.deepcopy(plain)
    names = [name for name, _ in plain.named_parameters()]
    if not as_plan:
        parallelize_module(model, accelerator.torch_device_mesh["tp"], plan)
    model = accelerator.prepare(model)
    objects = list(model.parameters())
    assert [tuple(param.shape) for param in objects] == [(5, 6), (5,), (6, 5), (6,)]
    for seed in range(2):
        x = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        model(own(x, accelerator)).square().mean().backward()
        plain(x).square().mean().backward()
        assert_local(model, names, objects)
        assert_tensors_close(full_gradients(model), gradients_of(plain), 1e-12)


@pytest.mark.parametrize("as_plan", [True, False], ids=["plan", "parallelized before"])
def test_a_module_may_be_called_several_times(as_plan):
    run_on_ranks(call_modules_repeatedly, 4, as_plan)


# --- optimizers built before `prepare` -------------------------------------------------------------------------------


def build_optimizer(model):
    named = list(model.named_parameters())
    groups = [
        {"params": [p for n, p in named if "mlp" in n], "lr": 3e-3, "weight_decay": 0.2, "name": "mlp"},
        {"params": [p for n, p in named if "norm" in n], "lr": 5e-3, "betas": (0.5, 0.9), "name": "norms"},
        {"params": [p for n, p in named if "mlp" not in n and "norm" not in n], "weight_decay": 0.0, "name": "rest"},
    ]
    return torch.optim.AdamW(groups, lr=1e-2, eps=1e-5, foreach=False)  # foreach takes no mixture with DTensors


def step(model, optimizer, ids):
    loss_of(model, ids).backward()
    optimizer.step()
    optimizer.zero_grad()


def carry_an_optimizer_over(kind, architecture):
    accelerator, plain = accelerator_for(kind), tiny(architecture)
    model = parallelized(kind, tiny(architecture), accelerator.torch_device_mesh["tp"])
    names = [name for name, _ in plain.named_parameters()]
    optimizer, plain_optimizer = build_optimizer(model), build_optimizer(plain)
    for each, its_optimizer in ((model, optimizer), (plain, plain_optimizer)):
        step(each, its_optimizer, tokens(0))
    positions = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    number = {id(param): index for index, param in enumerate(model.parameters())}
    model, prepared = accelerator.prepare(model, optimizer)
    objects = list(model.parameters())
    assert prepared.optimizer is optimizer
    for group, expected, before in zip(optimizer.param_groups, plain_optimizer.param_groups, positions, strict=True):
        assert {**group, "params": None} == {**expected, "params": None}
        assert [id(p) for p in group["params"]] == [id(objects[number[old]]) for old in before], (
            "the order has changed"
        )
    assert {id(param) for param in optimizer.state} == {id(param) for param in objects}
    for param, state in optimizer.state.items():
        assert not any(isinstance(value, DTensor) for value in state.values())
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == param.shape and state["step"] == 1
    for seed in (1, 2):
        step(model, prepared, own(tokens(seed), accelerator))
        step(plain, plain_optimizer, tokens(seed))
        assert_local(model, names, objects)
    assert len(optimizer.state) == len(objects), "there is state of parameters that are gone"
    assert_tensors_close(full_state_dict(model), plain.state_dict(), RESULTS)


@pytest.mark.parametrize("kind, architecture", [("torch", "qwen3"), ("plan", "qwen3"), ("transformers", "llama")])
def test_an_optimizer_that_has_stepped_on_dtensors_continues_on_local_parameters(kind, architecture):
    run_on_ranks(carry_an_optimizer_over, 4, kind, architecture)


def prepare_after_a_step(kind, architecture):
    accelerator, plain = accelerator_for(kind), tiny(architecture)
    model = tiny(architecture)
    model = parallelized(kind, model, accelerator.torch_device_mesh["tp"])
    loss_of(model, tokens(0)).backward()
    model.zero_grad()
    model = accelerator.prepare(model)
    for seed in (1, 2):
        loss_of(model, own(tokens(seed), accelerator)).backward()
        loss_of(plain, tokens(seed)).backward()
        assert_tensors_close(full_gradients(model), gradients_of(plain), GRADIENTS)


@pytest.mark.parametrize(
    "kind, architecture",
    [
        ("torch", "qwen3"),
        ("plan", "qwen3"),
        ("transformers", "qwen3"),
    ],
)
def test_a_backward_before_prepare_does_not_change_later_gradients(kind, architecture):
    run_on_ranks(prepare_after_a_step, 4, kind, architecture)


# --- `localize` alone ------------------------------------------------------------------------------------------------


def localize_alone(kind, architecture):
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    plain, model = (
        tiny(architecture),
        parallelized(kind, tiny(architecture), mesh),
    )
    assert localize(model) is model
    names, objects = [name for name, _ in plain.named_parameters()], list(model.parameters())
    assert_local(model, names, objects)
    assert localize(model) is model
    assert_local(model, names, objects)
    infos = [getattr(param, "tp_shard", None) for param in objects]
    sharded = [info for info in infos if info is not None and info.is_sharded]
    assert len(sharded) == 7 * LAYERS + 2
    for _ in range(2):
        loss_of(model, tokens(0)).backward()
        loss_of(plain, tokens(0)).backward()
        assert_local(model, names, objects)
        assert_tensors_close(full_gradients(model), gradients_of(plain), GRADIENTS)
    assert_tensors_close(full_state_dict(model), plain.state_dict(), 1e-7)


def localize_and_prepare(architecture, folder):
    accelerator, plain = accelerator_for("transformers"), tiny(architecture)
    model = parallelized("transformers", tiny(architecture), accelerator.torch_device_mesh["tp"])
    model = accelerator.prepare(localize(model))
    for seed in range(2):
        with nullcontext() if seed else accelerator.no_sync(model):
            loss_of(model, own(tokens(seed), accelerator)).backward()
        loss_of(plain, tokens(seed)).backward()
    errors = {
        name: relative_error(gradient, expected)
        for (name, gradient), expected in zip(full_gradients(model).items(), gradients_of(plain).values(), strict=True)
    }
    accelerator.unwrap_model(model).save_pretrained(folder, is_main_process=accelerator.is_main_process)
    dist.barrier()
    return errors


@pytest.mark.parametrize(
    "kind, architecture",
    [
        ("torch", "qwen3"),
        ("transformers", "llama"),
        ("transformers", "qwen3"),
    ],
)
def test_localize_works_without_accelerate(kind, architecture):
    run_on_ranks(localize_alone, 2, kind, architecture)


def test_a_model_localized_by_hand_has_the_right_gradients(tmp_path):
    for errors in run_on_ranks(localize_and_prepare, 4, "qwen3", str(tmp_path)):
        assert max(errors.values()) < GRADIENTS, max(errors, key=errors.get)


def test_a_model_localized_by_hand_is_saved_with_its_full_weights(tmp_path):
    run_on_ranks(localize_and_prepare, 4, "llama", str(tmp_path))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_tensors_close(loaded.state_dict(), tiny("llama").state_dict(), 1e-7)
