"""The tensor-parallel region of a model: what its parallelized modules share while they run."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from .collectives import copy_to_tp
from .randomness import RandomStream
from .shard import ShardInfo, Shared, restore_shards, shard_info

__all__ = ["ParallelForward", "Region"]


class Runner(Protocol):
    """The part of a style that runs."""

    enters: bool
    shares_input: bool
    partial_gradients: bool

    def forward(self, call: ParallelForward, *args, **kwargs): ...


class Region:
    """Remembers the last tensor that entered, so that modules with one input (q/k/v, gate/up) share one copy node.

    One copy node means one all-reduce in the backward, of the sum of all their gradients.
    """

    def __init__(self, mesh: DeviceMesh, draws_dropout: bool = False):
        self.mesh = mesh
        self.stream = RandomStream(mesh.get_local_rank(), mesh.device_type) if draws_dropout else None
        self._source: weakref.ref[Tensor] | None = None
        self._version = -1
        # Held strongly only until the region is left: torch does not keep the Python object alive by itself.
        self._copy: Tensor | None = None
        self.running = 0  # forwards of the whole model under way
        self.whole: dict[tuple[int, int], Tensor] = {}  # what `direct` has gathered in this forward

    def enter(
        self, tensor: Tensor, partners: tuple[ParallelForward, ...] = (), keep: bool = True, training: bool = True
    ) -> Tensor:
        """`copy_to_tp` of `tensor`, or the copy that another module has just made of the same tensor.

        Args:
            tensor: Replicated input of a column-parallel module.
            partners: Modules whose replicated parameters get partial gradients inside this region; their gradients
                are summed in the same collective.
            keep: Whether a later module is expected to want this copy, until `leave` is called.
            training: Whether the module is in training mode, and what follows may drop out sharded activations.
        """
        if keep:
            self.open(training)
        if not torch.is_grad_enabled():
            return tensor
        if self._copy is not None and self._source() is tensor and self._version == tensor._version:
            return self._copy
        partial = [(partner, name) for partner in partners for name in partner.partial_names()]
        copy, *params = copy_to_tp(
            self.mesh,
            tensor,
            *(partner.module._parameters[name] for partner, name in partial),
            shared=[None, *(partner.shared(name) for partner, name in partial)],
        )
        for (partner, name), param in zip(partial, params):
            partner.offered[name] = param
        if keep:
            self._source, self._version, self._copy = weakref.ref(tensor), tensor._version, copy
        return copy

    def open(self, training: bool = True) -> None:
        """Go over to this rank's random stream; in training mode, and where anything drops out at all."""
        if training and self.stream is not None:
            self.stream.enter()

    def leave(self) -> None:
        """Close the region: forget its input, so that it is freed as early as without tensor parallelism."""
        self._source, self._copy = None, None
        if self.stream is not None:
            self.stream.leave()

    def attach(self, model: nn.Module) -> None:
        """Follow the forwards of the whole model, so that nothing outlives one, also where an exception ends it."""
        model.register_forward_pre_hook(self._begin_hook, prepend=True)
        model.register_forward_hook(self._end_hook, always_call=True)

    def _begin_hook(self, model: nn.Module, args: Any) -> None:
        self.running += 1

    def _end_hook(self, model: nn.Module, args: Any, output: Any) -> None:
        self.running = max(0, self.running - 1)
        self.whole.clear()
        self.leave()

    def __getstate__(self) -> dict[str, Any]:
        idle = {"_source": None, "_version": -1, "_copy": None, "running": 0, "whole": {}}
        return {"mesh": self.mesh, "stream": self.stream, **idle}


