"""Programs that are installed, unchanged, under plain DDP on 2 ranks and at tp 2 x dp 2: `benchmarks.programs`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.programs.catalog import PROGRAMS
from benchmarks.programs.run import missing

ROOT = Path(__file__).parents[2]
#: By `accelerate launch` itself, in the ordinary run of the tests.
QUICK = "trl rloo"
INSTALLED = [program for program in PROGRAMS if not program.is_file]


def rows_of(name, folder, *options):
    """The rows of the table that it prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "benchmarks.programs", "--only", name, "--keep", str(folder), *options]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-8000:]
    return [[cell.strip() for cell in line.split("|")] for line in done.stdout.splitlines()[2:]]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("program", INSTALLED, ids=lambda program: program.name)
def test_an_installed_program_does_what_it_does_under_plain_ddp(program, tmp_path):
    if reason := missing(program, None):
        pytest.skip(reason)
    ((_, name, compared, result, _),) = rows_of(program.name, tmp_path)
    assert (name, result) == (program.name, "equal") and compared


@pytest.mark.timeout(600)
def test_a_program_started_by_the_launcher_does_what_it_does_under_plain_ddp(tmp_path):
    pytest.importorskip("trl")
    ((_, name, compared, result, _),) = rows_of(QUICK, tmp_path, "--launcher")
    assert (name, result) == (QUICK, "equal")
    assert "3 losses, 3 rates, 3 norms, 4 logs" in compared and "tensors" in compared


def test_a_difference_between_two_runs_is_seen(tmp_path):
    """The comparison has teeth: each kind of difference, one at a time."""
    import copy

    import torch
    from safetensors.torch import save_file

    from benchmarks.programs.compare import DOUBLE_SCALE, Run, differences

    record = {
        "losses": [2.5, 2.0],
        "rates": [[0.01], [0.005]],
        "norms": [1.5, 1.25],
        "logs": [{"tokens": 656, "x": 0.5}],
    }
    record["logs"] = [{"tokens": 656, "x": 0.5}]
    record |= {"prints": ["epoch 0: {'accuracy': 0.5, 'rows': 13}"], "messages": [], "tracked": []}
    for name, tensor in (("plain", torch.ones(4, 2)), ("shard", torch.ones(2, 2)), ("other", torch.zeros(4, 2))):
        save_file({"weight": tensor}, tmp_path / f"{name}.safetensors")
    files = {"out/model.safetensors": tmp_path / "plain.safetensors"}
    plain = Run([record, copy.deepcopy(record)], files)

    def seen(change=None, files=files, scale=1.0):
        records = [copy.deepcopy(record) for _ in range(4)]
        if change:
            change(records)
        return differences(Run(records, files), plain, scale=scale)[1]

    assert seen() == []
    assert seen(lambda r: r[3]["losses"].__setitem__(1, 2.001)) == ["rank 3 losses[1]: 2.001 for 2.0"]
    assert seen(lambda r: r[1]["rates"].__setitem__(0, [0.010003])) == ["rank 1 rates[0][0]: 0.010003 for 0.01"]
    assert seen(lambda r: r[0]["norms"].pop()) == ["rank 0 norms: 1 of them for 2"]
    assert seen(lambda r: r[2]["logs"][0].update(tokens=1312)) == ["rank 2 logs[0].tokens: 1312 for 656"]
    assert len(seen(lambda r: r[0]["prints"].__setitem__(0, "epoch 0: {'accuracy': 0.5, 'rows': 25}"))) == 1
    assert seen(files={}) == ["file out/model.safetensors is missing"]
    assert "(2, 2) for (4, 2)" in seen(files={"out/model.safetensors": tmp_path / "shard.safetensors"})[0]
    assert "off by" in seen(files={"out/model.safetensors": tmp_path / "other.safetensors"})[0]

    # In double precision a millionth of it.
    for scale, change in ((1.0, 1e-3), (DOUBLE_SCALE, 1e-9)):
        save_file({"weight": torch.ones(4, 2, dtype=torch.float64) + 1.5 * change}, tmp_path / "off.safetensors")
        off = {"out/model.safetensors": tmp_path / "off.safetensors"}
        assert len(seen(lambda r: r[0]["losses"].__setitem__(0, 2.5 * (1 + change)), off, scale)) == 2
        save_file({"weight": torch.ones(4, 2, dtype=torch.float64) + 0.5 * change}, tmp_path / "off.safetensors")
        assert seen(lambda r: r[0]["losses"].__setitem__(0, 2.5 * (1 + change / 10)), off, scale) == []


def test_double_precision_is_kept_where_a_program_asks_for_single():
    import torch

    from benchmarks.programs.record import Double

    third = torch.ones(2, dtype=torch.float64) / 3
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(third.clone())
    with Double():
        asked = {
            "float": third.float(),
            "to": third.to(torch.float32),
            "to, by name": third.to(dtype=torch.float32),
            "softmax": torch.softmax(third.log(), -1, dtype=torch.float32) * 2 / 3,
            "zeros": torch.zeros(2, dtype=torch.float32) + third,
            "module": module.to(torch.float32).weight,
        }
    for name, tensor in asked.items():
        assert torch.equal(tensor, third), name
    assert third.float().dtype == torch.float32 and torch.zeros(2, dtype=torch.float32).dtype == torch.float32
