"""Sequence parallelism: between the blocks of a decoder layer each rank has a slice of the sequence.

Residuals, norms and dropout of a layer run on `[batch, length / tp, width]`. Hidden states are cut before the first
layer and joined after the last one; in between, a block of a layer (attention, an MLP) sees the whole sequence:

| a block              | enters by                     | ends by                       | what a layer sends           |
| -------------------- | ----------------------------- | ----------------------------- | ---------------------------- |
| that closes a region | all-gather, b. reduce-scatter | reduce-scatter, b. all-gather | as many bytes as all-reduces |
| that ends by one     | all-gather, b. slice          | reduce-scatter, b. all-gather | the region's own backward    |
| any other            | all-gather, b. slice          | slice, b. all-gather          | those, and the block's own   |

The first kind has nothing but column-parallel layers first and row-parallel ones last, whose all-reduces are left out.
In the second, such as latent attention, column-parallel layers take what replicated modules have made of the input. In
the third everything runs as without sequence parallelism: experts and their routers, what a plan leaves replicated. A
whole layer is such a block where its blocks cannot be told, or where it is given more of each token than its hidden
states.

Parameters that are used on a slice (norms, biases of row-parallel layers) get a part of their gradient on each rank.
They are summed in the graph, once for every backward: one all-reduce a layer of all of them together.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ..core.collectives import (
    copy_to_tp,
    gather_from_tp,
    gather_to_tp,
    gather_to_tp_meanwhile,
    scatter_to_tp,
    start_gather_whole,
)
from ..core.layout import chunk_ranges
from .forward import ParallelForward
from .hooks import has_users_hooks, hook_around
from .overlap import Again
from .region import Region, Spread, in_bf16

__all__ = ["Block", "Layer", "Stack"]

_OFF = "Set sequence_parallel=False for this model."
_CHECKPOINT = "_gradient_checkpointing_func"


class Stack:
    """The layers that a model runs one after the other, all in a module `owner`.

    Spread only in training and where there are gradients, so that evaluation and generation are what they are.
    """

    def __init__(self, region: Region, owner: nn.Module, layers: Sequence[Layer]):
        self.region = region
        self.owner = owner
        self.layers = tuple(layers)
        self.wanted = False  # of the forward under way
        self.carried = False  # whether a layer's hooks run within what is computed again
        self.spread: Spread | None = None  # from the first layer to the last

    def attach(self) -> None:
        hook_around(self.owner, self._begin, self._end)
        for layer in self.layers:
            layer.attach(self)

    def begin(self, hidden: Any) -> Spread | None:
        """How to spread what the first layer gets; None to leave it."""
        if not isinstance(hidden, Tensor) or hidden.ndim != 3 or not hidden.is_floating_point():
            shape = f"a {type(hidden).__name__}" + (f" {tuple(hidden.shape)}" if isinstance(hidden, Tensor) else "")
            raise ValueError(
                f"sequence_parallel=True: the first layer of this {type(self.owner).__name__} gets {shape} first, and "
                f"not hidden states [batch, sequence, hidden]. {_OFF}"
            )
        mesh = self.region.mesh
        if hidden.shape[1] < mesh.size():
            return None
        sizes = tuple(stop - start for ((start, stop),) in chunk_ranges(hidden.shape[1], mesh.size()))
        return Spread(mesh, hidden.shape[0], sizes, hidden.shape[2])

    def _begin(self, owner: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        asked = kwargs.get("output_hidden_states")
        if asked is None:
            asked = getattr(getattr(owner, "config", None), "output_hidden_states", False)
        self.wanted = owner.training and torch.is_grad_enabled() and asked in (None, False)
        self.spread = None
        for layer in self.layers:
            layer.carry()

    def _end(self, owner: nn.Module, args: Any, output: Any) -> None:
        left, self.spread, self.wanted = self.spread, None, False
        if left is not None and output is not None:
            raise ValueError(
                f"sequence_parallel=True: this {type(owner).__name__} has left its layers before the last one, and "
                f"each rank has a slice of the sequence. {_OFF}"
            )

    def refuse_backward(self, module: nn.Module) -> None:
        """Raise where a module is computed once more in a backward, and it is not known how it was spread."""
        if torch._C._current_graph_task_id() != -1 and module.training and not (self.wanted or self.carried):
            raise ValueError(
                f"sequence_parallel=True: a {type(module).__name__} is computed once more in the backward, and not by "
                "the model's own checkpointing. Use `gradient_checkpointing_enable()`, or set sequence_parallel=False."
            )

    @contextmanager
    def again(self, wanted: bool, spread: Spread | None) -> Iterator[None]:
        """Around what may be computed once more in a backward, the hooks of a layer included."""
        before = self.wanted, self.carried, self.spread
        self.wanted, self.carried, self.spread = wanted, True, spread
        try:
            yield
        finally:
            self.wanted, self.carried, self.spread = before

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "wanted": False, "carried": False, "spread": None}


class Block:
    """A module of a layer that sees the whole sequence.

    Args:
        module: The module.
        calls: Of the layers that open a region in it, where it closes that too; None of any other block.
        ends: Whether it ends by a row-parallel layer in any case.
    """

    def __init__(self, module: nn.Module, calls: Sequence[ParallelForward] | None, ends: bool = False):
        self.module = module
        self.calls = calls
        self.ends = ends or calls is not None
        self.layer: Layer
        self._open: Spread | None = None

    def attach(self, layer: Layer) -> None:
        self.layer = layer
        hook_around(self.module, self._begin, self._end)

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        spread = self.layer.running
        if spread is None:
            if not self.layer.sees_all:
                self.layer.stack.refuse_backward(module)
            return None
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        own = {id(leaf): leaf for leaf in leaves if leaf.shape == spread.own and leaf.is_floating_point()}
        rest = [leaf for leaf in leaves if id(leaf) not in own and leaf.is_floating_point()]
        if not own:
            if any(leaf.shape[-1:] == (spread.width,) for leaf in rest):
                shapes = ", ".join(str(tuple(leaf.shape)) for leaf in rest)
                raise ValueError(
                    f"sequence_parallel=True: a {type(module).__name__} gets {shapes}, and not hidden states "
                    f"{spread.own}, of which each rank has a slice. {_OFF}"
                )
            return None
        region, whole = self.layer.region, {}
        alone = len(own) == 1 and not any(leaf.requires_grad for leaf in rest)
        closes = self.calls is not None and alone
        for key, leaf in own.items():
            if closes:
                cast = in_bf16(leaf) and self._casts()
                joined = self._gather(spread, leaf.to(torch.bfloat16) if cast else leaf)
                whole[key] = joined.to(leaf.dtype) if cast and self._is_seen() else joined
            else:
                whole[key] = gather_from_tp(spread.mesh, leaf, 1, spread.sizes)
        self._open, region.between_blocks = spread, False
        region.spread, region.entered = (spread if self.ends and alone else None), closes
        if not closes and region.stream is not None:
            region.stream.leave()
        return tree_map_only(Tensor, lambda leaf: whole.get(id(leaf), leaf), (args, kwargs))

    def _end(self, module: nn.Module, args: Any, output: Any) -> Any:
        spread, self._open = self._open, None
        if spread is None:
            return None
        region = self.layer.region
        closed = region.spread is not None
        region.spread, region.entered, region.between_blocks = None, False, True
        region.forget_gathered()
        if output is None:
            return None
        if not closed:
            output = sliced(spread, output)
        self.layer.draw()
        return output

    def _gather(self, spread: Spread, source: Tensor) -> Tensor:
        assert self.calls is not None
        region = self.layer.region
        beside = None
        if region.overlap is not None:
            elements = sum(spread.sizes) * prod(source.shape[:1] + source.shape[2:])
            beside = region.beside(source, elements, *self.calls)
        if beside is None:
            return gather_to_tp(spread.mesh, source, 1, spread.sizes)
        beside.again = Again(source, partial(start_gather_whole, spread.mesh, dim=1, sizes=spread.sizes))
        whole, *weights = gather_to_tp_meanwhile(
            spread.mesh, source, 1, spread.sizes, beside.weights, beside.gradients, beside.again.ensure
        )
        region.set_gathered(whole, beside.passed(weights), beside.again)
        return whole

    def _casts(self) -> bool:
        """Whether all that the block does with its input is what autocast does in bf16; see `Region.enter`."""
        assert self.calls is not None
        return all(call.casts() for call in self.calls)

    def _is_seen(self) -> bool:
        """Whether a hook of a user's may look at what the block is given, on this rank, and so at its type."""
        assert self.calls is not None
        return has_users_hooks(self.module) or any(call.is_seen() for call in self.calls)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": None}


