"""Scripts that know nothing of tensor parallelism, under the launcher: real `accelerate launch`, real processes."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from safetensors.torch import load_file

from ..helpers.compare import assert_tensors_close
from ..helpers.launched import user_environment

SCRIPTS = Path(__file__).parents[1] / "scripts"
ROOT = SCRIPTS.parents[1]
YAML = """
distributed_type: MULTI_GPU
num_machines: 1
num_processes: {processes}
main_process_port: 0
mixed_precision: 'no'
"""
SIZES = """
parallelism_config:
  parallelism_config_tp_size: {tp}
  parallelism_config_dp_replicate_size: {dp}
"""
ARGUMENTS = ("--output_dir", "out", "--tp_size", "7", "a b", "-m", "c")  # the script's own, whatever they look like
TP2_DP2 = YAML.format(processes=4) + SIZES.format(tp=2, dp=2)


def launch(folder, config, *args, check=True):
    """`accelerate launch` with this YAML, from a folder that is not the repository's."""
    file = Path(folder) / "config.yaml"
    file.write_text(config)
    return run(folder, "accelerate.commands.launch", "--config_file", file, *args, check=check)


def run(folder, module, *args, check=True):
    environment = user_environment(ACCELERATE_USE_CPU="true")
    command = [sys.executable, "-m", module, *map(str, args)]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=250)
    assert not check or done.returncode == 0, done.stdout + done.stderr[-8000:]
    return done


def result_of(folder):
    return json.loads((Path(folder) / "out/run.json").read_text()), load_file(Path(folder) / "out/model.safetensors")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    launch(folder, YAML.format(processes=2), SCRIPTS / "ordinary.py", *ARGUMENTS)
    return result_of(folder)


def assert_same_run(folder, plain):
    (got, weights), (expected, expected_weights) = result_of(folder), plain
    for name, value in expected.items():
        assert got[name] == (pytest.approx(value, rel=2e-4) if name in ("losses", "norms", "rates") else value), name
    assert len(got["losses"]) == 6
    assert_tensors_close(weights, expected_weights, 1e-3)


def test_a_script_runs_unchanged_with_the_sizes_of_the_launchers_yaml(tmp_path, plain):
    done = launch(tmp_path, TP2_DP2, "-m", "accel_tp_ddp.launch", SCRIPTS / "ordinary.py", *ARGUMENTS)
    assert done.stdout.count("accel_tp_ddp.launch: TensorParallelDDPPlugin(tp_size=2, dp_replicate_size=2") == 1
    assert_same_run(tmp_path, plain)


@pytest.mark.slow
def test_a_module_runs_unchanged_with_the_sizes_of_options(tmp_path, plain):
    config, own = YAML.format(processes=4), ("-m", "accel_tp_ddp.launch", "--tp_size", "2", "-m")
    launch(tmp_path, config, *own, "tests.scripts.ordinary", *ARGUMENTS)
    assert_same_run(tmp_path, plain)


def test_the_launcher_without_tensor_parallelism_says_so_and_runs_the_script_unchanged(tmp_path, plain):
    done = launch(tmp_path, YAML.format(processes=2), "-m", "accel_tp_ddp.launch", SCRIPTS / "ordinary.py", *ARGUMENTS)
    assert done.stdout.count("no tensor parallelism asked for by options or the environment") == 1
    (got, weights), (expected, expected_weights) = result_of(tmp_path), plain
    assert got == expected
    assert_tensors_close(weights, expected_weights, 0.0)


OPTIONS = ("--num_processes=4", "--tp_size", "2", "--main_process_port", "0")


def test_the_launcher_takes_the_options_of_accelerate_launch_and_starts_the_ranks(tmp_path, plain):
    module = ("-m", "tests.scripts.ordinary")
    done = run(tmp_path, "accel_tp_ddp.launch", "--cpu", *OPTIONS, *module, *ARGUMENTS)
    assert done.stdout.count("accel_tp_ddp.launch: TensorParallelDDPPlugin(tp_size=2") == 1
    assert_same_run(tmp_path, plain)


