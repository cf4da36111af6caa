"""Each collective and its dual against the function without tensor parallelism, in double precision.

Hypothesis makes the examples on the ranks: derandomized, so the same on all of them, and the verdict of an example is
shared, so the ranks stay in step where it fails on one only.
"""

from __future__ import annotations

import math
import warnings

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.testing._internal.distributed.fake_pg import FakeStore

from accel_tp_ddp.core.collectives import (
    add_share,
    copy_to_tp,
    gather_from_tp,
    gather_to_tp,
    reduce_from_tp,
    scatter_to_tp,
    split_from_tp,
)
from accel_tp_ddp.core.layout import Layout, Piece, Shared
from accel_tp_ddp.core.shard import ShardInfo

from ..helpers.collectives import (
    LAYOUTS,
    CollectiveCalls,
    check_copy_to_tp,
    check_reduce_from_tp,
    error,
    laid_out,
    normal,
    run_check,
    same_on_all_ranks,
    seeded,
    shapes,
    tp_mesh,
    verdict,
)
from ..helpers.memory import PeakBytes
from ..helpers.ranks import run_on_ranks

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
WANTED = (("x", "up", "down"), ("up", "down"), ("x",), ("up",), ("down",), ("x", "down"))


MESHES = pytest.mark.parametrize(
    "world, tp",
    [(2, 1), (4, 2), (3, 3), (4, 4)],
    ids=["2 meshes of 1", "2 meshes of 2", "one mesh of 3", "one mesh of 4"],
)


def check_gather_from_tp(tp):
    mesh = tp_mesh(tp)
    rank = mesh.get_local_rank()

    @same_on_all_ranks
    @given(shapes(tp), st.sampled_from(LAYOUTS))
    def holds(example, grad_layout):
        shape, dim, sizes, layout, seed = example
        generator = seeded(seed)
        full = normal(shape, generator)
        weight = laid_out(normal(shape, generator), grad_layout)
        x = laid_out(full.split(sizes, dim)[rank], layout if layout != "expanded" else "contiguous").requires_grad_()
        gathered = gather_from_tp(mesh, x, dim, sizes)
        (gathered.sin() * weight).sum().backward()
        plain = full.clone().requires_grad_()
        (plain.sin() * weight).sum().backward()
        verdict(
            {"forward": error(gathered.detach(), full), "gradient": error(x.grad, plain.grad.split(sizes, dim)[rank])}
        )

    holds()


def check_scatter_to_tp(tp):
    mesh = tp_mesh(tp)
    rank = mesh.get_local_rank()

    @same_on_all_ranks
    @given(shapes(tp), st.sampled_from(LAYOUTS))
    def holds(example, grad_layout):
        shape, dim, sizes, layout, seed = example
        generator = seeded(seed)
        x = laid_out(normal(shape, generator), layout).requires_grad_()
        weight = normal(shape, generator)
        part = scatter_to_tp(mesh, x, dim, sizes)
        own = weight.split(sizes, dim)[rank]
        (part.sin() * (laid_out(own, grad_layout) if grad_layout != "expanded" else own)).sum().backward()
        plain = x.detach().clone().requires_grad_()
        (plain.sin() * weight).sum().backward()
        expected = x.detach().split(sizes, dim)[rank]
        verdict({"forward": error(part.detach(), expected), "gradient": error(x.grad, plain.grad)})

    holds()


def check_gather_to_tp(tp):
    mesh = tp_mesh(tp)
    rank = mesh.get_local_rank()

    @same_on_all_ranks
    @given(shapes(tp), st.sampled_from(LAYOUTS))
    def holds(example, grad_layout):
        shape, dim, sizes, layout, seed = example
        full = normal(shape, seeded(seed))
        weights = [normal(shape, seeded(seed + 1 + each)) for each in range(tp)]  # each rank computes another term
        own = laid_out(full.split(sizes, dim)[rank], layout if layout != "expanded" else "contiguous")
        x = own.requires_grad_()
        gathered = gather_to_tp(mesh, x, dim, sizes)
        weight = laid_out(weights[rank], grad_layout) if grad_layout != "expanded" else weights[rank]
        (gathered.sin() * weight).sum().backward()
        plain = full.clone().requires_grad_()
        (plain.sin() * sum(weights)).sum().backward()
        verdict(
            {"forward": error(gathered.detach(), full), "gradient": error(x.grad, plain.grad.split(sizes, dim)[rank])}
        )

    holds()


