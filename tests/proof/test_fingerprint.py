"""The fingerprint is blind to sizes, and to nothing that decides whether a plan is right."""

import importlib.util
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from accel_tp_ddp import Style, register_style, resolve_plan
from accel_tp_ddp.core.layout import chunk_ranges
from accel_tp_ddp.proof.fingerprint import describe, fingerprint
from accel_tp_ddp.styles import registry
from accel_tp_ddp.styles.base import Layout

from ..helpers.models import build_model

TP = 4
FULL = {
    "num_hidden_layers": 80,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
SMALL = {
    "num_hidden_layers": 2,
    "hidden_size": 128,
    "intermediate_size": 64,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "vocab_size": 96,
}


@pytest.fixture(autouse=True)
def registered_styles_are_forgotten(monkeypatch):
    monkeypatch.setattr(registry, "_STYLES", dict(registry._STYLES))


def llama(sizes=SMALL, **overrides):
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**{**sizes, **overrides}))


def rows(model, tp_size=TP, rules="auto"):
    return describe(model, resolve_plan(model, tp_size, rules))


def printed(model, tp_size=TP, rules="auto"):
    return fingerprint(model, resolve_plan(model, tp_size, rules))


def changed(before, after):
    """The rows that are in one of two descriptions only."""
    return sorted(set(before) ^ set(after))


@pytest.fixture(scope="module")
def plain():
    return rows(llama())


def test_a_small_model_has_the_fingerprint_of_the_full_one(plain):
    full = llama(FULL)
    assert changed(rows(full), plain) == []
    assert printed(full) == printed(llama()) is not None


def test_it_says_what_the_code_the_structure_the_cuts_and_the_switches_are(plain):
    q_proj = "module model.layers.*.self_attn.q_proj torch.nn.modules.linear.Linear weight "
    assert any(row.startswith(q_proj) and "colwise" in row and "dim 0 even 4 parts" in row for row in plain)
    assert any(row.startswith("source transformers.models.llama.modeling_llama ") for row in plain)
    assert any(row.startswith("source transformers.integrations.sdpa_attention ") for row in plain)
    assert "config - hidden_act 'silu'" in plain and f"tp_size {TP}" in plain
    assert not any("80" in row or "8192" in row or "128256" in row for row in rows(llama(FULL)) if "source" not in row)


DIFFERENT = {
    "biases": {"attention_bias": True},
    "one bias of another kind": {"mlp_bias": True},
    "tied embeddings": {"tie_word_embeddings": True},
    "fewer key/value heads than ranks": {"num_key_value_heads": 2},
    "one key/value head": {"num_key_value_heads": 1},
    "one key/value head a rank": {"num_key_value_heads": 4},
    "as many key/value heads as queries": {"num_key_value_heads": 16},
    "an odd vocabulary": {"vocab_size": 97},
    "a padding token": {"pad_token_id": 0},
    "a switch": {"is_encoder_decoder": True},
    "another activation": {"hidden_act": "gelu"},
    "another rotary embedding": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    "a field of its own": {"my_switch": True},
}


@pytest.mark.parametrize("overrides", DIFFERENT.values(), ids=DIFFERENT)
def test_another_config_of_the_same_class_differs(overrides, plain):
    assert changed(rows(llama(**overrides)), plain)
    assert printed(llama(**overrides)) != printed(llama())


def test_a_switch_counts_whatever_its_value_was(plain):
    assert changed(rows(llama(my_switch=True)), rows(llama(my_switch=False))) == [
        "config - my_switch False",
        "config - my_switch True",
    ]


UNIMPORTANT = {
    "names": {"name_or_path": "somewhere/else", "architectures": ["LlamaForCausalLM"]},
    "labels": {"num_labels": 7},
    "special tokens": {"bos_token_id": 5, "eos_token_id": [6, 7]},
    "generation": {"use_cache": False, "return_dict": False},
    "dropout": {"attention_dropout": 0.1},
    "initialization": {"initializer_range": 0.5},
    "dtype": {"dtype": torch.bfloat16},
    "attention that takes the heads that it gets": {"attn_implementation": "eager"},
}


