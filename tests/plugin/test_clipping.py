"""Norms and clipping are those of the full gradient."""

import inspect
from unittest import mock

import pytest
import torch
from accelerate import Accelerator

from accel_tp_ddp import parallelize
from accel_tp_ddp.plugin.accelerator import OVERRIDES
from accel_tp_ddp.training.gradients import clip_grad_norm_, full_grad_norm

from ..helpers.compare import relative_error
from ..helpers.models import build_model
from ..helpers.prepared import inputs
from ..helpers.ranks import run_on_ranks
from ..helpers.sharded import (
    MLP_PLAN,
    TOLERANCE,
    accelerator_for,
    assert_gradients_close,
    build_mlp,
    full_backward,
    full_gradients_of,
    token_batch,
    tp_mesh,
)

SUBSETS = {
    "all": lambda name: True,
    "sharded": lambda name: "proj" in name or "embed" in name or "head" in name,
    "replicated": lambda name: "norm" in name,
    "mixed": lambda name: name.endswith(("up_proj.weight", "layernorm.weight", "lm_head.weight")),
    "mostly replicated": lambda name: "norm" in name or name == "model.layers.0.self_attn.k_proj.weight",
    "none": lambda name: False,
}


def check_clipping(subset, norm_type, form, tied, max_norm):
    accelerator = accelerator_for(2)
    reference = build_model("llama", tied=tied)
    full_backward(reference, token_batch())
    model = accelerator.prepare(build_model("llama", tied=tied))
    accelerator.backward(model(**token_batch()).loss)
    chosen = [name for name, _ in reference.named_parameters() if SUBSETS[subset](name)]
    ours = [param for name, param in accelerator.unwrap_model(model).named_parameters() if name in chosen]
    theirs = [param for name, param in reference.named_parameters() if name in chosen]
    assert len(ours) == len(theirs) == len(chosen)
    if form == "generator":
        ours = (param for param in ours)
    elif form == "one":
        ours, theirs = ours[0], theirs[0]
    before = torch.nn.utils.get_total_norm([param.grad for param in reference.parameters()])
    wanted = torch.nn.utils.clip_grad_norm_(theirs, max_norm, norm_type)
    norm = accelerator.clip_grad_norm_(ours, max_norm, norm_type)
    assert relative_error(norm, wanted) < TOLERANCE, (float(norm), float(wanted))
    assert_gradients_close(full_gradients_of(model), full_gradients_of(reference))
    after = torch.nn.utils.get_total_norm([param.grad for param in reference.parameters()])
    assert (after < before) == (bool(chosen) and bool(wanted > max_norm))
    return float(norm).hex()


@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("norm_type", [1, 2, 3, float("inf")], ids=str)
def test_clip_grad_norm_is_that_of_the_full_gradient(subset, norm_type):
    norms = run_on_ranks(check_clipping, 2, subset, norm_type, "list", False, 1e-3)
    assert len(set(norms)) == 1, "ranks that disagree by a bit drift apart"


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("form", ["list", "generator", "one"])
@pytest.mark.parametrize("max_norm", [0.05, 1e6], ids=["clipped", "not clipped"])
def test_clip_grad_norm_takes_what_torch_takes(form, max_norm, ranks):
    norms = run_on_ranks(check_clipping, ranks, "all", 2.0, form, True, max_norm)
    assert len(set(norms)) == 1


def check_clip_value(limit):
    accelerator = accelerator_for(2)
    reference = build_model("llama")
    full_backward(reference, token_batch())
    model = accelerator.prepare(build_model("llama"))
    accelerator.backward(model(**token_batch()).loss)
    before = full_gradients_of(model)
    torch.nn.utils.clip_grad_value_(reference.parameters(), limit)
    accelerator.clip_grad_value_(model.parameters(), limit)
    assert_gradients_close(full_gradients_of(model), full_gradients_of(reference))
    assert any((grad.abs() > limit).any() for grad in before.values())


@pytest.mark.parametrize("ranks", [2, 4])
def test_clip_grad_value_is_that_of_the_full_gradient(ranks):
    run_on_ranks(check_clip_value, ranks, 1e-3)


def check_nonfinite(rank_with_inf):
    accelerator = accelerator_for(2, MLP_PLAN)
    model = accelerator.prepare(build_mlp())
    model(inputs(1)).sum().backward()
    if accelerator.tensor_parallel_rank == rank_with_inf:
        model.up.weight.grad[0, 0] = float("inf")
    return float(accelerator.clip_grad_norm_(model.parameters(), 1.0))


@pytest.mark.parametrize("rank_with_inf", [0, 1])
def test_an_infinite_gradient_on_one_rank_is_an_infinite_norm_on_all(rank_with_inf):
    assert run_on_ranks(check_nonfinite, 2, rank_with_inf) == [float("inf")] * 2


def check_norm_options(foreach):
    """Bare parameters, of several data types, in the order that torch is given them too."""
    mesh = tp_mesh()
    models = {which: build_mlp() for which in ("sharded", "whole")}
    parallelize(models["sharded"], mesh, MLP_PLAN)
    for model in models.values():
        model.up.to(torch.bfloat16)
        model.head.to(torch.float64)
        for index, param in enumerate(model.parameters()):
            info, generator = getattr(param, "tp_shard", None), torch.Generator().manual_seed(index)
            whole = torch.randn(info.global_shape if info else param.shape, generator=generator).to(param.dtype)
            param.grad = info.local_part(whole) if info else whole
    ours, theirs = (list(model.parameters()) for model in models.values())
    results = []
    for params, norm, clip in (
        (ours, full_grad_norm, clip_grad_norm_),
        (
            theirs,
            lambda params, **kw: torch.nn.utils.get_total_norm([p.grad for p in params], **kw),
            torch.nn.utils.clip_grad_norm_,
        ),
    ):
        with mock.patch.object(torch, "_foreach_norm", wraps=torch._foreach_norm) as spy:
            total = norm(params, foreach=foreach)
            used = spy.called
            clipped = clip(params, 0.5, foreach=foreach)
        results.append((used, total.dtype, relative_error(total, clipped), float(total)))
    assert results[0][:3] == results[1][:3]
    assert results[0][0] == (foreach is True or foreach is None and results[1][0])
    assert results[0][3] == pytest.approx(results[1][3], rel=1e-2)  # bf16, and torch rounds its sum to that
    for (name, param), other in zip(models["sharded"].named_parameters(), theirs):
        full = param.tp_shard.full_tensor(param.grad) if param.tp_shard else param.grad
        assert relative_error(full, other.grad) < 1e-2, name
    if mesh.get_local_rank() == 1:
        ours[0].grad.view(-1)[0] = float("nan")
    for call in (full_grad_norm, lambda params, **options: clip_grad_norm_(params, 1.0, **options)):
        assert torch.isnan(call(ours, foreach=foreach))
        with pytest.raises(RuntimeError, match="error_if_nonfinite=False"):
            call(ours, error_if_nonfinite=True, foreach=foreach)
    return results[0]


@pytest.mark.parametrize("foreach", [None, True, False])
def test_foreach_and_error_if_nonfinite_are_those_of_torch(foreach):
    first, second = run_on_ranks(check_norm_options, 2, foreach)
    assert first == second


def test_the_accelerators_clipping_takes_what_accelerates_takes():
    (row,) = (row for row in OVERRIDES if row.name == "clip_grad_norm_")
    ours = inspect.signature(row.function).parameters.values()
    taken = [param.name for param in ours if param.kind is not inspect.Parameter.POSITIONAL_ONLY]
    assert ["self", *taken] == list(inspect.signature(Accelerator.clip_grad_norm_).parameters)
