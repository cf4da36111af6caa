"""What a module around sharded layers has to know: sizes it has cached, arguments with a dimension of heads.

These styles shard nothing. They stand on the module whose forward computes on a part of the heads or features, beside
the styles of the layers in it, and may be joined by ` + `:

    h.*.attn: local_sizes(num_heads, split_size)
    h.*.self_attention: local_sizes(num_heads) + local_heads(alibi, dim=0)
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ..core.collectives import copy_to_tp, scatter_to_tp
from ..core.errors import nearest
from ..core.layout import Layout
from .base import Site, Style
from .forward import ParallelForward
from .region import Region

__all__ = ["LocalHeads", "LocalModules", "LocalSizes", "Requires", "Together", "full_size", "set_local_size"]

_FULL = "_tp_full_sizes"


def set_local_size(module: nn.Module, name: str, local: int) -> None:
    """Set an attribute that holds a count to this rank's, once: half of one count may equal another count."""
    full = module.__dict__.setdefault(_FULL, {})
    if name not in full:
        full[name] = getattr(module, name)
        setattr(module, name, local)


def full_size(module: nn.Module | None, name: str) -> Any:
    """The attribute as it was before `set_local_size`; None where there is none."""
    full = module.__dict__.get(_FULL, {}) if module is not None else {}
    return full[name] if name in full else getattr(module, name, None)