@pytest.mark.parametrize("overrides", UNIMPORTANT.values(), ids=UNIMPORTANT)
def test_what_does_not_reach_the_mathematics_is_left_out(overrides, plain):
    assert changed(rows(llama(**overrides)), plain) == []


def test_an_odd_intermediate_size_that_a_plan_cuts_differs():
    rules = {"mlp.0": "colwise_gather_output"}

    def sized(features):
        return rows(nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(8, features))}), 2, rules)

    assert sized(32) == sized(64)
    assert any("uneven" in row for row in changed(sized(32), sized(33)))


def test_an_attribute_that_was_set_after_the_model_was_built_counts(plain):
    model = llama()
    model.model.layers[1].self_attn.is_causal = False
    assert any("is_causal False" in row for row in changed(rows(model), plain))


def test_another_tp_size_differs():
    assert printed(llama(), 2) != printed(llama(), 4)


def test_one_rule_of_the_user_for_one_layer_differs(plain):
    found = changed(rows(llama(FULL), rules={"model.layers.7.self_attn.q_proj": "replicate"}), plain)
    assert any(row.startswith("module model.layers.*.self_attn.q_proj") and " replicate;" in row for row in found)


def test_which_rules_stand_together_in_a_layer_counts():
    """Two layers with one exception each have the modules of one layer with both, and compute otherwise."""
    q, k = ("model.layers.{}.self_attn." + name for name in ("q_proj", "k_proj"))
    apart = rows(llama(), rules={q.format(0): "replicate", k.format(1): "replicate"})
    together = rows(llama(), rules={q.format(0): "replicate", k.format(0): "replicate"})
    modules = [{row for row in found if row.startswith("module ")} for found in (apart, together)]
    assert modules[0] == modules[1]
    assert apart != together


@pytest.mark.parametrize("experts", [4, 8])
def test_the_number_of_experts_counts_by_whether_ranks_divide_it(experts):
    def mixtral(count, **overrides):
        return rows(build_model("mixtral", num_local_experts=count, **overrides), 4)

    assert mixtral(experts) == mixtral(12, layers=3, intermediate_size=64)
    found = changed(mixtral(experts), mixtral(6))
    assert "config - num_local_experts not divisible" in found
    assert any(row.startswith("module model.layers.*.mlp.experts ") for row in found)


def test_kinds_of_layers_count_and_not_how_many_of_each():
    def layered(*kinds):
        return rows(build_model("gemma2", layers=len(kinds), layer_types=list(kinds)), 2)

    full, sliding = "full_attention", "sliding_attention"
    assert layered(full, sliding) == layered(sliding, full, full, sliding)
    assert layered(full, sliding) != layered(full, full)


def test_an_adapter_differs_and_a_small_model_with_the_same_one_does_not(plain):
    from peft import LoraConfig, get_peft_model

    def adapted(sizes, **overrides):
        config = LoraConfig(**{"target_modules": ["q_proj", "down_proj"], "r": 4, **overrides})
        return rows(get_peft_model(llama(sizes), config))

    small = adapted(SMALL)
    assert changed(small, plain)
    assert changed(adapted(FULL, r=16, revision="main"), small) == []
    assert changed(adapted(SMALL, use_rslora=True), small)
    assert changed(adapted(SMALL, target_modules=["q_proj"]), small)


def test_tied_weights_are_told_by_the_names_that_share_them():
    def pair(tied):
        model = nn.ModuleDict({"first": nn.Linear(8, 8, bias=False), "second": nn.Linear(8, 8, bias=False)})
        if tied:
            model["second"].weight = model["first"].weight
        return rows(model, 2, {"first": "colwise_gather_output"} if tied else dict.fromkeys(model, ANY))

    ANY = "colwise_gather_output"
    assert "tied first.weight second.weight" in changed(pair(True), pair(False))


