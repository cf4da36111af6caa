"""The main process saves alone: its peers send their parts wherever they are, or it is told why they cannot."""

from __future__ import annotations

import time
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from accel_tp_ddp import parallelize
from accel_tp_ddp.core import serving, store
from accel_tp_ddp.core.store import Channel

from ..helpers.compare import assert_tensors_close
from ..helpers.files import contents
from ..helpers.models import build_model
from ..helpers.ranks import run_on_ranks
from ..helpers.sharded import token_batch, tp_mesh
from ..helpers.training import make_accelerator

HOW = ("save_pretrained", "save_model", "get_state_dict")
ELSEWHERE = ("in the next forward", "in wait_for_everyone", "in a Python loop", "in the same call")


def elementwise_step(model, optimizer):
    """One that gives the same bits on shards."""
    for param in model.parameters():
        param.grad = param.detach().clone()
    optimizer.step()
    optimizer.zero_grad()


def save_by(how, accelerator, model, folder):
    unwrapped = accelerator.unwrap_model(model)
    if how == "save_pretrained":
        unwrapped.save_pretrained(folder, max_shard_size="60KB")
    elif how == "save_model":
        accelerator.save_model(model, folder, max_shard_size="60KB")
    else:
        state = accelerator.get_state_dict(model)
        if accelerator.is_main_process:
            unwrapped.save_pretrained(folder, state_dict=state, max_shard_size="60KB")


def spin_until(done):
    """A Python loop that never enters a collective, and keeps the interpreter busy."""
    deadline = time.monotonic() + 60.0
    while not done() and time.monotonic() < deadline:
        sum(range(1000))


