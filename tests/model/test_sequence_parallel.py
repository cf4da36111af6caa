"""With the sequence spread over the ranks a model has the losses and gradients that it has without."""

import copy
import functools
import os
import pickle
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from torch._dynamo.backends.debugging import aot_eager
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP

from accel_tp_ddp import TensorParallelDDPPlugin, full_gradients, parallelize
from accel_tp_ddp.core.errors import WrongPlanError
from accel_tp_ddp.model.check import check_model
from accel_tp_ddp.model.parallelize import parallelize_with_map
from accel_tp_ddp.model.sequence import check_sequence
from accel_tp_ddp.tools.simulate import Setting, simulate
from benchmarks.sweep import causal

from ..helpers.compare import assert_tensors_close, relative_errors
from ..helpers.dropout import RATE, masks
from ..helpers.models import build_config, build_model
from ..helpers.ranks import run_on_ranks
from ..helpers.sharded import TOLERANCE, build_mlp, token_batch, tp_mesh
from ..helpers.training import Spec, assert_same_run, train

FLOOR = 1e-5
TP = pytest.mark.parametrize("tp", [2, 4])


def spread(model, tp=None):
    mesh = tp_mesh(tp)
    plan = check_model(model, mesh)
    check_sequence(model, plan)
    parallelize_with_map(model, mesh, replace(plan, sequence_parallel=True))
    return model


def batches():
    """By name: lengths that two ranks divide and that they do not, padded on either side, several in one row."""
    even, uneven, row = token_batch(), token_batch(4, 2, 11), token_batch(5, 1, 12)
    padded = torch.ones_like(uneven["input_ids"])
    padded[0, :4], padded[1, -3:] = 0, 0
    positions = torch.cat([torch.arange(5), torch.arange(7)]).view(1, -1)
    return {
        "even": even,
        "uneven": uneven,
        "padded": {**uneven, "attention_mask": padded, "labels": uneven["labels"].masked_fill(padded == 0, -100)},
        "packed": {**row, "position_ids": positions},
    }


def gradients(model):
    return {name: param.grad for name, param in model.named_parameters() if param.grad is not None}


def compared(name, kinds, checkpointing=None, tp=None, **options):
    """Two backwards of each batch, which accumulate, and the logits of evaluation."""
    reference, model = build_model(name, **options).train(), build_model(name, **options).train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
    spread(model, tp)
    for kind in kinds:
        batch = batches()[kind]
        for scale in (1.0, 2.0):
            losses = [each(**batch).loss for each in (model, reference)]
            assert abs(losses[0].item() - losses[1].item()) < 2e-6 * abs(losses[1].item()), (kind, losses)
            for loss in losses:
                (scale * loss).backward()
            assert_tensors_close(full_gradients(model), gradients(reference), TOLERANCE, FLOOR)
    with torch.no_grad():
        logits = [each.eval()(**batches()["uneven"]).logits for each in (model, reference)]
    assert torch.allclose(*logits, atol=1e-5)
    prompt = batches()["even"]["input_ids"][:, :4].clamp(min=1)
    tokens = [each.generate(prompt, max_new_tokens=3, do_sample=False) for each in (model, reference)]
    assert torch.equal(*tokens)


@TP
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt2"])
def test_losses_and_gradients_are_those_of_the_unsharded_model(name, tp):
    run_on_ranks(compared, tp, name, list(batches())[: 4 if tp == 2 else 2], tp=tp)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "qwen3_moe"])
def test_what_is_computed_again_is_spread_again(name, reentrant):
    run_on_ranks(compared, 2, name, ["even", "padded"], reentrant)


# Experts, latent attention, shared heads, alibi with a residual inside, parallel blocks.
@pytest.mark.parametrize(
    "name",
    ["mixtral", "deepseek_v3", "gpt_oss", "longcat_flash", "llama_one_key", "bloom", "falcon_two_keys", "gpt_neox"],
)
def test_blocks_of_other_kinds_see_the_whole_sequence(name):
    run_on_ranks(compared, 2, name, ["even", "padded"])


def copied():
    reference, model = build_model("llama").train(), spread(build_model("llama").train())
    batch = token_batch()
    reference(**batch).loss.backward()
    for copy_of in (copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))):
        model = copy_of(model)
        lengths = []
        norm = model.model.layers[0].input_layernorm
        hook = norm.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
        model.zero_grad()
        model(**batch).loss.backward()
        hook.remove()
        assert lengths == [5]
        assert_tensors_close(full_gradients(model), gradients(reference), TOLERANCE, FLOOR)


