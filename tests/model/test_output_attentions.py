"""`output_attentions=True` returns the attention weights of all heads, in their order, with their gradients."""

from functools import cache

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModel, BertConfig, CodeGenConfig, GPT2Config, LlamaConfig, T5Config

from accel_tp_ddp import full_gradients, parallelize

from ..helpers.compare import assert_tensors_close
from ..helpers.ranks import run_on_ranks

SIZES = {
    "llama": LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    ),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4),
    "bert": BertConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4),
    # A rank's heads are not next to each other.
    "codegen": CodeGenConfig(n_embd=64, n_layer=1, n_head=8, n_ctx=64, n_positions=64, rotary_dim=4),
    "t5": T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4),
}


def build(name):
    config = type(SIZES[name]).from_dict({**SIZES[name].to_dict(), "vocab_size": 64})
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    return AutoModel.from_config(config).eval()


def attentions(model, name, asked=True, **kwargs):
    ids = torch.randint(2, 64, (2, 6), generator=torch.Generator().manual_seed(1))
    second = {"decoder_input_ids": ids.flip(1)} if name == "t5" else {}
    output = model(input_ids=ids, **second, **({"output_attentions": True} if asked else {}), **kwargs)
    names = [key for key in output if "attentions" in key]
    return {f"{key}.{index}": part for key in names for index, part in enumerate(output[key])}


def weights_and_gradients(model, name, gradients):
    """The loss is made of nothing but attention weights, each weighted by its place."""
    found = attentions(model, name)
    loss = sum((part * torch.linspace(0, 1, part.numel()).view_as(part)).square().sum() for part in found.values())
    loss.backward()
    return {key: part.detach() for key, part in found.items()}, gradients(model)


@cache
def unsharded(name):
    own = lambda model: {key: param.grad for key, param in model.named_parameters() if param.grad is not None}  # noqa: E731
    return weights_and_gradients(build(name), name, own)


def on_a_rank(name, tp):
    mesh = init_device_mesh("cpu", (tp,), mesh_dim_names=("tp",))
    return weights_and_gradients(parallelize(build(name), mesh), name, full_gradients)


@pytest.mark.parametrize("name", SIZES)
def test_attention_weights_and_their_gradients_are_the_unsharded_models(name):
    weights, gradients = unsharded(name)
    assert weights
    for actual, actual_gradients in run_on_ranks(on_a_rank, 2, name, 2):
        assert_tensors_close(actual, weights, 1e-5)
        # A bias of the keys changes no attention weight: its gradient is rounding around zero.
        floor = 1e-3 * torch.stack([gradient.norm() for gradient in gradients.values()]).norm().item()
        assert_tensors_close(actual_gradients, gradients, 1e-4, floor)


def asked_by_the_config_or_not_at_all(tp):
    model = parallelize(build("llama"), init_device_mesh("cpu", (tp,), mesh_dim_names=("tp",)))
    none = attentions(model, "llama", asked=False)
    model.config.output_attentions = True
    by_config = attentions(model, "llama", asked=False)
    as_tuple = model(input_ids=torch.tensor([[3, 4]]), use_cache=False, return_dict=False)
    return len(none), {key: part.shape[1] for key, part in by_config.items()}, [part.shape[1] for part in as_tuple[-1]]


def test_the_config_may_ask_for_them_and_outputs_may_be_tuples():
    for none, by_config, as_tuple in run_on_ranks(asked_by_the_config_or_not_at_all, 2, 2):
        assert none == 0
        assert by_config == {"attentions.0": 4, "attentions.1": 4}
        assert as_tuple == [4, 4]
