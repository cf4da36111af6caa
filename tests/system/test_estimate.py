"""`accel-tp-ddp estimate`: what a few layers tell of all, what a step takes, and what is said of it."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

from accel_tp_ddp.cli import main
from accel_tp_ddp.core.errors import BadInputError
from accel_tp_ddp.tools import plots
from accel_tp_ddp.tools.estimate import card_names, layouts
from accel_tp_ddp.tools.estimate.cards import card, with_links
from accel_tp_ddp.tools.estimate.depths import Depth, Model
from accel_tp_ddp.tools.estimate.duration import duration, send_time
from accel_tp_ddp.tools.estimate.extend import Extended, extended
from accel_tp_ddp.tools.simulate import Setting, simulate, trace
from accel_tp_ddp.tools.tally import Collective, Live, Memory, Tally, Work, collective_bytes

from ..helpers.ranks import run_on_ranks

ROOT = Path(__file__).parents[2]
SIZES = {
    **{"hidden_size": 64, "intermediate_size": 128, "vocab_size": 512, "num_hidden_layers": 6},
    **{"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8, "max_position_embeddings": 128},
}
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **SIZES}
DEEPSEEK = {
    **{"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], **SIZES, "num_key_value_heads": 8},
    **{"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 2},
    **{"n_group": 2, "topk_group": 1, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16},
    **{"qk_rope_head_dim": 8, "v_head_dim": 16, "head_dim": 8},
}
GEMMA = {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "sliding_window": 16} | SIZES


def written(folder: Path, values: dict) -> str:
    path = folder / "config.json"
    path.write_text(json.dumps(values))
    return str(path)


# ------------------------------------------------------------------------------------------------- the extension


def both_ways(path: str, changes: dict, lora: int = 0):
    """The step as few layers tell it, and that of all layers: memory, operations, bytes, collectives."""
    model = Model(path, lora=lora)
    setting = Setting(**{"seq_len": 64, "vocabulary": model.vocabulary, **changes})
    depths = model.depths()
    traces = [trace(model.builder(depth, torch.float32), setting) for depth in depths]
    told = extended(traces[0], [(made, depth.times) for made, depth in zip(traces[1:], depths[1:])])
    every = Depth({count: tuple(range(count)) for count in depths[0].layers})
    whole = trace(model.builder(every, torch.float32), setting)
    largest = max(whole.points, key=lambda point: sum(point.bytes))
    rows = []
    for step, peak in ((told, told.peak), (whole, Memory(*largest.bytes))):
        rows.append(
            {
                **{"peak": peak, "resting": step.resting},
                "flops": sum(row.flops * row.count for row in step.work),
                "bytes": sum(row.bytes * row.count for row in step.work),
                "sent": {group: collective_bytes(step.collectives, group) for group in ("tp", "dp", "world")},
                "times": sum(row.count for row in step.collectives if row.group == "tp"),
            }
        )
    return rows, max(len(kept) for depth in depths for kept in depth.layers.values()), told.peak_at


@pytest.mark.parametrize(
    ("values", "changes", "lora"),
    [
        (LLAMA, {"tp": 2, "dp": 2}, 0),
        (LLAMA, {"tp": 2, "dp": 2, "checkpointing": True, "plugin": {"zero1": True}}, 0),
        (LLAMA, {"tp": 4, "plugin": {"loss_parallel": True}, "precision": "bf16"}, 0),
        (LLAMA, {"tp": 2, "dp": 2, "seq_len": 2}, 0),
        (LLAMA, {"tp": 2, "dp": 2}, 4),
        (DEEPSEEK, {"tp": 2, "precision": "bf16"}, 0),
        (GEMMA, {"tp": 2, "dp": 2, "checkpointing": True}, 0),
    ],
    ids=lambda value: value.get("model_type") if isinstance(value, dict) and "model_type" in value else None,
)
def test_few_layers_tell_exactly_what_all_take(values, changes, lora, tmp_path):
    (((told, whole), most, at),) = run_on_ranks(both_ways, 1, written(tmp_path, values), changes, lora)
    assert most < SIZES["num_hidden_layers"]
    assert told == whole
    if changes.get("seq_len") == 2:
        assert at.startswith("step") and told["peak"].optimizer  # and not where few layers have their peak


def test_an_alternating_and_a_dense_layer_are_kinds_of_their_own(tmp_path):
    for values, kinds in ((DEEPSEEK, [(0, 2), (0, 1, 2), (0, 2, 3)]), (GEMMA, [(0, 5), (0, 1, 5)])):
        depths = Model(written(tmp_path, values)).depths()
        assert [depth.layers[6] for depth in depths] == kinds
        left = sum(depth.times for depth in depths) + len(kinds[0])
        assert left == SIZES["num_hidden_layers"]


def traced_and_simulated(path: str, changes: dict):
    model = Model(path)
    setting = Setting(**{"seq_len": 64, **changes})
    build = model.builder(model.depths()[0], torch.float32)
    made, run = trace(build, setting), simulate(build, setting)
    largest = max(made.points, key=lambda point: sum(point.bytes))
    return (Memory(*largest.bytes), made.resting, made.collectives), (run.peak, run.resting, run.collectives)


@pytest.mark.parametrize("plugin", [{}, {"zero1": True}, {"overlap": True}], ids=str)
def test_a_trace_is_the_simulated_step(plugin, tmp_path):
    path = written(tmp_path, LLAMA)
    ((traced, simulated),) = run_on_ranks(traced_and_simulated, 1, path, {"tp": 2, "dp": 2, "plugin": plugin})
    assert traced == simulated


def flops_of_a_step(path: str):
    model = Model(path)
    made = trace(model.builder(model.depths()[0], torch.float32), Setting(micro_batch=2, seq_len=64))
    return sum(row.flops * row.count for row in made.work)


def test_flops_are_those_of_arithmetic(tmp_path):
    """Twice the weights' elements a token, forward and twice that backward; attention's, of which half is causal."""
    (counted,) = run_on_ranks(flops_of_a_step, 1, written(tmp_path, LLAMA))
    hidden, tokens, length, heads, width = 64, 128, 64, 8, 8
    weights = 2 * (hidden * hidden * 2 + hidden * 32 * 2 + 3 * hidden * 128) + hidden * 512
    scores = 2 * 2 * (tokens // length) * heads * length * length * width // 2  # two products, of half the tiles
    assert counted == 6 * tokens * weights + 2 * int(3.5 * scores)


def bytes_of_optimizers():
    """What AdamW moves for each element, of one step after the first, on lists of tensors and one by one."""
    found = []
    for foreach in (True, False):
        param = torch.nn.Parameter(torch.zeros(1000))
        optimizer = torch.optim.AdamW([param], foreach=foreach)
        for _ in range(2):
            param.grad = torch.ones(1000)
            with Tally(Live(), "activations", {}) as tally:
                optimizer.step()
        found.append(sum(work[3] * count for work, count in tally.work.items() if work[3] >= 4000) / 4000)
    return found


def test_kernels_that_change_lists_in_place_count_what_they_write():
    """AdamW: weight decay; first moment; second, times and plus a product; root, division, addition; the parameter."""
    reads_and_writes = 2 + 3 + (2 + 4) + 2 + 2 + 2 + 4
    assert bytes_of_optimizers() == [reads_and_writes, reads_and_writes]


# -------------------------------------------------------------------------------------------------------- the time


def test_a_kernel_takes_the_longer_of_its_operations_and_its_bytes():
    h100 = card("h100-80")
    few, many = (Work("forward", "bfloat16", flops, 10**9, 0, 1) for flops in (10**6, 10**15))
    seconds = [duration(Extended(Memory(), "", Memory(), (row,), ()), h100, 1, 1, 8).forward for row in (few, many)]
    assert seconds == pytest.approx([1e9 / (3.35e12 * h100.memory_share), 1e15 / (989.4e12 * h100.matmul)])
    tiny = Work("forward", "float32", 0, 8, 0, 100)
    launches = duration(Extended(Memory(), "", Memory(), (tiny,), ()), h100, 1, 1, 8)
    assert launches.forward == pytest.approx(100 * h100.launch) and launches.bound == "launches"


def test_a_ring_sends_each_byte_twice_to_reduce_and_once_to_gather():
    h100 = with_links(card("h100-80"), "100,10")
    reduced, gathered = (Collective(kind, "float32", 10**9, "dp", "step", 1) for kind in ("all_reduce", "all_gather"))
    inside = [send_time(row, 4, h100) for row in (reduced, gathered)]
    assert inside == pytest.approx([1.5e9 / (100e9 * h100.links), 0.75e9 / (100e9 * h100.links)], rel=1e-2)
    # Four ranks of a group in each node use four adapters, at most as fast as the links.
    assert send_time(reduced, 8, h100, 4) == pytest.approx(1.75e9 / (40e9 * h100.links), rel=1e-2)
    assert send_time(reduced, 1, h100, 4) == 0


def test_reducing_gradients_shows_where_it_takes_longer_than_the_backward():
    h100 = card("h100-80")
    backward = Work("backward", "bfloat16", int(989.4e12 * h100.matmul), 0, 0, 1)  # a second
    for size, count in ((10**9, 4), (10**12, 4)):
        row = Collective("all_reduce", "float32", size, "dp", "backward", count)
        at = duration(Extended(Memory(), "", Memory(), (backward,), (row,)), h100, 1, 8, 8)
        one = send_time(row, 8, h100)
        assert at.dp_exposed == pytest.approx(max(one, 4 * one - 1))


#: A row of `cards.json` with figures of its own, as `python -m benchmarks.calibrated` measures it.
OWN = {
    **{"name": "own", "memory_mib": 1024, "bf16_tflops": 0.02, "fp32_tflops": 0.01, "memory_gbs": 8},
    **{"link_gbs": 2, "network_gbs": 1, "source": "measured"},
    "achieved": {"matmul": 1, "memory": 1, "links": 1, "launch_us": 20, "start_us": 300},
}


def test_of_a_collective_beside_work_what_is_longer_shows():
    h100 = card("h100-80")
    beside = (Work("backward", "bfloat16", int(989.4e12 * h100.matmul * 0.01), 0, 0, 1),)  # ten milliseconds
    for size in (10**7, 10**11):
        rows = tuple(Collective("all_reduce", "bfloat16", size, "tp", "backward", 3, each) for each in ((), beside))
        at = duration(Extended(Memory(), "", Memory(), (), rows), h100, 8, 1, 8)
        one = send_time(rows[0], 8, h100)
        assert at.tp == pytest.approx(6 * one)
        assert at.tp_exposed == pytest.approx(3 * one + 3 * max(one - 0.01, 0))


def test_on_cpu_ranks_nothing_runs_beside_something_else(tmp_path):
    path = tmp_path / "own.json"
    backward = Work("backward", "float32", 10**9, 0, 0, 4)  # 0.1 s each
    row = Collective("all_reduce", "float32", 10**8, "dp", "backward", 2)  # 0.05 s each, and a start
    step = Extended(Memory(), "", Memory(), (backward,), (row,))
    path.write_text(json.dumps({**OWN, "apart": False}))
    inside = replace(step, collectives=(replace(row, group="tp", beside=(backward,)),))
    waited = duration(inside, card(str(path)), 2, 1, 8)
    assert waited.tp_exposed == waited.tp == pytest.approx(2 * (0.05 + 300e-6))
    took = duration(step, card(str(path)), 1, 2, 8)
    assert took.backward == pytest.approx(0.4 + 4 * 20e-6) and took.bound == "compute"
    assert took.dp_exposed == took.dp == pytest.approx(2 * (0.05 + 300e-6))
    path.write_text(json.dumps(OWN))
    beside = duration(step, card(str(path)), 1, 2, 8)
    assert beside.backward == pytest.approx(0.4) and beside.dp_exposed == pytest.approx(0.05 + 300e-6)


def test_results_in_fresh_memory_take_longer(tmp_path):
    path = tmp_path / "own.json"
    works = [Work("forward", "float32", 0, 3 * 2**26, made, 1) for made in (0, 2**26)]
    path.write_text(json.dumps({**OWN, "fresh_gbs": 2}))
    took = duration(Extended(Memory(), "", Memory(), tuple(works), ()), card(str(path)), 1, 1, 8)
    assert took.forward == pytest.approx(3 * 2**26 / 8e9 + 3 * 2**26 / 2e9)


def test_every_card_names_its_sources():
    assert len(card_names()) >= 7
    for name in card_names():
        each = card(name)
        assert each.source and each.link >= each.network and each.bf16 > each.fp32
        assert int(name.rpartition("-")[2]) * 0.93 < each.memory / 2**30 <= int(name.rpartition("-")[2])


# ----------------------------------------------------------------------------------------------------- the command


def answered(*arguments: str):
    import contextlib
    import io

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["estimate", *arguments])
    return code, out.getvalue(), err.getvalue()


def ask(*arguments: str) -> dict:
    ((code, out, err),) = run_on_ranks(answered, 1, *arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def test_layouts_are_ranked_and_one_is_taken(tmp_path):
    path = written(tmp_path, LLAMA)
    found = ask(path, "--gpus", "4096", "--gpu", "h100-80", "--seq-len", "32", "--tp", "2", "8")
    assert {(row["tp"], row["dp"]) for row in found["layouts"]} == {(2, 2048), (8, 512)}
    speeds = [row["tokens_per_second"] for row in found["layouts"]]
    assert speeds == sorted(speeds, reverse=True) and all(row["fits"] for row in found["layouts"])
    assert found["take"]["tp"] == found["layouts"][0]["tp"] and "most tokens a second" in found["take"]["why"]
    for row in found["layouts"]:
        assert sum(row["parts"].values()) == row["peak"] == sum(row["memory"].values())


def test_where_nothing_fits_it_is_said_what_would(tmp_path):
    path = written(tmp_path, {**LLAMA, "vocab_size": 65536})
    arguments = (path, "--gpus", "2", "--tp", "2", "--seq-len", "512", "--gpu-memory")
    (row,) = ask(*arguments, "64")["layouts"]
    ample = row["needed"] / 2**30
    assert row["fits"] and "seconds" not in row and row["most_memory"] == "logits"
    found = ask(*arguments, f"{ample - 0.05:.4f}")
    assert found["take"] is None
    made = {switch["change"]: switch for switch in found["switches"]}
    assert made["--loss-parallel"]["fits"] and found["switches"][0]["fits"]
    (again,) = ask(*arguments, f"{ample - 0.05:.4f}", "--loss-parallel")["layouts"]
    assert again["fits"] and again["needed"] == made["--loss-parallel"]["needed"]


def answered_where_switches_do_not_go_together(*arguments: str):
    """As if loss parallel and sequence parallel were refused together, as other switches may be."""
    stock = layouts._Estimate._step

    def step(self, request, tp, dp):
        if request.plugin.get("loss_parallel") and request.plugin.get("sequence_parallel"):
            raise BadInputError("loss_parallel and sequence_parallel do not go together.")
        return stock(self, request, tp, dp)

    with mock.patch.object(layouts._Estimate, "_step", step):
        return answered(*arguments)


def test_a_combination_of_switches_that_is_refused_is_left_out_of_the_advice(tmp_path):
    path = written(tmp_path, LLAMA)
    arguments = (path, "--gpus", "2", "--tp", "2", "--seq-len", "64", "--gpu-memory", "0.1", "--json")
    ((code, out, err),) = run_on_ranks(answered_where_switches_do_not_go_together, 1, *arguments)
    assert code == 0, err
    changes = [row["change"] for row in json.loads(out)["switches"]]
    assert {"--loss-parallel", "--sequence-parallel"} <= set(changes)
    assert not any("--loss-parallel" in change and "--sequence-parallel" in change for change in changes)


@pytest.mark.parametrize(
    ("switches", "says"),
    [
        (["--loss-parallel"], "the plan spreads no output layer of this LlamaForCausalLM"),
        (["--loss-parallel", "--lora", "4"], "the plan spreads no output layer of this"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_switches_that_the_plan_does_not_go_with_are_one_line(switches, says, tmp_path):
    plan = tmp_path / "plan.yaml"
    plan.write_text("lm_head: replicate\n")
    arguments = (written(tmp_path, LLAMA), "--gpus", "2", "--tp", "2", "--gpu-memory", "24", "--plan", str(plan))
    ((code, out, err),) = run_on_ranks(answered, 1, *arguments, "--seq-len", "16", *switches)
    assert code == 2 and out == "" and err.count("\n") == 1 and says in err


def test_a_size_that_the_model_does_not_allow_is_refused_with_why(tmp_path):
    path = written(tmp_path, {**LLAMA, "hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2})
    found = ask(path, "--gpus", "4", "--gpu", "a100-80", "--seq-len", "16")
    assert sorted(row["tp"] for row in found["layouts"]) == [1, 2]
    assert [row["tp"] for row in found["refused"]] == [4] and "not divisible" in found["refused"][0]["why"]


def test_what_the_documentation_shows_is_what_is_printed(monkeypatch):
    monkeypatch.chdir(ROOT)
    block = (ROOT / "docs" / "estimate.md").read_text(encoding="utf-8").split("```\n$ accel-tp-ddp estimate ")[1]
    command, *shown = block.partition("\n```")[0].splitlines()
    ((code, out, err),) = run_on_ranks(answered, 1, *command.split())
    assert code == 0, err
    assert out.splitlines() == shown


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--gpus", "8"], "Give --gpu NAME, or --gpu-memory GiB"),
        (["--gpus", "8", "--gpu", "h100"], "Nearest names that exist: h100-80"),
        (["--gpus", "0", "--gpu", "h100-80"], "--gpus is 0; give 1 or more"),
        (["--gpus", "8", "--gpu-memory", "-1"], "more than 0"),
        (["--gpus", "8", "--gpu-memory", "24", "--links", "1,1"], "--links is of no use without --gpu"),
        (["--gpus", "8", "--gpu", "h100-80", "--links", "450"], "--links 450,50"),
        (["--gpus", "8", "--gpu", "h100-80", "--links", "450,nan"], "--links 450,50"),
        (["--gpus", "8", "--gpu", "h100-80", "--tp", "3"], "--tp 3 does not divide the 8 GPUs"),
        (["--gpus", "8", "--gpu", "h100-80", "--precision", "fp8"], "--precision is 'fp8'; give one of fp32"),
        (["--gpus", "8", "--gpu", "h100-80", "--seq-len", "1"], "--seq-len is 1; give 2 or more"),
        (["--gpus", "8", "--gpu", "h100-80", "--micro-batch", "0"], "--micro-batch is 0; give 1 or more"),
        (["--gpus", "8", "--gpu", "h100-80", "--gpus-per-node", "0"], "--gpus-per-node is 0; give 1 or more"),
        (["--gpus", "8", "--gpu-memory", "24", "--tp", "2", "--plan", "none.yaml"], "there is no file"),
        (["--gpus", "16", "--gpu", "h100-80", "--tp", "16"], "allows none of the tensor-parallel sizes 16"),
        (["--gpu", "h100-80"], "--gpus"),
        (["--gpus", "two", "--gpu", "h100-80"], "invalid int value: 'two'"),
        (["--gpus", "8", "--gpu", "h100-80", "--lora", "-1"], "--lora is -1; give 0 or more"),
        (["--gpus", "8", "--gpu", "h100-80", "--tp", "0"], "--tp 0 does not divide the 8 GPUs"),
        (["--gpus", "8", "--gpu", "none.json"], "--gpu none.json cannot be read as JSON: No such file"),
        (["--gpus", "8", "--gpu", "{path}"], "memory_mib is None; give a number above 0. It needs memory_mib, "),
        (["--gpus", "8", "--gpu", "h100-80", "--plot", "bars.svg"], "--plot is bars.svg; give a file that ends with"),
        (["--gpus", "8", "--gpu", "h100-80", "--plot", "no/bars.png"], "there is no folder no. Make it"),
    ],
    ids=lambda value: None if isinstance(value, list) else value[:24],
)
def test_bad_input_is_exit_code_2_and_one_line(arguments, says, tmp_path, capsys):
    path = written(tmp_path, LLAMA)
    assert main(["estimate", path, *(each.format(path=path) for each in arguments)]) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.count("\n") == 1
    assert told.err.startswith("accel-tp-ddp: ") and says in told.err


def test_a_model_without_labels_is_refused(tmp_path, capsys):
    path = written(tmp_path, {**LLAMA, "architectures": ["LlamaModel"]})
    assert main(["estimate", path, "--gpus", "2", "--gpu-memory", "24"]) == 2
    assert "takes no `labels`" in capsys.readouterr().err


@pytest.mark.parametrize(
    "values", [{"link_gbs": 0}, {"achieved": {"matmul": "much"}}, [1], {"apart": 1}, {"fresh_gbs": -1}], ids=str
)
def test_a_card_of_ones_own_that_is_wrong_is_one_line(values, tmp_path, capsys):
    own = tmp_path / "own.json"
    own.write_text(json.dumps({**OWN, **values} if isinstance(values, dict) else values))
    assert main(["estimate", written(tmp_path, LLAMA), "--gpus", "2", "--gpu", str(own)]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and f"--gpu {own}: " in told and " is " in told


# ----------------------------------------------------------------------------------------------------- the picture


def test_without_matplotlib_a_picture_is_one_error_before_anything_is_computed(tmp_path, monkeypatch, capsys):
    stock = importlib.util.find_spec
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None if name == "matplotlib" else stock(name))
    picture = str(tmp_path / "bars.png")
    for arguments in (["estimate", "none", "--gpus", "8", "--gpu", "h100-80"], ["plan", "none", "--tp", "2"]):
        assert main([*arguments, "--plot", picture]) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1 and "--plot needs matplotlib. Run `pip install matplotlib`" in told


def test_a_picture_has_a_bar_for_each_part_of_each_layout(tmp_path):
    plt = pytest.importorskip("matplotlib.pyplot")
    parts = {"weights": 2 * 2**30, "logits": 2**29}
    row = {"parts": parts, "needed": 3 * 2**30, "tokens_per_second": 9, "seconds": {}}
    rows = [{**row, "tp": tp, "dp": 4 // tp} for tp in (1, 2)]
    request = {"memory": 2**31, "card": "own", "gpus": 4, "micro_batch": 1, "seq_len": 8, "precision": "bf16"}
    drawn = []
    with mock.patch.object(plt, "close", drawn.append):
        plots.draw_estimate({"model": "Any", "layouts": rows, "request": request}, str(tmp_path / "bars.png"))
    (axis,) = drawn[0].axes
    widths = [bar.get_width() for bar in axis.patches]
    assert widths == [2, 2, 0.5, 0.5, 0.5, 0.5]  # weights, logits, and what else is needed
    assert [line.get_xdata()[0] for line in axis.lines] == [2]
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")
