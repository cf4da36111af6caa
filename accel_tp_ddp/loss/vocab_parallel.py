"""Cross-entropy and its kin over a vocabulary that is spread over the ranks, with the output layer inside.

A token's loss is log Z - z_t, with z the logits, t its label and Z the sum of exp z; its gradient is softmax(z) - 1_t
(torch.nn.functional.cross_entropy). Each rank has some of the logits, of which it keeps three numbers a token: their
maximum m, the sum of exp(z - m), and z_t if it has that. From those of all ranks, M = max m, Z = sum of s exp(m - M),
and the own part of the softmax is exp(z - m) exp(m - M) / Z: one all-gather of O(tokens), as in Megatron-LM's
vocab-parallel cross-entropy (arXiv:1909.08053, section 3), which takes three all-reduces.

The output layer runs on a chunk of tokens at a time, and where a loss is one number, its gradients are taken in the
same pass and scaled in the backward, as in Liger-Kernel's fused linear cross-entropy (arXiv:2410.10989, section 3.2).
Where there is a number for each token (`token_statistics`), the backward computes each chunk's logits once more.

Gradients of hidden states are this rank's terms of a sum over the ranks, as those of any column-parallel layer's
input: `copy_to_tp` opens the region.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

from ..core.collectives import gather_parts
from .projection import Chain, Projection

__all__ = ["TokenStatistics", "Vocabulary", "cross_entropy", "token_statistics"]

#: At least as many tokens go into a chunk: fewer make products too small to be fast, and collectives too many.
LEAST_ROWS = 512


@dataclass(frozen=True)
class Vocabulary:
    """Which part of the vocabulary each rank has: `sizes` in rank order, unequal where they do not divide."""

    mesh: DeviceMesh
    sizes: tuple[int, ...]

    @property
    def total(self) -> int:
        return sum(self.sizes)

    @property
    def start(self) -> int:
        return sum(self.sizes[: self.mesh.get_local_rank()])

    def chunks(self, tokens: int, width: int) -> Iterator[slice]:
        """Chunks of tokens, the same on all ranks: as many logits in each as there are hidden values in all."""
        rows = max(LEAST_ROWS, tokens * width // max(self.sizes))
        return (slice(start, min(start + rows, tokens)) for start in range(0, tokens, rows))

    def of_all(self, *own: Tensor) -> Tensor:
        """These numbers of every rank, `[rank, which, token]`: one all-gather."""
        return torch.stack(gather_parts(self.mesh, torch.stack(own), 0, [len(own)] * len(self.sizes)))

    def place(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """For each label, whether this rank has its logit, and at which index (any, if not)."""
        own = self.sizes[self.mesh.get_local_rank()]
        index = labels - self.start
        return (index >= 0) & (index < own), index.clamp(0, own - 1).unsqueeze(-1)

    def check(self, labels: Tensor, valid: Tensor) -> None:
        """Raise for a label that is no token; on a GPU without waiting for it, as torch does it too."""
        known = ~valid | ((labels >= 0) & (labels < self.total))
        torch._assert_async(known.all(), f"a label is out of bounds of the vocabulary of {self.total}")


def cross_entropy(
    vocabulary: Vocabulary,
    projection: Projection,
    hidden: Tensor,
    labels: Tensor,
    chain: Chain = Chain(),
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """`torch.nn.functional.cross_entropy(chain(projection(hidden)), labels, ...)`, of all ranks' logits together.

    Args:
        vocabulary: Who has which logits.
        projection: This rank's part of the output layer.
        hidden: Hidden states `[tokens, width]`, in the tensor-parallel region.
        labels: `[tokens]`, the same on all ranks.
        chain: What is done to the logits before they are compared.
        ignore_index: Labels of tokens that do not count.
        reduction: "mean" over the tokens that count, "sum", or "none".
        label_smoothing: Between the label and all tokens alike.

    Returns:
        A scalar, or `[tokens]`; the same on all ranks.
    """
    valid = labels != ignore_index
    vocabulary.check(labels, valid)
    if reduction == "none":
        found = token_statistics(
            vocabulary, projection, hidden, labels, chain, ("mean_logits",) * bool(label_smoothing)
        )
        loss = -found.log_probs
        if found.mean_logits is not None:
            loss = (1 - label_smoothing) * loss + label_smoothing * (found.log_z - found.mean_logits)
        return loss.masked_fill(~valid, 0)
    total = _CrossEntropy.apply(
        vocabulary,
        projection,
        chain,
        labels,
        valid,
        label_smoothing,
        torch.is_grad_enabled(),
        hidden,
        *projection.tensors,
    )
    if reduction == "sum":
        return total
    count = valid.sum()
    return torch.where(count > 0, total / count.clamp(min=1), torch.nan)


class _CrossEntropy(torch.autograd.Function):
    """The sum over tokens; its gradients are taken in the forward."""

    @staticmethod
    def forward(
        ctx: Any,
        vocabulary: Vocabulary,
        projection: Projection,
        chain: Chain,
        labels: Tensor,
        valid: Tensor,
        smoothing: float,
        enabled: bool,
        hidden: Tensor,
        *tensors: Tensor,
    ) -> Tensor:
        wanted = [enabled and want for want in ctx.needs_input_grad[7:]]
        grads = any(wanted)
        layer = projection.begin(tensors, wanted[1:])
        of_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if grads else None
        losses = []
        for rows in vocabulary.chunks(*hidden.shape):
            logits, to_hidden = layer.forward(hidden[rows], grads)
            outcome, to_logits = chain.pull_back(logits)
            del logits
            mine = layer.gives_away and chain.casts_only
            own, grad = _chunk_loss(vocabulary, outcome, labels[rows], valid[rows], smoothing, grads, mine)
            del outcome
            losses.append(own)
            if of_hidden is not None:
                of_hidden[rows] = to_hidden(to_logits(grad))
            del grad, to_hidden, to_logits
        ctx.save_for_backward(of_hidden, *(layer.gradients() if grads else ()))
        ctx.dtypes = [tensor.dtype for tensor in (hidden, *tensors)]
        return torch.stack(losses).sum() if losses else hidden.new_zeros((), dtype=torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        scaled = (
            None if own is None else (own * grad.to(torch.promote_types(own.dtype, grad.dtype))).to(dtype)
            for own, dtype in zip(ctx.saved_tensors, ctx.dtypes)
        )
        return *(None,) * 7, *scaled


def _chunk_loss(
    vocabulary: Vocabulary, logits: Tensor, labels: Tensor, valid: Tensor, smoothing: float, grads: bool, mine: bool
) -> tuple[Tensor, Tensor]:
    """A chunk's sum of losses, and its gradient by this rank's logits; in their place, if they are `mine`."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    here, index = vocabulary.place(labels)
    most = logits.amax(-1)
    target = logits.gather(-1, index).squeeze(-1).masked_fill(~here, 0)
    summed = [logits.sum(-1)] if smoothing else []
    weights = (logits.sub_ if mine else logits.sub)(most.unsqueeze(-1)).exp_()
    of_all = vocabulary.of_all(most, weights.sum(-1), target, *summed)
    log_z, scale = _log_z(most, of_all)
    loss = log_z - (1 - smoothing) * of_all[:, 2].sum(0)
    if smoothing:
        loss -= smoothing / vocabulary.total * of_all[:, 3].sum(0)
    if grads:
        counted = valid.to(weights.dtype).unsqueeze(-1)
        weights.mul_(scale.unsqueeze(-1) * counted)
        if smoothing:
            weights.sub_(counted * (smoothing / vocabulary.total))
        weights.scatter_add_(-1, index, counted * here.unsqueeze(-1) * (smoothing - 1))
    return loss.masked_fill(~valid, 0).sum(), weights