def test_a_copied_model_is_still_spread():
    run_on_ranks(copied, 2)


def checkpointed_by_hand():
    model = spread(build_model("llama").train())
    for layer in model.model.layers:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    model(**token_batch()).loss.backward()


def test_checkpointing_by_hand_is_refused():
    for raised in run_on_ranks(checkpointed_by_hand, 2, expect_raise=True):
        assert "gradient_checkpointing_enable()" in raised.message


def compiled():
    """The number of graphs, and of a step in one of them loss and gradients."""
    reference, model = build_model("llama").train(), spread(build_model("llama").train())
    seen = []

    def backend(graph, inputs):
        seen.append(graph)
        return aot_eager(graph, inputs)

    loss, expected = torch.compile(model, backend=backend)(**token_batch()).loss, reference(**token_batch()).loss
    loss.backward()
    expected.backward()
    assert abs(loss.item() - expected.item()) < 2e-6 * abs(expected.item())
    assert_tensors_close(full_gradients(model), gradients(reference), TOLERANCE, FLOOR)
    return len(seen)


def test_a_compiled_model_is_one_graph():
    assert run_on_ranks(compiled, 2) == [1, 1]


# Of transformers' causal models: streams of hidden states side by side, which are no [batch, sequence, hidden].
UNFIT = {
    "deepseek_v4": "gets a Tensor (2, 16, 4, 64) first",
    "gemma3n_text": "gets a Tensor (4, 2, 16, 64) first",
    "hy_v4": "gets a Tensor (2, 16, 4, 64) first",
    "inkling2_text": "Sizes of tensors must match",
    "qwen4_exp_text": "not called from a block of its layer",
}


def of_architectures(names):
    """What is wrong with each: the error, or by how much loss or gradients are off."""
    found = {}
    for name in names:
        torch.manual_seed(0)
        reference = causal.model_of(name).train()
        for param in reference.parameters():
            if param.ndim == 1 or not param.any():
                param.data += 0.1 * torch.randn_like(param)
        for module in reference.modules():  # training mode without anything random
            for key, value in list(vars(module).items()):
                if isinstance(value, float) and (key == "p" or "dropout" in key or "noise" in key):
                    setattr(module, key, 0.0)
        batch = causal.language_inputs(reference)
        model = spread(copy.deepcopy(reference))
        try:
            losses = [each(**batch).loss for each in (model, reference)]
        except (RuntimeError, ValueError) as error:  # of shapes, and so on every rank
            found[name] = str(error)
            continue
        for loss in losses:
            loss.backward()
        off = relative_errors(full_gradients(model), gradients(reference), 1e-3)
        worst = max(off, key=off.get)
        if off[worst] > 1e-4 or abs(losses[0].item() - losses[1].item()) > 1e-5 * abs(losses[1].item()):
            found[name] = f"{losses}, {worst} {off[worst]:.1e}"
    return found


def assert_fit(names):
    for found in run_on_ranks(of_architectures, 2, names, timeout=1200):
        wrong = {name: what for name, what in found.items() if UNFIT.get(name, "fits") not in what}
        assert not wrong and found.keys() == UNFIT.keys() & set(names)


# Convolutions and state spaces, experts that give rows, inputs for each layer, hidden states in four streams.
def test_architectures_of_other_kinds_train_as_without():
    assert_fit(["jamba", "llama4_text", "gemma4_text", "qwen3_next", "deepseek_v4"])


@pytest.mark.slow
def test_every_causal_architecture_trains_as_without_or_says_why_not():
    assert_fit(causal.architectures())


# --- under Accelerate ------------------------------------------------------------------------------------------------


def with_sequence_parallel(function, *args, loss="auto", zero1="false", **kwargs):
    os.environ["ACCEL_TP_DDP_SEQUENCE_PARALLEL"] = "true"
    os.environ.update(ACCEL_TP_DDP_LOSS_PARALLEL=loss, ACCEL_TP_DDP_ZERO1=zero1)
    return function(*args, **kwargs)


SPECS = {
    "llama": (Spec("llama", optimizer="sgd"), {}),
    "tied, accumulated": (Spec("llama", tied=True, accumulation=2), {}),
    "gpt2, checkpointed": (Spec("gpt2", checkpointing="non_reentrant"), {}),
    "qwen3, with all": (Spec("qwen3", checkpointing="reentrant"), {"loss": "true", "zero1": "true"}),
}


