"""What `save_state` writes and `load_state` takes: everything, once, or a clear error on every rank and nothing."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import threading
import time
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from unittest import mock

import pytest
import torch
from accelerate.utils import ProjectConfiguration
from torch.distributed.checkpoint import FileSystemReader

import accel_tp_ddp
from accel_tp_ddp import CheckpointError, full_state_dict
from accel_tp_ddp.checkpoint import folder as folders
from accel_tp_ddp.checkpoint import save as saving
from accel_tp_ddp.checkpoint.dcp import read_metadata
from accel_tp_ddp.checkpoint.folder import MANIFEST, Manifest
from accel_tp_ddp.core import store

from ..helpers.compare import assert_tensors_close
from ..helpers.faults import RESUME_FAULTS, injected
from ..helpers.models import build_model
from ..helpers.ranks import run_on_ranks
from ..helpers.resuming import (
    SAVED_AFTER,
    Prepared,
    Run,
    Saved,
    full_optimizer_state,
    go_on_from,
    message_of,
    save_and_go_on,
)
from ..helpers.training import make_accelerator, make_optimizer

DROPOUT = (("hidden_dropout", 0.2), ("attention_dropout", 0.2))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A state by its run and replicas, and what the run saw."""

    @cache
    def at(run, dp=1):
        folder = tmp_path_factory.mktemp("states") / "state"
        return folder, run_on_ranks(save_and_go_on, (run.tp or 1) * dp, run, str(folder))

    return at


def digest(prepared):
    """This rank's weights and optimizer state, as numbers."""
    tensors = [*prepared.model.state_dict().values()]
    tensors += [v for state in prepared.optimizer.state.values() for v in state.values()]
    return [tensor.double().sum().item() for tensor in tensors]


# --- what is written -------------------------------------------------------------------------------------------------


def test_each_tensor_is_written_once_and_replicas_share_the_writing(saved):
    folder, ((first, *_)) = saved(Run(2), 2)
    metadata = FileSystemReader(folder / "tensors").read_metadata()
    stored = {name: value for name, value in metadata.state_dict_metadata.items() if hasattr(value, "chunks")}
    full = {f"models.0.{name}": tensor for name, tensor in first.weights.items()}
    full |= {f"optimizers.0.0.{n.replace(' ', '.')}": t for n, t in first.state.items() if t.dim()}
    assert stored.keys() == full.keys()
    for name, tensor in full.items():
        boxes = {tuple(chunk.offsets) for chunk in stored[name].chunks}
        assert stored[name].size == tensor.shape and len(boxes) == len(stored[name].chunks)
        assert sum(chunk.sizes.numel() for chunk in stored[name].chunks) == tensor.numel()
    written = [path.stat().st_size for path in sorted((folder / "tensors").glob("*.distcp"))]
    assert len(written) == 4 and max(written) < 1.5 * min(written)
    raw = sum(tensor.numel() * tensor.element_size() for tensor in full.values())
    assert raw < sum(written) < 1.5 * raw  # torch.save adds about a kilobyte to each of these small tensors


def test_the_manifest_lists_every_file(saved):
    folder, _ = saved(Run(2), 2)
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert set(Manifest.read(folder).files) == files - {MANIFEST}
    assert {"scheduler.bin", "tensors/.metadata", *(f"random_states_{rank}.pkl" for rank in range(4))} < files


# --- going on --------------------------------------------------------------------------------------------------------


def test_dropout_goes_on_as_in_the_uninterrupted_run(saved):
    run = Run(2, "gpt_neox", options=DROPOUT)
    folder, uninterrupted = saved(run, 2)
    for fault in (None, "random states not loaded", "random states of the first rank"):
        resumed = run_on_ranks(go_on_with, 4, fault, run, [str(folder)])
        off = max(
            abs(got - wanted)
            for (record,), whole in zip(resumed, uninterrupted)
            for got, wanted in zip(record.losses, whole.losses[SAVED_AFTER:])
        )
        assert off == 0 if fault is None else off > 1e-4, fault


def go_on_with(fault, run, folders):
    with injected(fault):
        return go_on_from(run, folders)


