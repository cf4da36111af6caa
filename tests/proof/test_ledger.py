"""The ledger: what a run has proved, later runs know, and nothing that goes wrong with a file stops one."""

import json
import logging
import multiprocessing
import os
from pathlib import Path

import pytest
import torch

from accel_tp_ddp.proof import ledger
from accel_tp_ddp.proof.ledger import CACHE_VARIABLE, Known, Ledger, write_shipped

PRINT, OTHER = "0123456789abcdef" * 2, "fedcba9876543210" * 2
LOGGER = "accel_tp_ddp.proof.ledger"


@pytest.fixture(autouse=True)
def nothing_is_cached():
    caches = (ledger.read_shipped, ledger._warn_of, ledger._own_sources)
    for each in caches:
        each.cache_clear()
    yield
    for each in caches:
        each.cache_clear()


def the_file(folder: Path) -> Path:
    (file,) = folder.iterdir()
    return file


def test_what_is_remembered_is_known_to_the_next_run(tmp_path):
    folder = tmp_path / "not" / "yet"
    assert Ledger(folder).known(PRINT) is None
    assert not folder.exists()
    Ledger(folder).remember(PRINT, "LlamaForCausalLM, tp 2")
    assert Ledger(folder).known(PRINT) == Known("cache")
    assert Ledger(folder).known(OTHER) is None
    assert json.loads(the_file(folder).read_text())["proved"] == "LlamaForCausalLM, tp 2"


def test_no_fingerprint_is_never_known(tmp_path):
    Ledger(tmp_path).remember(None, "a notebook's model")
    assert Ledger(tmp_path).known(None) is None and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"null", b"{}", b'{"fingerprint": "another"}', b"\xff\xfe", b"[" * 100_000]
)
def test_a_damaged_file_is_not_known_and_is_replaced(tmp_path, text):
    Ledger(tmp_path).remember(PRINT, "x")
    the_file(tmp_path).write_bytes(text)
    assert Ledger(tmp_path).known(PRINT) is None
    Ledger(tmp_path).remember(PRINT, "x")
    assert Ledger(tmp_path).known(PRINT) == Known("cache")


def test_a_file_that_is_another_fingerprints_is_not_known(tmp_path):
    Ledger(tmp_path).remember(PRINT, "x")
    held = the_file(tmp_path).read_bytes()
    Ledger(tmp_path)._file(OTHER).write_bytes(held)
    assert Ledger(tmp_path).known(OTHER) is None


def test_a_folder_in_the_place_of_the_file_is_not_known_and_no_error(tmp_path):
    Ledger(tmp_path)._file(PRINT).mkdir()
    assert Ledger(tmp_path).known(PRINT) is None
    Ledger(tmp_path).remember(PRINT, "x")
    assert list(tmp_path.iterdir()) == [Ledger(tmp_path)._file(PRINT)]


def in_the_way(tmp_path: Path) -> Path:
    (tmp_path / "file").write_text("")
    return tmp_path / "file" / "proofs"


def read_only(tmp_path: Path) -> Path:
    (tmp_path / "folder").mkdir(mode=0o555)
    if os.access(tmp_path / "folder", os.W_OK):
        return Path("/proc/proofs")  # root may write anywhere but there
    return tmp_path / "folder" / "proofs"


@pytest.mark.parametrize("where", [in_the_way, read_only])
def test_a_folder_that_cannot_be_written_is_one_warning(tmp_path, caplog, where):
    folder = where(tmp_path)
    with caplog.at_level(logging.WARNING, LOGGER):
        for fingerprint in (PRINT, OTHER, PRINT):
            Ledger(folder).remember(fingerprint, "x")
    (record,) = caplog.records
    assert str(folder) in record.getMessage() and CACHE_VARIABLE in record.getMessage()
    assert Ledger(folder).known(PRINT) == Known("cache")  # in this process
    ledger._unwritten.clear()
    assert Ledger(folder).known(PRINT) is None


def test_a_proof_counts_for_the_sources_of_this_package(tmp_path, monkeypatch):
    Ledger(tmp_path).remember(PRINT, "x")
    monkeypatch.setattr(ledger, "_PACKAGE", tmp_path / "another")
    for text in ("a later version", "a later version still"):
        for wing in ("core", "styles", "plans", "model", "proof"):
            (tmp_path / "another" / wing).mkdir(parents=True, exist_ok=True)
        (tmp_path / "another" / "styles" / "linear.py").write_text(text)
        ledger._own_sources.cache_clear()
        assert Ledger(tmp_path).known(PRINT) is None
        Ledger(tmp_path).remember(PRINT, "x")
    assert Ledger(tmp_path).known(PRINT) == Known("cache")


def test_a_proof_counts_for_the_version_of_torch(tmp_path, monkeypatch):
    Ledger(tmp_path).remember(PRINT, "x")
    monkeypatch.setattr(torch, "__version__", "3.0.0")
    assert Ledger(tmp_path).known(PRINT) is None


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.delenv(CACHE_VARIABLE, raising=False)
    assert Ledger().folder == tmp_path / "hub" / "accel_tp_ddp" / "proofs"
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "own"))
    assert Ledger().folder == tmp_path / "own" / "proofs"
    monkeypatch.setenv(CACHE_VARIABLE, "~/own")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Ledger().folder == tmp_path / "own" / "proofs"
    for name in (CACHE_VARIABLE, "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, "")
    assert Ledger().folder == tmp_path / ".cache" / "huggingface" / "accel_tp_ddp" / "proofs"


def write_often(folder: Path) -> None:
    for count in range(300):
        Ledger(folder).remember(PRINT, "x" * count * 1000)


def test_a_file_that_is_half_written_is_never_seen(tmp_path):
    """Processes that write one proof over and over, while this one reads it: known from the first time on."""
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_often, args=(tmp_path,)) for _ in range(3)]
    for writer in writers:
        writer.start()
    seen = []
    while any(writer.is_alive() for writer in writers):
        seen.append(Ledger(tmp_path).known(PRINT))
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    first = seen.index(Known("cache"))
    assert len(seen) - first > 10 and set(seen[first:]) == {Known("cache")}
    assert the_file(tmp_path) == Ledger(tmp_path)._file(PRINT)  # and nothing is left beside it


def test_what_is_shipped_is_known_whatever_the_cache_holds(tmp_path, monkeypatch):
    shipped = tmp_path / "ledger.json"
    monkeypatch.setattr(ledger, "_SHIPPED", shipped)
    write_shipped({OTHER: "second", PRINT: "first"}, shipped)
    assert Ledger(tmp_path).known(PRINT) == Ledger(in_the_way(tmp_path)).known(OTHER) == Known("shipped")
    assert shipped.read_text() == f'{{\n"{PRINT}": "first",\n"{OTHER}": "second"\n}}\n'


@pytest.mark.parametrize("text", ["", "[]", "{"])
def test_a_damaged_shipped_ledger_is_one_warning_and_no_proof(tmp_path, monkeypatch, caplog, text):
    (tmp_path / "ledger.json").write_text(text)
    monkeypatch.setattr(ledger, "_SHIPPED", tmp_path / "ledger.json")
    with caplog.at_level(logging.WARNING, LOGGER):
        assert [Ledger(tmp_path).known(PRINT) for _ in range(3)] == [None] * 3
    assert len(caplog.records) == 1 and str(tmp_path) in caplog.text


def test_the_shipped_ledger_is_in_order():
    held = json.loads(ledger._SHIPPED.read_text(encoding="utf-8"))
    assert list(held) == sorted(held)
    assert all(len(key) == len(PRINT) and isinstance(value, str) and value for key, value in held.items())