class ParallelForward:
    """Stands in for `module.forward` and runs it under a style.

    It sits inside the module's hooks, so a user's hooks see what they would see without tensor parallelism,
    and it survives `copy.deepcopy` and pickling together with its module.
    """

    def __init__(
        self,
        module: nn.Module,
        style: Runner,
        region: Region,
        shards: dict[str, ShardInfo],
        facts: dict[str, Any] | None = None,
    ):
        self.module = module
        self.facts = facts or {}
        self.style = style
        self.region = region
        self.shards = shards
        self.partners: tuple[ParallelForward, ...] = ()
        self.offered: dict[str, Tensor] = {}
        self._inner: Callable | None = module.__dict__.get("forward")
        self._entered = False
        self.computing = False  # whether the module's own forward runs
        self.idle = False  # while a module around this one runs it under the style

    @property
    def mesh(self) -> DeviceMesh:
        return self.region.mesh

    def __call__(self, *args, **kwargs):
        if self.idle:
            return self.inner(*args, **kwargs)
        params = self.module._parameters  # without those that PEFT has put a parametrization in the place of
        if any(name in params and shard_info(params[name]) is None for name in self.shards):
            restore_shards(self.module)
        return self.style.forward(self, *args, **kwargs)

    def install_on(self, module: nn.Module) -> None:
        """Become the forward of `module`."""
        module.forward = self
        if self.style.enters:
            module.register_forward_pre_hook(self.enter_hook, prepend=True, with_kwargs=True)
            module.register_forward_hook(self.exit_hook, always_call=True)

    def inner(self, *args, **kwargs):
        """The module's own forward."""
        self.computing = True
        try:
            if self._inner is not None:
                return self._inner(*args, **kwargs)
            return type(self.module).forward(self.module, *args, **kwargs)
        finally:
            self.computing = False

    def enter_hook(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Forward pre-hook: open the region on the module's first argument.

        A hook, because torch gives every module a tensor of its own after the pre-hooks if it has backward hooks.
        """
        if self.idle:
            return args, kwargs
        if args:
            args = (self.enter(args[0]), *args[1:])
        else:
            name = next(iter(kwargs))
            kwargs = {**kwargs, name: self.enter(kwargs[name])}
        self._entered = True
        return args, kwargs

    def entered(self, tensor: Tensor) -> Tensor:
        """`tensor`, inside the region; also where somebody calls `module.forward` and so passes by the hook."""
        return tensor if self._entered else self.enter(tensor)

    def exit_hook(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook, also after an exception: the next call enters the region by itself."""
        self._entered = False

    def enter(self, tensor: Tensor) -> Tensor:
        return self.region.enter(tensor, self.partners, self.style.shares_input, self.module.training)

    def partial_names(self) -> list[str]:
        """Own parameters whose gradients are partial and wanted."""
        if not self.partial_gradients:
            return []
        params = self.module._parameters.items()
        return [name for name, param in params if param is not None and param.requires_grad and self.is_partial(name)]

    @property
    def partial_gradients(self) -> bool:
        """Whether there may be parameters whose gradient is the sum over several ranks."""
        return self.style.partial_gradients or any(info.is_repeated for info in self.shards.values())

    def is_partial(self, name: str) -> bool:
        return self.shards[name].is_repeated if name in self.shards else self.style.partial_gradients

    def shared(self, name: str) -> Shared | None:
        """See `copy_to_tp`."""
        return self.shards[name].shared if name in self.shards else None

    def summed_parameters(self) -> dict[str, Tensor]:
        """Own parameters, their gradients summed over the ranks: as offered by `Region.enter`, or by themselves."""
        names = self.partial_names() if torch.is_grad_enabled() else []
        offered, self.offered = self.offered, {}
        missing = [name for name in names if name not in offered]
        own = copy_to_tp(
            self.mesh,
            *(self.module._parameters[name] for name in missing),
            shared=[self.shared(name) for name in missing],
        )
        return {**{name: offered[name] for name in names if name in offered}, **dict(zip(missing, own))}

    def inner_with_sums(self, *args, **kwargs):
        """The module's own forward, on parameters whose partial gradients are summed in the backward."""
        if not self.partial_gradients:
            return self.inner(*args, **kwargs)
        with self.replacing(**self.summed_parameters()):
            return self.inner(*args, **kwargs)

    @contextmanager
    def replacing(self, **params: Tensor | None) -> Iterator[None]:
        """Let the module compute with other tensors in place of some of its parameters."""
        saved = {name: self.module._parameters[name] for name in params}
        self.module._parameters.update(params)
        try:
            yield
        finally:
            self.module._parameters.update(saved)

    def __getstate__(self) -> dict[str, Any]:
        idle = {"offered": {}, "_entered": False, "computing": False, "idle": False}
        return {**self.__dict__, **idle}