@pytest.mark.parametrize("name", SPECS)
def test_a_run_is_that_of_plain_ddp(name):
    spec, options = SPECS[name]
    plain = run_on_ranks(train, 2, spec)
    assert_same_run(run_on_ranks(with_sequence_parallel, 4, train, replace(spec, tp=2), **options), plain)


def test_a_run_in_bf16_is_that_of_plain_ddp_within_rounding():
    spec = Spec("llama", mixed_precision="bf16")
    plain = run_on_ranks(train, 2, spec)
    assert_same_run(run_on_ranks(with_sequence_parallel, 4, train, replace(spec, tp=2)), plain, 2e-2, 5e-2)


def adapted(reentrant=None):
    peft = pytest.importorskip("peft")
    found = []
    for sharded in (True, False):
        torch.manual_seed(3)
        config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, use_dora=True)
        model = peft.get_peft_model(build_model("llama"), config).train()
        if reentrant is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        if sharded:
            spread(model, 2)
        loss = model(**batches()["uneven"]).loss
        loss.backward()
        found.append((loss.item(), full_gradients(model) if sharded else gradients(model)))
    (loss, ours), (wanted, expected) = found
    assert abs(loss - wanted) < 2e-6 * abs(wanted)
    assert_tensors_close(ours, expected, TOLERANCE, FLOOR)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_adapters_have_the_gradients_of_the_unsharded_model(reentrant):
    run_on_ranks(adapted, 2, reentrant)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_dropout_of_a_slice_is_drawn_by_each_rank(reentrant):
    (first, state), (second, peer_state), (third, _), _ = run_on_ranks(
        with_sequence_parallel, 4, masks, False, reentrant
    )
    assert state == peer_state and len(first) >= 7
    apart = [mask != theirs for (_, mask, _), (_, theirs, _) in zip(first, second, strict=True)]
    assert apart == [False] + [True] * (len(first) - 1), "only that of the embeddings is of the whole sequence"
    assert all(mask != theirs for (_, mask, _), (_, theirs, _) in zip(first, third, strict=True))
    rates = [rate for *_, rate in first]
    assert abs(sum(rates) / len(rates) - RATE) < 0.05
    if reentrant is not None:
        again = [mask for _, mask, _ in first[1:]]
        assert set(again[: len(again) // 2]) == set(again[len(again) // 2 :]), "computed again with other masks"


# --- what cannot be spread -------------------------------------------------------------------------------------------


class MixingLayer(LlamaDecoderLayer):
    """Looks at other places of the sequence outside of any block."""

    def forward(self, hidden_states, **kwargs):
        return super().forward(hidden_states + 0.1 * hidden_states.cumsum(1), **kwargs)


class PassingLayer(LlamaDecoderLayer):
    """Passes by its MLP."""

    def forward(self, hidden_states, **kwargs):
        return super().forward(hidden_states + self.mlp.down_proj(self.mlp.up_proj(hidden_states)), **kwargs)


class FlatMLP(LlamaMLP):
    """Gives one row a token inside, and hidden states in the end."""

    def forward(self, x):
        return super().forward(x.flatten(0, 1)).view(x.shape)


class Mixing(LlamaForCausalLM):
    layer: type = MixingLayer
    mlp: type = LlamaMLP

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.__class__, layer.mlp.__class__ = self.layer, self.mlp


class Passing(Mixing):
    layer = PassingLayer


class Flat(Mixing):
    layer, mlp = LlamaDecoderLayer, FlatMLP


def prepared(make, **options):
    plugin = TensorParallelDDPPlugin(**{"tp_size": 2, "sequence_parallel": True, **options})
    return Accelerator(parallelism_config=plugin).prepare(make())


def mixing(kind):
    return prepared(lambda: kind(build_config("llama")).train(), prove="always")


@pytest.mark.parametrize(
    "kind, says",
    [(Mixing, "model.layers.*"), (Passing, "not called from a block"), (Flat, "a row-parallel layer gives (")],
)
def test_the_proof_refuses_what_cannot_be_spread(kind, says):
    for raised in run_on_ranks(mixing, 2, kind, expect_raise=True):
        assert WrongPlanError.__name__ in raised.type_names and says in raised.message
        assert "set sequence_parallel=False" in raised.message


def proved(name):
    prepared(lambda: build_model(name).train(), prove="always")


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_the_proof_accepts_what_can(name):
    run_on_ranks(proved, 2, name)


def encoder_decoder():
    sizes = {"d_model": 64, "d_kv": 8, "d_ff": 96, "num_heads": 8, "num_layers": 2, "vocab_size": 64}
    return AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("t5", **sizes))


def dropping_layers():
    sizes = {"hidden_size": 64, "ffn_dim": 96, "num_attention_heads": 8, "num_hidden_layers": 2, "vocab_size": 64}
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model("opt", **sizes, layerdrop=0.5, word_embed_proj_dim=64)
    )


