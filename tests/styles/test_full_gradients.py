"""The full gradient of every parameter is the unsharded model's, over one, two and three accumulated backwards."""

from functools import cache, partial

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F
from transformers import BertConfig, BertForMaskedLM, BertModel, OPTConfig, OPTForCausalLM

from accel_tp_ddp import full_gradients, parallelize, register_style
from accel_tp_ddp.styles.packed import PackedColwise

from ..helpers.compare import assert_tensors_close, relative_errors
from ..helpers.faults import STYLE_FAULTS, injected
from ..helpers.models import ARCHITECTURES, FURTHER, VOCABULARY, build_model
from ..helpers.ranks import run_on_ranks
from ..helpers.training import make_accelerator

TOLERANCE = 1e-4
PASSES = 3
BATCH, LENGTH = 2, 10

TP = pytest.mark.parametrize("tp", [2, 4])
MODEL = pytest.mark.parametrize("model", ARCHITECTURES)


def tokens(seed, vocabulary=VOCABULARY):
    """Each backward pass and each replica has a batch of its own; the second row of each ends in padding."""
    ids = torch.randint(1, vocabulary, (BATCH, LENGTH), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[1, LENGTH - 3 :] = 0
    return ids, mask


def causal_loss(model, seed):
    ids, mask = tokens(seed)
    return model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss


def accumulated(model, loss, seeds, gradients):
    """The gradients after each of several backward passes, without a `zero_grad` between them."""
    after = []
    for seed in seeds:
        loss(model, seed).backward()
        after.append({name: gradient.clone() for name, gradient in gradients(model).items()})
    return after


def own_gradients(model):
    return {name: param.grad for name, param in model.named_parameters() if param.grad is not None}


@cache
def unsharded(build, loss, seeds=tuple(range(PASSES))):
    return accumulated(build(), loss, seeds, own_gradients)


def sharded(build, loss, plan="auto", fault=None, seeds=tuple(range(PASSES))):
    """On a rank."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),), mesh_dim_names=("tp",))
    with injected(fault):
        return accumulated(parallelize(build(), mesh, plan), loss, seeds, full_gradients)


def assert_gradients(on_ranks, expected, floor=0.0):
    for passes in on_ranks:
        assert len(passes) == len(expected)
        for actual, reference in zip(passes, expected):
            assert_tensors_close(actual, reference, TOLERANCE, floor)


# --- the causal language models --------------------------------------------------------------------------------------


@cache  # equal arguments give the same object, which `unsharded` is cached by
def causal(model, tied):
    return partial(build_model, model, tied=tied)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@MODEL
@TP
def test_each_parameter_has_the_unsharded_gradient(tp, model, tied):
    reference = unsharded(causal(model, tied), causal_loss)
    assert reference[0].keys() == dict(build_model(model, tied=tied).named_parameters()).keys()
    assert_gradients(run_on_ranks(sharded, tp, causal(model, tied), causal_loss), reference)


@pytest.mark.parametrize("model", FURTHER)
@TP
def test_experts_latent_attention_sinks_and_shared_heads_have_the_unsharded_gradient(tp, model):
    """Over two backward passes. What one rank holds of it is less than the whole."""
    seeds = (0, 1)
    reference = unsharded(causal(model, False), causal_loss, seeds)
    floor = 1e-3 if model == "qwen2_one_key" else 0.0  # a key's bias gets rounding noise only
    assert reference[0].keys() == dict(build_model(model).named_parameters()).keys()
    assert all(gradient.norm() > 1e-3 for name, gradient in reference[0].items() if not name.endswith("k_proj.bias"))
    assert_gradients(run_on_ranks(sharded, tp, causal(model, False), causal_loss, seeds=seeds), reference, floor)


@pytest.mark.parametrize("checkpointing", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("model", [*ARCHITECTURES, "llama_one_key", "qwen3_moe", "deepseek_v2"])
def test_recomputed_activations_give_the_same_gradients(model, checkpointing):
    actual = run_on_ranks(sharded, 2, partial(with_checkpointing, model, checkpointing), causal_loss)
    assert_gradients(actual, unsharded(causal(model, False), causal_loss))


def with_checkpointing(model, reentrant):
    built = build_model(model)
    built.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    return built.train()


@pytest.mark.parametrize(
    "model, fault",
    [
        ("qwen3", "partial gradients not summed"),
        ("qwen3", "partial gradients summed again"),
        ("llama", "copy without its backward"),
        ("llama", "gather with a sum in its backward"),
        ("llama", "reduce with a sum in its backward"),
        ("phi3", "packed weights cut as one"),
        ("gpt_neox", "row bias on every rank"),
    ],
)
def test_a_fault_shows_in_the_gradients(model, fault):
    reference = unsharded(causal(model, False), causal_loss)
    for passes in run_on_ranks(sharded, 2, causal(model, False), causal_loss, fault=fault):
        worst = max(max(relative_errors(*pair).values()) for pair in zip(passes, reference))
        assert worst > 10 * TOLERANCE


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])  # grouped_mm is what transformers takes by itself
@pytest.mark.parametrize("model", ["gpt_oss", "qwen3_moe"])
def test_experts_have_the_unsharded_gradient_however_they_are_computed(model, implementation):
    seeds = (0, 1)
    assert build_model(model).config._experts_implementation == "grouped_mm"
    build = partial(build_model, model, experts_implementation=implementation)
    assert build().config._experts_implementation == implementation
    assert_gradients(
        run_on_ranks(sharded, 2, build, causal_loss, seeds=seeds), unsharded(causal(model, False), causal_loss, seeds)
    )


# Where a fault of one style shows, and in the gradient of what.
SHOWN_BY = {
    "shared rotary keys not summed": ("deepseek_v2", 2, "self_attn.kv_a_proj_with_mqa.weight"),
    "shared heads not summed": ("llama_one_key", 2, "self_attn.k_proj.weight"),
    "shared heads summed over all ranks": ("qwen3_two_keys", 4, "self_attn.v_proj.weight"),
    "shared sections summed as a whole": ("phi3_two_keys", 4, "self_attn.qkv_proj.weight"),
    "sinks of other heads": ("gpt_oss", 2, "self_attn.sinks"),
    "expert bias on every rank": ("gpt_oss", 2, "mlp.experts.down_proj_bias"),
    "expert bias with a divided gradient": ("gpt_oss", 2, "mlp.experts.down_proj_bias"),
    "experts' input gradients not summed": ("qwen3_moe", 2, "post_attention_layernorm.weight"),
    "routing weights' gradients not summed": ("mixtral", 2, "mlp.gate.weight"),
    "identity expert on every rank": ("longcat_flash", 2, "mlp.router.classifier.weight"),
}


def test_each_fault_of_a_style_is_tried():
    assert SHOWN_BY.keys() | {"cached head counts left as they were"} == set(STYLE_FAULTS)


@pytest.mark.parametrize("fault", SHOWN_BY)
def test_a_fault_of_a_style_shows_in_the_gradients(fault):
    model, tp, sign = SHOWN_BY[fault]
    seeds = (0, 1)
    reference = unsharded(causal(model, False), causal_loss, seeds)
    for passes in run_on_ranks(sharded, tp, causal(model, False), causal_loss, fault=fault, seeds=seeds):
        errors = relative_errors(passes[-1], reference[-1])
        assert max(error for name, error in errors.items() if name.endswith(sign)) > 10 * TOLERANCE


# --- through Accelerate ----------------------------------------------------------------------------------------------


def prepared_gradients(model, dp):
    """Two backward passes inside `no_sync`, one outside, then a second round; the gradients after each."""
    accelerator = make_accelerator(2)
    prepared = accelerator.prepare(build_model(model))
    after = []
    for round_ in range(2):
        for seed in range(PASSES):
            loss = causal_loss_of_replica(accelerator.data_parallel_rank, dp, round_)
            if seed < PASSES - 1:
                with accelerator.no_sync(prepared):
                    accelerator.backward(loss(prepared, seed))
            else:
                accelerator.backward(loss(prepared, seed))
            after.append(full_gradients(prepared))
        prepared.zero_grad()
    return accelerator.data_parallel_rank, after


def causal_loss_of_replica(replica, dp, round_):
    return lambda model, seed: causal_loss(model, 100 * round_ + dp * seed + replica)


@MODEL
def test_ddp_averages_outside_no_sync_and_leaves_alone_inside(model):
    dp = 2

    def alone(replica, round_):
        loss = causal_loss_of_replica(replica, dp, round_)
        return accumulated(build_model(model), loss, range(PASSES), own_gradients)

    rounds = [[alone(replica, round_) for replica in range(dp)] for round_ in range(2)]
    for rank, (replica, after) in enumerate(run_on_ranks(prepared_gradients, 2 * dp, model, dp)):
        assert replica == rank // 2
        assert len(after) == 2 * PASSES
        for n, replicas in enumerate(rounds):
            own, (first, second) = replicas[replica], (r[-1] for r in replicas)
            mean = {name: (first[name] + second[name]) / dp for name in first}
            for actual, expected in zip(after[n * PASSES :], [*own[:-1], mean]):
                assert_tensors_close(actual, expected, TOLERANCE)


# --- an encoder, by a plan of the user -------------------------------------------------------------------------------

BERT_VOCABULARY = 129  # 33, 33, 33 and 30 rows at tp 4
BERT_PLAN = {
    "embeddings.word_embeddings": "embedding_rowwise",
    "encoder.layer.*.attention.self.query": "colwise",
    "encoder.layer.*.attention.self.key": "colwise",
    "encoder.layer.*.attention.self.value": "colwise",
    "encoder.layer.*.attention.output.dense": "rowwise",
    "encoder.layer.*.intermediate.dense": "colwise",
    "encoder.layer.*.output.dense": "rowwise",
}


def seeded(make, seed=0):
    """A model of weights that all matter, norms and biases included."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = make()
        for param in model.parameters():
            param += 0.1 * torch.randn_like(param)
    return model


def build_bert(kind, tied=False):
    config = BertConfig(
        tie_word_embeddings=tied,
        vocab_size=BERT_VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return seeded(lambda: kind(config)).train()


def bert_loss(model, seed):
    ids, mask = tokens(seed, BERT_VOCABULARY)
    ids = ids.masked_fill(mask == 0, model.config.pad_token_id)
    output = model(input_ids=ids, attention_mask=mask)
    if not hasattr(output, "logits"):
        return output.last_hidden_state.square().mean() + output.pooler_output.pow(3).mean()
    return F.cross_entropy(output.logits.transpose(1, 2), ids.masked_fill(mask == 0, -100))


@TP
@pytest.mark.parametrize("kind, tied", [(BertModel, False), (BertForMaskedLM, False), (BertForMaskedLM, True)])
def test_an_encoder_by_a_plan_of_the_user(kind, tied, tp):
    build = partial(build_bert, kind, tied)
    reference = unsharded(build, bert_loss)
    # Softmax takes a constant added to all keys away again, so the gradient of a key's bias is nothing but rounding.
    floor = 1e-3
    below = {name for name, gradient in reference[0].items() if gradient.norm() < floor}
    assert below == {name for name in reference[0] if name.endswith("key.bias")}
    assert_gradients(run_on_ranks(sharded, tp, build, bert_loss, BERT_PLAN), reference, floor)


# --- head counts that an attention module keeps ----------------------------------------------------------------------

OPT_PLAN = {
    **{f"model.decoder.layers.*.self_attn.{name}_proj": "colwise" for name in "qkv"},
    "model.decoder.layers.*.self_attn.out_proj": "rowwise",
    "model.decoder.layers.*.fc1": "colwise",
    "model.decoder.layers.*.fc2": "rowwise",
}


def build_opt():
    """Its attention takes `view(batch, -1, num_heads, head_dim)`, where -1 is the length."""
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_attention_heads": 4}
    config = OPTConfig(vocab_size=VOCABULARY, num_hidden_layers=2, max_position_embeddings=16, dropout=0.0, **sizes)
    return seeded(lambda: OPTForCausalLM(config)).train()


def unmasked_loss(model, seed):
    """Without padding attention gets no mask, whose size would show that the length is wrong."""
    ids = torch.randint(1, VOCABULARY, (BATCH, 8), generator=torch.Generator().manual_seed(seed))
    return model(input_ids=ids, labels=ids).loss


class KeepsCounts(nn.Module):
    """Grouped-query attention without a config; half of its query heads are as many as its key/value heads."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = 8, 4, 3
        self.q, self.k, self.v = (nn.Linear(12, heads * 3) for heads in (8, 4, 4))
        self.o = nn.Linear(24, 12)

    def forward(self, x):
        length = x.shape[1]
        q = self.q(x).view(len(x), -1, self.num_heads, self.head_dim)
        k, v = (each(x).view(len(x), -1, self.num_kv_heads, self.head_dim) for each in (self.k, self.v))
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o(out.transpose(1, 2).reshape(len(x), length, -1))


GROUPED_PLAN = {"q": "colwise", "k": "colwise", "v": "colwise", "o": "rowwise"}


def build_grouped():
    return seeded(KeepsCounts)


def grouped_loss(model, seed):
    x = torch.randn(2, 8, 12, generator=torch.Generator().manual_seed(seed))
    return model(x).square().sum()


@pytest.mark.parametrize(
    "build, loss, plan",
    [
        (build_opt, unmasked_loss, OPT_PLAN),
        (build_opt, causal_loss, OPT_PLAN),
        (build_grouped, grouped_loss, GROUPED_PLAN),
    ],
    ids=["opt without a mask", "opt", "grouped"],
)
@TP
def test_an_attention_that_keeps_its_head_counts(tp, build, loss, plan):
    reference = unsharded(build, loss)
    floor = 1e-3 * max(gradient.norm().item() for gradient in reference[0].values())  # a key's bias has none
    assert_gradients(run_on_ranks(sharded, tp, build, loss, plan), reference, floor)


# --- each style, on a toy --------------------------------------------------------------------------------------------


class HeadNorm(nn.Module):
    """A norm over heads: its parameters are replicated, its input is this rank's heads."""

    def __init__(self, width):
        super().__init__()
        self.width = width
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x):
        heads = x.unflatten(-1, (-1, self.width))
        return F.layer_norm(heads, (self.width,), self.weight, self.bias).flatten(-2)


class SumOfFeatures(nn.Module):
    def forward(self, x):
        return x.sum(dim=-1, keepdim=True)


class Toy(nn.Module):
    """A residual stream of width 16 that passes every style."""

    WIDTH = 16

    def __init__(self, padding_idx=None, frozen=()):
        super().__init__()
        width = self.WIDTH
        self.tokens = nn.Embedding(129, width, padding_idx=padding_idx)
        self.words = nn.Embedding(129, 18, padding_idx=padding_idx)
        self.join = nn.Linear(width + 18, width)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 24)
        self.head_norm = HeadNorm(6)
        self.down = nn.Linear(24, width)
        self.gate_up = nn.Linear(width, 2 * 20)
        self.gated_down = nn.Linear(20, width)
        self.three = nn.Linear(width, 3 * 8, bias=False)
        self.three_down = nn.Linear(8, width)
        self.pair = nn.Linear(width, 2 * 12)
        self.pair_down = nn.Linear(2 * 12, width)
        self.spread = nn.Linear(width, 8)
        self.total = SumOfFeatures()
        self.narrow = nn.Linear(width, 19)  # uneven at 2 and at 4
        self.wide = nn.Linear(19, width)
        self.whole = nn.Linear(width, width)
        self.head = nn.Linear(width, 129)
        for name in frozen:
            self.get_parameter(name).requires_grad_(False)

    def forward(self, ids):
        x = self.norm(self.join(torch.cat([self.tokens(ids), self.words(ids)], dim=-1)))
        x = x + self.down(F.gelu(self.head_norm(self.up(x))))
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        x = x + self.gated_down(F.silu(gate) * up)
        a, b, c = self.three(x).chunk(3, dim=-1)
        x = x + self.three_down(a * b.tanh() * c.sigmoid())
        x = x + self.pair_down(F.gelu(self.pair(x)))
        x = x + self.total(self.spread(x).tanh())
        x = x + self.wide(self.narrow(x).cumsum(dim=-1).tanh())  # needs the whole width
        return self.head(x + self.whole(x).tanh())


