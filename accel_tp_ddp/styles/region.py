"""The tensor-parallel region of a model: what its parallelized modules share while they run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.distributed.device_mesh import DeviceMesh

from ..core.collectives import copy_to_tp, copy_to_tp_meanwhile, split_from_tp
from ..core.layout import Shared
from ..core.randomness import RandomStream
from .overlap import Again, Beside, CanWait, Waiting
from .recompute import Checkpointed

__all__ = ["Region", "Spread", "running_region"]


class Partner(Protocol):
    """A module with replicated parameters whose gradients are partial, as its `ParallelForward` knows it."""

    offered: dict[str, Tensor]

    def partial_names(self) -> list[str]: ...

    def held(self, name: str) -> Tensor: ...

    def shared(self, name: str) -> Shared | None: ...


class Opener(CanWait, Protocol):
    """A column-parallel module, as its `ParallelForward` knows it.

    Attributes:
        partners: Modules whose replicated parameters get partial gradients inside this region; their gradients are
            summed in the same collective.
        keeps: Whether a later module is expected to want this copy, until `leave` is called.
        module: In training mode, what follows may drop out sharded activations.
    """

    module: nn.Module
    keeps: bool

    @property
    def partners(self) -> Sequence[Partner]: ...

    def casts(self) -> bool:
        """Whether all that the module does with its input is what autocast does in bf16.

        The cast is then made before the copy, once for all modules, and gradients are summed in bf16, half the bytes.
        Hooks do not count, as one rank may have them alone: a main process that logs.
        """
        ...

    def is_seen(self) -> bool:
        """Whether a hook of a user's, on this rank, looks at what the module is given."""
        ...


@dataclass(frozen=True)
class Spread:
    """Hidden states `[batch, length, width]`, of which each rank has a slice of the sequence."""

    mesh: DeviceMesh
    batch: int
    sizes: tuple[int, ...]
    width: int

    @property
    def own(self) -> tuple[int, int, int]:
        """The shape of this rank's slice."""
        return self.batch, self.sizes[self.mesh.get_local_rank()], self.width

    @property
    def whole(self) -> tuple[int, int, int]:
        return self.batch, sum(self.sizes), self.width

    def split(self, tensor: Tensor) -> Tensor:
        """This rank's slice of the sum over the ranks, where a region is closed."""
        if tensor.shape != self.whole:
            raise ValueError(
                f"sequence_parallel=True: a row-parallel layer gives {tuple(tensor.shape)} inside its block, and not "
                f"[batch, sequence, hidden], here {self.whole}. Set sequence_parallel=False for this model."
            )
        return split_from_tp(self.mesh, tensor, 1, self.sizes)


#: Those whose whole model is in a forward, the innermost last: more than one where a teacher runs in a student's.
_running: list[Region] = []


def running_region() -> Region | None:
    """The region of the model that is in its forward."""
    return _running[-1] if _running else None


