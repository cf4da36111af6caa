"""Tensor parallelism inside plain DistributedDataParallel, for Hugging Face Accelerate."""

from .checkpoint.background import wait_for_save
from .checkpoint.export import full_gradients, full_state_dict
from .checkpoint.load import load_state
from .core.errors import CheckpointError, PlanError
from .core.shard import ShardInfo
from .model.parallelize import localize, parallelize
from .plans.plan import Plan, resolve_plan
from .plugin import TensorParallelDDPPlugin
from .styles import Style, register_style
from .training.full_tensor_step import register_whole_step
from .training.gradients import grad_scaler

__version__ = "0.1.0"
__all__ = [
    "CheckpointError",
    "Plan",
    "PlanError",
    "ShardInfo",
    "Style",
    "TensorParallelDDPPlugin",
    "full_gradients",
    "full_state_dict",
    "grad_scaler",
    "load_state",
    "localize",
    "parallelize",
    "register_style",
    "register_whole_step",
    "resolve_plan",
    "wait_for_save",
]