def check_split_from_tp(tp):
    mesh = tp_mesh(tp)
    rank = mesh.get_local_rank()

    @same_on_all_ranks
    @given(shapes(tp), st.sampled_from(LAYOUTS))
    def holds(example, grad_layout):
        shape, dim, sizes, layout, seed = example
        terms = [normal(shape, seeded(seed + each)) for each in range(tp)]
        x = laid_out(terms[rank], layout if layout != "expanded" else "contiguous").requires_grad_()
        weight = normal(shape, seeded(seed + tp))
        part = split_from_tp(mesh, x, dim, sizes)
        own = weight.split(sizes, dim)[rank]
        (part.sin() * (laid_out(own, grad_layout) if grad_layout != "expanded" else own)).sum().backward()
        plain = sum(terms).requires_grad_()
        (plain.sin() * weight).sum().backward()
        expected = plain.detach().split(sizes, dim)[rank]
        verdict({"forward": error(part.detach(), expected), "gradient": error(x.grad, plain.grad)})

    holds()


def check_a_whole_layer(tp):
    """Column-parallel, then row-parallel, both ways of handing over: the duals fit together."""
    mesh = tp_mesh(tp)
    rank = mesh.get_local_rank()

    @same_on_all_ranks
    @given(shapes(tp), st.booleans(), st.sampled_from(WANTED))
    def holds(example, through_gather, wanted):
        shape, _, sizes, layout, seed = example
        generator = seeded(seed)
        width = sum(sizes)
        x = laid_out(normal((*shape, 3), generator), layout).requires_grad_("x" in wanted)
        up, down = normal((3, width), generator), normal((width, 3), generator)
        own_up = up.split(sizes, 1)[rank].clone().requires_grad_("up" in wanted)
        own_down = down.split(sizes, 0)[rank].clone().requires_grad_("down" in wanted)
        (copy,) = copy_to_tp(mesh, x)
        inner = (copy @ own_up).tanh()
        if through_gather:
            inner = scatter_to_tp(mesh, gather_from_tp(mesh, inner, -1, sizes) * 1.5, -1, sizes)
        output = reduce_from_tp(mesh, inner @ own_down)
        output.square().sum().backward()
        plain = {name: tensor.detach().clone() for name, tensor in (("x", x), ("up", up), ("down", down))}
        for name in wanted:
            plain[name].requires_grad_()
        expected = (plain["x"] @ plain["up"]).tanh() * (1.5 if through_gather else 1.0) @ plain["down"]
        expected.square().sum().backward()
        scale = max(1.0, *(plain[name].grad.abs().max().item() for name in wanted))
        own_parts = {
            "x": (x, lambda grad: grad),
            "up": (own_up, lambda grad: grad.split(sizes, 1)[rank]),
            "down": (own_down, lambda grad: grad.split(sizes, 0)[rank]),
        }
        errors = {"output": error(output.detach(), expected.detach()) / scale}
        for name, (tensor, part) in own_parts.items():
            if name in wanted:
                errors[name] = error(tensor.grad, part(plain[name].grad)) / scale
            else:
                errors[name] = 0.0 if tensor.grad is None else 1.0
        verdict(errors)

    holds()


def whole_numbers(shape, generator, dtype, limit=3):
    """Small enough for sums and products of a few of them to be exact in any of `DTYPES`."""
    return torch.randint(-limit, limit + 1, shape, generator=generator).to(dtype)


def check_every_dtype(tp):
    """On whole numbers nothing is rounded, so half precision has to give the very result, in its own type."""
    mesh = tp_mesh(tp)
    rank = mesh.get_local_rank()

    @same_on_all_ranks
    @given(shapes(tp), st.sampled_from(DTYPES))
    def holds(example, dtype):
        shape, dim, sizes, layout, seed = example
        generator = seeded(seed)
        x = laid_out(whole_numbers(shape, generator, dtype), layout)
        parts = [laid_out(whole_numbers(shape, generator, dtype), layout) for _ in range(tp)]
        weights = [whole_numbers(shape, generator, dtype) for _ in range(tp)]
        own = x.split(sizes, dim)[rank]
        mappings = {
            "copy": (lambda t: copy_to_tp(mesh, t)[0], x, weights[rank], x, sum(weights)),
            "reduce": (lambda t: reduce_from_tp(mesh, t), parts[rank], weights[0], sum(parts), weights[0]),
            "gather": (
                lambda t: gather_from_tp(mesh, t, dim, sizes),
                *(own, weights[0], x, weights[0].split(sizes, dim)[rank]),
            ),
            "split": (
                lambda t: scatter_to_tp(mesh, t, dim, sizes),
                *(x, weights[0].split(sizes, dim)[rank], own, weights[0]),
            ),
        }
        errors = {}
        for name, (mapping, value, weight, output, grad) in mappings.items():
            value = value.detach().clone(memory_format=torch.preserve_format).requires_grad_()
            result = mapping(value)
            result.backward(weight)
            errors[name] = error(result.detach(), output)
            errors[f"{name}, gradient"] = error(value.grad, grad)
        verdict(errors)

    holds()


