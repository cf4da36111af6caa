"""`use_liger_kernel`: the loss of shards in the place of Liger's, which is of the whole head.

Liger's kernels are Triton's, which has an interpreter for CPUs; the fused loss runs in it. Neither is a dependency:

    pip install --no-deps liger-kernel triton
    TRITON_INTERPRET=1 python -m pytest tests/plugin/test_liger.py
"""

import importlib.util
import os

import pytest
import torch

from ..helpers.prepared import plain_and_sharded
from ..helpers.trainer import Case, make_trainer

THERE = all(importlib.util.find_spec(name) for name in ("liger_kernel", "triton"))
# Triton reads the variable when it is imported, which is before a test begins.
pytestmark = pytest.mark.skipif(
    not THERE or os.environ.get("TRITON_INTERPRET") != "1", reason="wants liger-kernel, triton, TRITON_INTERPRET=1"
)
#: What the interpreter can run.
ALONE = {"rms_norm": False, "swiglu": False, "rope": False}


def trained(tp, folder, kept):
    """What Trainer logs, and whether the model has Liger's forward."""
    config = {**ALONE, "fused_linear_cross_entropy": True} if kept else ALONE
    case = Case({"max_steps": 3, "use_liger_kernel": True, "liger_kernel_config": config})
    trainer = make_trainer(tp, folder, case)
    trainer.train()
    logs = [[row["loss"], row["grad_norm"]] for row in trainer.state.log_history if "loss" in row]
    return logs, "liger" in trainer.model.forward.__func__.__module__


@pytest.mark.parametrize("kept", [False, True], ids=["", "kept by the user"])
def test_trainer_with_ligers_kernels_logs_what_it_logs_under_plain_ddp(kept, tmp_path):
    plain, sharded = plain_and_sharded(trained, 2, str(tmp_path), kept)
    assert plain[0][1] and len(plain[0][0]) == 3
    for logs, by_liger in sharded:
        assert torch.allclose(torch.tensor(logs), torch.tensor(plain[0][0]), rtol=1e-4, atol=0)
        assert by_liger == kept
