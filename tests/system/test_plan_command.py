"""`accel-tp-ddp plan`: the resolved plan of a model that a command names as a tree, or an inferred one as YAML."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.utils import set_seed
from peft import LoraConfig, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoConfig, LlamaConfig

from accel_tp_ddp import parallelize, resolve_plan
from accel_tp_ddp.cli import main
from accel_tp_ddp.tools.plots import by_kind
from accel_tp_ddp.tools.tree import as_tree, ranges, totals, walk

from ..helpers.models import build_config, build_model
from ..helpers.ranks import run_on_ranks

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "benchmarks" / "configs"
#: Parameters as the model cards state them, in 10^9.
STATED = {
    **{"llama-3.1-405b": "406", "qwen3-235b-a22b": "235", "deepseek-v3": "671", "mixtral-8x22b": "141"},
    **{"phi-4": "14.7", "gemma-3-27b": "27.4", "qwen2.5-7b": "7.62"},
}


@pytest.fixture(autouse=True)
def nothing_proved(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCEL_TP_DDP_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def small(tmp_path):
    """The config.json of a small Llama, with more ranks than key/value heads at tp 4."""
    folder = tmp_path / "small"
    config = build_config("llama", layers=3, num_key_value_heads=2, vocab_size=128)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    return folder / "config.json"


def answer(capsys, *arguments: str | Path) -> dict:
    assert main(["plan", *map(str, arguments), "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def test_the_plan_of_a_folder(tmp_path, capsys):
    LlamaConfig(num_hidden_layers=3, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    assert main(["plan", str(tmp_path), "--tp", "4"]) == 0
    printed = capsys.readouterr().out
    assert "Tensor-parallel plan of LlamaForCausalLM: tp_size=4" in printed
    (row,) = (line.split() for line in printed.splitlines() if line.split()[:1] == ["o_proj"])
    assert row[1:3] == ["rowwise", "model"] and row[-3:] == ["4096x4096", "->", "4096x1024"]
    assert "\n    layers.0-2  LlamaDecoderLayer" in printed
    assert answer(capsys, tmp_path, "--tp", "2")["rules"]["model.layers.2.mlp.down_proj"] == "rowwise"
    assert main(["plan", str(tmp_path), "--tp", "0"]) == 2


# ------------------------------------------------------------------------------------- against what parallelize does


ARCHITECTURES = (
    *("llama", "llama, tied", "llama_one_key", "qwen3_moe", "gpt_oss", "deepseek_v3", "gpt2", "phi3_two_keys"),
    "lora",
)


def build(architecture: str):
    if architecture == "lora":
        set_seed(0)
        adapters = LoraConfig(r=4, target_modules=["q_proj", "k_proj", "o_proj", "down_proj"], task_type="CAUSAL_LM")
        return get_peft_model(build_model("llama"), adapters)
    return build_model(architecture.removesuffix(", tied"), tied=architecture.endswith("tied"), layers=3)


def what_is_held(architecture: str):
    """Of every parameter of a sharded model on this rank: its local shape, and whether it is sharded."""
    tp_size = torch.distributed.get_world_size()
    model = parallelize(build(architecture), init_device_mesh("cpu", (tp_size,), mesh_dim_names=("tp",)))
    held = {name: (list(param.shape), param.tp_shard) for name, param in model.named_parameters()}
    sizes = {name: (shape, info is not None and info.is_sharded) for name, (shape, info) in held.items()}
    return sizes, sum(param.numel() for param in model.parameters())


def unfolded(tree: dict) -> dict[str, dict]:
    """Every parameter that is counted, by its full name."""
    found = {}
    for node, param in walk(tree):
        if param["tied"] is None:
            names = [""]
            for part in node["name"].split("."):
                names = [f"{name}.{each}" for name in names for each in numbers(part)]
            assert len(names) == node["count"]
            found.update({f"{name}.{param['name']}".strip("."): param for name in names})
    return found


def numbers(part: str) -> list[str]:
    if not part[:1].isdigit():
        return [part]
    spans = [span.split("-") for span in part.split(",")]
    return [str(number) for span in spans for number in range(int(span[0]), int(span[-1]) + 1)]


@pytest.mark.parametrize("tp_size", [2, 4])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_local_shapes_and_sums_are_those_of_the_sharded_model(architecture, tp_size):
    model = build(architecture)
    tree = as_tree(model, resolve_plan(model, tp_size))
    expected, sums = unfolded(tree), totals(tree, tp_size)
    assert sums["parameters"] == sum(param.numel() for param in model.parameters())
    assert sums["bytes"] == sum(param.numel() * param.element_size() for param in model.parameters())
    full = {name: list(param.shape) for name, param in model.named_parameters()}
    assert {name: param["full"] for name, param in expected.items()} == full
    for rank, (held, count) in enumerate(run_on_ranks(what_is_held, tp_size, architecture)):
        assert {name: shape for name, (shape, _) in held.items()} == {
            name: param["local"][rank] for name, param in expected.items()
        }
        assert {name for name, (_, sharded) in held.items() if not sharded} == {
            name for name, param in expected.items() if param["replicated"]
        }
        assert sums["ranks"][rank]["parameters"] == count


# ------------------------------------------------------------------------------------------- what the tree says


def nodes(tree: dict) -> dict[str, dict]:
    return {tree["name"]: tree, **{name: node for child in tree["children"] for name, node in nodes(child).items()}}


def test_layers_that_are_alike_are_one_and_another_is_not(small, tmp_path, capsys):
    assert "model.layers.0-2.mlp.up_proj" in nodes(answer(capsys, small, "--tp", "2")["tree"])
    plan = tmp_path / "plan.yaml"
    plan.write_text("model.layers.1.mlp.gate_proj: colwise_gather_output\nmodel.layers.1.mlp.down_proj: replicate\n")
    found = answer(capsys, small, "--tp", "2", "--plan", plan)
    tree = nodes(found["tree"])
    assert tree["model.layers.0,2.mlp.gate_proj"]["count"] == 2 and tree["model.layers.1.mlp.gate_proj"]["count"] == 1
    mine, own = tree["model.layers.1.mlp.down_proj"], tree["model.layers.0,2.mlp.down_proj"]
    assert (mine["style"], mine["source"], mine["rule"]) == ("replicate", "user", "model.layers.1.mlp.down_proj")
    assert (own["style"], own["source"]) == ("rowwise", "model")
    assert (
        mine["parameters"][0]["replicated"] == "the rule says `replicate`" and not own["parameters"][0]["replicated"]
    )
    assert [part["names"] for part in found["replicated"] if "replicate`" in part["why"]] == [
        ["model.layers.1.mlp.down_proj.weight"]
    ]


def test_rules_that_are_not_followed_are_listed_with_why(small, tmp_path, capsys):
    plan = tmp_path / "plan.yaml"
    plan.write_text("model.layers.*.mlp.up_proj: colwise\nmodel.layers.*.mlp.router?.up: colwise\n")
    unused = {rule["rule"]: rule for rule in answer(capsys, small, "--tp", "2", "--plan", plan)["unused"]}
    assert unused.keys() == {"model.layers.*.mlp.up_proj", "model.layers.*.mlp.router?.up"}
    assert unused["model.layers.*.mlp.router?.up"]["overridden"] is None
    mine = {"rule": "model.layers.*.mlp.up_proj", "style": "colwise", "source": "user"}
    overridden = unused["model.layers.*.mlp.up_proj"]
    assert overridden["source"] == "model" and overridden["overridden"] == mine


def test_heads_on_several_ranks_and_parts_of_different_size_are_warned_of(small, capsys):
    assert not any("heads" in line for line in answer(capsys, small, "--tp", "2")["warnings"])
    found = answer(capsys, small, "--tp", "4")
    assert any("k_proj.weight on 2" in line for line in found["warnings"])  # two key/value heads
    assert nodes(found["tree"])["model.layers.0-2.self_attn.k_proj"]["parameters"][0]["ranks"] == 2
    small.write_text(json.dumps(json.loads(small.read_text()) | {"vocab_size": 131}))
    found = answer(capsys, small, "--tp", "2")
    assert any("different size of model.embed_tokens.weight, lm_head.weight" in line for line in found["warnings"])
    first, last = (rank["parameters"] for rank in found["totals"]["ranks"])
    assert first == last + 2 * 64  # a row more of each


LARGE = """
from torch import nn

