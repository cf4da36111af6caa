"""What this package says while something runs."""

import logging
from contextlib import contextmanager


class Lines(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


@contextmanager
def heard():
    """The warnings of this package, as they come."""
    handler, logger = Lines(), logging.getLogger("accel_tp_ddp")
    logger.addHandler(handler)
    try:
        yield handler.lines
    finally:
        logger.removeHandler(handler)
