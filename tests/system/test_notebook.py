"""recipes/notebook.ipynb: its code cells run from top to bottom, as one program, with real forked ranks."""

import json
import subprocess
import sys
from pathlib import Path

from ..helpers.launched import user_environment

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "recipes" / "notebook.ipynb"


def test_the_notebook_runs_and_its_losses_are_those_of_plain_ddp(tmp_path):
    notebook = json.loads(NOTEBOOK.read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(not cell.get("outputs") for cell in notebook["cells"]), "it is kept without outputs"
    (tmp_path / "cells.py").write_text("\n\n".join(cells))
    environment = user_environment(TMPDIR=str(tmp_path), HF_HUB_OFFLINE="1")
    command = [sys.executable, "cells.py"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]
    assert done.stdout.count("plain DDP on 2 ranks") == 8 and "loaded without the plugin" in done.stdout
    assert "16 of 21 parameters sharded" in done.stdout, "two ranks a replica, or it shows nothing"