class Model(nn.Module):
    tp_plan = {"up": "colwise", "down": "rowwise"}

    def __init__(self):
        super().__init__()
        self.up, self.down, self.other = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(64, 64)
"""


def test_large_matrices_without_a_rule_are_warned_of(tmp_path, monkeypatch, capsys):
    (tmp_path / "with_a_large_matrix.py").write_text(LARGE)
    monkeypatch.chdir(tmp_path)
    found = answer(capsys, "with_a_large_matrix:Model", "--tp", "2")
    share = 64 * 64 / found["totals"]["ranks"][0]["parameters"]
    assert found["warnings"] == [f"no rule names other.weight: {share:.1%} of what a rank holds, on each rank"]


def test_a_plan_is_known_once_it_was_proved(small, capsys, monkeypatch):
    monkeypatch.setattr("accel_tp_ddp.proof.ledger.read_shipped", dict)
    found = answer(capsys, small, "--tp", "2")
    assert found["proof"] == {"status": "unknown", "unproved": []} and "verify" in found["text"].splitlines()[-1]
    command = [sys.executable, "-m", "accel_tp_ddp.cli", "verify", str(small), "--tp", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run(command, env=environment, capture_output=True, timeout=250).returncode == 0
    assert answer(capsys, small, "--tp", "2")["proof"]["status"] == "cache"
    assert answer(capsys, small, "--tp", "4")["proof"]["status"] == "unknown"


def test_an_inferred_plan_is_yaml_that_is_the_models_own(tmp_path, capsys):
    config = LlamaConfig(num_hidden_layers=3, num_key_value_heads=8, architectures=["LlamaForCausalLM"])
    config.save_pretrained(tmp_path)
    command = [sys.executable, "-m", "accel_tp_ddp.cli", "plan", str(tmp_path), "--tp", "2", "--infer"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    own = {f"model.{name}": style for name, style in LlamaConfig.base_model_tp_plan.items()}
    found = yaml.safe_load(done.stdout)
    assert {name: found[name] for name in own} == own
    comments = [line for line in done.stdout.splitlines() if line.startswith("#")]
    assert any(line.split()[1:4] == ["o_proj", "rowwise", "inferred"] for line in comments)
    assert "was proved just now" in comments[-1]
    (tmp_path / "plan.yaml").write_text(done.stdout)
    again = answer(capsys, tmp_path, "--tp", "2", "--plan", tmp_path / "plan.yaml")
    assert {rule: again["rules"][rule.replace("*", "2")] for rule in own} == own


# ------------------------------------------------------------------------------------------------- published configs


@pytest.mark.parametrize("name", sorted(STATED))
def test_a_published_config_has_the_parameters_that_its_card_states(name, capsys):
    found = answer(capsys, CONFIGS / f"{name}.json", "--tp", "2")
    stated = STATED[name]
    digits = len(stated.partition(".")[2])
    assert f"{found['totals']['parameters'] / 1e9:.{digits}f}" == stated
    assert found["totals"]["share"] == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("name", ["deepseek-v3", "gemma-3-27b"])
def test_what_is_drawn_by_kind_of_module_is_all_that_a_rank_holds(name, capsys):
    found = answer(capsys, CONFIGS / f"{name}.json", "--tp", "8")
    kinds = by_kind(found["tree"])
    assert sum(sum(sizes.values()) for sizes in kinds.values()) == found["totals"]["ranks"][0]["bytes"]
    assert sum(sizes["replicated"] for sizes in kinds.values()) == found["totals"]["replicated"]
    assert {"embedding", "norms", "attention", "MLP, experts"} <= kinds.keys()
    assert kinds["norms"]["sharded"] == 0 and kinds["MLP, experts"]["sharded"] > kinds["attention"]["sharded"] > 0


def test_every_published_config_is_tried():
    assert {path.stem for path in CONFIGS.glob("*.json")} == STATED.keys()


@pytest.mark.parametrize("name", ["qwen2.5-7b", "phi-4", "mixtral-8x22b"])
def test_the_sizes_that_a_model_allows_are_those_that_leave_each_rank_full_heads(name, capsys):
    found = answer(capsys, CONFIGS / f"{name}.json")
    config = AutoConfig.from_pretrained(CONFIGS / f"{name}.json")
    queries, keys = config.num_attention_heads, config.num_key_value_heads
    full = [n for n in range(1, 65) if queries % n == 0 and (keys % n == 0 or n % keys == 0)]
    if name.startswith("mixtral"):  # experts lie in one tensor, which is cut evenly
        full = [n for n in full if config.intermediate_size % n == 0]
    assert [size["tp_size"] for size in found["sizes"] if size["allowed"]] == full
    assert all(size["why"] for size in found["sizes"] if not size["allowed"])
    per_head = {size["tp_size"]: size["ranks_per_head"] for size in found["sizes"] if size["allowed"]}
    assert per_head == {n: max(n // keys, 1) for n in full}


def test_why_a_size_is_not_allowed_is_said_once(capsys):
    assert main(["plan", str(CONFIGS / "qwen2.5-7b.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    refused = [line for line in lines if line.startswith("not ")]
    assert len(refused) == 2 and refused[0].startswith("not 3,5-6,8-13,15-27,29-64: `model.layers.*.self_attn.q_proj")
    assert "28 is not divisible" in refused[0] and refused[1].startswith("not 7,14: ") and "heads = 4" in refused[1]


def test_what_the_documentation_shows_is_what_is_printed(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    blocks = (ROOT / "docs" / "plans.md").read_text(encoding="utf-8").split("```\n$ accel-tp-ddp plan ")[1:]
    assert len(blocks) == 2
    for block in blocks:
        command, *shown = block.partition("\n```")[0].splitlines()
        assert main(["plan", *command.split()]) == 0
        printed = capsys.readouterr().out.splitlines()
        end = len(shown) - 1 if shown[-1] == "..." else len(printed)
        assert printed[:end] == shown[:end]


def test_a_config_of_405_billion_parameters_keeps_to_the_limits_of_the_benchmark():
    command = [sys.executable, "-m", "benchmarks.plans", "--only", "llama-3.1-405b"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "llama-3.1-405b" in done.stdout


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{folder}/none.json", "--tp", "2"], "there is no file or folder"),
        (["{folder}/none.json", "--tp", "2", "--infer"], "there is no file or folder"),
        (["{folder}/none.json"], "there is no file or folder"),
        (["{folder}/empty", "--tp", "2"], "has no config.json"),
        (["{folder}/broken.json", "--tp", "2"], "no config that can be read"),
        (["{folder}/list.json", "--tp", "2"], "no config that can be read"),
        (["{folder}/nothing.json", "--tp", "2"], "no config that can be read"),
        (["{folder}/zero.json", "--tp", "2"], "`embed_dim` must be divisible by num_heads"),
        (["{folder}/no_such_module:build", "--tp", "2"], "names no function"),
        (["{small}", "--tp", "two"], "invalid int value: 'two'"),
        (["{small}", "--tp", "-2"], "Give 1 or more"),
        (["{small}", "--tp", "3"], "Choose a tp_size that divides"),
        (["{small}", "--tp", "2", "--plan", "{folder}/none.yaml"], "there is no file"),
        (["{small}", "--tp", "2", "--plan", "{folder}/typo.yaml"], "gate_proj"),
        (["{small}", "--plan", "{folder}/typo.yaml"], "gate_proj"),
        (["{small}", "--tp", "2", "--plan", "{folder}/style.yaml"], "unknown style `colwse`"),
        (["{small}", "--tp", "2", "--infer", "--plan", "{folder}/style.yaml"], "Give one of the two"),
        (["{small}", "--tp", "1", "--infer"], "Give 2 or more"),
        (["{small}", "--infer"], "--infer needs --tp"),
        (["{folder}/planless.json", "--tp", "2"], "Give --infer"),
        (["{folder}/planless.json"], "Give --infer"),
        (["{small}", "--plot", "{folder}/plan.png"], "--plot needs --tp N"),
        (["{small}", "--tp", "2", "--plot", "{folder}/plan.svg"], "give a file that ends with .png"),
    ],
)
def test_bad_input_is_exit_code_2_and_one_line(arguments, says, small, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "nothing.json").write_text("{}")
    (tmp_path / "zero.json").write_text('{"model_type": "gpt2", "n_head": 7}')
    (tmp_path / "planless.json").write_text('{"model_type": "xlm"}')
    (tmp_path / "typo.yaml").write_text("model.layers.*.mlp.gate_prj: colwise\n")
    (tmp_path / "style.yaml").write_text("model.layers.*.mlp.gate_proj: colwse\n")
    given = [argument.format(folder=tmp_path, small=small) for argument in arguments]
    assert main(["plan", *given]) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.count("\n") == 1
    assert told.err.startswith("accel-tp-ddp: ") and says in told.err
    assert main(["plan", *given, "--json"]) == 2
    assert says in json.loads(capsys.readouterr().out)["error"]


def test_numbers_in_short():
    assert ranges([0, 1, 2, 4, 6, 7]) == "0-2,4,6-7" and ranges([3]) == "3"