class Layer:
    """A decoder layer.

    Args:
        module: The layer.
        blocks: Of it; None, if the whole layer sees the whole sequence.
        plain: Modules with parameters that are used on a slice.
        partial: Calls in blocks that close a region, of modules with parameters whose gradients are partial: as the
            region is entered by the block, which has no all-reduce, those are summed with the layer's.
        biases: Calls in such blocks of row-parallel layers, which add their bias to a slice.
    """

    def __init__(
        self,
        module: nn.Module,
        blocks: Sequence[Block] | None,
        plain: Sequence[nn.Module] = (),
        partial: Sequence[ParallelForward] = (),
        biases: Sequence[ParallelForward] = (),
    ):
        self.module = module
        self.blocks = blocks
        self.plain = tuple(plain)
        self.partial = tuple(partial)
        self.biases = tuple(biases)
        self.stack: Stack
        self.running: Spread | None = None  # while it computes on a slice
        self._waiting: tuple[Spread, bool] | None = None  # for what checkpointing runs within it
        self._saved: list[tuple[nn.Module, str, nn.Parameter]] = []
        self._around: Spread | None = None  # while it sees the whole sequence

    @property
    def region(self) -> Region:
        return self.stack.region

    @property
    def sees_all(self) -> bool:
        """Whether it is computed on the whole sequence."""
        return self._around is not None

    def attach(self, stack: Stack) -> None:
        self.stack = stack
        hook_around(self.module, self._begin, self._end)
        for block in self.blocks or ():
            block.attach(self)

    # ------------------------------------------------------------------------------------------------- the hooks

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        stack = self.stack
        if not stack.wanted:
            stack.refuse_backward(module)
            return None
        name = None if args else next(iter(kwargs), None)
        hidden = args[0] if name is None else kwargs[name]
        if stack.spread is None and self is stack.layers[0]:
            stack.spread = stack.begin(hidden)
        spread = stack.spread
        if spread is None:
            return None
        if self is stack.layers[0] and hidden.shape == spread.whole:
            hidden = scatter_to_tp(spread.mesh, hidden, 1, spread.sizes)
        elif not isinstance(hidden, Tensor) or hidden.shape != spread.own:
            got = tuple(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
            raise ValueError(
                f"sequence_parallel=True: a {type(module).__name__} gets {got} from the layer before it, and not "
                f"{spread.own}, of which each rank has a slice. {_OFF}"
            )
        whole = self.blocks is None or any(
            isinstance(leaf, Tensor) and leaf.requires_grad and leaf.shape[:2] == spread.whole[:2]
            for leaf in tree_leaves((args[1:], kwargs))
        )
        if self._checkpointed() and name is None and not stack.carried:
            self._waiting = spread, whole
        else:
            hidden = self.open(spread, whole, hidden)
        return (args if name is not None else (hidden, *args[1:])), ({**kwargs, name: hidden} if name else kwargs)

    def _end(self, module: nn.Module, args: Any, output: Any) -> Any:
        self._waiting = None
        error = sys.exc_info()[1] if output is None and self.stack.spread is not None else None
        if hasattr(error, "add_note"):  # since Python 3.11
            error.add_note(
                "sequence_parallel=True: a rank has a slice of the sequence here. If this is not raised without it, "
                "set sequence_parallel=False for this model."
            )
        spread = self.stack.spread
        output = self.close(output)
        if output is None or spread is None or self is not self.stack.layers[-1]:
            return output
        self.stack.spread = None
        return tree_map_only(Tensor, lambda leaf: _joined(spread, leaf), output)

    # -------------------------------------------------------------------------------------------- what is inside

    def open(self, spread: Spread, whole: bool, hidden: Tensor) -> Tensor:
        if whole:
            self._around = spread
            return gather_from_tp(spread.mesh, hidden, 1, spread.sizes)
        self.running, self.region.between_blocks = spread, True
        self._sum_gradients()
        self.draw()
        return hidden

    def close(self, output: Any) -> Any:
        around, self._around = self._around, None
        if around is not None:
            return output if output is None else sliced(around, output)
        if self.running is None:
            return output
        self.running, self.region.between_blocks = None, False
        for module, name, param in self._saved:
            module._parameters[name] = param
        self._saved.clear()
        for call in (*self.partial, *self.biases):
            call.offered.clear()
        if self.region.stream is not None:
            self.region.stream.leave()
        return output

    def draw(self) -> None:
        """Go over to this rank's random stream, where it is not yet."""
        if self.region.stream is not None:
            self.region.stream.enter()

    def _sum_gradients(self) -> None:
        """Let modules compute with copies of their parameters whose gradients are summed over the ranks."""
        places: list[tuple[Any, str, Tensor, Any]] = []
        for module in self.plain:
            places += [(module, name, param, None) for name, param in module._parameters.items() if param is not None]
        for call in self.partial:
            places += [(call, name, call.held(name), call.shared(name)) for name in call.partial_names()]
        for call in self.biases:
            bias = call.module._parameters.get("bias")
            if bias is not None:
                places.append((call, "bias", bias, None))
        once: list[tuple[Tensor, Any]] = []
        for _, _, param, shared in places:
            # Not by their `id`, which the compiler would guard, and so compile each layer anew.
            if not any(param is other for other, _ in once):
                once.append((param, shared))
        copies = copy_to_tp(self.region.mesh, *(param for param, _ in once), shared=[shared for _, shared in once])
        for place, name, param, _ in places:
            copy = next(copy for (other, _), copy in zip(once, copies) if other is param)
            if isinstance(place, ParallelForward):
                place.offered[name] = copy
            elif copy is not param:
                self._saved.append((place, name, param))  # type: ignore[arg-type]
                place._parameters[name] = copy

    # -------------------------------------------------------------------------------------------- checkpointing

    def _checkpointed(self) -> bool:
        module: Any = self.module
        own = isinstance(module.__dict__.get(_CHECKPOINT), _Carrying)
        return own and module.training and bool(getattr(module, "gradient_checkpointing", False))

    def carry(self) -> None:
        """Let what is computed again know what it was computed with."""
        stock = self.module.__dict__.get(_CHECKPOINT)
        if stock is not None and not isinstance(stock, _Carrying):
            self.module.__dict__[_CHECKPOINT] = _Carrying(self, stock)

    def waiting(self) -> tuple[Spread, bool] | None:
        waiting, self._waiting = self._waiting, None
        return waiting

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "running": None, "_waiting": None, "_saved": [], "_around": None}


