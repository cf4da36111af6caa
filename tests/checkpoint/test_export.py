"""Full checkpoints out of shards: the files of plain DDP, a tensor at a time, and one error on all ranks."""

from __future__ import annotations

import functools
import resource
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, Trainer, TrainingArguments

from accel_tp_ddp import CheckpointError, TensorParallelDDPPlugin, parallelize
from accel_tp_ddp.checkpoint.deferred import DeferredTensor
from accel_tp_ddp.core import agreement
from accel_tp_ddp.core.shard import ShardInfo

from ..helpers.faults import injected
from ..helpers.files import contents
from ..helpers.models import build_model
from ..helpers.ranks import run_on_ranks
from ..helpers.sharded import accelerator_for, tp_mesh

SHARD_SIZE = "60KB"


def vision_language_experts() -> nn.Module:
    """Its conversion looks at the shapes of the model's own parameters."""
    text: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}
    text |= {"intermediate_size": 96, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
    text |= {"num_hidden_layers": 1, "vocab_size": 131, "pad_token_id": 0}
    text["rope_parameters"] = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 64}
    vision |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForImageTextToText.from_config(
            AutoConfig.for_model("qwen3_vl_moe", text_config=text, vision_config=vision)
        )


def build(kind: str, source: str | None = None) -> nn.Module:
    if kind == "loaded mixtral":
        return AutoModelForCausalLM.from_pretrained(source)
    if kind == "qwen3_vl_moe":
        return vision_language_experts()
    name, _, dtype = kind.partition(" in ")
    return build_model(name.removeprefix("tied "), tied="tied" in name).to(getattr(torch, dtype or "float32"))


KINDS = ("mixtral", "loaded mixtral", "qwen3_moe", "qwen3_vl_moe", "tied phi3 in bfloat16", "gemma2 in float16")


#: Its experts are sharded by older releases' plan too (5.20), in which only expert parallelism has rules for them.
EXPERTS = {
    "model.language_model?.layers.*.mlp.experts": "moe_tp_experts",
    "model.language_model?.layers.*.mlp.experts.gate_up_proj": "packed_colwise",
    "model.language_model?.layers.*.mlp.experts.down_proj": "rowwise",
}


def export_all(folder: str, kinds: tuple[str, ...], fault: str | None = None) -> None:
    accelerator = accelerator_for(2, plan=EXPERTS)
    for kind in kinds:
        model = accelerator.prepare(build(kind, f"{folder}/source"))
        with injected(fault):
            accelerator.unwrap_model(model).save_pretrained(f"{folder}/{kind}", max_shard_size=SHARD_SIZE)
            accelerator.save_model(model, f"{folder}/{kind} by Accelerate", max_shard_size=SHARD_SIZE)
        for name in (kind, f"{kind} by Accelerate"):  # the files are there as soon as the call returns, on any rank
            assert (Path(folder) / name / "model.safetensors.index.json").exists()
    accelerator.wait_for_everyone()


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    build_model("mixtral").save_pretrained(folder / "source")
    run_on_ranks(export_all, 4, str(folder), KINDS)
    return folder


def save_plainly(kind: str, exported: Path, folder: Path) -> dict[str, bytes]:
    build(kind, str(exported / "source")).save_pretrained(folder, max_shard_size=SHARD_SIZE)
    return contents(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_save_pretrained_writes_every_file_as_without_tensor_parallelism(kind, exported, tmp_path):
    plain, ours = save_plainly(kind, exported, tmp_path / "plain"), contents(exported / kind)
    assert ours.keys() == plain.keys() and len(plain) > 4
    assert {name for name in plain if ours[name] != plain[name]} == set()


@pytest.mark.parametrize("kind", ["mixtral", "tied phi3 in bfloat16"])
def test_save_model_writes_every_file_as_without_tensor_parallelism(kind, exported, tmp_path):
    from accelerate import Accelerator

    Accelerator().save_model(build(kind), tmp_path, max_shard_size=SHARD_SIZE)
    plain, ours = contents(tmp_path), contents(exported / f"{kind} by Accelerate")
    assert ours.keys() - plain.keys() == {"config.json", "generation_config.json"}
    assert {name for name in plain if ours[name] != plain[name]} == set()


@pytest.mark.parametrize("kind", KINDS)
def test_an_exported_model_loads_with_nothing_missing_and_nothing_unexpected(kind, exported):
    auto = AutoModelForImageTextToText if "vl" in kind else AutoModelForCausalLM
    loaded, told = auto.from_pretrained(exported / kind, output_loading_info=True)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    wanted = build(kind, str(exported / "source")).state_dict()
    assert loaded.state_dict().keys() == wanted.keys()
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == wanted[name].dtype and torch.equal(tensor, wanted[name]), name


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("conversions see this rank's shapes", "qwen3_vl_moe"),
        ("parts joined in the order they came", "mixtral"),
        ("every view a storage of its own", "mixtral"),
    ],
)
def test_a_fault_in_the_export_shows_in_the_files(fault, kind, exported, tmp_path):
    run_on_ranks(export_all, 2, str(tmp_path), (kind,), fault)
    plain, ours = save_plainly(kind, exported, tmp_path / "plain"), contents(tmp_path / kind)
    assert {name for name in plain if ours.get(name) != plain[name]}