def check_which_gradients_are_wanted(tp):
    """Several tensors in one copy, of which some want no gradient and some are not used."""
    mesh = tp_mesh(tp)
    rank = mesh.get_local_rank()

    @same_on_all_ranks
    @given(
        st.lists(st.tuples(shapes(tp), st.booleans(), st.booleans(), st.sampled_from(DTYPES)), min_size=1, max_size=4)
    )
    def holds(examples):
        tensors, copies_wanted, grads = [], [], []
        for (shape, _, _, layout, seed), wanted, used, dtype in examples:
            generator = seeded(seed)
            value = laid_out(whole_numbers(shape, generator, dtype), layout)
            tensors.append(value.requires_grad_(wanted))
            weights = [whole_numbers(shape, generator, dtype) for _ in range(tp)]
            copies_wanted.append((wanted and used, weights[rank]))
            grads.append(sum(weights) if wanted and used else None)
        copies = copy_to_tp(mesh, *tensors)
        used = [(copy, weight) for copy, (want, weight) in zip(copies, copies_wanted) if want]
        if used:
            torch.autograd.backward(*zip(*used))
        errors = {}
        for index, (tensor, copy, grad) in enumerate(zip(tensors, copies, grads)):
            errors[f"forward {index}"] = error(copy.detach(), tensor.detach())
            if grad is None:
                errors[f"gradient {index}"] = 0.0 if tensor.grad is None else 1.0
            else:
                errors[f"gradient {index}"] = error(tensor.grad, grad)
        verdict(errors)

    holds()


