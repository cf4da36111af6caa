"""Key/value heads fewer than ranks: ranks share a head, hold the same slice of it, and each knows its own counts."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from accel_tp_ddp import full_gradients, full_state_dict, parallelize
from accel_tp_ddp.core.layout import Layout
from accel_tp_ddp.core.shard import shard_info
from accel_tp_ddp.plans.plan import resolve_plan
from accel_tp_ddp.training.drift import ReplicaGuard, checksum
from accel_tp_ddp.training.gradients import full_grad_norm

from ..helpers.compare import assert_tensors_close, relative_errors
from ..helpers.faults import injected
from ..helpers.models import build_model
from ..helpers.ranks import run_on_ranks
from ..helpers.sharded import token_batch, tp_mesh

TOLERANCE = 2e-5


# --- the layout ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads, tp, holds", [(2, 4, [0, 0, 1, 1]), (1, 2, [0, 0]), (2, 8, [0, 0, 0, 0, 1, 1, 1, 1])])
def test_a_head_is_not_cut_and_those_next_to_each_other_share_it(heads, tp, holds):
    model = build_model("llama", num_key_value_heads=heads)
    layouts = resolve_plan(model, tp).layouts
    for name in ("k_proj", "v_proj"):
        layout = layouts[f"model.layers.1.self_attn.{name}.weight"]
        assert layout == Layout(0, tuple(((8 * head, 8 * head + 8),) for head in holds))
        assert layout.repeated and layout.parts == tuple(((8 * head, 8 * head + 8),) for head in range(heads))
        assert [layout.holds_first(rank) for rank in range(tp)] == [holds.index(h) == r for r, h in enumerate(holds)]
    assert not layouts["model.layers.1.self_attn.q_proj.weight"].repeated


def test_packed_keys_and_values_are_shared_and_queries_are_not():
    layout = resolve_plan(build_model("phi3_two_keys"), 4).layouts["model.layers.1.self_attn.qkv_proj.weight"]
    queries = [(16 * rank, 16 * rank + 16) for rank in range(4)]
    keys, values = [
        [(start + 8 * (rank // 2), start + 8 * (rank // 2) + 8) for rank in range(4)] for start in (64, 80)
    ]
    assert layout.ranges == tuple(zip(queries, keys, values))
    assert layout.repeated == ((64, 72), (72, 80), (80, 88), (88, 96))
    assert layout.pieces(3) == ((1, 8, 16, 8), (3, 24, 24, 8))
    assert [layout.counted(rank) for rank in (2, 3)] == [((0, 16), (16, 24), (24, 32)), ((0, 16),)]


def test_empty_parts_are_not_shared_ones():
    assert not Layout(0, (((0, 1),), ((1, 1),), ((1, 1),))).repeated


# --- values, gradients, norms ----------------------------------------------------------------------------------------


def heads_on_a_rank(architecture):
    mesh = tp_mesh()
    model = parallelize(build_model(architecture), mesh)
    shapes = {name: tuple(param.shape) for name, param in model.named_parameters()}
    state = full_state_dict(model)
    model(**token_batch()).loss.backward()
    attention = model.model.layers[0].self_attn

    def shared(tensor, projection):
        """What other ranks hold too, as one tensor."""
        info = shard_info(projection.weight)
        return torch.cat([tensor[piece.start : piece.start + piece.length] for piece in info.shared.pieces])

    return {
        "shapes": shapes,
        "state": state,
        "gradients": full_gradients(model),
        "norms": [float(full_grad_norm(model.parameters(), p)) for p in (1.0, 2.0, float("inf"))],
        "groups": attention.num_key_value_groups,
        "own": [
            int(checksum(shared(tensor, projection)))
            for layer in model.model.layers
            for name, projection in layer.self_attn.named_children()
            if name in ("k_proj", "v_proj", "qkv_proj")
            for tensor in (projection.weight, projection.weight.grad)
        ],
        "generated": model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False).tolist(),
    }


@pytest.mark.parametrize(
    "architecture, tp, sharing",
    [
        *(("llama_one_key", 2, [2]), ("llama_one_key", 4, [4]), ("qwen3_two_keys", 4, [2, 2])),
        *(("phi3_one_key", 2, [2]), ("phi3_two_keys", 4, [2, 2])),
    ],
)
def test_state_gradients_norm_and_generation_are_those_of_the_unsharded_model(architecture, tp, sharing):
    reference = build_model(architecture)
    state = {name: value.clone() for name, value in reference.state_dict().items()}
    reference(**token_batch()).loss.backward()
    gradients = {name: param.grad for name, param in reference.named_parameters()}
    flat = torch.cat([gradient.flatten().double() for gradient in gradients.values()])
    norms = [flat.norm(p).item() for p in (1.0, 2.0, float("inf"))]
    generated = reference.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False).tolist()
    config = reference.config
    results = run_on_ranks(heads_on_a_rank, tp, architecture)
    for result in results:
        assert result["state"].keys() == state.keys()
        assert all(torch.equal(result["state"][name], value) for name, value in state.items())
        assert_tensors_close(result["gradients"], gradients, TOLERANCE)
        assert result["norms"] == pytest.approx(norms, rel=1e-5)
        assert result["generated"] == generated
        assert result["groups"] == config.num_attention_heads // tp  # one key/value head for all of the rank's queries
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        queries = config.num_attention_heads // tp
        expected = {"k_proj": (width, 64), "v_proj": (width, 64), "qkv_proj": ((queries + 2) * width, 64)}
        first_layer = {name.split(".")[-2]: shape for name, shape in result["shapes"].items() if ".layers.0." in name}
        assert all(first_layer[name] == expected[name] for name in expected.keys() & first_layer.keys())
        assert expected.keys() & first_layer.keys()
    first = 0
    for count in sharing:  # weights and gradients, bit by bit
        same = [result["own"] for result in results[first : first + count]]
        assert all(own == same[0] for own in same)
        first += count
    if len(sharing) > 1:
        assert results[0]["own"] != results[-1]["own"]


# --- they stay equal -------------------------------------------------------------------------------------------------


def drifting(guarded, architecture="qwen3_two_keys"):
    mesh = tp_mesh()
    model = parallelize(build_model(architecture), mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    guard = ReplicaGuard(mesh, 0, "heal")
    guard.add(model)
    if not guarded:
        guard.agree_on_gradients = lambda optimizer: None
    guard.watch(optimizer)
    shared = {
        name: param for name, param in model.named_parameters() if (info := shard_info(param)) and info.is_repeated
    }
    noise = torch.Generator().manual_seed(mesh.get_local_rank())
    for param in shared.values():
        param.register_hook(lambda grad: grad * (1 + 1e-6 * torch.randn(grad.shape, generator=noise)))
    for seed in range(2):
        model(**token_batch(seed)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def sums():
        tensors = [
            tensor[piece.start : piece.start + piece.length] if tensor.ndim else tensor
            for param in shared.values()
            for tensor in (param, *optimizer.state[param].values())
            for piece in shard_info(param).shared.pieces
        ]
        return [int(checksum(tensor)) for tensor in tensors]

    before = sums()
    drifted = guard.compare(optimizer)
    return sorted(shared), before, sums(), drifted


@pytest.mark.parametrize("architecture", ["qwen3_two_keys", "phi3_two_keys"])
def test_ranks_that_share_a_head_keep_it_bit_equal(architecture):
    results = run_on_ranks(drifting, 4, True, architecture)
    for mine, peer in ((0, 1), (2, 3)):
        assert results[mine][1] == results[peer][1]
    assert results[0][1] != results[2][1]
    assert all(drifted == [] for *_, drifted in results)


@pytest.mark.parametrize("architecture", ["qwen3_two_keys", "phi3_two_keys"])
def test_a_shared_head_that_has_drifted_is_found_and_mended(architecture):
    results = run_on_ranks(drifting, 4, False, architecture)
    shared, *_ = results[0]
    assert len(shared) == (2 if architecture == "phi3_two_keys" else 4)
    for mine, peer in ((0, 1), (2, 3)):
        assert results[mine][1] != results[peer][1]
        assert results[mine][2] == results[peer][2]
    for *_, drifted in results:
        assert set(shared) <= set(drifted) and all(name.partition(" ")[0] in shared for name in drifted)


# --- head counts that an attention module keeps ----------------------------------------------------------------------

WIDTH, QUERIES, KEYS = 4, 8, 2


class CountingAttention(nn.Module):
    """Views its activations by the counts it keeps, with the length left open: a wrong count gives a wrong length."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.num_key_value_heads = config.num_key_value_heads
        self.num_key_value_groups = self.num_heads // self.num_key_value_heads
        self.head_dim = WIDTH
        self.q_proj = nn.Linear(16, QUERIES * WIDTH)
        self.k_proj = nn.Linear(16, KEYS * WIDTH, bias=False)
        self.v_proj = nn.Linear(16, KEYS * WIDTH)
        self.o_proj = nn.Linear(QUERIES * WIDTH, 16)

    def forward(self, x):
        batch = len(x)
        query = self.q_proj(x).view(batch, -1, self.num_heads, self.head_dim).transpose(1, 2)
        key = self.k_proj(x).view(batch, -1, self.num_key_value_heads, self.head_dim).transpose(1, 2)
        value = self.v_proj(x).view(batch, -1, self.num_key_value_heads, self.head_dim).transpose(1, 2)
        key, value = (tensor.repeat_interleave(self.num_key_value_groups, 1) for tensor in (key, value))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, -1, self.num_heads * self.head_dim))


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(num_attention_heads=QUERIES, num_key_value_heads=KEYS)
        self.first, self.second = CountingAttention(self.config), CountingAttention(self.config)

    def forward(self, x):
        return self.second(x + self.first(x)).pow(2).mean()


