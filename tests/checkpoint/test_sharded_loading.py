"""Loading in slices gives each rank just what cutting the whole model would have given it, and reads little more.

The checkpoints are what plain `save_pretrained` of tiny models writes. The reference is plain `from_pretrained` in the
same process, parallelized; of a training run it is plain DDP.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from accel_tp_ddp import PlanError, TensorParallelDDPPlugin, full_state_dict, localize, parallelize
from accel_tp_ddp.checkpoint import from_pretrained, lazy
from accel_tp_ddp.core.layout import Layout

from ..helpers.models import VOCABULARY, build_config, build_model
from ..helpers.ranks import COLLECTIVE_TIMEOUT, Raised, run_on_ranks
from ..helpers.sharded import accelerator_for, token_batch, tp_mesh
from ..helpers.training import Spec, assert_same_run, train
from ..helpers.versions import needs_sharded_loading

pytestmark = needs_sharded_loading

# Read from the file, per element that a rank holds: its slice, and the first row of each tensor to compare it by.
READ = 1.15

_SMALL = {"hidden_size": 64, "vocab_size": VOCABULARY, "max_position_embeddings": 64, "initializer_range": 0.1}
_ODD = {  # architectures that transformers' own tensor parallelism loads wrong
    "hrm_text": {"intermediate_size": 96, "num_attention_heads": 8, "head_dim": 16, "num_layers_per_stack": 1}
    | {"bos_token_id": 1, "eos_token_id": 2, "H_cycles": 1, "L_cycles": 1, "L_bp_cycles": [1]},
    "inkling2_text": {"num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16}
    | {"swa_num_attention_heads": 8, "swa_num_key_value_heads": 4, "swa_head_dim": 16, "moe_intermediate_size": 32}
    | {"n_routed_experts": 4, "num_experts_per_tok": 2, "eos_token_id": 2, "bos_token_id": None, "pad_token_id": None}
    | {"vocab_size": VOCABULARY + 5, "unpadded_vocab_size": VOCABULARY},  # its head's file is padded, since 5.24
}
_OPTIONS = {"llama, tied": ("llama", {"tied": True}), "llama, index": ("llama", {}), "llama, .bin": ("llama", {})}


def tiny_model(case: str) -> nn.Module:
    if case not in _ODD:
        name, options = _OPTIONS.get(case, (case, {}))
        return build_model(name, **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(case, **{**_SMALL, **_ODD[case]}))


CASES = (
    *("llama", "llama, tied", "llama, index", "llama, .bin", "llama_one_key", "phi3", "gemma2"),
    *("qwen3_moe", "mixtral", "gpt_oss", "hrm_text", "inkling2_text"),
)
#: What shows in the file that loading converts, and does not merely copy.
CONVERTED = {
    "qwen3_moe": "model.layers.0.mlp.experts.3.gate_proj.weight",
    "mixtral": "model.layers.0.block_sparse_moe.experts.3.w1.weight",
    "hrm_text": "model.H_module.layers.0.attn.gqkv_proj.weight",
    "inkling2_text": "model.llm.layers.0.mlp.experts.w13_weight",
}


@functools.cache
def checkpoints() -> Path:
    """A folder with a checkpoint for each case."""
    root = Path(tempfile.mkdtemp(prefix="checkpoints-"))
    for case in CASES:
        folder = root / case
        tiny_model(case).save_pretrained(folder, max_shard_size="50KB" if case == "llama, index" else "50GB")
        if case == "llama, .bin":
            torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
            (folder / "model.safetensors").unlink()
    return root


@pytest.fixture(scope="module", autouse=True)
def _checkpoints_end_with_the_module():
    yield
    if checkpoints.cache_info().currsize:
        shutil.rmtree(checkpoints())


class CountReads:
    """While active, counts the elements that are read from files, and names what was read whole to be converted."""

    def __enter__(self) -> CountReads:
        self.elements, self.read_whole = 0, set()
        self.stock = lazy._Stored.read_into, lazy._read
        lazy._Stored.read_into = self._read_into
        lazy._read = self._read
        return self

    def __exit__(self, *error: Any) -> None:
        lazy._Stored.read_into, lazy._read = self.stock

    @property
    def _read_into(self) -> Callable:
        def read_into(node: Any, out: torch.Tensor, box: lazy.Box) -> None:
            self.elements += math.prod(stop - start for start, stop in box)
            self.stock[0](node, out, box)

        return read_into

    def _read(self, value: Any) -> Any:
        if isinstance(value, lazy.LazyTensor):
            self.read_whole.add(tuple(value.shape))
        return self.stock[1](value)


def differences(actual: nn.Module, expected: nn.Module) -> list[str]:
    """What is not the same of two parallelized models, bit by bit."""
    found = []
    for kind in ("named_parameters", "named_buffers"):
        ours, theirs = (dict(getattr(m, kind)(remove_duplicate=False)) for m in (actual, expected))
        if list(ours) != list(theirs):
            return [f"{kind}: {sorted(set(ours) ^ set(theirs))}"]
        for name, tensor in theirs.items():
            own = ours[name]
            same = own.dtype == tensor.dtype and own.requires_grad == tensor.requires_grad and torch.equal(own, tensor)
            if not same or getattr(own, "tp_shard", None) != getattr(tensor, "tp_shard", None):
                found.append(f"{name}: {tuple(own.shape)} {own.dtype} for {tuple(tensor.shape)} {tensor.dtype}")
        ties = [[id(param) for param in tensors.values()] for tensors in (ours, theirs)]
        if [one.index(i) for one in ties[:1] for i in one] != [other.index(i) for other in ties[1:] for i in other]:
            found.append("tied otherwise")
    return found


def load_both(
    plugin: TensorParallelDDPPlugin, folder: Path, kind: Any = AutoModelForCausalLM, **options: Any
) -> tuple[nn.Module, nn.Module]:
    """In slices, and plainly, each with the same random numbers."""
    models = []
    for in_slices in (True, False):
        torch.manual_seed(5)
        if in_slices:
            with plugin.sharded_loading():
                models.append(kind.from_pretrained(folder, **options))
        else:
            models.append(kind.from_pretrained(folder, **options))
    return models[0], models[1]


# -------------------------------------------------------------------------------------------- the slices themselves


def load_every_case(root: Path) -> dict[str, dict[str, Any]]:
    plugin = accelerator_for(2).state.parallelism_config
    mesh, results = plugin.device_mesh["tp"], {}
    for case in CASES:
        with CountReads() as reads:
            sliced, plain = load_both(plugin, root / case)
        before = {name: tuple(param.shape) for name, param in sliced.named_parameters()}
        objects = {name: id(param) for name, param in sliced.named_parameters()}
        parallelize(plain, mesh)
        parallelize(sliced, mesh)
        batch = token_batch()
        results[case] = {
            "different": differences(sliced, plain),
            "loss": torch.equal(sliced(**batch).loss, plain(**batch).loss),
            "local from the start": before == {name: tuple(p.shape) for name, p in plain.named_parameters()},
            "same objects": objects == {name: id(param) for name, param in sliced.named_parameters()},
            "read": reads.elements / sum(param.numel() for param in sliced.parameters()),
            "read whole": reads.read_whole,
            "parts": sum(p.tp_shard is not None for p in sliced.parameters()),
        }
    return results


@functools.cache
def loaded() -> list[dict[str, dict[str, Any]]]:
    return run_on_ranks(load_every_case, 2, checkpoints())


@pytest.mark.parametrize("case", CASES)
def test_each_rank_holds_what_sharding_the_full_model_gives_it(case):
    for result in loaded():
        assert result[case]["parts"], "nothing was sharded"
        assert not result[case]["different"]
        assert result[case]["loss"], "the loss differs"


@pytest.mark.parametrize("case", CASES)
def test_parameters_have_their_sizes_and_identity_from_the_start(case):
    for result in loaded():
        assert result[case]["local from the start"]
        assert result[case]["same objects"]


@pytest.mark.parametrize("case", CASES)
def test_a_rank_reads_hardly_more_than_it_holds(case):
    for result in loaded():
        assert result[case]["read"] < READ, f"read {result[case]['read']:.2f} times what the rank holds"
        assert not result[case]["read whole"]


@pytest.mark.parametrize("case", CONVERTED)
def test_the_conversions_of_transformers_are_met(case):
    assert CONVERTED[case] in load_file(checkpoints() / case / "model.safetensors")


SHAPES = {  # of each operand, and what a conversion might do to them
    "stack, concatenate": ([(8, 4)] * 4, lambda a, b, c, d: torch.cat([torch.stack([a, b]), torch.stack([c, d])], 1)),
    "transpose": ([(8, 4)] * 2, lambda a, b: torch.stack([a, b]).transpose(1, 2).contiguous()),
    "permute": ([(8, 4, 2)], lambda a: a.permute(2, 0, 1).mT.contiguous()),
    "chunks": ([(12, 4)], lambda a: [part.contiguous() for part in torch.chunk(a, 3)]),
    "pieces of a list": ([(4, 8, 4)], lambda a: [part.squeeze(0) for part in torch.chunk(a, 4)]),
    "pieces of other sizes": ([(4, 12)], lambda a: torch.split(a, [4, 8], dim=1)),
    "slices": ([(4, 8)], lambda a: (a[1], a[..., 2:6], a[:, -4:].t(), a[None], a[:, 3])),
    "interleave": ([(2, 8, 4)], lambda a: a.reshape(2, 4, 2, 4).transpose(1, 2).reshape(2, 8, 4).contiguous()),
    "interleave back": ([(8, 4)], lambda a: a.reshape(2, 4, 4).transpose(0, 1).reshape(8, 4).contiguous()),
    "heads": ([(24, 4)], lambda a: a.view(3, 4, 2, 4).transpose(1, 2).reshape(24, 4)),
    "heads of a vector": ([(24,)], lambda a: a.view(3, 4, 2).transpose(1, 2).reshape(24)),
    "flatten": ([(4, 2, 3, 2)], lambda a: (a.reshape(4, -1), a.flatten(), a.reshape(2, 2, 12), a.reshape(8, 1, 6))),
    "scalar": ([()], lambda a: (a, a.reshape(1), a.reshape(1).squeeze(0))),
    "one that is not followed": ([(8, 4)], lambda a: a.flip(0)),
    "with an ordinary tensor": ([(8, 4)], lambda a: torch.cat([a, torch.ones(2, 4)])),
}


@pytest.mark.parametrize("case", SHAPES)
def test_a_slice_of_a_converted_tensor_is_that_slice_of_the_full_conversion(case):
    shapes, convert = SHAPES[case]
    stored = [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i, shape in enumerate(shapes)]
    results, expected = convert(*map(from_pretrained._lazy, stored)), convert(*stored)
    if isinstance(expected, torch.Tensor):
        results, expected = [results], [expected]
    followed = not case.startswith(("one that is not", "with an ordinary"))
    for result, full in zip(results, expected, strict=True):
        assert isinstance(result, lazy.LazyTensor) == followed and result.shape == full.shape
        assert torch.equal(lazy.read_full(result, "cpu"), full)
        assert torch.equal(lazy.first_row(result, 3), lazy.first_row(full, 3))
        for dim, size in enumerate(full.shape):
            for ranges in (((0, size // 2), (size // 2, size)), ((1, size), (0, 1))):
                layout = Layout(dim, tuple((part,) for part in ranges))
                packed = Layout(dim, (tuple((i, i + 1) for i in range(0, size, 2)), ((0, 0),)))
                for each, rank in ((layout, 0), (layout, 1), (packed, 0)):
                    index = torch.cat([torch.arange(*bounds) for bounds in each.ranges[rank]])
                    assert torch.equal(lazy.own_part(result, each, rank, "cpu"), full.index_select(dim, index))


def test_pieces_are_read_a_few_at_a_time(monkeypatch):
    monkeypatch.setattr(lazy, "_PIECE", 64)
    for case in ("interleave", "heads", "flatten", "stack, concatenate"):
        test_a_slice_of_a_converted_tensor_is_that_slice_of_the_full_conversion(case)


def test_operands_that_do_not_fit_are_an_error_of_torch():
    x = from_pretrained._lazy(torch.ones(4, 6))
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        torch.cat([x, x[:, :3]])


def test_a_value_that_is_cast_twice_is_rounded_twice():
    stored = torch.tensor([[1.00048828125, 3.0], [5.0, 7.0]])
    x = from_pretrained._lazy(stored)
    assert torch.equal(x.to(torch.bfloat16).to(torch.float32).read(), stored.to(torch.bfloat16).float())


# ------------------------------------------------------------------------------------- transformers' own behaviour


def with_changed_weights(folder: Path, to: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    shutil.copytree(folder, to)
    state = load_file(to / "model.safetensors")
    change(state)
    save_file(state, to / "model.safetensors", metadata={"format": "pt"})
    return to


def other_head(state: dict[str, torch.Tensor]) -> None:
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    state["lm_head.weight"][-1] += 1  # a row of the last rank's


VARIANTS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "given dtype": ("llama", AutoModelForCausalLM, {"dtype": torch.bfloat16}),
    "one device": ("llama", AutoModelForCausalLM, {"device_map": "cpu"}),
    "new head": ("llama", AutoModelForSequenceClassification, {"num_labels": 3}),
    "other sizes": ("llama", AutoModelForCausalLM, {"vocab_size": 96, "ignore_mismatched_sizes": True}),
    "missing and unexpected": ("incomplete", AutoModelForCausalLM, {}),
    "tied, and its head stored too": ("equal head", AutoModelForCausalLM, {}),
    "tied by its config only": ("other head", AutoModelForCausalLM, {}),
    "tied, and its bias missing": ("phi without bias", AutoModelForCausalLM, {}),
    "all ties stored": ("t5", AutoModelForSeq2SeqLM, {}),
    "values given": ("llama", AutoModelForCausalLM, {}),
}


def load_variants(root: Path) -> dict[str, dict[str, Any]]:
    accelerator = accelerator_for(2)
    plugin, mesh = accelerator.state.parallelism_config, tp_mesh(2)
    results = {}
    for variant, (source, kind, options) in VARIANTS.items():
        folder: Any = root / source
        if variant == "values given":
            state = load_file(folder / "model.safetensors")
            folder, options = None, {"config": AutoConfig.from_pretrained(folder), "state_dict": state}
            sliced, plain = (model for model in load_both(plugin, folder, _FromLlama, **options))
            infos = [{}, {}]
        else:
            (sliced, ours), (plain, theirs) = load_both(plugin, folder, kind, output_loading_info=True, **options)
            infos = [{key: sorted(map(str, value)) for key, value in info.items()} for info in (ours, theirs)]
        parallelize(plain, mesh)
        parallelize(sliced, mesh)
        results[variant] = {
            "different": differences(sliced, plain),
            "reports": infos,
            "tied": sliced.get_input_embeddings().weight is getattr(sliced.get_output_embeddings(), "weight", None),
            "dtypes": {param.dtype for param in sliced.parameters()},
        }
    return results


class _FromLlama:
    @staticmethod
    def from_pretrained(folder: None, **options: Any) -> nn.Module:
        from transformers import LlamaForCausalLM

        return LlamaForCausalLM.from_pretrained(folder, **options)


@functools.cache
def variants() -> list[dict[str, dict[str, Any]]]:
    root = Path(tempfile.mkdtemp(prefix="variants-"))
    shutil.copytree(checkpoints() / "llama", root / "llama")

    def drop(state: dict[str, torch.Tensor]) -> None:
        del state["model.layers.0.mlp.up_proj.weight"], state["model.layers.1.input_layernorm.weight"]
        state["model.layers.7.mlp.up_proj.weight"] = torch.zeros(2, 2)

    with_changed_weights(root / "llama", root / "incomplete", drop)
    tied = checkpoints() / "llama, tied"
    with_changed_weights(
        tied, root / "equal head", lambda s: s.update({"lm_head.weight": s["model.embed_tokens.weight"].clone()})
    )
    with_changed_weights(tied, root / "other head", other_head)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 8, "intermediate_size": 96}
    phi = AutoModelForCausalLM.from_config(AutoConfig.for_model("phi", **_SMALL, **sizes, tie_word_embeddings=True))
    phi.save_pretrained(root / "phi")
    sizes = {"d_model": 64, "d_kv": 8, "num_heads": 8, "d_ff": 96, "num_layers": 1, "vocab_size": VOCABULARY}
    t5 = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("t5", **sizes))
    t5.save_pretrained(root / "stored once")
    names = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
    with_changed_weights(
        root / "stored once", root / "t5", lambda s: s.update({name: s["shared.weight"].clone() for name in names})
    )
    with_changed_weights(root / "phi", root / "phi without bias", lambda state: state.pop("lm_head.bias"))
    try:
        return run_on_ranks(load_variants, 2, root)
    finally:
        shutil.rmtree(root)


@pytest.mark.parametrize("variant", VARIANTS)
def test_sliced_loading_does_what_transformers_does_to_full_weights(variant):
    for result in variants():
        assert not result[variant]["different"]
        assert result[variant]["reports"][0] == result[variant]["reports"][1]


def test_each_variant_of_loading_has_the_keys_and_dtypes_of_its_name():
    (result, _) = variants()
    assert result["given dtype"]["dtypes"] == {torch.bfloat16}
    assert result["new head"]["reports"][0]["missing_keys"] == ["score.weight"]
    assert result["new head"]["reports"][0]["unexpected_keys"] == ["lm_head.weight"]
    assert "131, 64" in str(result["other sizes"]["reports"][0]["mismatched_keys"])
    assert len(result["missing and unexpected"]["reports"][0]["missing_keys"]) == 2
    assert result["missing and unexpected"]["reports"][0]["unexpected_keys"] == ["model.layers.7.mlp.up_proj.weight"]
    assert result["tied, and its bias missing"]["reports"][0]["missing_keys"] == ["lm_head.bias"]
    assert result["tied, and its head stored too"]["tied"] and not result["tied by its config only"]["tied"]


def test_weights_that_will_be_tied_are_tied_for_the_plan():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(build_config("llama", tied=True))
    model.lm_head.weight = untied = nn.Parameter(
        torch.empty_like(model.lm_head.weight)
    )  # as from_pretrained builds it
    with pytest.raises(PlanError, match="is tied to a weight of"):
        from_pretrained._plan_on_meta(model, 2, {"lm_head": "replicate"})
    assert model.lm_head.weight is untied


def missing_with_other_seeds(folder: Path, without: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
    accelerator, names = accelerator_for(2), ("score.weight", "model.layers.0.mlp.up_proj.weight")
    if accelerator.is_main_process:
        with_changed_weights(folder, without, lambda state: state.pop(names[1]))
    dist.barrier()
    torch.manual_seed(dist.get_rank())
    with accelerator.state.parallelism_config.sharded_loading():
        model = AutoModelForSequenceClassification.from_pretrained(without, num_labels=3)
    full = full_state_dict(accelerator.prepare(model))
    torch.manual_seed(0)  # of the first rank
    plain = AutoModelForSequenceClassification.from_pretrained(without, num_labels=3)
    return [(full[name], plain.get_parameter(name).detach()) for name in names]


def test_what_is_missing_is_initialised_as_on_the_first_rank(tmp_path):
    for pairs in run_on_ranks(missing_with_other_seeds, 2, checkpoints() / "llama", tmp_path / "without"):
        assert all(torch.equal(actual, expected) for actual, expected in pairs)


# --------------------------------------------------------------------------------------- training, adapters, saving


@functools.cache
def trained(spec: Spec) -> list[Any]:
    return run_on_ranks(train, 2 if spec.tp is None else 2 * spec.tp, spec)


@pytest.mark.parametrize("case", ["llama, tied", "qwen3_moe"])
def test_training_from_slices_is_plain_ddp(case):
    spec = Spec(case, folder=str(checkpoints() / case), steps=4)
    assert_same_run(run_on_ranks(train, 4, Spec(case, folder=spec.folder, steps=4, tp=2)), trained(spec))


def save_unchanged(root: Path, to: Path) -> None:
    for case in ("qwen3_moe", "hrm_text", "llama, tied"):
        accelerator = accelerator_for(2)
        with accelerator.state.parallelism_config.sharded_loading():
            model = AutoModelForCausalLM.from_pretrained(root / case)
        model = accelerator.prepare(model)
        accelerator.unwrap_model(model).save_pretrained(to / case, is_main_process=accelerator.is_main_process)
    dist.barrier()


def test_what_was_loaded_in_slices_is_saved_as_it_was(tmp_path):
    run_on_ranks(save_unchanged, 2, checkpoints(), tmp_path)
    for case in ("qwen3_moe", "hrm_text", "llama, tied"):
        written, read = (load_file(root / case / "model.safetensors") for root in (tmp_path, checkpoints()))
        assert written.keys() == read.keys()
        assert all(torch.equal(written[name], read[name]) for name in read)
        configs = [json.loads((root / case / "config.json").read_text()) for root in (tmp_path, checkpoints())]
        assert configs[0] == configs[1]


def adapt(model: nn.Module, **options: Any) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(9)
    return get_peft_model(model, LoraConfig(target_modules="all-linear", r=4, **options))


def load_and_adapt(folder: Path, adapters: Path) -> dict[str, Any]:
    plugin, mesh, results = accelerator_for(2).state.parallelism_config, tp_mesh(2), {}
    sliced, plain = load_both(plugin, folder)
    if dist.get_rank() == 0:
        adapt(copy.deepcopy(plain), init_lora_weights=False).save_pretrained(adapters)
    try:
        parallelize(adapt(copy.deepcopy(sliced), init_lora_weights="pissa"), mesh)
    except ValueError as error:
        results["made of slices"] = str(error)
    pairs = {"wrapped": [adapt(model, modules_to_save=["lm_head"]) for model in (sliced, plain)]}
    dist.barrier()
    pairs["with the model"] = list(load_both(plugin, adapters))
    for case, models in pairs.items():
        losses = [parallelize(model, mesh)(**token_batch()).loss for model in models]
        found = differences(*models)
        if case == "wrapped":
            for loss in losses:
                loss.backward()
            gradients = [{n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in models]
            same = gradients[0].keys() == gradients[1].keys()
            same = same and all(torch.equal(g, gradients[1][n]) for n, g in gradients[0].items())
            found += [] if same else ["gradients"]
        results[case] = found + ([] if torch.equal(*losses) else ["loss"])
    return results


def test_adapters_go_around_a_model_in_slices_or_come_with_it(tmp_path):
    for result in run_on_ranks(load_and_adapt, 2, checkpoints() / "llama", tmp_path / "adapters"):
        assert "init_lora_weights='pissa'" in result.pop("made of slices")
        assert result == {"wrapped": [], "with the model": []}


def load_under_other_plans(folder: Path) -> list[list[str]]:
    found = []
    for plan, later in (
        ({"model.layers.*.mlp.up_proj": "replicate", "model.layers.*.mlp.gate_proj": "replicate"}, "auto"),
        ("auto", {"lm_head": "replicate"}),
    ):
        plugin = accelerator_for(
            2, plan={**plan, "model.layers.*.mlp.down_proj": "replicate"} if plan != "auto" else plan
        )
        sliced, plain = load_both(plugin.state.parallelism_config, folder)
        mesh = tp_mesh(2)
        found.append(differences(parallelize(sliced, mesh, later), parallelize(plain, mesh, later)))
    return found


def test_another_plan_than_that_of_loading_cuts_anew():
    for found in run_on_ranks(load_under_other_plans, 2, checkpoints() / "llama"):
        assert found == [[], []]


# ----------------------------------------------------------------------------------------------------- what is refused


def truncated(folder: Path) -> Path:
    to = Path(tempfile.mkdtemp()) / "truncated"
    shutil.copytree(folder, to)
    size = (to / "model.safetensors").stat().st_size
    os.truncate(to / "model.safetensors", size // 2)
    return to


def altered(folder: Path) -> Path:
    return with_changed_weights(
        folder, Path(tempfile.mkdtemp()) / "altered", lambda s: s["model.layers.1.mlp.up_proj.weight"].mul_(2)
    )


def only_here(rank: int, make: Callable[[Path], Path], folder: Path) -> Path:
    return make(folder) if dist.get_rank() == rank else folder


def quantized(folder: Path) -> Path:
    to = Path(tempfile.mkdtemp()) / "quantized"
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    (to / "config.json").write_text(json.dumps(config))
    return to


def _load(folder: Any, **options: Any) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def _lonely(folder: Path) -> None:
    if dist.get_rank() == 0:
        _load(folder)


def _own_error(folder: Path) -> None:
    _load(folder)
    if dist.get_rank() == 1:
        raise KeyError("of the script")


REFUSED: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "a truncated file on one rank": (lambda f: _load(only_here(1, truncated, f)), ("model.safetensors", "damaged")),
    "a folder that one rank lacks": (lambda f: _load(only_here(0, lambda f: f / "no", f)), ("no",)),
    "another checkpoint on one rank": (
        lambda f: _load(only_here(1, altered, f)),
        ("model.layers.1.mlp.up_proj.weight", "same files"),
    ),
    "another architecture on one rank": (
        lambda f: _load(only_here(1, lambda f: f.parent / "phi3", f)),
        ("what is to be loaded", "same model"),
    ),
    "a model on one rank only": (_lonely, ("is_main_process",)),
    "an error of the script's own": (_own_error, ("of the script",)),
    "quantized weights": (lambda f: _load(quantized(f)), ("sharded_loading", "quantiz")),
    "several devices": (
        lambda f: _load(f, device_map={"model": "cpu", "lm_head": "disk"}, offload_folder=tempfile.mkdtemp()),
        ("device_map", "one device"),
    ),
    "a model that transformers parallelizes": (lambda f: _load(f, tp_plan="auto"), ("distributed_config", "tp_plan")),
    "sizes that do not fit": (lambda f: _load(f, vocab_size=96), ("mismatch",)),
    "a plan that does not fit": (
        lambda f: _load(f, num_attention_heads=1, num_key_value_heads=1, head_dim=8, ignore_mismatched_sizes=True),
        ("tensor-parallel plan",),
    ),
}


def refused_on(root: Path) -> dict[str, Any]:
    folder, results = root / "llama", {}
    plugin = accelerator_for(2).state.parallelism_config
    for case, (load, _) in REFUSED.items():
        try:
            with warnings.catch_warnings(), plugin.sharded_loading():
                warnings.simplefilter("ignore")
                load(folder)
            results[case] = None
        except Exception as error:
            results[case] = Raised.of(error)
    try:
        with plugin.sharded_loading(), plugin.sharded_loading():
            pass
    except ValueError as error:
        results["nested"] = Raised.of(error)
    sliced, plain = load_both(plugin, folder)  # nothing of it all has been left behind
    results["afterwards"] = differences(parallelize(sliced, tp_mesh(2)), parallelize(plain, tp_mesh(2)))
    return results


@functools.cache
def refused() -> list[dict[str, Any]]:
    return run_on_ranks(refused_on, 2, checkpoints(), timeout=COLLECTIVE_TIMEOUT.total_seconds() / 2)


@pytest.mark.parametrize("case", REFUSED)
def test_an_error_in_sliced_loading_is_raised_on_every_rank(case):
    for rank, result in enumerate(refused()):
        assert result[case] is not None, f"rank {rank} noticed nothing"
        for word in REFUSED[case][1]:
            assert word.lower() in result[case].message.lower(), result[case].message


def test_loading_works_after_refused_loads():
    for result in refused():
        assert result["afterwards"] == []
        assert "active already" in result["nested"].message


def load_for_a_trainer(folder: Path, output: Path) -> list[str]:
    from transformers import Trainer, TrainingArguments

    plugin = TensorParallelDDPPlugin(tp_size=2)
    arguments = TrainingArguments(str(output), use_cpu=True, parallelism_config=plugin, report_to=[])
    with plugin.sharded_loading():  # which Trainer's own accelerator is yet to be made for
        model = _load(folder)
    trainer = Trainer(model, arguments)
    return differences(trainer.accelerator.prepare(model), parallelize(_load(folder), plugin.device_mesh["tp"]))


def test_training_arguments_are_enough_to_load(tmp_path):
    for different in run_on_ranks(load_for_a_trainer, 2, checkpoints() / "llama", tmp_path):
        assert not different


def use_too_early(folder: Path) -> dict[str, str]:
    plugin, messages = accelerator_for(2).state.parallelism_config, {}
    with plugin.sharded_loading():
        model = _load(folder)
    uses = {
        "forward": lambda: model(**token_batch()),
        "part": lambda: copy.deepcopy(model).model.layers[0].self_attn.q_proj(torch.zeros(1, 64)),
        "save_pretrained": lambda: model.save_pretrained(tempfile.mkdtemp()),
        "full_state_dict": lambda: full_state_dict(model),
        "localize": lambda: localize(model),
        "resize": lambda: model.resize_token_embeddings(200),
    }
    for name, use in uses.items():
        try:
            use()
            messages[name] = "nothing"
        except RuntimeError as error:
            messages[name] = str(error)
    return messages


def test_using_a_model_in_slices_before_prepare_is_an_error():
    for messages in run_on_ranks(use_too_early, 2, checkpoints() / "llama"):
        assert "part of the vocabulary" in messages.pop("resize")
        assert len(messages) == 5
        for name, message in messages.items():
            assert "not parallel yet" in message and "prepare" in message, (name, message)


def load_without_an_accelerator(folder: Path) -> str:
    try:
        with TensorParallelDDPPlugin(tp_size=2).sharded_loading():
            _load(folder)
    except ValueError as error:
        return str(error)
    return "nothing"


def test_sliced_loading_without_an_accelerator_is_an_error_that_says_so():
    for message in run_on_ranks(load_without_an_accelerator, 2, checkpoints() / "llama"):
        assert "Make the Accelerator first" in message


def test_in_one_process_sharded_loading_is_plain_loading():
    plain = _load(checkpoints() / "llama")
    for plugin in (TensorParallelDDPPlugin(tp_size=1), TensorParallelDDPPlugin(tp_size=2)):
        with plugin.sharded_loading():
            model = _load(checkpoints() / "llama")
        assert not differences(model, plain)
        model(**token_batch())


def test_a_transformers_without_the_methods_that_loading_overrides_is_refused(monkeypatch):
    from transformers import core_model_loading

    monkeypatch.delattr(core_model_loading, "set_param_for_module")
    loader = object.__new__(from_pretrained._Loader)
    with pytest.raises(RuntimeError, match="set_param_for_module is not there"), loader.in_transformers():
        pass
