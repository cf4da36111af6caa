"""`accelerate launch` over hosts made of network namespaces: each its own address, real gloo between them."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from ..helpers.compare import assert_tensors_close
from ..helpers.hosts import CAN_MAKE_HOSTS, Hosts
from ..helpers.launched import ROOT
from ..helpers.ranks import run_on_ranks
from ..scripts.elastic import STEPS, train

pytestmark = pytest.mark.skipif(not CAN_MAKE_HOSTS, reason="network namespaces need root, and iproute2")

YAML = """
distributed_type: MULTI_GPU
num_machines: {hosts}
num_processes: {processes}
main_process_ip: 10.77.0.1
main_process_port: 29511
mixed_precision: 'no'
"""
SIZES = """
parallelism_config:
  parallelism_config_tp_size: {tp}
"""


def on_hosts(hosts, folder, config, *script, late=0.0, timeout=280, **environment):
    """The launch line on each host, with its own --machine_rank; exit code and output of each."""
    Path(folder, "config.yaml").write_text(config)
    line = (sys.executable, "-m", "accelerate.commands.launch", "--config_file", "config.yaml", "--machine_rank")
    started = []
    for number in range(len(hosts.names)):
        started.append(hosts.start(number, *line, str(number), *script, cwd=folder, **environment))
        time.sleep(late)
    outputs = [process.communicate(timeout=timeout)[0] for process in started]
    return [process.returncode for process in started], outputs


def test_doctor_sees_hosts_and_tells_of_a_replica_on_two_of_them(tmp_path):
    """One host comes a second later; tp 2 is laid over both, which works, and is told."""
    config = YAML.format(hosts=2, processes=2) + SIZES.format(tp=2)
    with Hosts(2) as hosts:
        doctor = ("-m", "accel_tp_ddp.doctor", "--timeout", "60")
        codes, (out, _) = on_hosts(hosts, tmp_path, config, *doctor, late=1, GLOO_SOCKET_IFNAME="eth0")
    assert codes == [1, 1]
    assert "2 on 2 hosts" in out and "(10.77.0.1): ranks 0;" in out and "(10.77.0.2): ranks 1" in out
    assert "each of 2 ranks reaches each other one" in out and "a small Llama at tp 2 gives" in out
    assert "WRONG  layout     the ranks 0 to 1 share one replica over 2 hosts" in out and "1 to mend" in out


def test_doctor_finds_the_interface_that_other_hosts_cannot_reach(tmp_path):
    """Here the host's name is no address of a namespace, so torch takes the loopback: as /etc/hosts often has it."""
    config = YAML.format(hosts=2, processes=2)
    with Hosts(2) as hosts:
        codes, (out, _) = on_hosts(hosts, tmp_path, config, "-m", "accel_tp_ddp.doctor", "--timeout", "60")
    assert codes == [1, 1]
    assert "would give other hosts its address as 127." in out
    assert "-> Set GLOO_SOCKET_IFNAME to the interface between the hosts" in out


def test_doctor_finds_an_interface_that_leads_elsewhere(tmp_path):
    config = YAML.format(hosts=2, processes=2)
    with Hosts(2) as hosts:
        doctor = ("-m", "accel_tp_ddp.doctor", "--timeout", "60")
        codes, (out, _) = on_hosts(hosts, tmp_path, config, *doctor, GLOO_SOCKET_IFNAME="other0")
    assert codes == [1, 1]
    assert "cannot reach rank 1 on" in out and "at 10.78.1.1: " in out
    assert "or name the interface between them by GLOO_SOCKET_IFNAME" in out


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_replicas_on_several_hosts_train_as_plain_ddp_does(count, tmp_path):
    """tp 2 inside a host, replicas across, against one rank of plain DDP on each host."""
    script = str(ROOT / "tests/scripts/ordinary.py")
    found = []
    for name, own in (("plain", ()), ("sharded", ("-m", "accel_tp_ddp.launch", "--tp_size", "2"))):
        folder = tmp_path / name
        folder.mkdir()
        config = YAML.format(hosts=count, processes=count * (2 if own else 1))
        with Hosts(count) as hosts:
            line = (*own, script, "--output_dir", "out")
            codes, outputs = on_hosts(hosts, folder, config, *line, GLOO_SOCKET_IFNAME="eth0")
        assert codes == [0] * count, "\n".join(outputs)[-5000:]
        found.append((json.loads((folder / "out/run.json").read_text()), load_file(folder / "out/model.safetensors")))
    (plain, weights), (sharded, own_weights) = found
    for name, value in plain.items():
        assert sharded[name] == (pytest.approx(value, rel=2e-4) if name in ("losses", "norms", "rates") else value), (
            name
        )
    assert_tensors_close(own_weights, weights, 1e-3)


