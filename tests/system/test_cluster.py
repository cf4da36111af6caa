"""Recipes for clusters, as far as one machine can show: their syntax, and the launch lines that come of them."""

import importlib.util
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
SBATCH = ROOT / "recipes/cluster/slurm.sbatch"
#: They stand in for SLURM's programs, which are not here: srun runs its command once for each node, as tasks see it.
STAND_INS = {
    "srun": 'shift; for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@" || exit; done',
    "scontrol": "printf 'node7\\nnode9\\n'",
    "accelerate": 'printf "%s\\037" "$@"; echo',
}


def submitted(folder, *args, **environment):
    for name, body in STAND_INS.items():
        path = folder / name
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(0o755)
    given = {"SLURM_JOB_NODELIST": "node[7,9]", "SLURM_JOB_ID": "123456", "SLURM_NNODES": "2", **environment}
    environment = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", **given}
    done = subprocess.run(["bash", SBATCH, *args], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return [line.split("\037")[:-1] for line in done.stdout.splitlines()]


def test_the_sbatch_file_is_a_script():
    assert subprocess.run(["bash", "-n", SBATCH], timeout=60).returncode == 0


def test_the_sbatch_file_launches_each_node_with_its_rank(tmp_path):
    lines = submitted(tmp_path, "train.py", "--text", "two words", SLURM_GPUS_ON_NODE="4")
    assert len(lines) == 2
    for rank, line in enumerate(lines):
        value = {
            name: line[line.index(f"--{name}") + 1] for name in ("machine_rank", "main_process_ip", "num_processes")
        }
        assert value == {"machine_rank": str(rank), "main_process_ip": "node7", "num_processes": "8"}
        assert line[-5:] == ["-m", "accel_tp_ddp.launch", "train.py", "--text", "two words"]
        assert (ROOT / line[line.index("--config_file") + 1]).is_file()
    assert lines[0][lines[0].index("--main_process_port") + 1] == str(20000 + 123456 % 20000)


def test_the_sbatch_file_runs_doctor_on_request(tmp_path):
    assert [line[-2:] for line in submitted(tmp_path, CHECK="1")] == [["-m", "accel_tp_ddp.doctor"]] * 2


def test_the_pytorchjob_has_what_the_operator_and_the_launcher_want():
    job = yaml.safe_load((ROOT / "recipes/cluster/pytorchjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert set(job["spec"]["pytorchReplicaSpecs"]) == {"Master", "Worker"}
    for replica in job["spec"]["pytorchReplicaSpecs"].values():
        (container,) = replica["template"]["spec"]["containers"]
        assert container["name"] == "pytorch"
        assert str(container["resources"]["limits"]["nvidia.com/gpu"]) == job["spec"]["nprocPerNode"]
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in replica["template"]["spec"]["volumes"]}
        line = container["command"] + container["args"]
        assert line[:3] == ["torchrun", "-m", "accel_tp_ddp.launch"]
        assert int(job["spec"]["nprocPerNode"]) % int(line[line.index("--tp_size") + 1]) == 0, "a replica within a pod"


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason='needs `pip install "ray[train]"`')
def test_ray_train_gives_the_losses_of_plain_ddp(tmp_path):
    found = []
    for name, sizes in (("sharded", "--num_workers 4 --tp_size 2"), ("plain", "--num_workers 2 --tp_size 1")):
        command = [
            sys.executable,
            str(ROOT / "recipes/ray_train.py"),
            *shlex.split(sizes),
            "--output_dir",
            str(tmp_path / name),
        ]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
        found.append(json.loads((tmp_path / name / "losses.json").read_text()))
    assert len(found[0]) == 8 and found[0] == pytest.approx(found[1], rel=2e-4)