@pytest.mark.parametrize("fault", ["optimizer state of the first peer", "scheduler not loaded"])
def test_a_wrongly_resumed_run_is_another(saved, fault):
    run = Run(2, options=(("vocab_size", 132),))  # the same sizes on both ranks, or it would not go unnoticed
    folder, uninterrupted = saved(run)
    for injected_fault in (None, fault):
        records = run_on_ranks(go_on_with, 2, injected_fault, run, [str(folder)])
        errors = [
            abs(got / wanted - 1)
            for (record,), whole in zip(records, uninterrupted)
            for got, wanted in zip(
                record.losses + record.learning_rates,
                whole.losses[SAVED_AFTER:] + whole.learning_rates[SAVED_AFTER:],
            )
        ]
        assert max(errors) < 2e-4 if injected_fault is None else max(errors) > 2e-3, injected_fault
    if fault.startswith("optimizer"):
        with pytest.raises(AssertionError, match="tensors off by more than"):
            assert_tensors_close(records[0][0].state, uninterrupted[0].state, 1e-6)


def test_each_fault_of_resuming_is_tried():
    tried = {"random states not loaded", "random states of the first rank"}
    assert set(RESUME_FAULTS) == tried | {"optimizer state of the first peer", "scheduler not loaded"}


def without_the_plugin(folder):
    prepared, record = Prepared(Run(None), seed=5), Saved()
    accel_tp_ddp.load_state(prepared.accelerator, folder)
    prepared.look(record)
    prepared.train(prepared.accelerator.skip_first_batches(prepared.loader, SAVED_AFTER), 3, record)
    return record


@pytest.mark.parametrize("dp", [1, 2])
def test_an_accelerator_without_the_plugin_goes_on_from_a_sharded_state(saved, dp):
    folder, (first, *_) = saved(Run(2), 2)
    for record in run_on_ranks(without_the_plugin, dp, str(folder)):
        assert_tensors_close(record.weights, first.weights, 1e-6)
        assert_tensors_close(record.state, first.state, 1e-6)
        torch.testing.assert_close(record.losses, first.losses[SAVED_AFTER:], rtol=2e-4, atol=0)


def weights_only(place, tied):
    accelerator = make_accelerator(2)
    model = accelerator.prepare(build_model("llama", tied=tied))
    accelerator.load_state(place)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    return full_state_dict(model)