def save_alone(tp, folder):
    """The weights are stepped, and the main process saves them while the others are elsewhere; again and again."""
    accelerator = make_accelerator(tp)
    model = accelerator.prepare(build_model("llama"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)  # a prepared one lets the ranks of a replica meet
    losses = []
    for where in ELSEWHERE:
        for how in HOW:
            place = Path(folder, f"{how}, {where}")
            losses.append(model(**token_batch()).loss.item())
            if dist.get_rank() == 1:
                time.sleep(0.3)  # so that the main process asks before the step
            elementwise_step(model, optimizer)
            if accelerator.is_main_process or where == "in the same call" and tp is not None:
                save_by(how, accelerator, model, place)
            if accelerator.is_main_process:
                place.with_suffix(".done").touch()
            elif where == "in a Python loop":
                spin_until(place.with_suffix(".done").exists)
            if where == "in wait_for_everyone":
                accelerator.wait_for_everyone()
    return losses


def test_the_main_process_alone_saves_the_files_of_plain_ddp_wherever_the_others_are(tmp_path):
    plain = run_on_ranks(save_alone, 2, None, str(tmp_path / "plain"))
    sharded = run_on_ranks(save_alone, 4, 2, str(tmp_path / "sharded"))
    for rank in range(4):
        assert sharded[rank] == pytest.approx(plain[rank // 2], rel=2e-4)
    earlier = {}
    for where in ELSEWHERE:
        for how in HOW:
            wanted = contents(tmp_path / "plain" / f"{how}, {where}")
            found = contents(tmp_path / "sharded" / f"{how}, {where}")
            configs = {"config.json", "generation_config.json"} if how == "save_model" else set()
            assert found.keys() - configs == wanted.keys() and len(wanted) > 2
            assert {name for name in wanted if found[name] != wanted[name]} == set()
            assert wanted != earlier, "every save is of other weights"
            earlier = wanted


def alone(folder: str, how: str, where: str):
    accelerator = make_accelerator(2)
    model = accelerator.prepare(build_model("llama"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    norm = accelerator.unwrap_model(model).model.norm.weight
    message, seconds = None, 0.0
    is_peer, done = dist.get_rank() == 1, Path(folder, "done")
    with mock.patch.object(store, "PEERS_TIMEOUT", 1.0):
        if is_peer and where == "before the step":
            spin_until(done.exists)
        elementwise_step(model, optimizer) if where == "before the step" else None
        if is_peer and where == "beyond it":
            model.get_parameter("module.lm_head.weight").data.mul_(2)
            model.get_parameter("module.lm_head.weight").detach().mul_(0.5)
        if is_peer and where == "with other values":
            norm.data.mul_(2)
        if is_peer and where != "before the step":
            Path(folder, "changed").touch()
        try:
            if accelerator.is_main_process:
                if where != "before the step":
                    spin_until(Path(folder, "changed").exists)
                started = time.monotonic()
                save_by(how, accelerator, model, folder)
        except RuntimeError as error:
            message, seconds = str(error), time.monotonic() - started
        if accelerator.is_main_process:
            done.touch()
    accelerator.wait_for_everyone()
    if is_peer and where == "with other values":
        norm.data.mul_(0.5)
    accelerator.unwrap_model(model).save_pretrained(folder, is_main_process=accelerator.is_main_process)
    accelerator.wait_for_everyone()
    return message, seconds


@pytest.mark.parametrize(
    ("how", "where", "words"),
    [
        ("save_pretrained", "before the step", "times fewer than the main process"),
        ("get_state_dict", "before the step", "times fewer than the main process"),
        ("save_pretrained", "beyond it", "1 times more than the main process"),
        ("save_pretrained", "with other values", "its weights have other values"),
    ],
)
def test_what_cannot_be_saved_alone_is_an_error_that_says_what_to_change(how, where, words, tmp_path):
    (message, seconds), *others = run_on_ranks(alone, 4, str(tmp_path), how, where)
    assert f"`{how}` was called on the main process" in message and "every rank has to call it" in message
    assert words in message
    assert 1.0 <= seconds < 10.0
    assert others == [(None, 0.0)] * 3
    # and together it works, also afterwards
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    wanted = build_model("llama")
    if where == "before the step":
        elementwise_step(wanted, torch.optim.SGD(wanted.parameters(), lr=0.01))
    assert_tensors_close(loaded.state_dict(), wanted.state_dict(), 1e-7)


def save_at_once(folder: str):
    """The main process saves the second of two models while its peers are still sharding it."""
    add = serving._Service.add

    def late(service, model, mesh):
        time.sleep(1.0 if dist.get_rank() else 0.0)
        add(service, model, mesh)

    parallelize(build_model("llama", seed=0), tp_mesh(2))
    with mock.patch.object(serving._Service, "add", late):
        model = parallelize(build_model("llama", seed=1), tp_mesh(2))
        if dist.get_rank() == 0:
            model.save_pretrained(folder)


def test_a_peer_that_is_still_sharding_the_model_is_waited_for(tmp_path):
    run_on_ranks(save_at_once, 2, str(tmp_path))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.lm_head.weight, build_model("llama", seed=1).lm_head.weight)


def receive(silent: bool):
    """What the other ranks receive of three messages, the last of which comes late or never."""
    channel, received = Channel("news"), []
    with mock.patch.object(store, "SILENCE", 1.0):
        if dist.get_rank() == 0:
            for message in ("first", "second, of several words"):
                channel.send(message)
            if not silent:
                for sign in range(4):  # another rank receives none of these, but that there is somebody
                    time.sleep(0.5)
                    dist.distributed_c10d._get_default_store().add("accel_tp_ddp/channel/news/signs", 1)
                channel.send("third")
            return received
        try:
            while len(received) < 3:
                received.append(channel.receive())
        except RuntimeError as error:
            received.append(str(error))
        return received


@pytest.mark.parametrize("silent", [False, True])
def test_a_main_process_that_is_slow_is_waited_for_and_one_that_is_gone_is_not(silent):
    main, *others = run_on_ranks(receive, 3, silent)
    expected = "the main process has been silent for 1 s: it has ended, or hangs." if silent else "third"
    assert main == [] and others == [["first", "second, of several words", expected]] * 2
