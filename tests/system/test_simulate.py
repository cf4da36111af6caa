"""One rank's step on fake tensors: what the simulation sees is what is there, and none of its figures may grow.

Every figure is exact. A limit that a change gets below is lowered with it; one that a change would raise says why in
its commit, or is a defect.
"""

from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode

from accel_tp_ddp import parallelize
from accel_tp_ddp.core.errors import BadInputError
from accel_tp_ddp.styles.linear import Rowwise
from accel_tp_ddp.tools import simulate as simulation
from accel_tp_ddp.tools.simulate import Setting, simulate
from accel_tp_ddp.tools.tally import collective_name
from benchmarks.simulate import config_of, main, minimum, per_layer, plain

from ..helpers.ranks import run_on_ranks

HIDDEN, WIDTH, HEADS, KEYS, VOCABULARY, LAYERS = 64, 128, 8, 4, 256, 2
TP, BATCH, LENGTH = 4, 2, 128
TOKENS = BATCH * LENGTH
SIZES = {
    **{"hidden_size": HIDDEN, "intermediate_size": WIDTH, "num_hidden_layers": LAYERS, "vocab_size": VOCABULARY},
    **{"num_attention_heads": HEADS, "num_key_value_heads": KEYS, "head_dim": HIDDEN // HEADS},
}
LLAMA, QWEN3 = {"model_type": "llama", **SIZES}, {"model_type": "qwen3", **SIZES}

HIDDEN_STATE = TOKENS * HIDDEN
#: Of a rank: a quarter of the embedding and the head, of the four projections and the MLP's three; five norms.
PARAMETERS = (
    2 * VOCABULARY * HIDDEN // TP
    + LAYERS * (2 * HIDDEN * HIDDEN + 2 * HIDDEN * HIDDEN * KEYS // HEADS + 3 * HIDDEN * WIDTH) // TP
    + (2 * LAYERS + 1) * HIDDEN
)
OPTIMIZER = 8 * PARAMETERS + 4 * (9 * LAYERS + 3)  # two moments in float32, and a step count for each tensor


def setting(**changes):
    return Setting(**{"tp": TP, "micro_batch": BATCH, "seq_len": LENGTH, **changes})


def simulated(values, changes, graphs=False):
    return simulate(lambda: plain(config_of(values)), setting(**changes), held=True, graphs=graphs)


def both(values, changes):
    return simulated(values, changes), minimum(config_of(values), setting(**changes))


@pytest.fixture(scope="module")
def runs():
    """Each simulation once, in a process that has no group and no accelerator of its own."""
    made = {}

    def run(function, *args):
        key = function.__name__, repr(args)
        if key not in made:
            (made[key],) = run_on_ranks(function, 1, *args)
        return made[key]

    return run


# --------------------------------------------------------------------------------------- what it sees is what is there


def peaks_by_both(values, changes):
    chosen = setting(**changes)
    with simulation.one_of(chosen.tp * chosen.dp):
        run = simulation._Run(lambda: plain(config_of(values)), chosen, None, None)
        run.step()
        tracker = MemTracker()
        tracker.track_external(run.model, run.optimizer.optimizer, list(run.batch.values()))
        with run.fake, tracker:
            own = run.step().peak
        return sum(own.values()), tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"], own["buckets"]


@pytest.mark.parametrize("changes", [{"precision": "bf16"}, {"seq_len": 2}, {"dp": 2}], ids=str)
def test_the_peak_is_that_of_torchs_memory_tracker(changes):
    (answer,) = run_on_ranks(peaks_by_both, 1, LLAMA, changes)
    own, torchs, buckets = answer
    assert own == torchs + buckets  # which DDP makes before the tracker looks
    assert bool(buckets) == (changes.get("dp") == 2)


def beside_sums(changes, rows=1 << 12):
    """For the sums of input gradients in the backward, floating-point operations between start and wait, by layer."""
    values = {**LLAMA, "hidden_size": 1 << 12, "head_dim": 1 << 9}
    run = simulate(lambda: plain(config_of(values)), setting(micro_batch=1, seq_len=rows, **changes))
    return sorted(
        sum(work.flops * work.count for work in row.beside)
        for row in run.collectives
        if row.phase == "backward" and row.group == "tp" and row.kind in ("all_reduce", "reduce_scatter_tensor")
        for _ in range(row.count)
    )[-2 * LAYERS :]


@pytest.mark.parametrize("spread", [False, True], ids=["all-reduce", "reduce-scatter"])
def test_on_gpus_weight_gradients_of_large_inputs_are_computed_beside_the_sums(runs, spread):
    """As `overlap="auto"` does there; the first of a layer is that of q, k and v, the second of gate and up."""
    plugin = {"sequence_parallel": spread}
    hidden, rows = 1 << 12, 1 << 12
    weights = 2 * WIDTH // TP, (1 + 2 * KEYS // HEADS) * hidden // TP
    expected = sorted(2 * rows * hidden * width for width in weights * LAYERS)
    assert runs(beside_sums, {"gpu": True, "plugin": plugin}) == expected
    for off in ({"gpu": False, "plugin": plugin}, {"gpu": True, "plugin": {**plugin, "overlap": False}}):
        assert not any(runs(beside_sums, off))
    assert not any(runs(beside_sums, {"gpu": True, "plugin": plugin}, rows - 8))  # fewer than 16 Mi elements


def counted_on_ranks():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    model = parallelize(plain(config_of(LLAMA)), mesh)
    ids = torch.zeros(BATCH, LENGTH, dtype=torch.long)
    with CommDebugMode() as mode:
        model(input_ids=ids, labels=ids).loss.backward()
        return {operation.__name__: count for operation, count in mode.get_comm_counts().items()}


def test_real_ranks_send_what_the_simulation_does(runs):
    sent = Counter()
    for each in runs(simulated, LLAMA, {}).collectives:
        if each.phase in ("forward", "backward"):
            sent[each.kind] += each.count
    for counted in run_on_ranks(counted_on_ranks, TP):
        assert {collective_name(name): count for name, count in counted.items()} == sent


def test_weights_and_state_are_what_arithmetic_says(runs):
    resting = runs(simulated, LLAMA, {}).resting
    assert (resting.parameters, resting.optimizer) == (4 * PARAMETERS, OPTIMIZER)
    assert resting.gradients == resting.activations == resting.temporaries == 0


def test_a_plain_layer_keeps_what_arithmetic_says(runs):
    """In float32, elements a token, of a layer of one rank's sizes: what each operation of transformers' Llama needs.

    Norms: x, x normalized, the sum of squares' root (twice), and what the linear layers get. Attention: queries, keys,
    values, the output as computed and joined, the sums of the softmax. MLP: gate, up, silu, their product.
    """
    own = SIZES | {"num_attention_heads": HEADS // TP, "num_key_value_heads": KEYS // TP}
    own |= {"intermediate_size": WIDTH // TP, "model_type": "llama"}
    shallow, deep = (runs(simulated, own | {"num_hidden_layers": n}, {"tp": 1}) for n in (2, 3))
    heads, query = HEADS // TP, HIDDEN // TP
    key = query * KEYS // HEADS
    elements = 6 * HIDDEN + 2 + 2 * query + 2 * key + heads + 4 * WIDTH // TP
    assert deep.saved - shallow.saved == 4 * TOKENS * elements
    assert deep.kept - shallow.kept == deep.saved - shallow.saved


# ------------------------------------------------------------------------------------------- and none of it may grow


@pytest.mark.parametrize("precision, dp", [("fp32", 1), ("bf16", 2), ("bf16-weights", 1)])
def test_collectives_of_a_step(runs, precision, dp):
    """Two all-reduces a layer each way, one for the embedding, one for the head's input; the logits are gathered once.

    All go in the type of the compute (the embedding's in that of its weights), of one hidden state each.
    """
    size = 2 if precision == "bf16-weights" else 4
    low = 4 if precision == "fp32" else 2
    sent = {
        (c.kind, c.group, c.phase, c.bytes): c
        for c in runs(simulated, LLAMA, {"precision": precision, "dp": dp}).collectives
    }
    forward = [c for c in sent.values() if (c.phase, c.group) == ("forward", "tp")]
    assert sum(c.count for c in forward if c.kind == "all_reduce") == 2 * LAYERS + 1
    assert sum(c.count * c.bytes for c in forward if c.kind == "all_reduce") == HIDDEN_STATE * (
        2 * LAYERS * low + size
    )
    (gathered,) = [c for c in forward if c.kind.startswith("all_gather")]
    assert (gathered.count, gathered.bytes) == (1, TOKENS * VOCABULARY * low)
    backward = [c for c in sent.values() if (c.phase, c.group) == ("backward", "tp")]
    assert sum(c.count for c in backward) == 2 * LAYERS + 1
    assert sum(c.count * c.bytes for c in backward) == HIDDEN_STATE * (2 * LAYERS + 1) * low
    # The norm's sum, and the first rank's gradients of the norms; over the replicas, all gradients once.
    between = [c for c in sent.values() if c.phase in ("clip", "step")]
    assert sorted((c.kind, c.group, c.count, c.bytes) for c in between) == [
        ("all_reduce", "tp", 1, 4),
        ("broadcast", "tp", 1, (2 * LAYERS + 1) * HIDDEN * size),
    ]
    over_replicas = [c for c in sent.values() if c.group == "dp" and c.phase == "backward"]
    assert sum(c.count * c.bytes for c in over_replicas) == (PARAMETERS * size if dp > 1 else 0)
    assert not [c for c in sent.values() if c.group == "world"]


# LIMITS of copies of hidden states in a step of two layers: (forward, backward).
CLONES = {"fp32": (0, 6), "bf16": (0, 6)}  # a clone before each all-reduce of a gradient, which may be others' too
CASTS = {"fp32": (0, 0), "bf16": (7, 10)}  # of bf16: 2 a layer, 1 for the head, 2 of logits; and their gradients


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_copies_of_hidden_states(runs, precision):
    copies = [c for c in runs(simulated, LLAMA, {"precision": precision}).copies if c.elements >= HIDDEN_STATE]
    for kind, limits in (("clone", CLONES), ("cast", CASTS)):
        for phase, limit in zip(("forward", "backward"), limits[precision]):
            assert sum(c.count for c in copies if (c.kind, c.phase) == (kind, phase)) <= limit, (kind, phase)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_kernels_of_a_layer(runs, precision):
    """Beyond those of the plain layer of local sizes: a clone before each of the two collectives of the backward."""
    shallow, deep = (runs(both, LLAMA | {"num_hidden_layers": n}, {"precision": precision}) for n in (2, 3))
    more = {}
    for phase in ("forward", "backward"):
        ours, least = (deep[which].kernels[phase] - shallow[which].kernels[phase] for which in (0, 1))
        more[phase] = ours - least
    assert more["forward"] <= 0 and more["backward"] <= 2, more


@pytest.mark.parametrize(
    "values, precision, length, dp",
    [
        (LLAMA, "fp32", LENGTH, 1),
        (LLAMA, "bf16", LENGTH, 2),
        (LLAMA, "bf16-weights", LENGTH, 1),
        (LLAMA, "bf16", 2, 1),
        (QWEN3, "bf16", LENGTH, 1),
        (QWEN3, "fp32", 2, 2),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else str(value),
)
def test_the_peak_is_that_of_the_plain_module_of_local_sizes(runs, values, precision, length, dp):
    """In the loss, where all activations are kept; with hardly any tokens, in the optimizer's step."""
    changes = {"precision": precision, "seq_len": length, "dp": dp}
    ours, least = runs(both, values, changes)
    assert ours.peak_at.startswith("backward" if length == LENGTH else "step")
    if length == LENGTH and precision == "fp32":
        # Float32 logits and their log-softmax from the forward, both gradients in the backward; and what is kept.
        loss = 4 * TOKENS * VOCABULARY * 4
        assert least.peak.total >= least.resting.total + loss
    assert ours.peak.total <= 1.03 * least.peak.total, (ours.peak, least.peak, ours.held[:10])
    assert ours.saved <= 1.03 * least.saved


@pytest.mark.parametrize("values", [LLAMA, QWEN3], ids=["llama", "qwen3"])
def test_gradients_keep_no_more_alive_than_themselves(runs, values):
    run = runs(simulated, values, {})
    assert run.gradients_with_excess == run.gradient_excess == 0


@pytest.mark.parametrize("values", [LLAMA, QWEN3], ids=["llama", "qwen3"])
def test_one_graph_under_compile(runs, values):
    assert runs(simulated, values, {}, True).graphs == 1


# ---------------------------------------------------------------------------------------------------------- its use


def after_a_needless_clone():
    stock = Rowwise.forward
    Rowwise.forward = lambda *args, **kwargs: stock(*args, **kwargs).clone()
    try:
        return simulated(LLAMA, {})
    finally:
        Rowwise.forward = stock


def test_a_needless_clone_shows(runs):
    before, (after,) = runs(simulated, LLAMA, {}), run_on_ranks(after_a_needless_clone, 1)
    clones = [sum(c.count for c in run.copies if (c.kind, c.phase) == ("clone", "forward")) for run in (before, after)]
    assert clones[1] == clones[0] + 2 * LAYERS


def leaves_nothing_behind():
    import os

    environment = dict(os.environ)
    simulated(LLAMA, {"dp": 2})
    assert not dist.is_initialized() and dict(os.environ) == environment
    with pytest.raises(BadInputError, match="precision is 'fp8'"):
        setting(precision="fp8")
    with pytest.raises(BadInputError, match="tp is 0"):
        setting(tp=0)
    return torch.ones(1).sum().item()


def test_the_process_is_as_it_was():
    assert run_on_ranks(leaves_nothing_behind, 1) == [1.0]


def refused():
    with pytest.raises(BadInputError, match="without a process group"):
        simulated(LLAMA, {})


def test_real_ranks_are_refused():
    run_on_ranks(refused, 2)


def test_a_layer_is_the_difference_of_two_depths(runs):
    shallow, deep = (runs(simulated, LLAMA | {"num_hidden_layers": n}, {}) for n in (2, 3))
    added = per_layer(shallow, deep, 1, HIDDEN_STATE)
    assert added["all_reduce float32 over tp, forward"] == added["all_reduce float32 over tp, backward"] == 2


def printed():
    import contextlib
    import io

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = main(["--model", "llama-3-8b", "--tp", "8", "--layers", "2", "--seq-len", "64", "--top", "3"])
    return code, out.getvalue()


def test_the_command_prints_both_peaks():
    ((code, text),) = run_on_ranks(printed, 1)
    assert code == 0 and "ratio 1.0" in text and "not measured on a GPU" in text, text


def test_a_config_that_is_none(tmp_path, capsys):
    assert main(["--config", str(tmp_path)]) == 2
    assert "is no config.json that can be read" in capsys.readouterr().err
