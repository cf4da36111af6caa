"""Training in float8: linear layers are converted before they are sharded, and what is replaced later is an error."""

import importlib.util
import os
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from accel_tp_ddp import full_gradients

from ..helpers.models import VOCABULARY, build_model
from ..helpers.ranks import run_on_ranks
from ..helpers.training import make_accelerator
from ..helpers.versions import needs_sharded_loading

needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")


def off_by(actual, exact):
    """Relative error of all gradients together."""
    errors = sum(float((actual[name] - exact[name]).square().sum()) for name in exact)
    return (errors / sum(float(exact[name].square().sum()) for name in exact)) ** 0.5


def gradients(tp, kind, precision="fp8"):
    from accelerate.utils import AORecipeKwargs
    from torchao.float8 import Float8LinearConfig
    from torchao.float8.float8_linear import Float8Linear

    # As Accelerate sets it, with float8 emulated on the CPU.
    config = Float8LinearConfig(emulate=True, pad_inner_dim=True, enable_fsdp_float8_all_gather=tp is not None)
    handlers = [AORecipeKwargs(config=config)] if precision == "fp8" else []
    accelerator = make_accelerator(tp, mixed_precision=precision, kwargs_handlers=handlers)
    model = build_model(kind)
    given = dict(model.named_parameters())
    prepared = accelerator.prepare(model)
    assert all(param is given[name] for name, param in model.named_parameters())
    converted = {name for name, module in model.named_modules() if isinstance(module, Float8Linear)}
    ids = torch.randint(0, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(accelerator.process_index))
    accelerator.backward(prepared(input_ids=ids, labels=ids).loss)
    return full_gradients(prepared) if tp else {n: p.grad for n, p in model.named_parameters()}, converted


@needs_torchao
@pytest.mark.parametrize("kind", ["llama", "phi3"])
def test_float8_is_as_close_to_full_precision_as_without_tensor_parallelism(kind):
    exact, _ = run_on_ranks(gradients, 2, None, kind, "no")[0]
    (plain, converted), *_ = run_on_ranks(gradients, 2, None, kind)
    rounding = off_by(plain, exact)
    assert 0.01 < rounding < 0.2 and len(converted) > 6
    for sharded, in_them in run_on_ranks(gradients, 4, 2, kind):
        assert in_them == converted and off_by(sharded, exact) < 1.3 * rounding


def float8_accelerator(tp, **options):
    from accelerate.utils import AORecipeKwargs
    from torchao.float8 import Float8LinearConfig

    config = Float8LinearConfig(**options)
    return make_accelerator(tp, mixed_precision="fp8", kwargs_handlers=[AORecipeKwargs(config=config)])


def too_narrow():
    float8_accelerator(2).prepare(build_model("llama", intermediate_size=80))


def loaded(folder, sliced):
    from transformers import AutoModelForCausalLM

    accelerator = float8_accelerator(2, emulate=True)
    with accelerator.state.parallelism_config.sharded_loading() if sliced else nullcontext():
        model = AutoModelForCausalLM.from_pretrained(folder)
    prepared = accelerator.prepare(model)
    return prepared(input_ids=torch.arange(8)[None]).logits


@needs_torchao
@needs_sharded_loading
def test_a_model_that_was_loaded_in_slices_computes_in_float8_as_one_that_was_not(tmp_path):
    build_model("llama").save_pretrained(tmp_path)
    plain, _ = run_on_ranks(loaded, 2, str(tmp_path), False)
    for logits in run_on_ranks(loaded, 2, str(tmp_path), True):
        assert torch.equal(logits, plain)


def evaluated_first():
    accelerator, model = float8_accelerator(2, emulate=True), build_model("llama")
    accelerator.prepare_model(model, evaluation_mode=True)
    del model._is_accelerate_prepared  # as a Trainer that goes on to train
    accelerator.prepare(model)


@needs_torchao
@pytest.mark.parametrize(
    "prepare, words", [(too_narrow, "multiple of 16"), (evaluated_first, "has been sharded before")]
)
def test_what_float8_cannot_do_is_one_error_on_every_rank(prepare, words):
    for raised in run_on_ranks(prepare, 2, expect_raise=True):
        assert raised.type_name == "ValueError" and words in raised.message and "rank" not in raised.message[:5]


def with_backend(name, call):
    os.environ["ACCELERATE_FP8_BACKEND"] = name
    accelerator, model = make_accelerator(2), build_model("llama")
    getattr(accelerator, call)(model)


@pytest.mark.parametrize("name, call", [("TE", "prepare"), ("MSAMP", "prepare"), ("TE", "prepare_model")])
def test_other_backends_are_refused_by_name(name, call):
    for raised in run_on_ranks(with_backend, 2, name, call, expect_raise=True):
        assert raised.type_name == "ValueError" and f"({name})" in raised.message and "AO" in raised.message


# --- in general ------------------------------------------------------------------------------------------------------


class Replaced(nn.Linear):
    pass


def replacing(how, call):
    """A model that replaces, or restores, some of its modules while it is prepared."""
    model = build_model("llama")

    class Changed(type(model)):
        def to(self, *args, **kwargs):
            for layer in self.model.layers if how != "nothing" else []:
                if how == "replaced":
                    layer.mlp.up_proj = Replaced(*layer.mlp.up_proj.weight.T.shape, bias=False)
                else:
                    del layer.mlp.up_proj.forward
            return super().to(*args, **kwargs)

    model.__class__ = Changed
    getattr(make_accelerator(2), call)(model)
    return True


@pytest.mark.parametrize(
    "how, call", [("replaced", "prepare"), ("restored", "prepare"), ("replaced", "prepare_model")]
)
def test_modules_that_are_replaced_after_sharding_are_named(how, call):
    for raised in run_on_ranks(replacing, 2, how, call, expect_raise=True):
        assert raised.type_name == "ValueError" and raised.message.startswith("2 modules of this")
        assert "`model.layers.0.mlp.up_proj`, `model.layers.1.mlp.up_proj`" in raised.message


def test_a_model_that_only_moves_is_left_alone():
    assert run_on_ranks(replacing, 2, "nothing", "prepare") == [True, True]