# --- who does what ---------------------------------------------------------------------------------------------------


class Counts:
    """How often this rank joined tensors, sent parts, and met other ranks in a collective."""

    def __init__(self):
        self.joined: list[int] = []
        self.sent = self.collectives = self.most = 0
        self._alive: list[tuple[StorageWeakRef, int]] = []

    def watch(self) -> Any:
        stack = ExitStack()
        stack.enter_context(mock.patch.multiple(ShardInfo, collect=self._collect, send_part=self._send))
        gathers = (
            "all_gather",
            "all_gather_single",
            "all_gather_object",
            "all_reduce",
            "barrier",
            "broadcast",
            "gather",
        )
        stack.enter_context(mock.patch.object(agreement, "gather_objects", self._collective))
        return stack, mock.patch.multiple(torch.distributed, **dict.fromkeys(gathers, self._collective))

    @property
    def _collect(self):
        stock = ShardInfo.collect

        def collect(info: ShardInfo, *args: Any) -> Tensor:
            made = stock(info, *args)
            self.joined.append(made.nbytes)
            self._alive.append((StorageWeakRef(made.untyped_storage()), made.nbytes))
            self.most = max(self.most, sum(size for reference, size in self._alive if not reference.expired()))
            return made

        return collect

    @property
    def _send(self):
        stock = ShardInfo.send_part

        def send_part(info: ShardInfo, local: Tensor, *args: Any) -> None:
            self.sent += 1
            stock(info, local, *args)

        return send_part

    def _collective(self, *args: Any, **kwargs: Any) -> None:
        self.collectives += 1


def count_work(folder: str, way: str):
    accelerator = accelerator_for(2)
    model = accelerator.prepare(build_model("qwen3_moe"))
    sharded = [p for p in model.parameters() if p.tp_shard is not None and p.tp_shard.is_sharded]
    counts = Counts()
    points, collectives = counts.watch()
    with points, collectives:
        if way == "save_pretrained":
            accelerator.unwrap_model(model).save_pretrained(folder, max_shard_size=SHARD_SIZE)
        elif way == "save_model":
            accelerator.save_model(model, folder, max_shard_size=SHARD_SIZE)
        else:
            accelerator.get_state_dict(model)
    return len(sharded), counts.joined, counts.most, counts.sent, counts.collectives


@pytest.mark.parametrize("way", ["save_pretrained", "save_model", "get_state_dict"])
def test_each_tensor_is_joined_once_on_the_main_process_and_other_replicas_take_no_part(way, tmp_path):
    main, peer, *others = run_on_ranks(count_work, 4, str(tmp_path), way)
    sharded, joined, most, sent, collectives = main
    assert len(joined) == sharded > 10 and (sent, collectives) == (0, 0)
    assert peer == (sharded, [], 0, sharded, 0)
    assert others == [(sharded, [], 0, 0, 0)] * 2
    if way != "get_state_dict":
        largest_file = max(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
        assert most <= max(joined) + largest_file < sum(joined) / 2


def export_in_turn(folder: str):
    for turn, tp in enumerate((2, 4, 2, 4, 2)):
        model = parallelize(build_model("llama", seed=turn), tp_mesh(tp))
        model.save_pretrained(f"{folder}/{turn}")
        assert (Path(folder) / str(turn) / "model.safetensors").exists()


def test_models_over_other_groups_of_ranks_are_exported_in_turn(tmp_path):
    run_on_ranks(export_in_turn, 4, str(tmp_path))
    for turn in range(5):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / str(turn))
        assert torch.equal(loaded.lm_head.weight, build_model("llama", seed=turn).lm_head.weight)


