"""`python -m benchmarks.prepare_cost`: sharding a model takes no more memory than one rank's part of one parameter."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
EMBEDDING = 128256 * 4096 * 4 / 2**30  # GiB, the largest parameter of the 8 B model


def test_the_cost_of_preparing_8_b_is_one_part_of_its_largest_parameter():
    command = [sys.executable, "-m", "benchmarks.prepare_cost", "--models", "8 B", "--tp", "2", "--rounds", "1"]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    most, given, left = map(
        float, re.search(r"at most (\S+) GiB beside the (\S+) GiB given, (\S+) GiB", done.stdout).groups()
    )
    assert most <= 1.01 * EMBEDDING / 2 and abs(left - given / 2) < 0.1