def sharded_before():
    return parallelize(build_model("llama"), tp_mesh(2))


REFUSED = {
    "encoder-decoder": (encoder_decoder, {}, "is an encoder-decoder"),
    "no layers": (build_mlp, {"tp_plan": {"up": "colwise", "down": "rowwise"}}, "has no list of layers"),
    "layers dropped": (dropping_layers, {}, "layerdrop=0"),
    "sharded": (sharded_before, {}, "sharded before `prepare`"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_spread_is_one_error_on_every_rank(name):
    make, options, says = REFUSED[name]
    for raised in run_on_ranks(prepared, 2, make, **options, expect_raise=True):
        assert says in raised.message and "sequence_parallel" in raised.message


def ran_without():
    """Where somebody wants the hidden states of layers, of few tokens, or no gradient, the sequence is left alone."""
    reference, model = build_model("llama").train(), spread(build_model("llama").train())
    seen = []
    model.model.layers[1].register_forward_pre_hook(lambda layer, args: seen.append(args[0].shape[1]))
    batch = token_batch()
    states = [each(**batch, output_hidden_states=True).hidden_states for each in (model, reference)]
    assert all(torch.allclose(*pair, atol=1e-5) for pair in zip(*states, strict=True))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model(**batch, output_hidden_states=True).loss.backward()
    model.gradient_checkpointing_disable()
    seen.pop()
    one = {name: tensor[:, :1] for name, tensor in batch.items()}
    assert torch.allclose(*(each(**one, use_cache=False).logits for each in (model, reference)), atol=1e-5)
    with torch.no_grad():
        model(**batch)
    model.eval()(**batch)
    model.train()(**batch)
    return seen


def test_the_sequence_is_spread_in_training_only():
    assert run_on_ranks(ran_without, 2) == [[10, 1, 10, 10, 5]] * 2


# --- what it costs ---------------------------------------------------------------------------------------------------

SAMPLES, LENGTH, LAYERS = 2, 64, 8


def simulated(tp, on, layers, checkpointing, precision):
    def build():
        return AutoModelForCausalLM.from_config(build_config("llama", layers=layers, hidden_size=128))

    plugin = {"sequence_parallel": on}
    setting = Setting(tp, 1, SAMPLES, LENGTH, precision, checkpointing, plugin=plugin)
    return simulate(build, setting)


def of_layers(tp, on, checkpointing=False, precision="fp32"):
    """What eight layers keep for the backward, and what a layer sends: (kind, phase) -> bytes of the full tensor."""
    few, many = (simulated(tp, on, layers, checkpointing, precision) for layers in (2, 2 + LAYERS))
    sent = {}
    for run, sign in ((many, 1), (few, -1)):
        for each in run.collectives:
            key = each.kind, each.phase, each.bytes
            sent[key] = sent.get(key, 0) + sign * each.count
    return many.kept - few.kept, {
        key: count / LAYERS for key, count in sent.items() if count and key[0] != "broadcast"
    }


@pytest.mark.usefixtures("no_accelerator")
@pytest.mark.parametrize("tp, precision, width", [(2, "fp32", 4), pytest.param(4, "bf16", 2, marks=pytest.mark.slow)])
def test_eight_checkpointed_layers_keep_a_share_and_a_layer_sends_as_many_bytes(tp, precision, width):
    hidden = SAMPLES * LENGTH * 128 * width
    without, sent_without = of_layers(tp, False, precision=precision)
    spread_out, sent = of_layers(tp, True, precision=precision)
    assert sent_without == {("all_reduce", phase, hidden): 2 for phase in ("forward", "backward")}
    norms = sent.pop(("all_reduce", "backward", 2 * 128 * 4))  # of the two norms' weights, together
    assert norms == 1 and spread_out < without
    kinds = ("all_gather_into_tensor", "reduce_scatter_tensor")
    assert sent == {(kind, phase, hidden): 2 for kind in kinds for phase in ("forward", "backward")}
    kept = [of_layers(tp, on, True, precision)[0] for on in (False, True)]
    assert kept[1] <= (1 / tp + 0.05) * kept[0]