# --- errors ----------------------------------------------------------------------------------------------------------


def fail_and_go_on(folder: str, way: str, how: str):
    """What each rank is told when the main process cannot write, and whether saving works afterwards."""
    accelerator = accelerator_for(2)
    model = accelerator.prepare(build_model("llama"))
    save = functools.partial(save_by, accelerator, model, way)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    target = f"{folder}/file/below" if how == "not a folder" else folder
    size = "10 bushels" if how == "no size" else SHARD_SIZE
    told = None
    try:
        if how == "full disk" and accelerator.is_main_process:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        save(target, size)
    except Exception as error:
        told = type(error).__name__, str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    accelerator.wait_for_everyone()
    save(f"{folder}/again", SHARD_SIZE)
    return told


def save_by(accelerator: Any, model: nn.Module, way: str, folder: str, size: str) -> None:
    if way == "save_model":
        accelerator.save_model(model, folder, max_shard_size=size)
    elif way == "save_pretrained":
        accelerator.unwrap_model(model).save_pretrained(folder, max_shard_size=size)
    elif way == "get_state_dict":
        accelerator.get_state_dict(model)
    else:
        plugin = TensorParallelDDPPlugin(tp_size=2)
        trainer = Trainer(
            build_model("llama"),
            TrainingArguments(
                output_dir=folder.partition("/file")[0], use_cpu=True, report_to=[], parallelism_config=plugin
            ),
        )
        trainer.model = trainer.accelerator.prepare_model(trainer.model, evaluation_mode=True)
        trainer.save_model(folder)


@pytest.mark.parametrize(
    ("way", "how", "words"),
    [
        ("save_model", "full disk", ["File too large", "incomplete"]),
        ("save_pretrained", "full disk", ["File too large", "incomplete"]),
        ("save_pretrained", "not a folder", ["Not a directory"]),
        ("save_model", "no size", ["10 bushels"]),
        ("Trainer", "not a folder", ["Not a directory"]),
    ],
)
def test_what_fails_on_the_main_process_is_the_same_error_on_every_rank(way, how, words, tmp_path):
    (tmp_path / "file").write_text("")
    told = run_on_ranks(fail_and_go_on, 4, str(tmp_path), way, how, timeout=60)
    assert told == [told[0]] * 4
    kind, message = told[0]
    assert kind == ("ValueError" if how == "no size" else "CheckpointError")
    assert all(word in message for word in words), message
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again.lm_head.weight, build_model("llama").lm_head.weight)


def without_room(way: str, folder: str):
    accelerator = accelerator_for(2)
    model = accelerator.prepare(build_model("llama"))
    stock, joined = ShardInfo.collect, []

    def collect(info: ShardInfo, *args: Any) -> Tensor:
        if len(joined) == 5:
            raise MemoryError("no room")
        joined.append(info)
        return stock(info, *args)

    told = None
    try:
        with mock.patch.object(ShardInfo, "collect", collect):
            save_by(accelerator, model, way, folder, SHARD_SIZE)
    except CheckpointError as error:
        told = str(error)
    accelerator.wait_for_everyone()
    return told, len(accelerator.get_state_dict(model))


@pytest.mark.parametrize("way", ["save_model", "get_state_dict"])
def test_a_tensor_for_which_there_is_no_room_leaves_no_peer_waiting(way, tmp_path):
    (told, names), *others = run_on_ranks(without_room, 2, way, str(tmp_path), timeout=60)
    assert f"{way}: MemoryError: no room" in told and names > 10
    assert others == [(told, 0)]


def save_distributed(folder: str):
    accelerator = accelerator_for(2)
    model = accelerator.unwrap_model(accelerator.prepare(build_model("llama")))
    model.save_pretrained(folder, distributed_checkpoint=True)


