"""Tensor parallelism inside plain DistributedDataParallel, for Hugging Face Accelerate."""

from .checkpoint.background import wait_for_save
from .checkpoint.load import load_state
from .errors import CheckpointError, PlanError
from .export import full_gradients, full_state_dict
from .gradients import grad_scaler
from .parallelize import localize, parallelize
from .plan import Plan, resolve_plan
from .plugin import TensorParallelDDPPlugin
from .shard import ShardInfo
from .styles import Style, register_style
from .whole_step import register_whole_step

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