def _log_z(most: Tensor, of_all: Tensor) -> tuple[Tensor, Tensor]:
    """log Z from all ranks' maxima and sums, and exp(m - M) / Z, by which this rank's exp(z - m) is a softmax."""
    highest = of_all[:, 0].amax(0)
    total = (of_all[:, 1] * (of_all[:, 0] - highest).exp()).sum(0)
    return highest + total.log(), (most - highest).exp() / total


class TokenStatistics(NamedTuple):
    """Of each token's distribution over the vocabulary; without gradient where it says so. None where not wanted.

    Attributes:
        log_probs: Log-probability of the label.
        entropy: Entropy.
        log_sum_sq_probs: Log of the sum of squared probabilities; without gradient.
        mean_logits: Mean of the logits.
        is_top1: Whether the label is the most likely token, the first of those; without gradient.
        log_z: Log of the sum of exp(logits).
    """

    log_probs: Tensor
    entropy: Tensor | None
    log_sum_sq_probs: Tensor | None
    mean_logits: Tensor | None
    is_top1: Tensor | None
    log_z: Tensor


def token_statistics(
    vocabulary: Vocabulary,
    projection: Projection,
    hidden: Tensor,
    labels: Tensor,
    chain: Chain = Chain(),
    wanted: Sequence[str] = (),
) -> TokenStatistics:
    """What losses of tokens are made of: one all-gather of O(tokens) forward, none backward.

    Args:
        vocabulary: Who has which logits.
        projection: This rank's part of the output layer.
        hidden: Hidden states `[tokens, width]`, in the tensor-parallel region.
        labels: `[tokens]`, each a token of the vocabulary, the same on all ranks.
        chain: What is done to the logits.
        wanted: Names of optional fields.
    """
    found = _Statistics.apply(vocabulary, projection, chain, labels, tuple(wanted), hidden, *projection.tensors)
    return TokenStatistics(*found)


