"""`accelerate launch ... -m accel_tp_ddp.doctor`: whether the ranks of this launch line see each other."""

import sys

from .tools.doctor import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