class LocalSizes(Style):
    """Divides integers that the module keeps, such as its number of heads, by the number of ranks.

        h.*.attn: local_sizes(num_heads, split_size)  # attributes of the module; nothing is sharded

    Head counts of an attention module that states `head_dim` are divided without this, see `heads.show_local_heads`;
    naming them does no harm. Forward and backward: nothing.
    """

    usage = "local_sizes(attribute, ...)"

    def __init__(self, *names: str):
        if not names:
            raise ValueError("it names no attribute")
        self.names = names

    def verify(self, site: Site) -> None:
        super().verify(site)
        for name in self.names:
            size = full_size(site.module, name)
            if not isinstance(size, int) or isinstance(size, bool):
                known = [key for key, value in vars(site.module).items() if type(value) is int]
                raise site.error(
                    f"`{name}` of the {type(site.module).__name__} is {size!r} and no integer.",
                    f"Name attributes that are to be divided.{nearest(name, known)} It has: {', '.join(known)}.",
                )
            if size % site.tp_size:
                raise site.error(
                    f"`{name}` of the {type(site.module).__name__} is {size}, which is not divisible by tp_size.",
                    f"Choose a tp_size that divides {size}, or set this rule and the layers inside to `replicate`.",
                )

    def apply(self, site: Site, region: Region) -> None:
        self.show_sizes(site)

    def show_sizes(self, site: Site) -> None:
        for name in self.names:
            set_local_size(site.module, name, full_size(site.module, name) // site.tp_size)


class LocalHeads(Style):
    """Hands the module this rank's heads of an argument that has them all, such as a bias on attention scores.

        h.*.self_attention: local_heads(alibi, dim=0)  # alibi [batch * heads / tp, 1, length]; no parameter is sharded

    Named are an argument of the module's forward and the dimension of its heads. Their number is the config's
    num_attention_heads, or `heads=` an attribute of the module. A dimension of batch * heads is cut heads by heads.
    Left alone are None, a tensor with 1 in this dimension, which is equal for all heads, and one without such a
    dimension, as a padding mask `[batch, length]` has no `dim=-3`. Forward: slice; backward: all-gather, if the
    argument wants a gradient.
    """

    usage = "local_heads(argument, dim=dimension[, heads=attribute])"

    def __init__(self, argument: str, dim: int, heads: str = ""):
        self.argument = argument
        self.dim = dim
        self.heads = heads

    def verify(self, site: Site) -> None:
        super().verify(site)
        self._position(site)
        heads = self._heads(site)
        if not isinstance(heads, int):
            where = f"`{self.heads}` of the {type(site.module).__name__}" if self.heads else "its config"
            raise site.error(f"{where} states no number of heads.", "Name an attribute that does by `heads=`.")
        if heads % site.tp_size:
            raise site.error(
                f"the number of heads, {heads}, is not divisible by tp_size.",
                f"Choose a tp_size that divides {heads}, or set this rule and the layers inside to `replicate`.",
            )

    def facts(self, site: Site) -> dict[str, Any]:
        return {f"position of {self.argument}": self._position(site), f"heads of {self.argument}": self._heads(site)}

    def forward(self, call: ParallelForward, *args, **kwargs):
        position, heads = (call.facts[f"{what} of {self.argument}"] for what in ("position", "heads"))
        if self.argument in kwargs:
            kwargs = {**kwargs, self.argument: self._own(call, kwargs[self.argument], heads)}
        elif position is not None and position < len(args):
            own = self._own(call, args[position], heads)
            args = (*args[:position], own, *args[position + 1 :])
        return call.inner(*args, **kwargs)

    def _own(self, call: ParallelForward, value: Any, heads: int) -> Any:
        if not isinstance(value, Tensor) or not -value.ndim <= self.dim < value.ndim or value.size(self.dim) == 1:
            return value
        dim = self.dim % value.ndim
        groups, rest = divmod(value.size(dim), heads)
        if rest:
            raise ValueError(
                f"tensor parallelism: the argument `{self.argument}` of a {type(call.module).__name__} has the size "
                f"{tuple(value.shape)}, and its dimension {self.dim} does not hold {heads} heads. Correct the plan's "
                f"`local_heads({self.argument}, dim={self.dim})`."
            )
        tp_size = call.mesh.size()
        apart = value.reshape(*value.shape[:dim], groups, heads, *value.shape[dim + 1 :])
        own = heads_of_this_rank(call.mesh, apart, dim + 1, heads // tp_size)
        return own.reshape(*value.shape[:dim], groups * heads // tp_size, *value.shape[dim + 1 :])

    def _heads(self, site: Site) -> Any:
        return full_size(site.module, self.heads) if self.heads else site.head_counts().get("num_attention_heads")

    def _position(self, site: Site) -> int | None:
        """Where the argument stands in a call without its name; None where it can only be given by name."""
        parameters = list(inspect.signature(type(site.module).forward).parameters.values())[1:]
        names = [parameter.name for parameter in parameters]
        if self.argument in names:
            found = parameters[names.index(self.argument)]
            return None if found.kind is found.KEYWORD_ONLY else names.index(self.argument)
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            return None
        raise site.error(
            f"the forward of a {type(site.module).__name__} has no argument `{self.argument}`.",
            f"Name one of {', '.join(names)}.",
        )


class LocalModules(Style):
    """Lets the module compute with this rank's part of a list of modules that it pairs with its heads one by one.

        layers.*.self_attn.q_layernorm: local_modules(norms)  # a ModuleList in the module; nothing is sharded

    Its parameters are replicated, and each rank has gradients for its part only. Of fewer members than ranks, such as
    one for each key/value head, ranks next to each other take the same one. Forward: nothing; backward: one all-reduce
    of the gradients of the list.
    """

    usage = "local_modules(list)"

    def __init__(self, name: str):
        self.name = name

    def verify(self, site: Site) -> None:
        super().verify(site)
        members = getattr(site.module, self.name, None)
        if not isinstance(members, nn.ModuleList):
            raise site.error(
                f"`{self.name}` of the {type(site.module).__name__} is {type(members).__name__} and no ModuleList.",
                "Name the list of modules that belong to the heads.",
            )
        shapes = {tuple((name, param.shape) for name, param in member.named_parameters()) for member in members}
        if len(shapes) != 1 or any(member._modules for member in members):
            raise site.error(
                f"the {len(members)} modules of `{self.name}` have unlike parameters, or modules inside.",
                "Set this rule and the projections of this attention to `replicate`.",
            )
        if len(members) % site.tp_size and site.tp_size % len(members):
            raise site.error(
                f"the {len(members)} modules of `{self.name}` cannot be divided evenly.",
                f"Choose a tp_size that divides {len(members)}.",
            )

    def forward(self, call: ParallelForward, *args, **kwargs):
        module, rank, ranks = call.module, call.mesh.get_local_rank(), call.mesh.size()
        members: Any = module._modules[self.name]
        first, count = rank * len(members) // ranks, max(len(members) // ranks, 1)
        names = [name for name, param in members[0]._parameters.items() if param is not None]
        # One tensor for all members, or the ranks would disagree on which gradients there are to sum.
        stacked = [torch.stack([member._parameters[name] for member in members]) for name in names]
        copies = copy_to_tp(call.mesh, *stacked)
        own = members[first : first + count]
        saved = [dict(member._parameters) for member in own]
        try:
            for index, member in enumerate(own):
                member._parameters.update({name: copy[first + index] for name, copy in zip(names, copies)})
            module._modules[self.name] = own
            return call.inner(*args, **kwargs)
        finally:
            module._modules[self.name] = members
            for member, parameters in zip(own, saved):
                member._parameters.update(parameters)


def heads_of_this_rank(mesh: DeviceMesh, tensor: Tensor, dim: int, count: int) -> Tensor:
    """A view where no gradient is wanted, or attention would keep a copy of a mask for each layer."""
    if tensor.requires_grad and torch.is_grad_enabled():
        return scatter_to_tp(mesh, tensor, dim, [count] * mesh.size())
    return tensor.narrow(dim, mesh.get_local_rank() * count, count)


class Requires(Style):
    """Refuses a module that computes in a way the plan's other rules do not cover, by an attribute of it.

        h.*.self_attention: requires(slow_but_exact=False)  # nothing is sharded

    Forward and backward: nothing.
    """

    usage = "requires(attribute=value, ...)"

    def __init__(self, **wanted: Any):
        if not wanted:
            raise ValueError("it names no attribute")
        self.wanted = wanted

    def verify(self, site: Site) -> None:
        super().verify(site)
        for name, wanted in self.wanted.items():
            value = getattr(site.module, name, None)
            if value != wanted:
                raise site.error(
                    f"the {type(site.module).__name__} has {name}={value!r}, which cannot be sharded.",
                    f"Build the model with {name}={wanted!r}, or set this rule and those of the layers inside to "
                    "`replicate`.",
                )

    def apply(self, site: Site, region: Region) -> None:
        pass


class Together(Style):
    """Several styles of one module, in this order: the last is the outermost around its forward.

        h.*.attn: local_sizes(num_heads) + local_heads(alibi, dim=0)  # one may shard the module

    Forward and backward: those of its styles.
    """

    def __init__(self, styles: list[Style]):
        self.styles = tuple(styles)

    @property
    def takes_parameters(self) -> bool:  # type: ignore[override]  # its styles decide
        return any(style.takes_parameters for style in self.styles)

    def layouts(self, site: Site) -> dict[str, Layout]:
        return {name: layout for style in self.styles for name, layout in style.layouts(site).items()}

    def verify(self, site: Site) -> None:
        for style in self.styles:
            style.verify(site)
        sharding = [style for style in self.styles if style.enters or style.layouts(site)]
        cut = [name for style in sharding for name in style.layouts(site)]
        if sum(style.enters for style in sharding) > 1 or len(cut) > len(set(cut)):
            kinds = " and ".join(type(style).__name__ for style in sharding)
            raise site.error(f"{kinds} would both shard the module.", "Keep one of them.")

    def apply(self, site: Site, region: Region) -> None:
        for style in self.styles:
            style.apply(site, region)

    def show_sizes(self, site: Site) -> None:
        for style in self.styles:
            style.show_sizes(site)
