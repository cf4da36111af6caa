"""How collectives are checked: examples that are the same on all ranks, one verdict for all, and as strict as NCCL."""

from __future__ import annotations

import torch
import torch.distributed as dist
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from accel_tp_ddp.core.collectives import copy_to_tp, reduce_from_tp
from accel_tp_ddp.tools.tally import collective_name

EXAMPLES = 25
TOLERANCE = 1e-12  # double precision; a sum, slice or factor that is wrong is off by far more

same_on_all_ranks = settings(
    max_examples=EXAMPLES,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),  # they look at the clock, which the ranks do not share
)
LAYOUTS = ("contiguous", "transposed", "strided", "expanded")


class CollectiveCalls(TorchDispatchMode):
    """Each collective within, as (name of torch.distributed's function, data type and number of elements sent)."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[str, torch.dtype, int]] = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation.namespace == "c10d":
            name = collective_name(operation.overloadpacket.__name__)
            sent = self.tensors(args)
            self.look_at(name, sent)
            self.calls.append((name, sent[-1].dtype, sum(tensor.numel() for tensor in sent[self.received(name) :])))
        return operation(*args, **kwargs or {})

    @staticmethod
    def tensors(args) -> list[torch.Tensor]:
        flat = [each for arg in args for each in (arg if isinstance(arg, (list, tuple)) else (arg,))]
        return [each for each in flat if isinstance(each, torch.Tensor)]

    @staticmethod
    def received(name: str) -> int:
        """How many tensors stand before those that are sent."""
        return 1 if name in ("all_gather_into_tensor", "reduce_scatter_tensor") else 0

    def look_at(self, name: str, tensors: list[torch.Tensor]) -> None:
        """What a collective is about to be given."""

    @property
    def sizes(self) -> list[tuple[str, int]]:
        return [(name, size) for name, _, size in self.calls]


class AsStrictAsNCCL(CollectiveCalls):
    """gloo takes tensors that are not contiguous, NCCL refuses them; and a result in a copy of one is lost."""

    def look_at(self, name, tensors):
        for tensor in tensors:
            assert tensor.is_contiguous(), f"{name} of strides {tensor.stride()}"


def tp_mesh(tp):
    world = dist.get_world_size()
    if tp == world:
        return init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))
    return init_device_mesh("cpu", (world // tp, tp), mesh_dim_names=("dp_replicate", "tp"))["tp"]


def verdict(errors):
    """Raise on all ranks if any error on any rank is too large."""
    worst = torch.tensor([errors[name] for name in sorted(errors)], dtype=torch.float64).nan_to_num(torch.inf)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    wrong = {name: error for name, error in zip(sorted(errors), worst.tolist()) if not error <= TOLERANCE}
    assert not wrong, f"off by more than {TOLERANCE}: {wrong}"


def error(actual, expected):
    if actual is None or actual.shape != expected.shape or actual.dtype != expected.dtype:
        return float("inf")
    return (actual - expected).abs().max().item() if expected.numel() else 0.0


def laid_out(values, layout):
    """A tensor of the same values (for "expanded": of the first row's) that lies otherwise in memory."""
    if layout == "transposed":
        return values.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "strided":
        wide = values.new_zeros(*values.shape[:-1], 2 * values.shape[-1])
        wide[..., ::2] = values
        return wide[..., ::2]
    if layout == "expanded":
        return values[:1].expand_as(values)
    return values.clone()


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def normal(shape, generator, dtype=torch.float64):
    return torch.randn(shape, generator=generator, dtype=dtype)


@st.composite
def shapes(draw, tp):
    """A shape, one of its dimensions, how the ranks share that (uneven, empty parts too), a layout, and a seed."""
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    dim = draw(st.integers(-len(shape), len(shape) - 1))
    sizes = draw(st.lists(st.integers(0, 4), min_size=tp, max_size=tp))
    assume(sum(sizes))
    shape[dim] = sum(sizes)
    return tuple(shape), dim, tuple(sizes), draw(st.sampled_from(LAYOUTS)), draw(st.integers(0, 2**31))


def check_copy_to_tp(tp):
    mesh = tp_mesh(tp)
    rank = mesh.get_local_rank()

    @same_on_all_ranks
    @given(shapes(tp), st.integers(1, 3), st.sampled_from(LAYOUTS))
    def holds(example, uses, grad_layout):
        shape, _, _, layout, seed = example
        generator = seeded(seed)
        x = laid_out(normal(shape, generator), layout).requires_grad_()
        weights = [[laid_out(normal(shape, generator), grad_layout) for _ in range(uses)] for _ in range(tp)]
        (copy,) = copy_to_tp(mesh, x)
        values_are_equal = torch.equal(copy, x)
        sum((copy.sin() * weight).sum() for weight in weights[rank]).backward()
        plain = x.detach().clone().requires_grad_()
        sum((plain.sin() * weight).sum() for of_rank in weights for weight in of_rank).backward()
        verdict({"forward": 0.0 if values_are_equal else 1.0, "gradient": error(x.grad, plain.grad)})

    holds()


def check_reduce_from_tp(tp):
    mesh = tp_mesh(tp)
    rank = mesh.get_local_rank()

    @same_on_all_ranks
    @given(shapes(tp))
    def holds(example):
        shape, _, _, layout, seed = example
        generator = seeded(seed)
        parts = [laid_out(normal(shape, generator), layout) for _ in range(tp)]
        weight = normal(shape, generator)
        x = parts[rank].clone(memory_format=torch.preserve_format).requires_grad_()
        before = x.detach().clone()
        total = reduce_from_tp(mesh, x)
        (total.sin() * weight).sum().backward()
        plain = [part.clone().requires_grad_() for part in parts]
        (sum(plain).sin() * weight).sum().backward()
        verdict(
            {
                "forward": error(total.detach(), sum(parts)),
                "gradient": error(x.grad, plain[rank].grad),
                "input unchanged": error(x.detach(), before),
            }
        )

    holds()


def run_check(check, tp):
    with AsStrictAsNCCL():
        check(tp)