def test_transformers_own_distributed_checkpoint_is_refused_as_it_would_hold_one_ranks_part(tmp_path):
    for told in run_on_ranks(save_distributed, 2, str(tmp_path), expect_raise=True):
        assert told.type_name == "ValueError" and "save_state" in told.message


# --- deferred tensors ------------------------------------------------------------------------------------------------

OPERATIONS = {
    "chunk": lambda t: t.chunk(2, 0)[-1],
    "chunk the last": lambda t: torch.chunk(t, 2, dim=-1)[0],
    "contiguous": lambda t: t.contiguous(),
    "transpose": lambda t: t.transpose(0, -1),
    "squeeze": lambda t: t.squeeze(0),
    "unsqueeze": lambda t: t.unsqueeze(0),
    "reshape": lambda t: t.reshape(-1, 2),
    "split": lambda t: t.split([1, t.shape[0] - 1])[1],
    "cat": lambda t: torch.cat([t, torch.ones_like(t)]),
    "stack": lambda t: torch.stack([t, t], dim=1),
    "index": lambda t: t[..., ::2],
    "unbind": lambda t: t.unbind(0)[0],
    "double": lambda t: 2 * t,
    "to bfloat16": lambda t: t.to(torch.bfloat16),
    "detach": lambda t: t.detach(),
    "clone": lambda t: t.clone(),
}


def outcome_of(tensor: Tensor, names: list[str]) -> tuple[Tensor | None, list[Tensor]]:
    steps = [tensor]
    for name in names:
        try:
            steps.append(OPERATIONS[name](steps[-1]))
        except (RuntimeError, IndexError):
            return None, steps
    return steps[-1], steps


def strides(tensor: Tensor) -> list[int]:
    """Those that mean something."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape) if size > 1 and tensor.numel()]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(sorted(OPERATIONS)), max_size=5))
def test_a_deferred_tensor_is_what_an_ordinary_one_would_be(names):
    values = torch.arange(48.0).reshape(4, 6, 2)
    computed = []
    made, made_steps = outcome_of(
        DeferredTensor.of((4, 6, 2), torch.float32, lambda: computed.append(1) or values), names
    )
    wanted, steps = outcome_of(values, names)
    assert not computed or wanted is None, "only an error asks for the values"
    assert len(made_steps) == len(steps) and (made is None) == (wanted is None)
    for made, plain in zip(made_steps, steps):
        assert isinstance(made, DeferredTensor) and made.device.type not in ("cpu", "meta")
        facts = ("shape", "dtype", "layout")
        assert [getattr(made, fact) for fact in facts] == [getattr(plain, fact) for fact in facts]
        assert strides(made) == strides(plain) and made.is_contiguous() == plain.is_contiguous()
        assert made.untyped_storage().nbytes() == plain.untyped_storage().nbytes()
        for other, plain_other in zip(made_steps, steps):
            alike = plain.untyped_storage().data_ptr() == plain_other.untyped_storage().data_ptr()
            assert (made.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()) == alike
            if alike and plain.numel() and plain_other.numel():
                assert made.data_ptr() - other.data_ptr() == plain.data_ptr() - plain_other.data_ptr()
        assert (made.data_ptr() == 0) == (plain.data_ptr() == 0)
        assert torch.equal(made.to("cpu"), plain)


def test_values_that_are_held_are_not_computed_again_and_others_are():
    computed = []
    deferred = DeferredTensor.of((2, 3), torch.float32, lambda: computed.append(1) or torch.zeros(2, 3))
    first, second = deferred.chunk(2)
    held = first.to("cpu")
    assert second.to("cpu").data_ptr() == held.data_ptr() + 12 and len(computed) == 1
    del held
    second.to("cpu")
    assert len(computed) == 2


def test_a_deferred_tensor_is_not_written_to():
    deferred = DeferredTensor.of((2,), torch.float32, lambda: torch.zeros(2))
    for change in (
        lambda: deferred.add_(1),
        lambda: torch.add(deferred, 1, out=deferred),
        lambda: deferred.__setitem__(0, 1),
        lambda: deferred[:1].fill_(0),
    ):
        with pytest.raises(TypeError, match="can only be read"):
            change()