TOY_PLAN = {
    "tokens": "embedding_rowwise",
    "words": "embedding_colwise",
    "up": "colwise",
    "head_norm": "replicated_with_grad_allreduce",
    "down": "rowwise",
    "gate_up": "packed_colwise",
    "gated_down": "rowwise",
    "three": "packed_in_three",
    "three_down": "rowwise",
    "pair": "packed_colwise",
    "pair_down": "packed_rowwise",
    "spread": "colwise",
    "total": "all_reduce",
    "narrow": "colwise_gather_output",
    "wide": "rowwise_split_input",
    "whole": "replicate",
    "head": "colwise_rep",
}
SHARDED = {name for name, style in TOY_PLAN.items() if style not in ("replicate", "all_reduce")} - {"head_norm"}


@cache
def toy(padding_idx=None, frozen=()):
    return partial(build_toy, padding_idx, frozen)


def build_toy(padding_idx, frozen):
    return seeded(lambda: Toy(padding_idx, frozen))


PADDING = (0, 33, 64, 128)  # the first and last rows, and the edges of shards


def toy_loss(model, seed):
    ids = torch.randint(129, (4, 16), generator=torch.Generator().manual_seed(seed))
    ids[0, :4] = torch.tensor(PADDING)
    return F.cross_entropy(model(ids).transpose(1, 2), ids.flip(1))


