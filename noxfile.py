"""The contract tests with the oldest releases that setup.cfg allows, with the pinned ones, and with the newest.

    pip install nox
    nox                              # all three, each in an environment of its own in .nox/, CPU only
    nox -s oldest                    # one of them
    nox -R -s newest -- -k trainer   # again, without installing; what follows goes to pytest

Contract tests are those that show that the package does what it says with some release of the others: it is launched,
trains, clips, gathers, saves, resumes and loads as plain DDP does, and what it overrides is there. The whole suite,
with its faults and cross products, runs with the pinned and the newest releases (`make test`).
"""

from __future__ import annotations

import nox

#: Some 570 tests, of which half run on ranks: a quarter of an hour on two cores.
CONTRACT = (
    "tests/core/test_override.py",
    "tests/plugin/test_upstream.py",
    "tests/plugin/test_overrides.py",
    "tests/system/test_launch.py",
    "tests/plugin/test_prepare.py",
    "tests/plugin/test_gathering.py",
    "tests/plugin/test_trainer.py",
    "tests/plugin/test_trainer_logs.py",
    "tests/plugin/test_trainer_resume.py",
    "tests/plugin/test_trl.py",
    "tests/checkpoint/test_checkpoint.py",
    "tests/checkpoint/test_full_weights.py",
    "tests/plans/test_plan.py",
    "tests/styles/test_full_gradients.py",
)

#: The constraints of each set. torch is the same in all of them, of which pip may know a CPU build: the oldest that
#: setup.cfg allows comes from PyPI with CUDA, and nothing here needs that.
SETS = {
    "oldest": "constraints/oldest.txt",
    "pinned": "constraints.txt",
    "newest": "constraints/torch.txt",
}

nox.options.sessions = [*SETS]
nox.options.error_on_missing_interpreters = True


def contract(session: nox.Session, constraints: str) -> None:
    session.install("-c", constraints, "-e", ".[test]")
    session.run("python", "-m", "pip", "list", "--format=freeze", silent=False)
    session.run("python", "-m", "pytest", *CONTRACT, *session.posargs, env={"OMP_NUM_THREADS": "1"})


@nox.session
def oldest(session: nox.Session) -> None:
    contract(session, SETS["oldest"])


@nox.session
def pinned(session: nox.Session) -> None:
    contract(session, SETS["pinned"])


@nox.session
def newest(session: nox.Session) -> None:
    contract(session, SETS["newest"])
