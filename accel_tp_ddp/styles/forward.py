"""What stands in the place of a module's forward and runs it under a style."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.functional import linear

from ..core.collectives import copy_to_tp
from ..core.layout import Shared
from ..core.shard import ShardInfo, restore_shards
from .hooks import has_users_hooks, hook_around
from .overlap import linear_with
from .region import Region

__all__ = ["ParallelForward", "call_behind"]


class Runner(Protocol):
    """What of a style runs."""

    @property
    def enters(self) -> bool: ...

    @property
    def local_output(self) -> bool: ...

    @property
    def partial_gradients(self) -> bool: ...

    def forward(self, call: ParallelForward, *args: Any, **kwargs: Any) -> Any: ...


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
        self._names = tuple(shards)
        #: Whether there may be parameters whose gradient is the sum over several ranks.
        self.partial_gradients = style.partial_gradients or any(info.is_repeated for info in shards.values())
        self.partners: tuple[ParallelForward, ...] = ()
        self.offered: dict[str, Tensor] = {}
        self.followers: list[ParallelForward] = []  # seen to use what this one has opened; see `overlap`
        self.wrapped: Callable | None = module.__dict__.get("forward")
        #: Whether the module does nothing with its input but a matrix product, which autocast would cast it for.
        self._is_product = is_product(module)
        #: Whether its output is a product's too, whose value no operation needs again.
        self.fresh = self.wrapped is None and self._is_product
        self._run = style.forward
        self.keeps = style.local_output
        self._hosts: tuple[nn.Module, ...] = ()
        self.computing = False  # whether the module's own forward runs
        self.idle = False  # while a module around this one runs it under the style
        self.defer: Callable[[Tensor], Tensor | None] | None = None  # gives what is to be computed later, if anything

    @property
    def mesh(self) -> DeviceMesh:
        return self.region.mesh

    def __call__(self, *args, **kwargs):
        if self.idle:
            return self.inner(*args, **kwargs)
        params = self.module._parameters  # without those that PEFT has put a parametrization in the place of
        for name in self._names:
            param = params.get(name)
            if param is not None and getattr(param, "tp_shard", None) is None:  # `shard_info`, without a call
                restore_shards(self.module)
        return self._run(self, *args, **kwargs)

    def held(self, name: str) -> Tensor:
        """What the module holds under this name; its attribute may be read otherwise."""
        param = self.module._parameters[name]
        assert param is not None, name
        return param

    def install_on(self, module: nn.Module) -> None:
        """Become the forward of `module`."""
        # A method, and keys of hooks that are the same in all layers: dynamo guards both, and an object of its own, or
        # torch's running number of a hook, would be a graph of its own for each layer that is compiled by itself.
        module.forward = self.__call__
        if self.style.enters:
            self._hosts = (*self._hosts, module)
            hook_around(module, self.enter_hook)

    def product(self, input: Tensor, with_bias: bool = True) -> Tensor | None:
        """What a linear layer of torch's computes, by as few steps; None of any other module, see `inner`."""
        params = self.module._parameters
        weight = params.get("weight")
        if not self.fresh or weight is None:
            return None
        return linear(input, weight, params["bias"] if with_bias else None)

    def opening_product(self, input: Tensor) -> Tensor | None:
        """`product` of a layer that opens a region, whose weight gradient may wait for what the region sums."""
        region, params = self.region, self.module._parameters
        weight = params.get("weight")
        if region.overlap is None or weight is None or not self.fresh or not region.overlaps(input.numel()):
            return self.product(input)
        waiting, passed = region.waiting.pop(self, (None, weight))
        again = None if waiting is None else region.again(input)
        return linear_with(waiting, again, input, passed, params["bias"])

    @property
    def can_wait(self) -> bool:
        """Whether its weight gradient can be computed when those of the layer's input have been."""
        weight = self.module._parameters.get("weight") if self.fresh and not self.partial_gradients else None
        return weight is not None and weight.requires_grad and self.defer is None and not self.idle

    @property
    def extra_arguments(self) -> bool:
        """Whether the module's own forward is called with more than its input."""
        return False

    def inner(self, *args, **kwargs):
        """The module's own forward."""
        self.computing = True
        try:
            if self.wrapped is not None:
                return self.wrapped(*args, **kwargs)
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
            args = (self.region.enter(args[0], self), *args[1:])
        else:
            name = next(iter(kwargs))
            kwargs = {**kwargs, name: self.region.enter(kwargs[name], self)}
        self.region.opening = self
        return args, kwargs

    def entered(self, tensor: Tensor) -> Tensor:
        """`tensor`, inside the region; also where somebody calls `module.forward` and so passes by the hook."""
        if self.region.opening is not self:
            return self.region.enter(tensor, self)
        self.region.opening = None
        return tensor

    def casts(self) -> bool:
        """Whether autocast's cast is all that the module does with its input, beside its product."""
        return self._is_product

    def is_seen(self) -> bool:
        """Whether a hook of a user's may look at the input, on this rank; it is to see what it always sees."""
        return any(has_users_hooks(host) for host in self._hosts)

    def partial_names(self) -> list[str]:
        """Own parameters whose gradients are partial and wanted."""
        if not self.partial_gradients:
            return []
        params = self.module._parameters.items()
        return [name for name, param in params if param is not None and param.requires_grad and self.is_partial(name)]

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
        if not missing:
            return {name: offered[name] for name in names}
        own = copy_to_tp(
            self.mesh,
            *(self.held(name) for name in missing),
            shared=[self.shared(name) for name in missing],
        )
        return {**{name: offered[name] for name in names if name in offered}, **dict(zip(missing, own))}

    def inner_with_sums(self, *args, **kwargs):
        """The module's own forward, on parameters whose partial gradients are summed in the backward."""
        if not self.partial_gradients:
            return self.inner(*args, **kwargs)
        return self.inner_with(self.summed_parameters(), *args, **kwargs)

    def inner_with(self, params: Mapping[str, Tensor | None], /, *args, **kwargs):
        """The module's own forward, on other tensors in place of some of its parameters."""
        own: dict[str, Any] = self.module._parameters
        saved = {name: own[name] for name in params}
        own.update(params)
        try:
            return self.inner(*args, **kwargs)
        finally:
            own.update(saved)

    @contextmanager
    def replacing(self, **params: Tensor | None) -> Iterator[None]:
        """Let the module compute with other tensors in place of some of its parameters."""
        own: dict[str, Any] = self.module._parameters
        saved = {name: own[name] for name in params}
        own.update(params)
        try:
            yield
        finally:
            own.update(saved)

    def __getstate__(self) -> dict[str, Any]:
        idle = {"offered": {}, "followers": [], "computing": False, "idle": False, "defer": None}
        return {**self.__dict__, **idle}


def call_behind(forward: Any) -> ParallelForward | None:
    """What `install_on` has put in the place of a forward; None if this is another's."""
    call = getattr(forward, "__self__", None)
    return call if isinstance(call, ParallelForward) else None


def is_product(module: nn.Module) -> bool:
    """Whether the module is a linear layer of torch's, and computes as that does."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