def torchrun(hosts, folder, number, *script, restarts=0):
    """torchrun's launch line on one of two hosts, two ranks on each; see docs/hosts.md."""
    line = ("--nnodes", "2", "--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "10.77.0.1:29512")
    # The host's name is no address of a namespace, so torchrun is told who keeps the store, and each its address.
    address = ("--local-addr", hosts.addresses[number], "--rdzv-conf", f"is_host={int(number == 0)}")
    environment = {"GLOO_SOCKET_IFNAME": "eth0", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return hosts.start(
        number,
        sys.executable,
        "-m",
        "torch.distributed.run",
        *line,
        *address,
        "--max-restarts",
        str(restarts),
        *script,
        cwd=folder,
        **environment,
    )


def rows(folder):
    return [json.loads(line) for line in Path(folder, "losses.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_run_over_hosts_is_restarted_and_resumes_when_a_rank_is_killed(tmp_path):
    alone, folder = tmp_path / "alone", tmp_path / "hosts"
    alone.mkdir(), folder.mkdir()
    run_on_ranks(train, 4, str(alone))
    script = (str(ROOT / "tests/scripts/elastic.py"), str(folder), "4")
    with Hosts(2) as hosts:
        started = [torchrun(hosts, folder, number, *script, restarts=2) for number in range(2)]
        outputs = [process.communicate(timeout=280)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(outputs)[-5000:]
    # Killed before step 4, with the newest state damaged: step 3 is done again.
    assert [row["step"] for row in rows(folder)] == [0, 1, 2, 3, *range(3, STEPS)]
    assert "load_state passes over a damaged checkpoint" in outputs[0]
    losses = {row["step"]: row["loss"] for row in rows(folder)}  # of steps that were done twice the second
    assert [losses[step] for step in range(STEPS)] == pytest.approx([row["loss"] for row in rows(alone)], rel=2e-4)


@pytest.mark.slow
def test_a_link_that_is_cut_ends_the_ranks_of_every_host(tmp_path):
    """After the group's timeout of 15 s: nothing tells a rank that another host cannot be reached any more.

    torchrun's agent on the host that has lost the store waits until TCP gives up, a quarter of an hour: not ours.
    """
    script = (str(ROOT / "tests/scripts/elastic.py"), str(tmp_path), "--timeout", "15", "--steps", "1000")
    with Hosts(2) as hosts:
        started = [torchrun(hosts, tmp_path, number, *script) for number in range(2)]
        assert within(120, (tmp_path / "losses.jsonl").exists), "no step was made"
        hosts.cut(1)
        outputs = [started[0].communicate(timeout=120)[0]]
        assert started[0].returncode not in (0, None)
        assert within(60, lambda: not ranks_of(hosts, 1))
        os.killpg(started[1].pid, signal.SIGKILL)
        outputs.append(started[1].communicate()[0])
    for output in outputs:
        assert "Timed out waiting 15000ms" in output, output[-5000:]


def ranks_of(hosts, number):
    return [line for line in hosts.command_lines(number) if "torch.distributed.run" not in line]


def within(seconds, condition):
    """Whether a condition becomes true in so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)
    return True
