"""What Accelerate and Trainer need to know of tensor parallelism; the only wing that depends on them throughout."""

from .config import TensorParallelDDPPlugin

# Where pickles look for it, such as the arguments that Trainer saves.
TensorParallelDDPPlugin.__module__ = __name__

__all__ = ["TensorParallelDDPPlugin"]
