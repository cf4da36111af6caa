"""A sharded model beside the unsharded one in the same process, and how their gradients are compared."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from accel_tp_ddp import TensorParallelDDPPlugin, full_gradients, localize, parallelize

from .compare import assert_tensors_close
from .models import VOCABULARY

TOLERANCE = 2e-5  # relative, of each gradient's norm
FLOOR = 1e-5  # gradients smaller than that are rounding noise around zero, as of a key's bias
SOURCES = ("plan", "torch_styles", "torch_parallelized")
MLP_PLAN = {"up": "colwise", "down": "rowwise"}


class MLP(nn.Module):
    """The smallest model there is to shard. `head` is replicated."""

    def __init__(self, features: int = 8, repeats: int = 1, direct: bool = False):
        super().__init__()
        self.up = nn.Linear(features, 2 * features)
        self.down = nn.Linear(2 * features, features)
        self.head = nn.Linear(features, 3)
        self.repeats = repeats
        self.direct = direct

    def forward(self, x: Tensor) -> Tensor:
        up, down = (self.up.forward, self.down.forward) if self.direct else (self.up, self.down)
        for _ in range(self.repeats):
            x = x + down(torch.tanh(up(x)))
        return self.head(x)


def build_mlp(seed: int = 0, **options: Any) -> MLP:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MLP(**options)


def accelerator_for(tp: int | None, plan: Any = "auto", **options: Any) -> Accelerator:
    """With the plugin, or (None) without."""
    if tp is None:
        return Accelerator(**options)
    return Accelerator(parallelism_config=TensorParallelDDPPlugin(tp_size=tp, tp_plan=plan), **options)


def tp_mesh(tp: int | None = None) -> DeviceMesh:
    tp = tp or dist.get_world_size()
    return init_device_mesh("cpu", (dist.get_world_size() // tp, tp), mesh_dim_names=("dp_replicate", "tp"))["tp"]


def torch_plan(model: nn.Module) -> dict[str, ParallelStyle]:
    """torch's own styles for the linear layers of a llama's decoder."""
    styles = {"q_proj": ColwiseParallel, "k_proj": ColwiseParallel, "v_proj": ColwiseParallel}
    styles |= {"o_proj": RowwiseParallel, "gate_proj": ColwiseParallel, "up_proj": ColwiseParallel}
    styles |= {"down_proj": RowwiseParallel}
    return {name: styles[leaf]() for name, _ in model.named_modules() if (leaf := name.rpartition(".")[2]) in styles}


def shard(model: nn.Module, mesh: DeviceMesh, source: str = "plan", plan: Any = "auto") -> nn.Module:
    """By this package's styles, by torch's styles in a plan, or by torch alone and then localized."""
    if source == "plan":
        return parallelize(model, mesh, plan)
    if source == "torch_styles":
        return parallelize(model, mesh, torch_plan(model))
    return localize(parallelize_module(model, mesh, torch_plan(model)))


def token_batch(seed: int = 3, samples: int = 3, length: int = 10) -> dict[str, Tensor]:
    """Ids over the whole vocabulary, its first and its last among them."""
    ids = torch.randint(0, VOCABULARY, (samples, length), generator=torch.Generator().manual_seed(seed))
    ids[0, :2] = torch.tensor([0, VOCABULARY - 1])
    return {"input_ids": ids, "labels": ids.clone()}


def full_backward(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The full gradients of one forward and backward, of a sharded model or of an unsharded one."""
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: grad.clone() for name, grad in full_gradients(model).items()}


def assert_gradients_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert_tensors_close(actual, expected, TOLERANCE, FLOOR)


def assert_right_gradients(model: nn.Module, reference: nn.Module, batch: dict[str, Tensor]) -> None:
    assert_gradients_close(full_backward(model, batch), full_backward(reference, batch))


def full_gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: grad.clone() for name, grad in full_gradients(model).items()}
