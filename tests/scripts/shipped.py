"""Run a test script that Accelerate ships: `shipped.py test_sync`, with what it takes to run it at tp x dp.

Its model has two numbers for parameters, so there is nothing to shard: it gets a frozen linear layer and a plan. Each
rank draws data of its own, so peers are given the same.
"""

import importlib.util
import sys

import accelerate.accelerator
import accelerate.test_utils.training as training
from torch import nn

from accel_tp_ddp import TensorParallelDDPPlugin

accelerate.accelerator.ParallelismConfig = TensorParallelDDPPlugin  # also at tp_size=1, which the launcher leaves out
tp_size = TensorParallelDDPPlugin().tp_size
spec = importlib.util.find_spec(f"accelerate.test_utils.scripts.{sys.argv[1]}")
source = open(spec.origin, encoding="utf-8").read()
if tp_size > 1:
    model_init, data_init = training.RegressionModel.__init__, training.RegressionDataset.__init__

    def init_model(self, *args, **kwargs):
        model_init(self, *args, **kwargs)
        self.extra = nn.Linear(4, 4).requires_grad_(False)

    def init_data(self, *args, seed=None, **kwargs):
        data_init(self, *args, seed=0 if seed is None else seed, **kwargs)

    training.RegressionModel.__init__, training.RegressionModel.tp_plan = init_model, {"extra": "colwise"}
    training.RegressionDataset.__init__ = init_data
sys.argv = [spec.origin]
exec(compile(source, spec.origin, "exec"), {"__name__": "__main__", "__file__": spec.origin})
