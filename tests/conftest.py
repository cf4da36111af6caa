"""Every test is CPU-only, offline and single-threaded; the processes of `helpers/ranks.py` end with the session."""

import os

os.environ.update(ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
# Thousands of preparations, injected faults among them that are to show in training: tests/proof is about the proof.
os.environ.setdefault("ACCEL_TP_DDP_PROVE", "never")

import pytest  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402

from .helpers.ranks import close_pools  # noqa: E402


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: a full cross product of which a fixed slice also runs unmarked")


@pytest.fixture
def no_accelerator():
    """Where a simulation may run; a test before may have made one in this process."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session", autouse=True)
def _ranks_end_with_the_session():
    yield
    close_pools()