def sharded_toy(padding_idx=None, frozen=(), passes=PASSES):
    """On a rank. Also tells what it holds of each weight."""
    register_style("packed_in_three", PackedColwise(sections=3))
    build = toy(padding_idx, frozen)
    gradients = sharded(build, toy_loss, TOY_PLAN, seeds=tuple(range(passes)))
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),), mesh_dim_names=("tp",))
    model = parallelize(build(), mesh, TOY_PLAN)
    return gradients, {name: tuple(param.shape) for name, param in model.named_parameters()}


@TP
def test_every_style(tp):
    results = run_on_ranks(sharded_toy, tp)
    whole = {name: tuple(param.shape) for name, param in toy()().named_parameters()}
    for _, held in results:
        assert {name.partition(".")[0] for name in held if held[name] != whole[name]} == SHARDED
    assert_gradients([gradients for gradients, _ in results], unsharded(toy(), toy_loss))


@TP
def test_an_uneven_vocabulary_leaves_the_last_rank_less(tp):
    rows = [held["tokens.weight"][0] for _, held in run_on_ranks(sharded_toy, tp, passes=1)]
    assert rows == {2: [65, 64], 4: [33, 33, 33, 30]}[tp]


@TP
@pytest.mark.parametrize("padding_idx", PADDING)
def test_a_padding_row_gets_no_gradient_and_its_neighbours_theirs(tp, padding_idx):
    reference = unsharded(toy(padding_idx), toy_loss)
    assert_gradients([gradients for gradients, _ in run_on_ranks(sharded_toy, tp, padding_idx)], reference)
    for name in ("tokens.weight", "words.weight"):
        assert not reference[-1][name][padding_idx].any()
        assert unsharded(toy(), toy_loss)[-1][name][padding_idx].any()  # or there was nothing to leave out


FROZEN = {
    "column-parallel": ("up.weight", "up.bias", "gate_up.weight"),
    "biases": tuple(f"{name}.bias" for name in ("up", "down", "wide", "pair", "pair_down", "head")),
    "row-parallel": ("down.weight", "pair_down.weight", "wide.weight", "gated_down.bias"),
    "embeddings": ("tokens.weight", "words.weight"),
    "head norm": ("head_norm.weight",),
    "all before the first region": (
        *("tokens.weight", "words.weight", "join.weight", "join.bias", "norm.weight", "norm.bias"),
    ),
    "everything but one": tuple(name for name, _ in Toy().named_parameters() if name != "up.weight"),
    "everything but a head norm": tuple(name for name, _ in Toy().named_parameters() if name != "head_norm.weight"),
}


@TP
@pytest.mark.parametrize("frozen", FROZEN)
def test_frozen_parameters_get_none_and_the_others_theirs(tp, frozen):
    build = toy(None, FROZEN[frozen])
    reference = unsharded(build, toy_loss)
    assert reference[0].keys() == dict(Toy().named_parameters()).keys() - set(FROZEN[frozen])
    assert_gradients([gradients for gradients, _ in run_on_ranks(sharded_toy, tp, None, FROZEN[frozen])], reference)
