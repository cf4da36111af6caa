"""The sharded losses and their gradients are torch's, of full logits in one process."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional

from accel_tp_ddp.core.collectives import copy_to_tp
from accel_tp_ddp.core.layout import chunk_ranges
from accel_tp_ddp.loss import vocab_parallel
from accel_tp_ddp.loss.projection import Chain, LinearProjection
from accel_tp_ddp.loss.vocab_parallel import Vocabulary, cross_entropy, token_statistics

from ..helpers.ranks import run_on_ranks

TOKENS, HIDDEN, VOCABULARY = 21, 16, 131
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}
TP = pytest.mark.parametrize("tp", [2, 4])

CHAINS = {
    "as they are": Chain(),
    "float": Chain((("to", torch.float32),)),
    "scaled": Chain((("mul", 0.25),)),
    "capped": Chain((("div", 3.0), ("tanh",), ("mul", 3.0))),
    "cast, scaled and capped": Chain((("div", 0.5), ("to", torch.float64), ("div", 2.0), ("tanh",), ("mul", 2.0))),
}
CASES = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "smoothed": {"label_smoothing": 0.1},
    "smoothed sum": {"label_smoothing": 0.3, "reduction": "sum"},
    "smoothed none": {"label_smoothing": 0.3, "reduction": "none"},
    "another index to ignore": {"ignore_index": 5},
}


def inputs(dtype, bias=True, scale=2.0):
    """Hidden states, weight, bias and labels; also where all labels of a chunk are another rank's, or ignored."""
    generator = torch.Generator().manual_seed(3)
    hidden, weight, own = (
        (torch.randn(shape, generator=generator, dtype=torch.float64) * scale / HIDDEN**0.25).to(dtype)
        for shape in ((TOKENS, HIDDEN), (VOCABULARY, HIDDEN), (VOCABULARY,))
    )
    labels = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    labels[0], labels[1], labels[8:16], labels[16:19] = VOCABULARY - 1, 0, 2, 5
    return hidden, weight, own if bias else None, labels


def weights_of_tokens(dtype):
    return torch.linspace(0.5, 2.0, TOKENS, dtype=dtype)


def compare(found, expected, tolerance, names):
    errors = {}
    for name, ours, theirs in zip(names, found, expected, strict=True):
        assert (ours is None) == (theirs is None), name
        if ours is not None:
            assert ours.shape == theirs.shape, name
            scale = theirs.double().abs().max().clamp(min=1e-30)
            errors[name] = ((ours.double() - theirs.double()).abs().max() / scale).item()
    return {name: error for name, error in errors.items() if not error <= tolerance}


def sharded(fn, dtype, bias, transposed=False, wanted=(True, True, True)):
    """`fn` of the sharded layer; its value, and the gradients of the full hidden states, weight and bias."""
    tp = dist.get_world_size()
    mesh = init_device_mesh("cpu", (tp,), mesh_dim_names=("tp",))
    hidden, weight, own, labels = inputs(dtype, bias)
    ranges = [span for (span,) in chunk_ranges(VOCABULARY, tp)]
    vocabulary = Vocabulary(mesh, tuple(stop - start for start, stop in ranges))
    part = slice(*ranges[dist.get_rank()])
    hidden.requires_grad_(wanted[0])
    weight = (weight[part].t().contiguous() if transposed else weight[part].clone()).requires_grad_(wanted[1])
    own = own[part].clone().requires_grad_(wanted[2]) if bias else None
    (copy,) = copy_to_tp(mesh, hidden)
    projection = LinearProjection(weight, own, dtype, transposed)
    value = fn(vocabulary, projection, copy, labels)
    total = (value * weights_of_tokens(value.dtype)).sum() if value.ndim else value * 3
    total.backward()
    grads = [None if t is None or t.grad is None else t.grad for t in (hidden, weight, own)]
    if transposed:
        grads[1] = grads[1].t()
    full = [grads[0]]
    for grad in grads[1:]:
        parts = [None] * tp
        dist.all_gather_object(parts, grad)
        full.append(None if grad is None else torch.cat(parts))
    return [value.detach(), *full]


def unsharded(fn, dtype, bias, wanted=(True, True, True)):
    hidden, weight, own, labels = inputs(dtype, bias)
    tensors = [t.requires_grad_(want) if t is not None else None for t, want in zip((hidden, weight, own), wanted)]
    value = fn(functional.linear(*tensors), labels)
    ((value * weights_of_tokens(value.dtype)).sum() if value.ndim else value * 3).backward()
    return [value.detach(), *(None if t is None else t.grad for t in tensors)]


def check(case, chain, dtype, bias, least_rows=8, **options):
    before, vocab_parallel.LEAST_ROWS = vocab_parallel.LEAST_ROWS, least_rows
    kwargs = CASES[case]
    wanted = options.get("wanted", (True, True, True))

    def ours(vocabulary, projection, hidden, labels):
        if least_rows < TOKENS:
            assert len(list(vocabulary.chunks(*hidden.shape))) == 3
        return cross_entropy(vocabulary, projection, hidden, labels, CHAINS[chain], **kwargs)

    try:
        found = sharded(ours, dtype, bias, **options)
    finally:
        vocab_parallel.LEAST_ROWS = before

    def theirs(logits, labels):
        logits = CHAINS[chain](logits)
        return functional.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, **kwargs)

    expected = unsharded(theirs, dtype, bias, wanted)
    tolerance = TOLERANCES[torch.float32 if chain == "float" and dtype == torch.float64 else dtype]
    return compare(found, expected, tolerance, ("loss", "hidden", "weight", "bias"))