def check_copy_to_tp_in_slots(tp):
    """A tensor that only some ranks share: its gradient is the sum over those."""
    mesh = tp_mesh(tp)
    rank = mesh.get_local_rank()

    @same_on_all_ranks
    @given(shapes(tp), st.sampled_from([n for n in range(1, tp + 1) if tp % n == 0]), st.booleans())
    def holds(example, slots, beside_another):
        shape, _, _, layout, seed = example
        generator = seeded(seed)
        own = rank * slots // tp
        shared = [laid_out(normal(shape, generator), layout) for _ in range(slots)]
        whole = normal((3,), generator)
        weights = [normal(shape, generator) for _ in range(tp)]

        def loss(of_rank, x, y):
            return (x.sin() * weights[of_rank]).sum() * (y.sum() if beside_another else 1)

        x, y = shared[own].clone().requires_grad_(), whole.clone().requires_grad_()
        tensors = (x, y) if beside_another else (x,)
        piece = Piece(own, own * shape[0], 0, shape[0])
        pieces = Shared(0, slots * shape[0], (piece,))
        copies = copy_to_tp(mesh, *tensors, shared=[pieces, None][: len(tensors)])
        loss(rank, copies[0], copies[-1]).backward()
        plain, plain_y = [each.clone().requires_grad_() for each in shared], whole.clone().requires_grad_()
        sum(loss(other, plain[other * slots // tp], plain_y) for other in range(tp)).backward()
        errors = {"gradient of the shared": error(x.grad, plain[own].grad)}
        if beside_another:
            errors["gradient of the other"] = error(y.grad, plain_y.grad)
        verdict(errors)

    holds()


def check_add_share(tp):
    mesh = tp_mesh(tp)
    rank = mesh.get_local_rank()

    @same_on_all_ranks
    @given(shapes(tp))
    def holds(example):
        shape, _, _, layout, seed = example
        generator = seeded(seed)
        parts = [normal(shape, generator) for _ in range(tp)]
        term, weight = laid_out(normal(shape, generator), layout), normal(shape, generator)
        x = term.clone(memory_format=torch.preserve_format).requires_grad_()
        total = reduce_from_tp(mesh, parts[rank] + add_share(mesh, x))
        (total.sin() * weight).sum().backward()
        plain = term.clone().requires_grad_()
        expected = sum(parts) + plain
        (expected.sin() * weight).sum().backward()
        verdict({"forward": error(total.detach(), expected.detach()), "gradient": error(x.grad, plain.grad)})

    holds()


def check_gradcheck(tp):
    """torch's own check by finite differences. It varies a tensor on all ranks in step, so each function that it is
    given takes replicated tensors and gives a replicated result, by way of the mapping and its dual."""
    mesh = tp_mesh(tp)
    rank = mesh.get_local_rank()
    sizes = tuple(1 + index % 2 for index in range(tp))  # uneven
    for layout in ("contiguous", "transposed", "strided"):
        generator = seeded(tp)
        x = laid_out(normal((2, sum(sizes)), generator), layout).requires_grad_()
        y = normal((3,), generator).requires_grad_()
        factors = [normal(x.shape, generator) for _ in range(tp)]
        own = factors[0].split(sizes, 1)[rank]

        def copy_then_reduce(x, y):
            a, b = copy_to_tp(mesh, x, y)
            return reduce_from_tp(mesh, (a * factors[rank]).sin() * b.sum() * (rank + 1))

        def split_then_gather(x, y):
            return gather_from_tp(mesh, (scatter_to_tp(mesh, x, 1, sizes) * own).sin(), 1, sizes) * y.sum()

        def split_then_reduce(x, y):
            part = (scatter_to_tp(mesh, x, 1, sizes) * own).sin()
            return reduce_from_tp(mesh, part.sum(1)) * y.sum()

        def copy_then_gather(x, y):
            (a,) = copy_to_tp(mesh, x)
            return gather_from_tp(mesh, (a * factors[0]).split(sizes, 1)[rank].cos(), 1, sizes) * y.sum()

        def share_then_reduce(x, y):
            return reduce_from_tp(mesh, add_share(mesh, x * factors[0]) + factors[rank]).sin() * y.sum()

        failures = {}
        for function in (copy_then_reduce, split_then_gather, split_then_reduce, copy_then_gather, share_then_reduce):
            right = torch.autograd.gradcheck(function, (x, y), raise_exception=False)
            failures[function.__name__] = 0.0 if right else 1.0
        verdict(failures)


CHECKS = (
    check_copy_to_tp,
    check_reduce_from_tp,
    check_gather_from_tp,
    check_scatter_to_tp,
    check_gather_to_tp,
    check_split_from_tp,
    check_a_whole_layer,
    check_every_dtype,
    check_which_gradients_are_wanted,
    check_copy_to_tp_in_slots,
    check_add_share,
    check_gradcheck,
)


@MESHES
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_forward_and_backward_are_those_of_the_unsharded_function(check, world, tp):
    run_on_ranks(run_check, world, check, tp)


# --- one node for several tensors ------------------------------------------------------------------------------------


def count_all_reduces(action):
    with CollectiveCalls() as recorded:
        action()
    return [(dtype, size) for name, dtype, size in recorded.calls if name == "all_reduce"]


def copies_of_several_dtypes():
    mesh = tp_mesh(dist.get_world_size())
    rank, world = mesh.get_local_rank(), mesh.size()
    dtypes = [torch.float64, torch.bfloat16, torch.float64, torch.float32, torch.bfloat16]
    shapes_ = [(2, 3), (4,), (), (3, 0, 2), (1, 5)]
    tensors = [torch.ones(shape, dtype=dtype, requires_grad=True) for shape, dtype in zip(shapes_, dtypes)]
    copies = copy_to_tp(mesh, *tensors)
    loss = sum(copy.double().sum() * (index + 1) * (rank + 1) for index, copy in enumerate(copies))
    calls = count_all_reduces(loss.backward)
    for index, (tensor, copy) in enumerate(zip(tensors, copies)):
        assert copy.dtype == tensor.dtype and copy.shape == tensor.shape
        expected = torch.full_like(tensor, (index + 1) * sum(range(1, world + 1)))
        assert tensor.grad.dtype == tensor.dtype and torch.equal(tensor.grad, expected), index
    return calls


def test_a_copy_of_several_tensors_takes_one_all_reduce_per_dtype():
    for calls in run_on_ranks(copies_of_several_dtypes, 2):
        assert sorted(str(dtype) for dtype, _ in calls) == ["torch.bfloat16", "torch.float32", "torch.float64"]
        assert sorted(numel for _, numel in calls) == [0, 7, 9]


def copies_of_which_some_are_not_used():
    mesh = tp_mesh(dist.get_world_size())
    rank, world = mesh.get_local_rank(), mesh.size()
    used, unused, frozen = torch.ones(3, requires_grad=True), torch.ones(4, requires_grad=True), torch.ones(5)
    integers = torch.arange(3)
    copies = copy_to_tp(mesh, frozen, used, unused, integers)
    assert copies[0] is frozen and copies[3] is integers
    calls = count_all_reduces((copies[1] * copies[0][:3] * (rank + 1)).sum().backward)
    assert [numel for _, numel in calls] == [3]
    assert torch.equal(used.grad, torch.full((3,), float(sum(range(1, world + 1)))))
    assert unused.grad is None and frozen.grad is None


def copies_without_gradients():
    mesh = tp_mesh(dist.get_world_size())
    frozen, wanted = torch.ones(3), torch.ones(3, requires_grad=True)
    assert copy_to_tp(mesh, frozen)[0] is frozen
    with torch.no_grad():
        assert copy_to_tp(mesh, wanted)[0] is wanted
    with torch.inference_mode():
        assert copy_to_tp(mesh, wanted)[0] is wanted
    assert copy_to_tp(mesh) == ()
    for outcome in (
        reduce_from_tp(mesh, frozen),
        gather_from_tp(mesh, frozen, 0, [3] * mesh.size()),
        scatter_to_tp(mesh, frozen, 0, [3, *[0] * (mesh.size() - 1)]),
    ):
        assert not outcome.requires_grad
    with torch.no_grad():
        assert torch.equal(reduce_from_tp(mesh, wanted), torch.full((3,), float(mesh.size())))
        assert torch.equal(gather_from_tp(mesh, wanted, -1, [3] * mesh.size()), torch.ones(3 * mesh.size()))


def accumulated_backwards():
    mesh = tp_mesh(dist.get_world_size())
    x = torch.ones(3, dtype=torch.float64, requires_grad=True)
    for step in range(1, 4):
        (copy,) = copy_to_tp(mesh, x)
        (copy * 2).sum().backward()
        assert torch.equal(x.grad, torch.full_like(x, 2.0 * mesh.size() * step)), "what came before is summed again"


def test_a_copy_that_nobody_uses_and_one_without_gradient_add_nothing():
    run_on_ranks(copies_of_which_some_are_not_used, 2)


def test_without_gradients_a_copy_is_the_tensor_itself():
    run_on_ranks(copies_without_gradients, 2)


def test_the_sum_over_ranks_covers_the_new_gradient_only():
    run_on_ranks(accumulated_backwards, 2)


# --- gradients that others hold as well ------------------------------------------------------------------------------


def gradients_shared_with_another_consumer():
    """z = mapping(x) + y: y's gradient is the very tensor that the mapping's backward is given."""
    mesh = tp_mesh(dist.get_world_size())
    rank, world = mesh.get_local_rank(), mesh.size()
    sizes = [2] * world
    weight = torch.arange(1.0, 2 * world + 1)  # the same on all ranks
    total = float(sum(range(1, world + 1)))
    mappings = {
        "copy": (lambda x: copy_to_tp(mesh, x)[0], 2 * world, weight * total),
        "reduce": (lambda x: reduce_from_tp(mesh, x), 2 * world, weight * (rank + 1)),
        "gather": (lambda x: gather_from_tp(mesh, x, 0, sizes), 2, weight[2 * rank : 2 * rank + 2] * (rank + 1)),
    }
    for name, (mapping, length, expected) in mappings.items():
        for x_first in (True, False):
            x, y = torch.ones(length, requires_grad=True), torch.ones(2 * world, requires_grad=True)
            z = mapping(x) + y if x_first else y + mapping(x)
            (z * weight * (rank + 1)).sum().backward()
            assert torch.equal(y.grad, weight * (rank + 1)), f"{name}: the other consumer's gradient has changed"
            assert torch.equal(x.grad, expected), name
            x.grad.mul_(0)  # as clipping does
            assert torch.equal(y.grad, weight * (rank + 1)), f"{name}: both gradients lie in the same memory"
    x, y = torch.ones(2 * world, requires_grad=True), torch.ones(2, requires_grad=True)
    own = weight[2 * rank : 2 * rank + 2]
    ((scatter_to_tp(mesh, x, 0, sizes) + y) * own).sum().backward()
    assert torch.equal(x.grad, weight) and torch.equal(y.grad, own)


def outputs_changed_in_place():
    """What leaves the region may be written into (`x += residual`, an in-place activation); the input stays."""
    mesh = tp_mesh(dist.get_world_size())
    world = mesh.size()
    for name, mapping in {
        "reduce": lambda x: reduce_from_tp(mesh, x),
        "gather": lambda x: gather_from_tp(mesh, x, 0, [2] * world),
        "reduce, and a slice": lambda x: split_from_tp(mesh, x, 0, [1] * 2 + [0] * (world - 2)),
    }.items():
        x = torch.ones(2, requires_grad=True)
        inner = x * 1
        output = mapping(inner)
        value = output[0].item()
        output.add_(1).square().sum().backward()
        assert torch.equal(inner.detach(), torch.ones(2)), f"{name} has changed its input"
        assert torch.equal(x.grad, torch.full((2,), 2 * (value + 1))), name
    for name, mapping in {
        "copy": lambda x: copy_to_tp(mesh, x)[0],
        "split": lambda x: scatter_to_tp(mesh, x, 0, [2] * world),
    }.items():  # what enters it may be a view, and then autograd says so
        x = torch.ones(2 * world, requires_grad=True)
        inner = x * 1
        try:
            mapping(inner).add_(1)
            refused = False
        except RuntimeError as error:
            refused = "modified inplace" in str(error)
        assert refused or torch.equal(inner.detach(), torch.ones(2 * world)), f"{name} has changed its input"


def test_a_gradient_that_another_consumer_holds_is_not_corrupted():
    run_on_ranks(gradients_shared_with_another_consumer, 2)


def test_an_output_changed_in_place_leaves_the_input_as_it_was():
    run_on_ranks(outputs_changed_in_place, 2)


# --- memory ----------------------------------------------------------------------------------------------------------


def gathering(rank, dim, sizes):
    """Peak bytes of a gather, forward, and of a scatter, backward, and the collectives that they are.

    On one rank of a fake group: gloo's threads let go of a tensor a moment after the rank does.
    """
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=2)
    try:
        return gathered_on_a_rank(tp_mesh(2), dim, sizes)
    finally:
        dist.destroy_process_group()


def gathered_on_a_rank(mesh, dim, sizes):
    shape = [6, 10, 4]
    shape[dim] = sizes[mesh.get_local_rank()]
    own = torch.randn(shape)
    with PeakBytes() as forward, warnings.catch_warnings():
        warnings.simplefilter("error")  # a name that torch is to drop
        gathered = gather_from_tp(mesh, own, dim, sizes)
    full = torch.randn_like(gathered, requires_grad=True)
    grad = torch.randn(shape)
    part = scatter_to_tp(mesh, full, dim, sizes)
    with PeakBytes() as backward:
        part.backward(grad)
    with PeakBytes() as unsharded:
        info = ShardInfo.sharded(mesh, gathered.shape, Layout(dim, ranges_of(sizes)))
        full = info.full_tensor(own)
    # Of the parts of other ranks a fake group knows nothing: they are compared over gloo, above.
    assert full.shape == gathered.shape
    start, size = sum(sizes[: mesh.get_local_rank()]), sizes[mesh.get_local_rank()]
    assert all(torch.equal(each.narrow(dim, start, size), own) for each in (full, gathered))
    modes = (forward, backward, unsharded)
    return [mode.peak for mode in modes], [
        [name for name in mode.operations if name.startswith("c10d")] for mode in modes
    ]


def ranges_of(sizes):
    starts = [sum(sizes[:rank]) for rank in range(len(sizes))]
    return tuple(((start, start + size),) for start, size in zip(starts, sizes))


@pytest.mark.parametrize("dim, sizes", [(0, (3, 3)), (1, (5, 5)), (2, (2, 2)), (-3, (4, 4)), (0, (4, 3)), (2, (3, 1))])
def test_a_gather_takes_its_result_and_at_most_one_copy(dim, sizes):
    shape = [6, 10, 4]
    shape[dim] = sum(sizes)
    result, longest = 4 * math.prod(shape), 4 * math.prod(shape) * max(sizes) // sum(sizes)
    first, even = dim % 3 == 0, len(set(sizes)) == 1
    for rank in range(2):
        ((peaks, names),) = run_on_ranks(gathering, 1, rank, dim % 3, sizes)
        padded = longest if sizes[rank] < max(sizes) else 0  # gone before the copy is made
        expected = result if first and even else 2 * longest + max(padded, result)
        assert peaks == [expected] * 3, rank
        assert names == [["c10d::_allgather_base_"]] * 3