def test_configs_inside_count_by_their_paths():
    def vision_and_text(**text):
        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}
        config = AutoConfig.for_model(
            "llava",
            text_config={"model_type": "llama", **sizes, "vocab_size": 64, "num_key_value_heads": 4, **text},
            vision_config={"model_type": "clip_vision_model", **sizes, "image_size": 32, "patch_size": 8},
        )
        from transformers import LlavaForConditionalGeneration

        with torch.device("meta"):
            return rows(LlavaForConditionalGeneration(config), 2)

    before = vision_and_text()
    assert "config - vision_config.hidden_act 'quick_gelu'" in before
    found = changed(before, vision_and_text(my_switch=True))
    assert "config - text_config.my_switch True" in found
    assert changed(before, vision_and_text(num_hidden_layers=3, intermediate_size=64)) == []


# Code ---------------------------------------------------------------------------------------------

CUSTOM = """
from torch import nn
{imports}

SCALE = 1.0

class Block(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)

    def forward(self, x):
        return self.down({activation}(self.up(x))) * SCALE

class Model(nn.Module):
    def __init__(self, width=16, inner=32, layers=2):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, inner) for _ in range(layers))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x
"""
RULES = {"blocks.*.up": "colwise", "blocks.*.down": "rowwise"}


@pytest.fixture
def load(monkeypatch):
    def load(file: Path, name: str | None = None):
        spec = importlib.util.spec_from_file_location(name or file.stem, file)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        spec.loader.exec_module(module)
        return module

    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return load


def write(file: Path, text: str) -> Path:
    file.write_text(text)
    return file


def custom(imports="", activation="nn.functional.relu"):
    return CUSTOM.format(imports=imports, activation=activation)


def test_one_byte_of_the_models_own_file_differs(tmp_path, load):
    file = write(tmp_path / "modeling_own.py", custom())
    before = printed(load(file).Model(), 2, RULES)
    assert before is not None and printed(load(file).Model(64, 128, 12), 2, RULES) == before
    write(file, custom() + "#")
    assert printed(load(file).Model(), 2, RULES) != before


def test_the_same_file_elsewhere_is_the_same_code(tmp_path, load):
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
    here, there = (write(tmp_path / folder / "modeling_own.py", custom()) for folder in ("here", "there"))
    first, second = (load(file, f"cached.{file.parent.name}.modeling_own") for file in (here, there))
    assert rows(first.Model(), 2, RULES) == rows(second.Model(), 2, RULES)


@pytest.mark.parametrize("how", ["from helping import act", "import helping", "from helping import ACTS"])
def test_one_byte_of_a_file_that_the_models_file_uses_differs(tmp_path, load, how):
    helper = write(tmp_path / "helping.py", "from deeper import act\nACTS = {'act': act}\n")
    deeper = write(tmp_path / "deeper.py", "import torch\ndef act(x):\n    return torch.relu(x)\n")
    file = write(tmp_path / "modeling_own.py", custom(how, "(lambda x: x)"))

    def found():
        load(deeper)
        load(helper)
        return printed(load(file).Model(), 2, RULES)

    before = found()
    assert before == found()
    write(deeper, deeper.read_text() + "#")
    assert found() != before


def test_a_file_that_was_edited_since_it_was_loaded_is_not_what_runs(tmp_path, load):
    """A proof of the loaded code must not be remembered for the code that the file holds by now."""
    for number, text in enumerate([custom(activation="nn.functional.gelu"), custom().replace("1.0", "2.0")]):
        file = write(tmp_path / f"modeling_{number}.py", custom())
        old = load(file).Model()
        write(file, text)
        stale = rows(old, 2, RULES)
        fresh = rows(load(file).Model(), 2, RULES)
        assert rows(old, 2, RULES) == stale  # also where another module has its name by now
        assert {row.split()[0] for row in changed(stale, fresh)} == {"loaded"}