class Region:
    """Remembers the last tensor that entered, so that modules with one input (q/k/v, gate/up) share one copy node.

    One copy node means one all-reduce in the backward, of the sum of all their gradients.
    """

    def __init__(self, mesh: DeviceMesh, draws_dropout: bool = False, overlap: int | None = None):
        self.mesh = mesh
        #: Elements of an input from which on weight gradients are computed while its gradient is summed, if any.
        self.overlap = overlap
        self.opening: Any = None  # the layer whose hook has entered, until its forward takes that
        self.stream = RandomStream(mesh.get_local_rank(), mesh.device_type, mesh.size()) if draws_dropout else None
        # Both held only until the region is left. The copy is a view of its source, or of a cast of it.
        self._source: Tensor | None = None
        self._copy: Tensor | None = None
        self._version = -1
        self._cast = False
        self._opener: Opener | None = None  # which has made the copy
        self.waiting: dict[Any, tuple[Waiting, Tensor]] = {}  # see `Beside.passed`
        self._gathered: tuple[Tensor, int, Again] | None = None  # what a block was given, with its version
        self.full: dict[tuple, Tensor] = {}  # what `direct_reads` has gathered in this forward
        #: How the sequence is spread around the block that runs, which closes the region; see `sequence`.
        self.spread: Spread | None = None
        #: Whether that block has entered it too, so that the layers in it need not.
        self.entered = False
        #: Whether a layer is under way in which tensors are slices of the sequence, outside of its blocks.
        self.between_blocks = False

    def enter(self, tensor: Tensor, opener: Opener) -> Tensor:
        """`copy_to_tp` of `tensor`, or the copy that another module has just made of the same tensor.

        Args:
            tensor: Replicated input of a column-parallel module.
            opener: The module.
        """
        if self.entered:  # gathered by the block, whose backward sums up the gradients
            return tensor
        if self.between_blocks:
            raise ValueError(
                f"sequence_parallel=True: a column-parallel layer gets {tuple(tensor.shape)}, a slice of the "
                "sequence, as it is not called from a block of its layer. Set sequence_parallel=False for this model."
            )
        if self.stream is not None and opener.keeps and opener.module.training:
            self.stream.enter()
        if not torch.is_grad_enabled():
            return tensor
        # Dynamo cannot trace the read of a version; it works on graphs in which nothing is changed in place.
        version = 0 if is_compiling() else tensor._version
        if self._source is tensor and self._version == version:
            if not self._cast or (in_bf16(tensor) and opener.casts()):
                if self._opener is not None and self.overlaps(tensor.numel()):
                    follow(self._opener, opener)
                own: Any = self._copy  # there is one where there is a source
                return _AsGiven.apply(own, tensor) if self._cast and opener.is_seen() else own
        cast = in_bf16(tensor) and opener.casts()
        source = tensor.to(torch.bfloat16) if cast else tensor
        beside = None if self.overlap is None else self.beside(source, source.numel(), opener)
        if opener.partners or beside is not None:
            copy = self._enter_with(source, opener.partners, beside)
        else:
            copy = copy_to_tp(self.mesh, source)[0]
        if opener.keeps:
            self._opener = None if self.overlap is None else opener
            self._source, self._version, self._copy, self._cast = tensor, version, copy, cast
        return _AsGiven.apply(copy, tensor) if cast and opener.is_seen() else copy

    def _enter_with(self, tensor: Tensor, partners: Sequence[Partner], beside: Beside | None = None) -> Tensor:
        offers = [(partner, name) for partner in partners for name in partner.partial_names()]
        tensors = [tensor, *(partner.held(name) for partner, name in offers)]
        shared = [None, *(partner.shared(name) for partner, name in offers)]
        if beside is not None:
            copies = copy_to_tp_meanwhile(self.mesh, tensors, shared, beside.weights, beside.gradients)
            self.waiting = beside.passed(copies[len(tensors) :])
        else:
            copies = copy_to_tp(self.mesh, *tensors, shared=shared)
        for (partner, name), param in zip(offers, copies[1:]):
            partner.offered[name] = param
        return copies[0]

    def set_gathered(self, whole: Tensor, weights: dict[Any, tuple[Waiting, Tensor]], again: Again) -> None:
        """What layers of the block that begins are given, and need not keep; until `forget_gathered`."""
        self.waiting, self._gathered = weights, (whole, whole._version, again)

    def forget_gathered(self) -> None:
        self.waiting, self._gathered = {}, None

    def again(self, input: Tensor) -> Again | None:
        """What gathers `input` once more in the backward, if it is what the block was given."""
        if self._gathered is None or self._gathered[0] is not input or self._gathered[1] != input._version:
            return None
        return self._gathered[2]

    def overlaps(self, elements: int) -> bool:
        """Whether layers compute their weight gradients of an input of so many while its gradient is summed."""
        return (
            self.overlap is not None
            and elements >= self.overlap
            and torch.is_grad_enabled()
            and not is_compiling()
            and not torch.are_deterministic_algorithms_enabled()
        )

    def beside(self, input: Tensor, elements: int, *openers: Opener) -> Beside | None:
        """Those of `openers`, and of the layers that came after them so far, whose weight gradients can wait.

        Args:
            input: What they share, or this rank's slice of it.
            elements: Of all of it, as ranks have to agree, and slices need not be of one length.
            openers: The layers.
        """
        self.waiting = {}
        if not input.requires_grad or not self.overlaps(elements):
            return None
        found = {id(each): each for opener in openers for each in (opener, *opener.followers) if each.can_wait}
        return Beside(list(found.values())) if found else None

    def open(self, training: bool = True) -> None:
        """Go over to this rank's random stream; in training mode, and where anything drops out at all."""
        if training and self.stream is not None:
            self.stream.enter()

    def leave(self) -> None:
        """Close the region: forget its input, so that it is freed as early as without tensor parallelism."""
        self._source, self._copy, self._opener = None, None, None
        self.waiting = {}
        if self.spread is not None:  # what follows drops out a rank's part, too
            if self.stream is not None:
                self.stream.enter()
            return
        if self.stream is not None:
            self.stream.leave()

    @property
    def running(self) -> int:
        """How many forwards of the whole model are under way."""
        return _running.count(self)

    def attach(self, model: nn.Module) -> None:
        """Follow the forwards of the whole model, so that nothing outlives one, also where an exception ends it."""
        model.register_forward_pre_hook(Checkpointed(model).set_hooks_apart)
        model.register_forward_pre_hook(self._begin_hook, prepend=True)
        model.register_forward_hook(self._end_hook, always_call=True)

    def _begin_hook(self, model: nn.Module, args: Any) -> None:
        _running.append(self)
        self.opening = None  # of a layer that was interrupted before its forward

    def _end_hook(self, model: nn.Module, args: Any, output: Any) -> None:
        self.spread, self.entered, self.between_blocks, self.opening = None, False, False, None
        if self in _running:
            del _running[len(_running) - 1 - _running[::-1].index(self) :]
        self.full.clear()
        self.leave()

    def __getstate__(self) -> dict[str, Any]:
        idle: dict[str, Any] = {"_source": None, "_version": -1, "_copy": None, "_cast": False, "full": {}}
        idle |= {
            "spread": None,
            "entered": False,
            "between_blocks": False,
            "_opener": None,
            "opening": None,
            "waiting": {},
            "_gathered": None,
        }
        return {"mesh": self.mesh, "stream": self.stream, "overlap": self.overlap, **idle}


def follow(opener: Opener, other: Opener) -> None:
    """Remember that `other` uses what `opener` has opened: the next time its weight gradient waits, too."""
    if other is not opener and other not in opener.followers:
        opener.followers.append(other)


class _AsGiven(torch.autograd.Function):
    """What a hook is to see: the values of `given`, before they were cast to `copy`, which gets the gradient."""

    @staticmethod
    def forward(ctx, copy: Tensor, given: Tensor):
        ctx.dtype = copy.dtype
        return given.view_as(given)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad.to(ctx.dtype), None


def in_bf16(tensor: Tensor) -> bool:
    """Whether autocast would have a matrix product cast this float32 tensor to bf16."""
    if tensor.dtype is not torch.float32 or not torch.is_autocast_enabled(device := tensor.device.type):
        return False
    return torch.get_autocast_dtype(device) is torch.bfloat16
