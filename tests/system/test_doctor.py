"""`accel-tp-ddp doctor`: what it finds, what it says to change, and that it ends."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from accel_tp_ddp.cli import main
from accel_tp_ddp.tools.doctor import doctor
from accel_tp_ddp.tools.links import _compare, _Stop, check_ranks

from ..helpers.launched import user_environment
from ..helpers.ranks import run_on_ranks

GOOD = {
    **{"distributed_type": "MULTI_GPU", "num_machines": 1, "num_processes": 4, "main_process_port": 0},
    **{"mixed_precision": "no", "parallelism_config": {"parallelism_config_tp_size": 2}},
}


def config(folder, **changes):
    values = {**GOOD, **changes}
    path = Path(folder, "config.yaml")
    path.write_text(yaml.safe_dump({name: value for name, value in values.items() if value is not None}))
    return str(path)


def fixes(report):
    return {(each["check"], each["told"]): each["fix"] for each in report["findings"] if each["fix"] is not None}


def test_ranks_under_the_users_own_launch_line(tmp_path):
    """Real `accelerate launch`, real gloo ranks; the report is what rank 0 has found."""
    path = config(tmp_path, num_processes=2)
    environment = user_environment(ACCELERATE_USE_CPU="true")
    line = f"{sys.executable} -m accelerate.commands.launch --config_file {path}"
    command = [sys.executable, "-m", "accel_tp_ddp.cli", "doctor", "--launch", line, "--timeout", "60", "--json"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    report = json.loads(done.stdout)
    assert done.returncode == 0 and report["ok"], fixes(report) or done.stderr
    told = {each["check"]: each["told"] for each in report["findings"]}
    assert "2 on 1 host" in told["ranks"] and told["layout"] == "tp 2 x dp 1 on cpu"
    assert told["links"] == "each of 2 ranks reaches each other one"
    assert "ranks 0 to 1: an all-reduce of 8 MiB takes" in told["bandwidth"]
    assert "a small Llama at tp 2 gives" in told["proof"]


@pytest.mark.parametrize(
    "changes, check, said, fix",
    [
        ({"num_processes": 3}, "layout", "tp_size=2 does not divide the 3 processes", "num_processes"),
        (
            {"parallelism_config": {"parallelism_config_tp_size": 2, "parallelism_config_dp_replicate_size": 3}},
            *("layout", "are 6 processes, but 4 were launched", "sizes of parallelism_config"),
        ),
        ({"parallelism_config": None}, "layout", "no tensor parallelism", "parallelism_config_tp_size: 2"),
        ({"distributed_type": "MULTI_CPU"}, "layout", "starts one process, not 4", "MULTI_GPU"),
        ({"distributed_type": "FSDP"}, "layout", "does not go with this plugin", "MULTI_GPU"),
        (
            {
                "parallelism_config": {"parallelism_config_tp_size": 4},
                "num_machines": 2,
                "main_process_ip": "127.0.0.1",
            },
            *("layout", "a replica lies on several hosts", "divisor of 2"),
        ),
        ({"num_machines": 2}, "address", "no main_process_ip", "first host's address"),
        ({"num_machines": 2, "main_process_ip": "nohost.invalid"}, "address", "no such address", "can resolve"),
        ({"num_machines": 2, "main_process_ip": "203.0.113.9"}, "address", "is no address of this host", "one of"),
    ],
)
def test_what_a_yaml_gets_wrong_is_said_with_what_to_change(changes, check, said, fix, tmp_path):
    report = doctor(config(tmp_path, **changes))
    found = [(each, how) for (each, told), how in fixes(report).items() if said in told]
    assert not report["ok"] and len(found) == 1
    assert found[0][0] == check and fix in found[0][1]


def test_a_good_yaml_has_nothing_to_mend(tmp_path, capsys):
    assert main(["doctor", "--config_file", config(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "tp 2 x dp 2" in out and out.rstrip().endswith("nothing found") and "transformers" in out


def test_a_release_that_is_too_old_is_found(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("accel_tp_ddp.tools.doctor.requires", lambda name: ["accelerate>=99.1", "torch>=2.8"])
    assert main(["doctor", "--config_file", config(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "is older than 99.1" in out and "-> pip install 'accelerate>=99.1'" in out and "1 to mend" in out


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--config_file", "no.yaml"], "no.yaml cannot be read: FileNotFoundError"),
        (["--launch", "nonesuch launch"], "there is no program 'nonesuch'"),
        (["--launch", "'"], "is no command line"),
        (["--timeout", "0"], "a positive number of seconds"),
        (["--timeout", "soon"], "argument --timeout"),
    ],
)
def test_bad_input_is_one_line(argv, said, capsys):
    assert main(["doctor", *argv]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and said in lines[0]


def test_a_yaml_with_a_key_that_accelerate_does_not_know_is_bad_input(tmp_path, capsys):
    assert main(["doctor", "--config_file", config(tmp_path, nonsense=1)]) == 2
    assert "nonsense" in capsys.readouterr().err


def test_a_launch_line_that_fails_is_told_with_its_error(tmp_path):
    report = doctor(config(tmp_path), f"{sys.executable} -c pass -m", timeout=5)
    ((told, fix),) = [(told, fix) for (check, told), fix in fixes(report).items() if check == "launch"]
    assert "ended with exit code 0" in told and "-m accel_tp_ddp.doctor" in fix


# --- ranks that do not meet: one rank, in a process of its own ------------------------------------------------------


def _alone(environment, timeout):
    os.environ.update({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", **environment})
    begun = time.monotonic()
    found = [(each.check, each.told, each.fix) for each in check_ranks(None, timeout)]
    return [each for each in found if each[2] is not None], time.monotonic() - begun


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return str(server.getsockname()[1])


@pytest.mark.parametrize(
    "environment, check, said",
    [
        ({"MASTER_ADDR": "203.0.113.9"}, "address", "which is no address of its own host"),
        ({"MASTER_ADDR": "nohost.invalid"}, "address", "no such address"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "address", "nobody answers within 2 s"),
        ({"WORLD_SIZE": "2"}, "ranks", "of 2 ranks, 1 did not come to the step 'hello' within 2 s"),
        ({"GLOO_SOCKET_IFNAME": "nonesuch0"}, "interface", "has no interface 'nonesuch0'"),
        ({"PARALLELISM_CONFIG_TP_SIZE": "2"}, "layout", "tp_size=2 does not divide the 1 processes"),
    ],
)
def test_ranks_that_cannot_work_say_why_and_end(environment, check, said):
    ((found, seconds),) = run_on_ranks(_alone, 1, {"MASTER_PORT": free_port(), **environment}, 2.0)
    assert [each[0] for each in found] == [check] and said in found[0][1] and found[0][2]
    assert seconds < 60


def told_by(rank, **changes):
    return {
        **{"host": "a", "machine": "0", "address": "10.0.0.1", "interface": None, "device": "cpu"},
        **{"sizes": {"tp": 2, "dp": 2}, "versions": {"torch": "2.13"}, **changes},
    }


@pytest.mark.parametrize(
    "last, said",
    [
        ({"versions": {"torch": "2.12"}}, "rank 3 on a has {'torch': '2.12'}"),
        ({"sizes": {"tp": 1, "dp": 4}}, "(tp, dp) differ over the ranks"),
        ({"machine": "1", "address": "127.0.1.1"}, "would give other hosts its address as 127.0.1.1"),
    ],
)
def test_ranks_that_differ_are_told_apart(last, said):
    with pytest.raises(_Stop) as stopped:
        _compare([told_by(0), told_by(1), told_by(2), told_by(3, **last)])
    assert any(said in each.told for each in stopped.value.findings if each.fix)


def test_a_replica_over_two_hosts_is_told():
    ranks = [told_by(0), told_by(1, machine="1"), told_by(2, machine="1"), told_by(3)]
    assert any("share one replica over 2 hosts" in each.told for each in _compare(ranks) if each.fix)
    assert not any(
        each.fix for each in _compare([told_by(0), told_by(1), told_by(2, machine="1"), told_by(3, machine="1")])
    )