class _Carrying:
    """A layer's checkpointing, which takes with it how the sequence was spread."""

    def __init__(self, layer: Layer, stock: Callable):
        self.layer = layer
        self.stock = stock

    def __call__(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        stack, waiting = self.layer.stack, self.layer.waiting()
        if waiting is not None:  # the layer's hooks are around this
            return self.stock(_Inside(self.layer, *waiting, function), *args, **kwargs)
        return self.stock(_Around(stack, function), *args, **kwargs)


class _Inside:
    def __init__(self, layer: Layer, spread: Spread, whole: bool, function: Callable):
        self.layer = layer
        self.spread = spread
        self.whole = whole
        self.function = function

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = None
        try:
            hidden = self.layer.open(self.spread, self.whole, hidden)
            output = self.function(hidden, *args, **kwargs)
        finally:
            output = self.layer.close(output)
        return output


class _Around:
    def __init__(self, stack: Stack, function: Callable):
        self.stack = stack
        self.wanted = stack.wanted
        self.spread = stack.spread
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        first = self.stack.wanted and not self.stack.carried  # its hooks decide for the layers that follow
        with self.stack.again(self.wanted, self.spread):
            output = self.function(*args, **kwargs)
            left = self.stack.spread
        if first:
            self.stack.spread = left
        return output


def sliced(spread: Spread, output: Any) -> Any:
    """What a block or a layer gives of the whole sequence, cut."""
    found: dict[int, Tensor] = {}

    def cut(leaf: Tensor) -> Tensor:
        by_token = leaf.shape == (spread.batch * sum(spread.sizes), spread.width)
        if not (by_token or leaf.shape == spread.whole) or not leaf.is_floating_point():
            return leaf
        if id(leaf) not in found:
            own = scatter_to_tp(spread.mesh, leaf.view(spread.whole), 1, spread.sizes)
            found[id(leaf)] = own.flatten(0, 1) if by_token else own
        return found[id(leaf)]

    return tree_map_only(Tensor, cut, output)


def _joined(spread: Spread, leaf: Tensor) -> Tensor:
    if leaf.shape != spread.own or not leaf.is_floating_point():
        return leaf
    return gather_from_tp(spread.mesh, leaf, 1, spread.sizes)