def check_all(chain, dtype):
    found = {case: check(case, chain, dtype, True) for case in CASES}
    return {case: wrong for case, wrong in found.items() if wrong}


@TP
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("chain", CHAINS)
def test_the_loss_and_its_gradients_are_those_of_full_logits(chain, dtype, tp):
    for wrong in run_on_ranks(check_all, tp, chain, dtype):
        assert wrong == {}


@TP
def test_one_chunk_a_transposed_weight_and_frozen_tensors_give_the_same(tp):
    for options in (
        {"least_rows": 100, "bias": False},
        {"transposed": True, "bias": True},
        {"wanted": (True, False, False), "bias": True},
        {"wanted": (False, True, False), "bias": True},
        {"wanted": (False, False, True), "bias": True},
    ):
        for case in ("mean", "none"):
            for wrong in run_on_ranks(check, tp, case, "as they are", torch.float64, **options):
                assert not wrong, f"{options} {case}: {wrong}"


# --- statistics of tokens --------------------------------------------------------------------------------------------

FIELDS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def of_full(logits, labels):
    log_p = logits.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    target = log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return {
        "log_probs": target,
        "entropy": entropy,
        "log_sum_sq_probs": (2 * log_p).logsumexp(-1),
        "mean_logits": logits.mean(-1),
        "is_top1": logits.argmax(-1) == labels,
        "log_z": logits.logsumexp(-1),
    }


def check_statistics(field, chain, dtype):
    """The value of one field, and the gradients of it and the log-probabilities together."""
    vocab_parallel.LEAST_ROWS = 8
    labelled = torch.argmax(functional.linear(*inputs(dtype)[:3]), -1)  # of some tokens: so that some are the first
    both = []

    def mixed(fields, labels):
        both.append(fields[field].detach())
        value = fields["log_probs"]
        return value - 0.7 * fields[field] if field in ("entropy", "mean_logits", "log_z") else value

    def pick(labels):
        return torch.where(torch.arange(TOKENS) % 2 == 0, labelled, labels)

    def ours(vocabulary, projection, hidden, labels):
        found = token_statistics(vocabulary, projection, hidden, pick(labels), CHAINS[chain], FIELDS)
        return mixed(found._asdict(), labels)

    found = sharded(ours, dtype, True)
    expected = unsharded(
        lambda logits, labels: mixed(of_full(CHAINS[chain](logits), pick(labels)), labels), dtype, True
    )
    tolerance = TOLERANCES[torch.float32 if chain == "float" and dtype == torch.float64 else dtype] * 5
    if field == "is_top1":
        assert both[1].any() and not both[1].all()
    return compare([both[0], *found], [both[1], *expected], tolerance, ("field", "value", "hidden", "weight", "bias"))


def check_all_statistics(chain):
    fields = ("log_probs", *FIELDS, "log_z")
    found = {field: check_statistics(field, chain, torch.float64) for field in fields}
    return {field: wrong for field, wrong in found.items() if wrong}


@TP
@pytest.mark.parametrize("chain", CHAINS)
def test_statistics_of_tokens_and_their_gradients_are_those_of_full_logits(chain, tp):
    for wrong in run_on_ranks(check_all_statistics, tp, chain):
        assert wrong == {}


def ties():
    """Two equal logits, the first of which lies on the first rank: only that is the most likely token."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    weight = torch.zeros(3, 2)
    weight[1] = 1
    found = []
    for label in (1, 4):
        out = token_statistics(
            Vocabulary(mesh, (3, 3)), LinearProjection(weight, None, torch.float32), torch.ones(1, 2),
            torch.tensor([label]), wanted=("is_top1",),
        )  # fmt: skip
        found.append(out.is_top1.item())
    return found


def test_of_equal_logits_the_first_is_the_most_likely():
    assert run_on_ranks(ties, 2) == [[True, False]] * 2


# --- labels ----------------------------------------------------------------------------------------------------------


def labelled(labels):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    hidden = torch.ones(len(labels), 2, requires_grad=True)
    weight = torch.ones(3, 2, requires_grad=True)
    vocabulary = Vocabulary(mesh, (3, 3))
    loss = cross_entropy(vocabulary, LinearProjection(weight, None, torch.float32), hidden, torch.tensor(labels))
    loss.backward()
    return loss.item(), hidden.grad.abs().max().item(), weight.grad.abs().max().item()


def test_no_label_that_counts_gives_what_torch_gives():
    for loss, *grads in run_on_ranks(labelled, 2, [-100, -100]):
        assert loss != loss and grads == [0, 0]


@pytest.mark.parametrize("label", [6, -1])
def test_a_label_that_is_no_token_is_an_error_on_every_rank(label):
    for raised in run_on_ranks(labelled, 2, [1, label], expect_raise=True):
        assert "out of bounds of the vocabulary of 6" in raised.message