def test_a_file_that_was_loaded_again_leaves_old_objects_with_old_code(tmp_path, load):
    file = write(tmp_path / "modeling_own.py", custom())
    module = load(file)
    old = module.Model()
    write(file, custom(activation="nn.functional.gelu"))
    exec(compile(file.read_text(), str(file), "exec"), vars(module))  # as importlib.reload does
    found = changed(rows(old, 2, RULES), rows(module.Model(), 2, RULES))
    assert found and all(row.startswith("loaded modeling_own.Block ") for row in found)


def test_a_method_that_was_replaced_differs(monkeypatch, tmp_path, load, plain):
    other = load(write(tmp_path / "patches.py", "def forward(self, x):\n    return x\n"))
    monkeypatch.setattr(sys.modules[LlamaForCausalLM.__module__].LlamaMLP, "forward", other.forward)
    found = changed(rows(llama()), plain)
    assert any(row.startswith("source patches ") for row in found)


def test_a_forward_that_was_set_on_one_module_differs(tmp_path, load, plain):
    other = load(write(tmp_path / "patches.py", "def forward(self, x):\n    return x\n"))
    model = llama()
    model.model.layers[0].mlp.forward = types.MethodType(other.forward, model.model.layers[0].mlp)
    assert any(row.startswith("forward model.layers.*.mlp ") for row in changed(rows(model), plain))


def test_code_without_a_file_is_never_known(tmp_path):
    cell = types.ModuleType("a_notebook")
    sys.modules[cell.__name__] = cell
    try:
        exec(custom(), vars(cell))
        plan = resolve_plan(cell.Model(), 2, RULES)
        assert fingerprint(cell.Model(), plan) is None
        assert "unknown: a_notebook has no source file" in describe(cell.Model(), plan)
    finally:
        del sys.modules[cell.__name__]


REMOTE = """
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

class RemoteConfig(PretrainedConfig):
    model_type = "remote_for_a_test"
    base_model_tp_plan = {"up": "colwise", "down": "rowwise"}

    def __init__(self, width=16, gated=False, **kwargs):
        self.width, self.gated = width, gated
        super().__init__(**kwargs)

class RemoteModel(PreTrainedModel):
    config_class = RemoteConfig

    def __init__(self, config):
        super().__init__(config)
        self.up, self.down = nn.Linear(config.width, 32), nn.Linear(32, config.width)
        self.post_init()

    def forward(self, x):
        return self.down(self.up(x))
"""