@pytest.mark.parametrize("size", ["5GB", "50KB"], ids=["one file", "several files"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_weights_of_a_hugging_face_checkpoint_are_taken(tmp_path, tied, size):
    source = build_model("llama", tied=tied, seed=9)
    source.save_pretrained(tmp_path, max_shard_size=size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (size == "50KB")
    for weights in run_on_ranks(weights_only, 2, str(tmp_path), tied):
        assert_tensors_close(weights, source.state_dict(), 1e-7)


class Counter:
    def __init__(self):
        self.count = 0

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


def several(folder):
    """Two models with an optimizer each, a third over both, custom objects, a GradScaler; saved, spoilt and loaded."""
    accelerator = make_accelerator(2)
    models = [build_model("llama", tied=True, seed=1), build_model("qwen3", seed=2)]
    every = [p for model in models for p in model.parameters()]
    optimizers = [make_optimizer(models[0]), make_optimizer(models[1], "sgd"), torch.optim.Adam(every, lr=1e-3)]
    *models, a, b, c = accelerator.prepare(*models, *optimizers)
    counter = Counter()
    accelerator.register_for_checkpointing(counter)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    tokens = torch.arange(1, 11)[None]

    def train():
        for model in models:
            accelerator.backward(model(input_ids=tokens, labels=tokens).loss)
        for optimizer in (a, b, c):
            optimizer.optimizer.step()
        counter.count += 1

    def look():
        states = [full_optimizer_state(m, o) for m, o in zip((*models, *models), (a, b, c, c))]
        return [*(full_state_dict(model) for model in models), *states]

    accelerator.scaler.scale(torch.zeros(()))
    train()
    before = [{name: tensor.clone() for name, tensor in part.items()} for part in look()]
    accelerator.save_state(folder)
    identities = [id(v) for o in (a, b, c) for state in o.state.values() for v in state.values() if v.dim()]
    train()
    accelerator.scaler.load_state_dict({**accelerator.scaler.state_dict(), "scale": 2.0})
    b.param_groups[1]["lr"] = 123.0
    accelerator.load_state(folder)
    for now, then in zip(look(), before):
        assert_tensors_close(now, then, 1e-7)
    kept = [id(v) for o in (a, b, c) for state in o.state.values() for v in state.values() if v.dim()]
    assert kept == identities, "state tensors were replaced"
    return counter.count, accelerator.scaler.get_scale(), b.param_groups[1]["lr"]


def test_several_models_and_optimizers_custom_objects_and_the_scaler_come_back(tmp_path):
    assert run_on_ranks(several, 2, str(tmp_path / "state")) == [(1, 8.0, 0.25)] * 2


def state_on_one_rank(folder):
    """As where a rank holds nothing of a small parameter: only one has a state for it. Any may write the summary."""
    prepared = Prepared(Run(2))
    prepared.train(prepared.loader, 1, Saved())
    norm, found = prepared.model.model.norm.weight, []
    for without in (0, 1):
        before = prepared.optimizer.state[norm]["exp_avg"].clone()
        if int(os.environ["RANK"]) == without:
            del prepared.optimizer.state[norm]
        prepared.accelerator.save_state(folder)
        prepared.accelerator.load_state(folder)
        found.append(torch.equal(prepared.optimizer.state[norm]["exp_avg"], before))
    return found


def test_a_state_that_only_one_rank_has_is_saved(tmp_path):
    assert run_on_ranks(state_on_one_rank, 2, str(tmp_path / "state")) == [[True, True]] * 2


class RowMomentum(torch.optim.SGD):
    """Keeps one number for each row: of a sharded parameter nobody could say how it is cut."""

    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param]["rows"] = param.flatten(1).sum(1) if param.dim() > 1 else param.sum()[None].repeat(3)


def other_shapes(folder, of):
    accelerator = make_accelerator(2)
    model = build_model("llama")
    params = [p for name, p in model.named_parameters() if ("norm" in name) == (of == "norms")]
    model, optimizer = accelerator.prepare(model, RowMomentum(params, lr=0.1))
    model(input_ids=torch.ones(1, 4, dtype=torch.long), labels=torch.ones(1, 4, dtype=torch.long)).loss.backward()
    optimizer.step()
    if of == "norms":  # replicated: whatever shape
        rows = [state["rows"].clone() for state in optimizer.state.values()]
        accelerator.save_state(folder)
        for state in optimizer.state.values():
            state["rows"].zero_()
        accelerator.load_state(folder)
        return all(torch.equal(state["rows"], row) for state, row in zip(optimizer.state.values(), rows))
    return message_of(lambda: accelerator.save_state(folder))


def test_state_of_another_shape_than_its_sharded_parameter_is_refused_by_name(tmp_path):
    first, second = run_on_ranks(other_shapes, 2, str(tmp_path / "state"), "weights")
    assert "RowMomentum holds a state `rows`" in first and "model.embed_tokens.weight" in first
    assert "RowMomentum holds a state `rows`" in second and not list(tmp_path.iterdir())
    assert run_on_ranks(other_shapes, 2, str(tmp_path / "state"), "norms") == [True, True]


# --- hooks, naming ---------------------------------------------------------------------------------------------------


def hooks_as_in_diffusers(folder, tp):
    accelerator = make_accelerator(tp)
    models = [build_model("llama", seed=1), build_model("llama", seed=2)]
    models = list(accelerator.prepare(*models))
    seen = []

    def save_hook(models, weights, output_dir):
        seen.append([{name: tensor.shape for name, tensor in whole.items()} for whole in weights])
        if accelerator.is_main_process:
            Path(output_dir, "mine.txt").write_text("mine")
            weights.pop(1)  # this one it saves itself
            del weights[0]["model.norm.weight"]

    def load_hook(models, input_dir):
        seen.append(Path(input_dir, "mine.txt").read_text())
        models.pop(1)

    accelerator.register_save_state_pre_hook(save_hook)
    handle = accelerator.register_load_state_pre_hook(load_hook)
    saved = [{n: t.clone() for n, t in full_state_dict(model).items()} for model in models]
    accelerator.save_state(folder)
    for model in models:
        torch._foreach_zero_([p.data for p in model.parameters()])
    accelerator.load_state(folder, strict=False)
    loaded = [full_state_dict(model) for model in models]
    handle.remove()
    message = message_of(lambda: accelerator.load_state(folder, strict=False))
    whole = [name for name in saved[0] if torch.equal(saved[0][name], loaded[0][name])]
    return seen, saved[0].keys() - whole, any(t.any() for t in loaded[1].values()), message


def test_pre_hooks_are_called_as_accelerate_calls_them(tmp_path):
    results = run_on_ranks(hooks_as_in_diffusers, 2, str(tmp_path / "s"), 2)
    for rank, (seen, not_loaded, second_loaded, message) in enumerate(results):
        shapes, mine = seen
        full = {name: tensor.shape for name, tensor in build_model("llama").state_dict().items()}
        assert shapes == ([{}, {}] if rank else [full, full]) and mine == "mine"
        assert not_loaded == {"model.norm.weight"} and not second_loaded
        assert "holds no weights of model 1" in message
    assert "mine.txt" in Manifest.read(tmp_path / "s").files
    assert not any(name.startswith("models.1") for name in read_metadata(tmp_path / "s" / "tensors"))


def automatic(folder):
    config = ProjectConfiguration(project_dir=folder, automatic_checkpoint_naming=True, total_limit=2)
    accelerator = make_accelerator(2, project_config=config)
    model, optimizer = accelerator.prepare(model := build_model("llama"), make_optimizer(model))
    checkpoints = Path(folder) / "checkpoints"
    for number in range(4):
        torch._foreach_zero_([p.data for p in model.parameters()])
        torch._foreach_add_([p.data for p in model.parameters()], number)
        if number == 3 and accelerator.is_main_process:
            (checkpoints / ".checkpoint_2.saving").mkdir()  # as a killed save leaves it
        place = accelerator.save_state()
        assert place == checkpoints / f"checkpoint_{number}" and accelerator.save_iteration == number + 1
    accelerator.wait_for_everyone()
    names = sorted(path.name for path in checkpoints.iterdir())

    def value_loaded(**where):
        torch._foreach_zero_([p.data for p in model.parameters()])
        accelerator.load_state(**where)
        return {p.data.mean().item() for p in model.parameters()}

    newest = value_loaded()
    accelerator.project_configuration.iteration = 3
    exists = message_of(accelerator.save_state, ValueError)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        flip(checkpoints / "checkpoint_3" / "tensors" / "__1_0.distcp")
    accelerator.wait_for_everyone()
    damaged = message_of(lambda: accelerator.load_state(str(checkpoints / "checkpoint_3")))
    second = value_loaded()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (checkpoints / "checkpoint_2" / MANIFEST).unlink()
    accelerator.wait_for_everyone()
    none = message_of(accelerator.load_state)
    return names, newest, exists, damaged, second, none


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_automatic_naming_keeps_total_limit_and_takes_the_newest_intact_checkpoint(tmp_path):
    checkpoints = tmp_path / "checkpoints"
    for names, newest, exists, damaged, second, none in run_on_ranks(automatic, 2, str(tmp_path)):
        assert names == ["checkpoint_2", "checkpoint_3"]
        assert newest == {3.0} and second == {2.0}
        assert f"{checkpoints}/checkpoint_3 already exists" in exists and "iteration" in exists
        assert f"{checkpoints}/checkpoint_3/tensors/__1_0.distcp is damaged" in damaged
        assert f"The newest intact checkpoint is {checkpoints}/checkpoint_2." in damaged
        assert "checkpoint_3/tensors/__1_0.distcp is damaged" in none
        assert f"checkpoint_2/{MANIFEST} is missing" in none


# --- what cannot be loaded -------------------------------------------------------------------------------------------

DAMAGES = {
    "a flipped byte": (flip, "tensors/__0_0.distcp", "SHA-256"),
    "a file cut short": (lambda path: os.truncate(path, 100), "tensors/__1_0.distcp", "has 100 bytes, and"),
    "a missing shard": (Path.unlink, "tensors/__1_0.distcp", "is missing"),
    "missing random states": (Path.unlink, "random_states_1.pkl", "is missing"),
    "a missing index": (Path.unlink, "tensors/.metadata", "is missing"),
    "a missing manifest": (Path.unlink, MANIFEST, "this is no complete state"),
    "a damaged manifest": (lambda path: os.truncate(path, 100), MANIFEST, "cannot be read as a manifest"),
}


def load_damaged(folders):
    prepared = Prepared(Run(2), seed=5)
    prepared.train(prepared.loader, 1, Saved())
    before, random_state = digest(prepared), torch.get_rng_state()
    messages = [message_of(lambda f=f: prepared.accelerator.load_state(f)) for f in folders]
    assert digest(prepared) == before and torch.equal(torch.get_rng_state(), random_state)
    return messages


def test_a_damaged_state_is_refused_on_all_ranks_by_the_same_words_and_nothing_is_loaded(saved, tmp_path):
    folder, _ = saved(Run(2))
    places = []
    for damage, (change, name, _) in DAMAGES.items():
        places.append(tmp_path / damage)
        shutil.copytree(folder, places[-1])
        change(places[-1] / name)
    first, second = run_on_ranks(load_damaged, 2, [str(place) for place in places])
    assert first == second
    for message, place, (_, name, word) in zip(first, places, DAMAGES.values()):
        assert str(place / name) in message and word in message and "Nothing has been loaded" in message


def unfit(folder, plain):
    """Models, optimizers and objects that are not those of the state."""
    messages = []

    def attempt(build, folder=folder, register=False):
        accelerator = make_accelerator(2)
        model, *others = build()
        accelerator.prepare(model, *others)
        if register:
            accelerator.register_for_checkpointing(Counter())
        before = [p.data.clone() for p in model.parameters()]
        messages.append(message_of(lambda: accelerator.load_state(folder), CheckpointError, ValueError))
        assert all(torch.equal(p.data, old) for p, old in zip(model.parameters(), before))

    def with_optimizer(groups=None, **options):
        model = build_model("llama", **options)
        optimizer = torch.optim.AdamW(groups(model)) if groups else make_optimizer(model)
        return model, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer)

    def one_group(model):
        return list(model.parameters())

    def other_groups(model):
        params = list(model.parameters())
        return [{"params": params[:2]}, {"params": params[2:]}]

    attempt(lambda: with_optimizer(vocab_size=140))
    attempt(lambda: with_optimizer(layers=3))
    attempt(lambda: with_optimizer(one_group))
    attempt(lambda: with_optimizer(other_groups))
    attempt(lambda: [build_model("llama")])
    attempt(lambda: with_optimizer(), register=True)
    attempt(lambda: with_optimizer(), folder=folder + "x")
    attempt(lambda: with_optimizer(), folder=os.path.dirname(folder))
    attempt(lambda: with_optimizer(vocab_size=140), folder=plain)
    attempt(lambda: with_optimizer(one_group), folder=plain)
    return messages


def test_a_state_of_something_else_is_refused_before_anything_is_loaded(saved):
    folder, plain = saved(Run(2))[0], saved(Run(1), 2)[0]
    expected = [
        ("`.*` of this LlamaForCausalLM has the size", "131", "140"),
        ("not one of this LlamaForCausalLM", "model.layers.2", "missing from the checkpoint"),
        ("has 1 parameter groups, but 2",),
        ("not one of this AdamW, group 0",),
        ("0 prepared optimizers here, but 1",),
        ("1 custom objects registered for checkpointing here, but 0",),
        ("folder does not exist",),
        ("is neither a state",),
        ("has the size", "131", "140"),
        ("the parameter groups of this AdamW have",),
    ]
    for messages in run_on_ranks(unfit, 2, str(folder), str(plain)):
        assert len(messages) == len(expected)
        for message, parts in zip(messages, expected):
            assert all(re.search(part, message) for part in parts), message


# --- saving that fails -----------------------------------------------------------------------------------------------


@contextmanager
def small_files(limit):
    """Files of this process cannot grow beyond `limit` bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class Unsaveable(Counter):
    fails_on = None

    def state_dict(self):
        if self.fails_on == int(os.environ["RANK"]):
            raise OSError(5, "Input/output error")
        return super().state_dict()


def failing_saves(folder):
    prepared, counter = Prepared(Run(2)), Unsaveable()
    prepared.accelerator.register_for_checkpointing(counter)
    save, rank = prepared.accelerator.save_state, int(os.environ["RANK"])
    place = os.path.join(folder, "state")
    save(place)
    manifest = Path(place, MANIFEST).read_text()
    prepared.train(prepared.loader, 1, Saved())
    messages = []
    with small_files(20_000 if rank == 1 else resource.RLIM_INFINITY):
        messages.append(message_of(lambda: save(place)))
    for counter.fails_on in (0, 1):
        messages.append(message_of(lambda: save(place)))
    counter.fails_on = None
    with mock.patch.object(folders, "_checksum", side_effect=OSError(5, "x")) if rank == 1 else small_files(-1):
        messages.append(message_of(lambda: save(place)))
    messages.append(message_of(lambda: save(os.path.join(place, MANIFEST, "below")), ValueError))
    messages.append(message_of(lambda: save(os.path.join(place, MANIFEST)), ValueError))
    messages.append(message_of(lambda: save(None), ValueError))
    assert Path(place, MANIFEST).read_text() == manifest
    names = os.listdir(folder)
    prepared.accelerator.load_state(place)
    prepared.accelerator.wait_for_everyone()
    save(place)
    assert Path(place, MANIFEST).read_text() != manifest
    return messages, names


def test_a_save_that_fails_on_one_rank_fails_on_all_and_leaves_the_old_state(tmp_path):
    (first, names), (second, _) = run_on_ranks(failing_saves, 2, str(tmp_path))
    assert names == ["state"] and len(first) == 7
    full, first_fails, second_fails, checksum, below, a_file, nowhere = first
    assert first == second
    assert [m for m in first[:-1] if str(tmp_path / "state") not in m] == []
    assert "rank 1" in full and "File too large" in full and "bytes are free there" in full
    assert "rank 0" in first_fails and "rank 1" in second_fails and "Input/output error" in first_fails
    assert "rank 1" in checksum and "is a file" in below and "is a file" in a_file and "output_dir" in nowhere


def alone(folder, which):
    prepared = Prepared(Run(2))
    call = getattr(prepared.accelerator, which)
    prepared.accelerator.save_state(folder)
    told, seconds = None, 0.0
    with mock.patch.object(store, "PEERS_TIMEOUT", 1.0):
        if prepared.accelerator.is_main_process:
            started = time.monotonic()
            told = message_of(lambda: call(folder))
            seconds = time.monotonic() - started
    prepared.accelerator.wait_for_everyone()
    call(folder)  # and together it works, also afterwards
    return told, seconds


@pytest.mark.parametrize("which", ["save_state", "load_state"])
def test_the_main_process_alone_is_told_that_every_rank_has_to_call_it(tmp_path, which):
    (told, seconds), other = run_on_ranks(alone, 2, str(tmp_path / "state"), which)
    assert f"`{which}` was called on the main process" in told and "every rank has to call it" in told
    assert 1.0 <= seconds < 10.0 and other == (None, 0.0)


# --- ranks that are killed -------------------------------------------------------------------------------------------

# rank: the call within which it dies, after what has been done before it
KILLS = {
    "a rank before it writes": (1, saving, "write_tensors"),
    "the main process after the tensors": (0, saving._Saver, "_write_others"),
    "a rank at the checksums": (1, folders, "_checksum"),
    "the main process at the renaming": (0, folders, "put_back"),
}


def save_and_die(folder, kill, delay=None):
    prepared = Prepared(Run(2))
    prepared.train(prepared.loader, 1, Saved())
    prepared.accelerator.wait_for_everyone()
    if delay is not None:
        rank, seconds = delay
        if rank == int(os.environ["RANK"]):
            threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
        while True:
            prepared.accelerator.save_state(folder)
    rank, owner, name = KILLS[kill]
    if rank != int(os.environ["RANK"]):
        prepared.accelerator.save_state(folder)
    with mock.patch.object(owner, name, lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)):
        prepared.accelerator.save_state(folder)


@pytest.mark.parametrize("kill", KILLS)
def test_a_rank_killed_in_a_save_leaves_the_old_state(saved, tmp_path, kill):
    place = tmp_path / "state"
    shutil.copytree(saved(Run(2))[0], place)
    started = time.monotonic()
    dead = KILLS[kill][0]
    raised = run_on_ranks(save_and_die, 2, str(place), kill, expect_raise=True)
    assert time.monotonic() - started < 60
    assert "exit code -9" in raised[dead].message
    assert "lost contact" in raised[1 - dead].message and str(place) in raised[1 - dead].message
    assert_goes_on_from(place, saved)


def assert_goes_on_from(place, saved):
    """One process is enough to load it, and to say whether it is the old state."""
    _, (first, *_) = saved(Run(2))
    ((record,),) = run_on_ranks(go_on_from, 1, Run(1), [str(place)])
    torch.testing.assert_close(record.losses, first.losses[SAVED_AFTER:], rtol=2e-4, atol=0)


@pytest.mark.parametrize("number", [pytest.param(n, marks=pytest.mark.slow) if n >= 3 else n for n in range(20)])
def test_a_rank_killed_at_a_random_moment_leaves_a_whole_state(saved, tmp_path, number):
    place = tmp_path / "state"
    shutil.copytree(saved(Run(2))[0], place)
    delay = torch.rand(1, generator=torch.Generator().manual_seed(number)).item()
    run_on_ranks(save_and_die, 2, str(place), "", (number % 2, 0.2 * delay), expect_raise=True)
    ((record,),) = run_on_ranks(go_on_from, 1, Run(1), [str(place)])
    assert len(record.losses) == 3
