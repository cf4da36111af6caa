"""The environment of a process that a test starts as a user would."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]


def user_environment(**more: str) -> dict[str, str]:
    """This process's, without what a launcher has told it, with this checkout to import and one thread; and `more`."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "PARALLELISM_CONFIG_"))}
    return {**inherited, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}