def test_the_launcher_takes_a_config_file_and_a_script(tmp_path, plain):
    Path(tmp_path, "config.yaml").write_text(TP2_DP2)
    run(tmp_path, "accel_tp_ddp.launch", "--config_file", "config.yaml", SCRIPTS / "ordinary.py", *ARGUMENTS)
    assert_same_run(tmp_path, plain)


def test_a_scripts_own_traceback_comes_first_and_is_not_that_of_the_launcher(tmp_path):
    Path(tmp_path, "broken.py").write_text("def deep():\n    raise KeyError('mine')\n\n\ndeep()\n")
    options = ("--cpu", "--num_processes", "2", "--main_process_port", "0")
    done = run(tmp_path, "accel_tp_ddp.launch", *options, "broken.py", "--tp_size", "x", check=False)
    lines = done.stderr.splitlines()
    first = lines.index("Traceback (most recent call last):")
    assert lines[first + 1].strip() == 'File "broken.py", line 5, in <module>'
    assert "KeyError: 'mine'" in lines[first + 1 : first + 7]
    assert "runpy" not in done.stderr and "accel_tp_ddp/plugin" not in done.stderr
    assert done.returncode == 1 and "accel_tp_ddp.launch: rank" in lines[-1] and "failed first" in lines[-1]


@cache
def usage(*args):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PARALLELISM_CONFIG_")}
    command = [sys.executable, "-m", "accel_tp_ddp.launch", *args]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(
    "args, said",
    [
        (("missing.py",), "there is no file 'missing.py'. Give the path of a script, or `-m` and a module."),
        (("--tp_size", "two", "README.md"), "tp_size (from the environment variable PARALLELISM_CONFIG_TP_SIZE) is"),
        (("--num_processes", "2", "--no_python", "x.py"), "a program that is no Python"),
        (("--config_file", "no.yaml", "x.py"), "--config_file no.yaml cannot be read: FileNotFoundError"),
        (("--config_file", "README.md", "x.py"), "--config_file README.md cannot be read"),
        (("--num_processes", "2", "--cpu", "--tpu", "x.py"), "You can only use one of"),
        (("--num_processes", "2", "--nonsense", "x.py"), "unrecognized arguments: --nonsense"),
        (("-m", "no.such.module"), "there is no module 'no.such.module'"),
        (("--replica_drift", "hide", "--tp_size", "2", "README.md"), 'it has to be "heal" or "raise"'),
    ],
)
def test_bad_input_is_one_line_that_says_what_to_change(args, said):
    code, last = usage(*args)
    assert code != 0 and said in last


# --- what Accelerate ships -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["test_ops", pytest.param("test_sync", marks=pytest.mark.slow)])
def test_accelerates_own_tests_pass_at_tp2_dp2(script, tmp_path):
    launch(tmp_path, TP2_DP2, SCRIPTS / "shipped.py", script)


@pytest.mark.parametrize(
    "script", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("test_script", "test_sync")), "test_ops"]
)
def test_accelerates_own_tests_pass_with_the_plugin_at_tp_size_1(script, tmp_path):
    config = YAML.format(processes=2) + SIZES.format(tp=1, dp=2)
    launch(tmp_path, config, SCRIPTS / "shipped.py", script)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["test_script", "test_sync", "test_ops"])
def test_accelerates_own_tests_pass_with_the_package_imported(script, tmp_path):
    code = (
        f"import accel_tp_ddp, runpy; runpy.run_module('accelerate.test_utils.scripts.{script}', run_name='__main__')"
    )
    (tmp_path / "imported.py").write_text(code)
    launch(tmp_path, YAML.format(processes=2), tmp_path / "imported.py")


def test_under_the_launcher_the_view_holds_from_the_process_group_on(tmp_path):
    done = launch(tmp_path, TP2_DP2, "-m", "accel_tp_ddp.launch", SCRIPTS / "counting.py", tmp_path)
    assert done.returncode == 0
    for rank in range(4):
        found = json.loads(Path(tmp_path, f"{rank}.json").read_text())
        replica = rank // 2
        assert found == {
            "state": [2, replica, rank == 0],
            "arguments": [2, replica, rank == 0],
            "gathered": [rank % 2, 2 + rank % 2],
            "after": [2, replica],
        }