def test_a_model_whose_code_came_with_its_weights(tmp_path):
    """In processes of their own, as transformers reads where its cache is when it is imported."""
    folder, script = tmp_path / "remote", tmp_path / "script.py"
    folder.mkdir()
    script.write_text(
        "import sys, transformers\n"
        "from accel_tp_ddp import resolve_plan\n"
        "from accel_tp_ddp.proof.fingerprint import describe, fingerprint\n"
        "config = transformers.AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "config.width, config.gated = int(sys.argv[2]), sys.argv[3] == 'True'\n"
        "model = transformers.AutoModel.from_config(config, trust_remote_code=True)\n"
        "plan = resolve_plan(model, 2, {'up': 'colwise', 'down': 'rowwise'})\n"
        "assert any(row.startswith('source modeling_remote ') for row in describe(model, plan))\n"
        "print(fingerprint(model, plan))\n"
    )
    classes = '{"AutoConfig": "modeling_remote.RemoteConfig", "AutoModel": "modeling_remote.RemoteModel"}'
    (folder / "config.json").write_text(f'{{"model_type": "remote_for_a_test", "auto_map": {classes}}}')

    def run(code=REMOTE, width=16, gated=False):
        (folder / "modeling_remote.py").write_text(code)
        environment = {**os.environ, "HF_HOME": str(tmp_path / "hub"), "PYTHONHASHSEED": "random"}
        command = [sys.executable, str(script), str(folder), str(width), str(gated)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()[-1]

    before = run()
    assert len(before) == 32 and run(width=64) == before
    assert run(gated=True) != before
    assert run(REMOTE + "#") != before


# Styles that are objects --------------------------------------------------------------------------


class Scaled(Style):
    def __init__(self, factor=1.0, note=None):
        self.factor, self.note = factor, note

    def layouts(self, site):
        return {"weight": Layout(0, chunk_ranges(len(site.module.weight), site.tp_size))}


class Hidden:
    __slots__ = ("value",)


def head(style):
    return rows(llama(), rules={"lm_head": style})


def test_a_style_of_the_user_counts_by_its_class_and_its_state():
    assert head(Scaled(1.0)) == head(Scaled(1.0))
    assert head(Scaled(1.0)) != head(Scaled(2.0))
    assert any(row.startswith("source test_fingerprint ") for row in head(Scaled()))
    nested = [Scaled(note={"a": [Scaled(2.0), torch.float32, {"x", "y", "z"}]}) for _ in range(2)]
    assert head(nested[0]) == head(nested[1]) != head(Scaled(note={"a": [Scaled(3.0)]}))


def test_a_style_that_was_registered_counts_as_what_it_is_and_not_by_its_name():
    register_style("scaled", Scaled(1.0))
    before = head("scaled")
    register_style("scaled", Scaled(2.0))
    assert head("scaled") != before


def test_a_style_of_torch_counts_by_its_state():
    assert head(ColwiseParallel(output_layouts=Replicate())) == head(ColwiseParallel(output_layouts=Replicate()))
    assert head(ColwiseParallel(output_layouts=Replicate())) != head(ColwiseParallel())


def test_a_style_whose_state_cannot_be_read_is_never_known():
    for note in (Hidden(), torch.ones(1), nn.Linear(1, 1)):
        assert printed(llama(), rules={"lm_head": Scaled(note=note)}) is None
    looping = Scaled()
    looping.note = looping
    assert printed(llama(), rules={"lm_head": looping}) is None


# The same everywhere ------------------------------------------------------------------------------


def test_it_is_the_same_in_another_process_whatever_else_that_has_imported():
    program = (
        "import sys, torch, transformers\nOTHERS\n"
        "from accel_tp_ddp import resolve_plan\n"
        "from accel_tp_ddp.proof.fingerprint import fingerprint\n"
        f"config = transformers.LlamaConfig(**{SMALL})\n"
        "with torch.device('meta'):\n    model = transformers.LlamaForCausalLM(config)\n"
        f"print(fingerprint(model, resolve_plan(model, {TP})))"
    )
    for others in ("", "import peft, accelerate, trl.trainer.sft_trainer"):
        done = subprocess.run(
            [sys.executable, "-c", program.replace("OTHERS", others)], capture_output=True, text=True
        )
        assert done.stdout.split()[-1:] == [printed(llama())], done.stderr


def test_it_does_not_depend_on_weights_or_on_the_device():
    first, second = (AutoModelForCausalLM.from_config(LlamaConfig(**SMALL)) for _ in range(2))
    assert printed(first) == printed(second) == printed(llama())
    assert printed(torch.compile(first)) == printed(first)


def test_it_changes_nothing():
    model = build_model("llama")
    before = {name: param.clone() for name, param in model.state_dict().items()}
    attributes = {name: list(vars(module)) for name, module in model.named_modules()}
    state = torch.get_rng_state()
    printed(model, 2)
    assert torch.equal(torch.get_rng_state(), state)
    assert attributes == {name: list(vars(module)) for name, module in model.named_modules()}
    assert all(torch.equal(param, before[name]) for name, param in model.state_dict().items())
