"""ZeRO-1: each replica keeps the optimizer state of its part of every parameter (arXiv:1910.02054).

The optimizer stays the user's own object. During its step it holds, in place of each parameter, this replica's range
of the parameter's elements, as a view; afterwards the updated ranges are gathered from all replicas. Gradients stay
full and equal on all replicas, as DDP leaves them, so norms, clipping and scalers see what they always see.

An optimizer that looks at more than one element gets full parameters instead, each on one replica: `steps_by_element`
finds out which. Optimizer states are then divided as evenly as the sizes of parameters allow.

Why not torch's `ZeroRedundancyOptimizer`: it makes the optimizer itself, from a class, and wants it before the model
is sharded; it divides whole parameters, so an embedding of 128 k words stays on one replica; it sends one broadcast a
parameter, or owns the parameters' memory; its state has to be collected on one rank before it can be saved at all.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Size, Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ..core.agreement import Ranks
from ..core.collectives import gather_into
from ..core.override import Override, install
from ..core.pieces import FlatShard
from ..core.shard import full_shape, shard_info
from .buckets import buckets
from .by_element import likeness, steps_by_element
from .full_tensor_step import _with_closure_called, bare_optimizer, steps_on_full_tensors

__all__ = ["OVERRIDES", "Zero1", "check_zero1", "zero1_of"]

_KEPT_AS = "_accel_tp_ddp_zero1"
_BUCKET = 64 << 20  # bytes that one collective gathers at most: the memory that it takes beside the parameters
_IN_PLACE = 1 << 20  # bytes of a range from which on copying it to a bucket and back would cost more than a collective

#: Optimizers whose step on a parameter looks at others, or that take no step: no trial is needed.
_LOOKS_AT_OTHERS = frozenset(
    "AdaLomo DAdaptAdaGrad DAdaptAdam DAdaptLion DAdaptSGD LBFGS Lomo Prodigy SAM".split(),
)


def check_zero1(optimizer: Optimizer) -> None:
    """Raise if the state of `optimizer` cannot be divided over the replicas.

    Raises:
        ValueError: With the optimizer's name.
    """
    for kind in type(optimizer).__mro__:
        if kind.__name__ in _LOOKS_AT_OTHERS:
            raise ValueError(
                f"the step of the optimizer {kind.__name__} on a parameter looks at other parameters too, and with "
                "zero1 each replica steps on a part of them. Use one that steps parameter by parameter, such as "
                "AdamW, or set zero1=False."
            )
    if callable(getattr(optimizer, "eval", None)):
        raise ValueError(
            f"the optimizer {type(optimizer).__name__} changes parameters by its state outside of its step (it has "
            "`train` and `eval`), and with zero1 each replica has a part of that state. Use another one, such as "
            "AdamW, or set zero1=False."
        )


def zero1_of(optimizer: Optimizer) -> Zero1 | None:
    """What divides the state of an optimizer, bare or as Accelerate prepared it; None if nothing does."""
    return vars(bare_optimizer(optimizer)).get(_KEPT_AS)


@dataclass(frozen=True)
class _Entry:
    """One parameter whose state is divided.

    Attributes:
        param: The parameter; held, so that its id stays its own.
        owner: The replica that keeps all of its state; None if each keeps a range.
    """

    param: nn.Parameter
    owner: int | None


@dataclass
class _Views:
    """What a step works on, for as long as the parameters lie where they lie."""

    places: tuple[Any, ...]
    pieces: dict[int, nn.Parameter] = field(default_factory=dict)
    buckets: list[_Bucket] = field(default_factory=list)


class Zero1:
    """Lets each step of `optimizer` train, and keep state of, this replica's part only.

    Args:
        optimizer: Bare.
        group: The ranks that hold the same parameters: one of each replica.
        models: The models that are prepared by now; parameters of others, such as those of a loss, are trained on
            every replica, as their gradients are not averaged.
    """

    def __init__(self, optimizer: Optimizer, group: dist.ProcessGroup, models: Callable[[], Sequence[nn.Module]]):
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._models = models
        self._entries: dict[int, _Entry] = {}
        self._wrappers: list[DistributedDataParallel] = []
        self._seen: tuple[Any, ...] = ()
        self._agreed: tuple[Any, ...] | None = None
        self._by_element: dict[str, bool] = {}
        self._loads = [0] * self.size
        self._swapped: list[tuple[dict[str, Any], list[nn.Parameter]]] = []
        self._stepped: list[tuple[nn.Parameter, nn.Parameter]] = []
        self._views = _Views(())
        vars(optimizer)[_KEPT_AS] = self
        self._hook = optimizer.register_step_pre_hook(self._before).id
        self._last_hooks: list[int] = []
        after = optimizer.register_step_post_hook(self._after)
        _in_order(optimizer._optimizer_step_post_hooks).move_to_end(after.id, last=False)  # others see parameters
        optimizer.register_state_dict_pre_hook(self._give_back)
        optimizer.register_load_state_dict_pre_hook(self._give_back)

    def stay_last(self, optimizer: Optimizer) -> None:
        """Let hooks that are registered from now on see the parameters: those registered since this one come last."""
        hooks = list(optimizer._optimizer_step_pre_hooks)
        self._last_hooks = hooks[hooks.index(self._hook) :]
        install(optimizer, OVERRIDES, self)

    def put_last(self, optimizer: Optimizer) -> None:
        for hook in self._last_hooks:
            _in_order(optimizer._optimizer_step_pre_hooks).move_to_end(hook)

    # ------------------------------------------------------------------------------------------------- what is whose

    def shard(self, optimizer: Optimizer, param: Tensor) -> FlatShard | None:
        """Which elements this replica keeps the state of; None where it is all of them, or none."""
        self._assign(bare_optimizer(optimizer))
        entry = self._entries.get(id(param))
        return self._range(entry.param, self.rank) if entry is not None and entry.owner is None else None

    def holds(self, optimizer: Optimizer, param: Tensor) -> bool:
        """Whether this replica keeps any state of a parameter."""
        self._assign(bare_optimizer(optimizer))
        entry = self._entries.get(id(param))
        return entry is None or self._holds(entry, self.rank)

    def _holds(self, entry: _Entry, replica: int) -> bool:
        if entry.owner is not None:
            return entry.owner == replica
        span = self._range(entry.param, replica)
        # Of a parameter without elements, as a rank has of a small one, the first replica keeps the state.
        return span.start < span.stop or replica == 0

    def _range(self, param: nn.Parameter, replica: int) -> FlatShard:
        return FlatShard.of_replica(param, replica, self.size, shard_info(param))

    def _assign(self, optimizer: Optimizer) -> None:
        """Divide what has not been divided yet. No collective: every replica comes to the same."""
        models = self._models()
        params = tuple(id(param) for group in optimizer.param_groups for param in group["params"])
        seen = (params, tuple(map(id, models)))
        if seen == self._seen:
            return
        averaged = {id(param): wrapper for model in models for wrapper, param in _averaged(model)}
        fresh = [
            (group, param)
            for group in optimizer.param_groups
            for param in group["params"]
            if id(param) in averaged and id(param) not in self._entries and param.dim()
        ]
        full: list[nn.Parameter] = []
        for group, param in fresh:
            if self._is_cut(optimizer, group) and param.is_contiguous():
                self._entries[id(param)] = _Entry(param, None)
            else:
                full.append(param)
        for param in sorted(full, key=lambda param: -full_shape(param).numel()):  # stable, so the same everywhere
            owner = self._loads.index(min(self._loads))
            self._loads[owner] += full_shape(param).numel() if param.requires_grad else 0
            self._entries[id(param)] = _Entry(param, owner)
        self._wrappers = list({id(w): w for key, w in averaged.items() if key in self._entries}.values())
        self._seen = seen
        for _, param in fresh:
            self._let_go(optimizer, param)

    def _is_cut(self, optimizer: Optimizer, group: dict[str, Any]) -> bool:
        if steps_on_full_tensors(optimizer):
            return False
        alike = likeness(group)
        if alike not in self._by_element:
            self._by_element[alike] = steps_by_element(optimizer, group)
        return self._by_element[alike]

    def _let_go(self, optimizer: Optimizer, param: nn.Parameter) -> None:
        """Of state that was there before it was divided, keep this replica's."""
        if param not in optimizer.state:
            return
        entry = self._entries[id(param)]
        if not self._holds(entry, self.rank):
            del optimizer.state[param]
        elif entry.owner is None:
            span = self._range(param, self.rank)
            state = optimizer.state[param]
            state.update({key: span.cut_if_full(value) for key, value in state.items()})

    # -------------------------------------------------------------------------------------------------------- a step

    def _before(self, optimizer: Optimizer, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        self._give_back(optimizer)
        args, kwargs = _with_closure_called(args, kwargs)
        self._assign(optimizer)
        self._agree(optimizer)
        if any(not wrapper.require_backward_grad_sync for wrapper in self._wrappers):
            raise RuntimeError(
                "an optimizer with zero1 takes a step within `no_sync`, where each replica has gradients of its own, "
                "and zero1 needs their mean. Step outside of it, and do without LocalSGD, or set zero1=False."
            )
        self._renew_views()
        for group in optimizer.param_groups:
            params = group["params"]
            self._swapped.append((group, params))
            group["params"] = [own for param in params if (own := self._own(optimizer, param)) is not None]
        return args, kwargs

    def _own(self, optimizer: Optimizer, param: nn.Parameter) -> nn.Parameter | None:
        """What this replica steps on in place of `param`."""
        entry = self._entries.get(id(param))
        if entry is None:
            return param
        if not self._holds(entry, self.rank):
            return None
        if entry.owner is not None:
            return param
        if param.grad is None:
            return None
        if param.grad.layout != torch.strided:
            raise ValueError(
                f"a parameter of size {tuple(param.shape)} has a sparse gradient, which zero1 cannot divide. Make its "
                "embedding with sparse=False, or set zero1=False."
            )
        piece = self._views.pieces[id(param)]
        piece.grad = self._range(param, self.rank).cut(param.grad)
        if param in optimizer.state:
            optimizer.state[piece] = optimizer.state.pop(param)
        self._stepped.append((param, piece))
        return piece

    def _after(self, optimizer: Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
        self._give_back(optimizer)
        with torch.no_grad():
            for bucket in self._views.buckets:
                bucket.gather(self.group)

    def _give_back(self, optimizer: Optimizer, *_: Any) -> None:
        """Let the optimizer have its parameters again, also after a step that raised."""
        while self._swapped:
            group, params = self._swapped.pop()
            group["params"] = params
        for param, piece in self._stepped:
            piece.grad = None
            if piece in optimizer.state:
                optimizer.state[param] = optimizer.state.pop(piece)
        self._stepped.clear()

    def _agree(self, optimizer: Optimizer) -> None:
        """Raise on every rank, before the first collective of a step, unless all ranks divide the same."""
        if self._agreed == self._seen:
            return
        rows = [
            f"group {index}: {tuple(full_shape(param))} {param.dtype} {self._how(param)}"
            for index, group in enumerate(optimizer.param_groups)
            for param in group["params"]
        ]
        Ranks("zero1").same([type(optimizer).__name__, *rows], _DIFFERENT, "the optimizer's step")
        self._agreed = self._seen

    def _how(self, param: nn.Parameter) -> str:
        entry = self._entries.get(id(param))
        if entry is None:
            return "on every replica"
        return "by ranges" if entry.owner is None else f"on replica {entry.owner}"

    # ------------------------------------------------------------------------------------------------------ gathering

    def _renew_views(self) -> None:
        """Views of the parameters and the order of their collectives, unless both are as they were."""
        # A frozen parameter that has a gradient is trained all the same.
        trained = [e for e in self._entries.values() if e.param.requires_grad or e.param.grad is not None]
        places = tuple((id(entry.param), entry.param.data_ptr()) for entry in trained)
        if places == self._views.places:
            return
        self._views = _Views(places)
        with torch.no_grad():
            for entry in trained:
                if entry.owner is None:
                    flat = self._range(entry.param, self.rank).cut(entry.param.detach())
                    self._views.pieces[id(entry.param)] = nn.Parameter(flat, requires_grad=entry.param.requires_grad)
            self._views.buckets = list(_buckets(trained, self.rank, self.size))

    # ---------------------------------------------------------------------------------------------------- full states

    def full_states(self, optimizer: Optimizer, states: dict[Any, Any]) -> Iterator[tuple[int, str, Any]]:
        """The states of all parameters, as each tensor-parallel rank would have them: number, key and value.

        Collective over all ranks, tensor by tensor.

        Args:
            optimizer: Bare or prepared.
            states: Those in its `state_dict()`.
        """
        self._assign(bare_optimizer(optimizer))
        params = [param for group in optimizer.param_groups for param in group["params"]]
        own = {index: state for index, state in states.items() if isinstance(index, int)}
        entries = {index: self._entries.get(id(param)) for index, param in enumerate(params)}
        described = {
            index: {key: _describe(value, params[index], entries[index]) for key, value in state.items()}
            for index, state in own.items()
        }
        there: dict[int, dict[str, _Description]] = {}
        for other in Ranks("zero1").all(described):
            for index, state in other.items():
                there[index] = {**state, **there.get(index, {})}
        for index in sorted(there):
            entry, state = entries[index], own.get(index, {})
            for key, (dtype, shape, value) in there[index].items():
                if dtype is None or entry is None:
                    yield index, key, state.get(key, value)
                elif entry.owner is None:
                    yield index, key, self._from_all(entry.param, state.get(key), dtype)
                else:
                    yield index, key, self._from_owner(entry, state.get(key), dtype, shape)

    def _from_owner(self, entry: _Entry, own: Tensor | None, dtype: torch.dtype, shape: Size | None) -> Tensor:
        if own is None:
            own = torch.empty(entry.param.shape if shape is None else shape, dtype=dtype, device=entry.param.device)
        sent = own.detach().contiguous()
        if sent.numel():
            dist.broadcast(sent, group=self.group, group_src=entry.owner)
        return sent

    def _from_all(self, param: nn.Parameter, own: Tensor | None, dtype: torch.dtype) -> Tensor:
        count = param.numel()
        step = FlatShard.step(count, self.size)
        sent = torch.zeros(step, dtype=dtype, device=param.device)
        if own is not None:
            sent[: own.numel()].copy_(own)
        full = sent.new_empty(self.size * step)
        if count:
            gather_into(full, sent, self.group)
        return full[:count].view(param.shape)


class _Description(NamedTuple):
    """What other ranks have to know of a state: a tensor's type and shape (None: its parameter's), or its value."""

    dtype: torch.dtype | None
    shape: Size | None
    value: Any


def _describe(value: Any, param: nn.Parameter, entry: _Entry | None) -> _Description:
    if not isinstance(value, Tensor):
        return _Description(None, None, value)
    if entry is None or value.dim() == 0:
        return _Description(None, None, value.detach().cpu() if value.dim() == 0 else None)
    return _Description(value.dtype, None if value.shape == param.shape else value.shape, None)


# --- collectives -----------------------------------------------------------------------------------------------------


class _Bucket(Protocol):
    """What one collective sends."""

    def gather(self, group: dist.ProcessGroup) -> None: ...


@dataclass(frozen=True)
class _InPlace:
    """One parameter, cut in equal parts that are worth a collective of their own.

    Attributes:
        full: Its elements.
        own: Those of this replica among them.
    """

    full: Tensor
    own: Tensor

    def gather(self, group: dist.ProcessGroup) -> None:
        gather_into(self.full, self.own, group)


@dataclass(frozen=True)
class _Rows:
    """Ranges of several parameters: each replica sends a row, in which all have the same place.

    Attributes:
        length: Of a row.
        size: Number of replicas.
        own: This replica's ranges, each with its place in the row.
        even: All replicas' ranges of a parameter that is cut in equal parts, a row each, with their place in the rows.
        others: The other replicas' ranges of other parameters, each with its place in all rows.
    """

    length: int
    size: int
    own: list[tuple[Tensor, int]] = field(default_factory=list)
    even: list[tuple[Tensor, int]] = field(default_factory=list)
    others: list[tuple[Tensor, int]] = field(default_factory=list)
    like: Tensor | None = None

    def gather(self, group: dist.ProcessGroup) -> None:
        assert self.like is not None
        row = self.like.new_empty(self.length)
        _copy([row[place : place + view.numel()] for view, place in self.own], [view for view, _ in self.own])
        rows = row.new_empty(self.size * self.length)
        gather_into(rows, row, group)
        table = rows.view(self.size, self.length)
        _copy([view for view, _ in self.even], [table[:, place : place + view.size(1)] for view, place in self.even])
        _copy([view for view, _ in self.others], [rows[place : place + view.numel()] for view, place in self.others])


@dataclass(frozen=True)
class _FromOwner:
    """Full parameters that one replica has stepped on."""

    owner: int
    is_own: bool
    params: list[Tensor]

    def gather(self, group: dist.ProcessGroup) -> None:
        flat = torch.cat([param.reshape(-1) for param in self.params])
        dist.broadcast(flat, group=group, group_src=self.owner)
        if not self.is_own:
            parts = flat.split([param.numel() for param in self.params])
            _copy(self.params, [part.view(param.shape) for part, param in zip(parts, self.params)])


def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    if targets:
        torch._foreach_copy_(targets, sources)


def _buckets(entries: Iterable[_Entry], rank: int, size: int) -> Iterator[_Bucket]:
    """The collectives after a step, in an order that is the same on all replicas."""
    alike: dict[tuple[Any, ...], list[Tensor]] = {}
    for entry in entries:
        if entry.param.numel():
            param = entry.param.detach()
            alike.setdefault((param.dtype, param.device, entry.owner), []).append(param)
    for (dtype, _, owner), params in alike.items():
        if owner is not None:
            for some in buckets(params, _BUCKET):
                yield _FromOwner(owner, owner == rank, some)
            continue
        rest = []
        for param in params:
            flat, step = param.view(-1), FlatShard.step(param.numel(), size)
            if step * size == flat.numel() and step * dtype.itemsize >= _IN_PLACE:
                yield _InPlace(flat, flat[rank * step : (rank + 1) * step])
            else:
                rest.append(flat)
        yield from _rows(rest, rank, size, _BUCKET // dtype.itemsize // size)


def _rows(params: list[Tensor], rank: int, size: int, longest: int) -> Iterator[_Rows]:
    """Rows of at most `longest` elements, for parameters that may be longer."""
    ranges: list[tuple[Tensor, int, int]] = []  # of each replica's part: where it begins, and how long it is
    length = 0
    for flat in params:
        step, taken = FlatShard.step(flat.numel(), size), 0
        while taken < step:
            part = min(step - taken, longest - length)
            ranges.append((flat, taken, part))
            taken, length = taken + part, length + part
            if length == longest:
                yield _row_of(ranges, rank, size)
                ranges, length = [], 0
    if ranges:
        yield _row_of(ranges, rank, size)


def _row_of(ranges: list[tuple[Tensor, int, int]], rank: int, size: int) -> _Rows:
    bucket = _Rows(sum(part for *_, part in ranges), size, like=ranges[0][0])
    place = 0
    for flat, offset, part in ranges:
        step = FlatShard.step(flat.numel(), size)
        if step * size == flat.numel():  # one copy in place of one for each replica
            view = flat.view(size, step)[:, offset : offset + part]
            bucket.own.append((view[rank], place))
            bucket.even.append((view, place))
            place += part
            continue
        for replica in range(size):
            start = replica * step + offset
            view = flat[start : min(start + part, (replica + 1) * step)]  # the last replicas may have less
            if view.numel() and replica == rank:
                bucket.own.append((view, place))
            elif view.numel():
                bucket.others.append((view, replica * bucket.length + place))
        place += part
    return bucket


def _in_order(hooks: dict[int, Any]) -> OrderedDict[int, Any]:
    assert isinstance(hooks, OrderedDict)
    return hooks


def _averaged(model: nn.Module) -> Iterator[tuple[DistributedDataParallel, nn.Parameter]]:
    """The parameters whose gradients a wrapper averages over the replicas."""
    for wrapper in model.modules():
        if isinstance(wrapper, DistributedDataParallel):
            ignored = wrapper.parameters_to_ignore
            for name, param in wrapper.module.named_parameters():
                if name not in ignored:
                    yield wrapper, param


_DIFFERENT = (
    "rank {rank} would divide the optimizer's state otherwise than rank {own} ({theirs!r} against {ours!r}). Build "
    "the same optimizer, of the same parameters, on every rank."
)


def _register_step_pre_hook(zero: Zero1, stock: Callable, optimizer: Optimizer, /, hook: Callable) -> Any:
    handle = stock(hook)
    zero.put_last(optimizer)
    return handle


#: On an optimizer whose state is divided.
OVERRIDES = (
    Override(
        *("torch.optim.Optimizer", "register_step_pre_hook", _register_step_pre_hook),
        *("torch 2.13, optim/optimizer.py:570", "lets a hook see the parts that the step works on"),
        counts=False,
    ),
)
