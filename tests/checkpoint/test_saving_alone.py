"""Weights can only be gathered together: a main process that tries it alone is told so, and nothing hangs."""

from __future__ import annotations

import time
from unittest import mock

import pytest
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from accel_tp_ddp.core import store
from accel_tp_ddp.core.store import Channel

from ..helpers.compare import assert_tensors_close
from ..helpers.models import build_model
from ..helpers.ranks import run_on_ranks
from ..helpers.training import make_accelerator


def alone(folder: str, how: str):
    accelerator = make_accelerator(2)
    model = accelerator.prepare(build_model("llama"))
    store.PEERS_TIMEOUT = 1.0
    message, seconds = None, 0.0
    try:
        if accelerator.is_main_process:
            started = time.monotonic()
            if how == "save_pretrained":
                accelerator.unwrap_model(model).save_pretrained(folder)
            else:
                accelerator.get_state_dict(model)
    except RuntimeError as error:
        message, seconds = str(error), time.monotonic() - started
    finally:
        store.PEERS_TIMEOUT = 60.0
    accelerator.wait_for_everyone()
    accelerator.unwrap_model(model).save_pretrained(folder, is_main_process=accelerator.is_main_process)
    accelerator.wait_for_everyone()
    return message, seconds


@pytest.mark.parametrize("how", ["save_pretrained", "get_state_dict"])
def test_saving_on_the_main_process_alone_is_an_error_that_says_what_to_change(how, tmp_path):
    (message, seconds), *others = run_on_ranks(alone, 4, str(tmp_path), how)
    assert f"`{how}` was called on the main process" in message and "every rank has to call it" in message
    assert 1.0 <= seconds < 10.0
    assert others == [(None, 0.0)] * 3
    # and together it works, also afterwards
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_tensors_close(loaded.state_dict(), build_model("llama").state_dict(), 1e-7)


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
