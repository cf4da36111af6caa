"""Models that hold only this rank's slices of their weights, and are still to be parallelized.

A model that was loaded in slices has plain parameters of the local sizes, and no style runs it yet: it may be wrapped
in adapters first, as an unsharded model may. Each module remembers the slices that it holds. `parallelize` sees the
model with full parameters on the meta device in their place, resolves the plan and applies the styles to those, and
puts the slices back: nothing there needs to know of slices. Until then a forward of such a module is an error, as is
anything else that takes a slice for the full weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from .layout import Layout
from .override import Override, Refusal, install, uninstall
from .shard import ShardInfo, mark_shard, shard_info

__all__ = [
    "OVERRIDES",
    "RESIZING",
    "check_slices_mesh",
    "hold_slices",
    "holds_slices",
    "refuse_slices",
    "slices_kept",
    "slices_become_shards",
    "full_on_meta",
]


_SLICES = "_tp_slices"


def hold_slices(model: nn.Module, slices: Iterable[tuple[nn.Parameter, ShardInfo]]) -> None:
    """Mark parameters of `model` as slices, in every module that holds them."""
    infos = {id(param): (param, info) for param, info in slices}
    for module in model.modules():
        if _SLICES in module.__dict__:
            continue
        held = {name: infos[id(param)][1] for name, param in module._parameters.items() if id(param) in infos}
        if held:
            module.__dict__[_SLICES] = held
            module.register_forward_pre_hook(_NotYetParallel(), prepend=True)
    install(model, OVERRIDES)


@contextmanager
def slices_kept(model: nn.Module) -> Iterator[None]:
    """Let modules that take the place of others within the block, with their parameters, hold the same slices."""
    slices = [(module._parameters[name], info) for module in model.modules() for name, info in _of(module).items()]
    yield
    if slices:
        hold_slices(model, [(param, info) for param, info in slices if param is not None])


def holds_slices(model: nn.Module) -> bool:
    return any(_SLICES in module.__dict__ for module in model.modules())


def refuse_slices(model: nn.Module, caller: str) -> None:
    """Raise where `caller` would take slices for full weights.

    Raises:
        RuntimeError: If `model` holds slices and has not been parallelized yet.
    """
    if holds_slices(model):
        raise RuntimeError(f"{caller}: {_advice(type(model).__name__)}")


@contextmanager
def full_on_meta(model: nn.Module) -> Iterator[dict[nn.Parameter, nn.Parameter]]:
    """Put full parameters on the meta device in the place of the slices; ties stay ties.

    Yields:
        The stand-in of each slice.
    """
    held = [
        (module, name, module.get_parameter(name), info)
        for module in model.modules()
        for name, info in _of(module).items()
    ]
    stand_ins: dict[nn.Parameter, nn.Parameter] = {}
    for _, _, own, info in held:
        if own not in stand_ins:
            full = torch.empty(info.global_shape, dtype=own.dtype, device="meta")
            stand_ins[own] = nn.Parameter(full, requires_grad=own.requires_grad)
    for module, name, own, _ in held:
        module._parameters[name] = stand_ins[own]
    try:
        yield stand_ins
    finally:
        for module, name, own, _ in held:
            module._parameters[name] = own


@contextmanager
def slices_become_shards(model: nn.Module, layouts: Mapping[nn.Parameter, Layout]) -> Iterator[None]:
    """Let the styles be applied, within the block, to stand-ins for the slices; these are shards afterwards.

    Collective over the tensor-parallel group where slices lie otherwise than `layouts` says.
    """
    _restore_full(model, layouts)
    with full_on_meta(model) as stand_ins:
        yield
    for own, stand_in in stand_ins.items():
        assert own.shape == stand_in.shape, "a slice that the plan cuts otherwise was to be restored before"
        mark_shard(own, shard_info(stand_in))
    for module in model.modules():
        uninstall(module, OVERRIDES)
        if module.__dict__.pop(_SLICES, None) is not None:
            hooks = module._forward_pre_hooks
            for key in [key for key, hook in hooks.items() if isinstance(hook, _NotYetParallel)]:
                del hooks[key]


def _restore_full(model: nn.Module, layouts: Mapping[nn.Parameter, Layout]) -> None:
    """Turn slices whose layout is not the one in `layouts` into full parameters again, in place.

    Collective over the tensor-parallel group. Ordinarily there are none: it happens where the model is parallelized by
    another plan than it was loaded by, or has turned out to be tied otherwise than its config says.
    """
    done: set[nn.Parameter] = set()
    for module in model.modules():
        for name, info in list(_of(module).items()):
            param = module.get_parameter(name)
            if layouts.get(param) == info.layout:
                continue
            if param not in done:
                param.data = info.full_tensor(param)
                done.add(param)
            del _of(module)[name]


def check_slices_mesh(model: nn.Module, mesh: DeviceMesh) -> None:
    """Raise unless the slices of `model`, if it holds any, were cut for the ranks of `mesh`.

    Raises:
        ValueError: With both meshes' ranks.
    """
    own = next((info.mesh for module in model.modules() for info in _of(module).values()), None)
    if own is None:
        return
    ranks, wanted = (dist.get_process_group_ranks(each.get_group()) for each in (own, mesh))
    if ranks != wanted:
        raise ValueError(
            f"this {type(model).__name__} was loaded in slices for the {len(ranks)} ranks {ranks}, but tp_size="
            f"{mesh.size()} and the `tp` mesh has the ranks {wanted} here. Prepare it with the accelerator whose "
            "plugin loaded it, or load it again."
        )


class _NotYetParallel:
    """Forward pre-hook of a module that holds slices. An object, so that it is copied and pickled with its module."""

    def __call__(self, module: nn.Module, args: Any) -> None:
        raise RuntimeError(f"this {_advice(type(module).__name__)}")


def _of(module: nn.Module) -> dict[str, ShardInfo]:
    return module.__dict__.get(_SLICES, {})


def _advice(name: str) -> str:
    return (
        f"{name} was loaded in slices (`sharded_loading`) and is not parallel yet. Pass it to `accelerator.prepare` "
        "(or `parallelize`) first, on every rank."
    )


RESIZING = Override(
    "transformers.modeling_utils.PreTrainedModel",
    "resize_token_embeddings",
    Refusal(
        "resize_token_embeddings after the model has been sharded would work on this rank's part of the vocabulary. "
        "Call it before `prepare` (or `parallelize`)."
    ),
    "transformers 5.23, modeling_utils.py:2633",
    "builds new embeddings out of this rank's rows",
)

#: While a model holds slices.
OVERRIDES = (
    RESIZING,
    Override(
        "transformers.modeling_utils.PreTrainedModel",
        "save_pretrained",
        Refusal(f"save_pretrained: this {_advice('model')}"),
        "transformers 5.23, modeling_utils.py:3310",
        "writes this rank's slices",
    ),
)