class _Statistics(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        vocabulary: Vocabulary,
        projection: Projection,
        chain: Chain,
        labels: Tensor,
        wanted: tuple[str, ...],
        hidden: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        layer = projection.begin(tensors, [False] * len(tensors))
        own = []
        for rows in vocabulary.chunks(*hidden.shape):
            logits = chain(layer.forward(hidden[rows], False)[0])
            own.append(_chunk_statistics(vocabulary, logits, labels[rows], wanted))
        of_all = vocabulary.of_all(*torch.cat(own, -1))
        log_z, _ = _log_z(of_all[0, 0], of_all)
        target = of_all[:, 2].sum(0)
        highest = of_all[:, 0].amax(0)
        # Sums of exp(z - m) and the like, on the scale of exp(z - log Z).
        scale = (of_all[:, 0] - log_z).exp()
        entropy = log_z - (of_all[:, 3] * scale).sum(0) if "entropy" in wanted else None
        squares = (of_all[:, 4] * scale.square()).sum(0).log() if "log_sum_sq_probs" in wanted else None
        mean = of_all[:, 5].sum(0) / vocabulary.total if "mean_logits" in wanted else None
        top = (target >= highest) & (target > of_all[:, 6].amax(0)) if "is_top1" in wanted else None
        ctx.save_for_backward(hidden, labels, log_z, entropy, *tensors)
        ctx.vocabulary, ctx.projection, ctx.chain = vocabulary, projection, chain
        ctx.mark_non_differentiable(*(each for each in (squares, top) if each is not None))
        return target - log_z, entropy, squares, mean, top, log_z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        of_log_prob, of_entropy, _, of_mean, _, of_log_z = grads
        hidden, labels, log_z, entropy, *tensors = ctx.saved_tensors
        vocabulary = ctx.vocabulary
        layer = ctx.projection.begin(tensors, ctx.needs_input_grad[6:])
        of_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format)
        for rows in vocabulary.chunks(*hidden.shape):
            logits, to_hidden = layer.forward(hidden[rows], True)
            outcome, to_logits = ctx.chain.pull_back(logits)
            del logits
            log_p = outcome.to(log_z.dtype) - log_z[rows].unsqueeze(-1)
            del outcome
            # d log p_t / dz_j = 1_t - p_j;  d log Z / dz_j = p_j;  d entropy / dz_j = -p_j (log p_j + entropy)
            of_p = torch.zeros_like(log_z[rows])
            if of_log_prob is not None:
                of_p -= of_log_prob[rows]
            if of_log_z is not None:
                of_p += of_log_z[rows]
            if of_entropy is not None:
                grad = log_p.exp()
                grad.mul_(of_p.unsqueeze(-1) - of_entropy[rows].unsqueeze(-1) * (log_p + entropy[rows].unsqueeze(-1)))
            else:
                grad = log_p.exp_().mul_(of_p.unsqueeze(-1))
            if of_mean is not None:
                grad += of_mean[rows].unsqueeze(-1) / vocabulary.total
            if of_log_prob is not None:
                here, index = vocabulary.place(labels[rows])
                grad.scatter_add_(-1, index, (of_log_prob[rows] * here).unsqueeze(-1))
            of_hidden[rows] = to_hidden(to_logits(grad))
            del log_p, grad, to_hidden, to_logits
        own = (g if g is None else g.to(tensor.dtype) for g, tensor in zip(layer.gradients(), tensors))
        return *(None,) * 5, of_hidden, *own


def _chunk_statistics(vocabulary: Vocabulary, logits: Tensor, labels: Tensor, wanted: tuple[str, ...]) -> Tensor:
    """This rank's numbers for each token of a chunk, `[which, token]`; zero where they are not wanted."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    here, index = vocabulary.place(labels)
    most = logits.amax(-1)
    none = torch.zeros_like(most)
    target = logits.gather(-1, index).squeeze(-1).masked_fill(~here, 0)
    mean = logits.sum(-1) if "mean_logits" in wanted else none
    before = none
    if "is_top1" in wanted:
        position = torch.arange(logits.shape[-1], device=logits.device) + vocabulary.start
        before = logits.masked_fill(position >= labels.unsqueeze(-1), -math.inf).amax(-1)
    weights = (logits - most.unsqueeze(-1)).exp_()
    total = weights.sum(-1)
    energy = (weights * logits).sum(-1) if "entropy" in wanted else none
    squares = weights.square_().sum(-1) if "log_sum_sq_probs" in wanted else none
    return torch.stack([most, total, target, energy, squares, mean, before])