COUNTING_PLAN = {
    "*.q_proj": "colwise",
    "*.k_proj": "colwise",
    "*.v_proj": "colwise",
    "*.o_proj": "rowwise",
}


def build_counting():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Counting()


def counting_gradients(fault=None):
    x = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(1))
    with injected(fault):
        model = parallelize(build_counting(), tp_mesh(), COUNTING_PLAN)
        loss = model(x)
        loss.backward()
    attention = model.first
    counts = (attention.num_heads, attention.num_key_value_heads, attention.num_key_value_groups)
    return loss.item(), full_gradients(model), counts


@pytest.mark.parametrize("tp, counts", [(2, (4, 1, 4)), (4, (2, 1, 2))])
def test_a_module_that_views_by_counts_it_keeps_sees_those_of_its_rank(tp, counts):
    reference = build_counting()
    loss = reference(torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(1)))
    loss.backward()
    gradients = {name: param.grad for name, param in reference.named_parameters()}
    for actual, full, shown in run_on_ranks(counting_gradients, tp):
        assert actual == pytest.approx(loss.item(), rel=1e-5)
        assert_tensors_close(full, gradients, TOLERANCE)
        assert shown == counts


def failing_counts():
    try:
        _, gradients, _ = counting_gradients("cached head counts left as they were")
    except RuntimeError:
        return True
    reference = build_counting()
    reference(torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(1))).backward()
    errors = relative_errors(gradients, {name: param.grad for name, param in reference.named_parameters()})
    return max(errors.values()) > 10 * TOLERANCE


def test_with_the_counts_of_the_whole_it_goes_wrong():
    assert all(run_on_ranks(failing_counts, 2))
