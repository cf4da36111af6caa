"""`accelerate launch` over hosts made of network namespaces: each its own address, real gloo between them."""

import json
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from ..helpers.compare import assert_tensors_close
from ..helpers.hosts import CAN_MAKE_HOSTS, ROOT, Hosts

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
