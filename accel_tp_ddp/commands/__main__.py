"""The command line: `accel-tp-ddp COMMAND ...`, or `python -m accel_tp_ddp.commands COMMAND ...`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from .frame import run
from .merge import Merge

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    return run([Merge()], argv)


if __name__ == "__main__":
    sys.exit(main())
