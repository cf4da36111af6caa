"""Optimizers whose step looks at a full tensor: means over rows and columns, norms, orthogonalisation.

On a shard such a step would do something else, so it is taken on full tensors. These are dealt out to the ranks: one
of them gets all parts of a parameter and of its gradient, takes the optimizer's own step, and sends each rank its
part back. The state of such a parameter is then sent to all, and so it is full on every rank: small for Adafactor (a
row and a column), a full momentum for Muon.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..core.collectives import exchange, on_any_rank
from ..core.control import gather_objects
from ..core.randomness import agree_on_randomness, random_digest
from ..core.shard import ShardInfo, shard_info
from .buckets import BUCKET_BYTES, buckets, send_bucket

__all__ = ["FullTensorStep", "bare_optimizer", "deal", "register_whole_step", "steps_on_full_tensors"]

_REGISTERED: set[type] = {getattr(torch.optim, name) for name in ("Adafactor", "Muon") if hasattr(torch.optim, name)}
_BY_NAME = {"transformers.optimization.Adafactor"}  # which is not imported here


def register_whole_step(kind: type[Optimizer]) -> type[Optimizer]:
    """Let optimizers of this class, and of classes derived from it, step on full tensors under tensor parallelism.

    Right for an optimizer whose update of a parameter depends on that parameter, its gradient, its state and the
    options of its group, and on no other parameter: LAMB, LARS, CAME, Shampoo and the like. The parameters are dealt
    out over the ranks, so a rank takes the steps of 1 / tp_size of them; it costs the sending of parameters, gradients
    and state, and a state as large as without tensor parallelism. What a state holds besides tensors is pickled.

    Returns:
        `kind`, so that it can be used as a decorator.

    Raises:
        TypeError: If `kind` is no class of optimizers.
    """
    if not isinstance(kind, type) or not issubclass(kind, Optimizer):
        raise TypeError(f"register_whole_step takes a subclass of torch.optim.Optimizer, not {kind!r}.")
    _REGISTERED.add(kind)
    return kind


def steps_on_full_tensors(optimizer: Optimizer) -> bool:
    """Whether an optimizer, bare or as Accelerate prepared it, steps on full tensors and keeps full states."""
    kinds = type(bare_optimizer(optimizer)).__mro__
    return any(kind in _REGISTERED or f"{kind.__module__}.{kind.__qualname__}" in _BY_NAME for kind in kinds)


def bare_optimizer(optimizer: Optimizer) -> Optimizer:
    """The optimizer in all that has been put around it."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer


class FullTensorStep:
    """Lets each step of `optimizer` take the sharded parameters as full ones first, and then all others by itself.

    By hooks, so that it also works under schedulers and scalers that have wrapped `step`. Hooks that are to see the
    gradients before the step have to be registered earlier.
    """

    def __init__(self, optimizer: Optimizer):
        self._gradients: list[tuple[nn.Parameter, Tensor]] = []
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)

    def _before(self, optimizer: Optimizer, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        self._give_back()  # what a step that raised has left
        args, kwargs = _with_closure_called(args, kwargs)
        entries = _with_gradient(optimizer)
        for mesh in dict.fromkeys(entry.info.mesh for entry in entries):
            _DealtStep(optimizer, mesh, [entry for entry in entries if entry.info.mesh == mesh]).take()
        for _, param, _ in entries:
            if param.grad is not None:
                self._gradients.append((param, param.grad))
                param.grad = None  # the step that follows passes it over
        return args, kwargs

    def _after(self, optimizer: Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
        self._give_back()

    def _give_back(self) -> None:
        while self._gradients:
            param, grad = self._gradients.pop()
            if param.grad is None:
                param.grad = grad


class _Entry(NamedTuple):
    """A sharded parameter, its group of the optimizer, and its shard."""

    group: dict[str, Any]
    param: nn.Parameter
    info: ShardInfo

    @property
    def types(self) -> tuple[torch.dtype, torch.dtype]:
        """Of the parameter, and of its gradient."""
        return self.param.dtype, self.param.dtype if self.param.grad is None else self.param.grad.dtype


class _DealtStep:
    """One step on the full tensors of some parameters, each taken by one rank of `mesh`."""

    def __init__(self, optimizer: Optimizer, mesh: DeviceMesh, entries: list[_Entry]):
        self.optimizer, self.mesh, self.entries = optimizer, mesh, entries
        self.rank, self.ranks = mesh.get_local_rank(), mesh.size()
        sizes = [entry.info.global_shape.numel() for entry in entries]
        self.owners = deal(sizes, self.ranks)
        nbytes = [size * entry.param.element_size() for size, entry in zip(sizes, entries)]
        self.turns = _turns(self.owners, nbytes, self.ranks)
        self.problem: Exception | None = None

    @torch.no_grad()
    def take(self) -> None:
        """Raises on every rank what the step has raised on any; what it has not reached stays as it is."""
        for turn in self.turns:
            self._take(turn)
        self._share_state()

    def _take(self, turn: list[int]) -> None:
        outgoing: list[list[Tensor]] = [[] for _ in range(self.ranks)]
        incoming: list[list[Any]] = [[] for _ in range(self.ranks)]
        for index in turn:
            (_, param, info), owner = self.entries[index], self.owners[index]
            if self.rank in info.senders:
                outgoing[owner] += [param, torch.zeros_like(param) if param.grad is None else param.grad]
            if self.rank == owner:
                for sender in info.senders:
                    incoming[sender] += [(info.local_shapes[sender], dtype) for dtype in self.entries[index].types]
        parts = [iter(tensors) for tensors in exchange(self.mesh, outgoing, incoming)]

        outgoing, incoming = [[] for _ in range(self.ranks)], [[] for _ in range(self.ranks)]
        for index in turn:
            (_, param, info), owner = self.entries[index], self.owners[index]
            incoming[owner].append((param.shape, param.dtype))
            if self.rank == owner:
                pairs = {sender: (next(parts[sender]), next(parts[sender])) for sender in info.senders}
                full = self._stepped(self.entries[index], pairs)
                for rank in range(self.ranks):
                    outgoing[rank].append(info.part_of(full, rank))
        stepped = [iter(tensors) for tensors in exchange(self.mesh, outgoing, incoming)]
        for index in turn:
            self.entries[index].param.copy_(next(stepped[self.owners[index]]))

    def _stepped(self, entry: _Entry, pairs: dict[int, tuple[Tensor, Tensor]]) -> Tensor:
        """The full parameter after the step; as it was, if that has failed, here or before."""
        group, param, info = entry
        values = {rank: value for rank, (value, _) in pairs.items()}
        full = nn.Parameter(info.joined(values, param))
        if self.problem is None:
            grads = {rank: grad for rank, (_, grad) in pairs.items()}
            full.grad = info.joined(grads, param.new_empty((), dtype=entry.types[1]))
            try:
                with _alone(self.optimizer, group, param, full):
                    type(self.optimizer).step(self.optimizer)
            except Exception as error:  # the others wait for this rank's parts
                self.problem = error
                return info.joined(values, param)
        return full

    def _share_state(self) -> None:
        """The state of each parameter from the rank that has taken its step, and what that rank's step has raised."""
        own, held = {}, {}
        for index in range(len(self.entries)):
            param = self.entries[index].param
            if self.owners[index] == self.rank and param in self.optimizer.state:
                own[index], held[index] = _described(self.optimizer.state[param], self.mesh.device_type)
        own_word = _sendable(self.problem), random_digest(self.mesh.device_type), own
        told = gather_objects(own_word, self.mesh.get_group())
        for rank, (_, _, described) in enumerate(told):
            tensors: list[Tensor] = []
            for index, state in described.items():
                if rank != self.rank:
                    param = self.entries[index].param
                    held[index] = _make_room(self.optimizer, param, state)
                tensors += held[index]
            for bucket in buckets(tensors):
                send_bucket(self.mesh, bucket, rank)
        if len({digest for _, digest, _ in told}) > 1:  # a step draws numbers, and each rank has taken other steps
            agree_on_randomness(self.mesh)
        if self.problem is not None:
            raise self.problem
        problem = next((problem for problem, _, _ in told if problem is not None), None)
        if problem is not None:
            raise problem


@dataclass(frozen=True)
class _Slot:
    """Where a tensor is in a state that is sent."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def _described(state: Any, device_type: str) -> tuple[Any, list[Tensor]]:
    """A state with slots in the place of its tensors, and these. What is on another device stays in it."""
    leaves, spec = tree_flatten(state)
    is_sent = [type(leaf) in (Tensor, nn.Parameter) and leaf.device.type == device_type for leaf in leaves]
    slots = [_Slot(tuple(leaf.shape), leaf.dtype) if sent else leaf for leaf, sent in zip(leaves, is_sent)]
    return tree_unflatten(slots, spec), [leaf for leaf, sent in zip(leaves, is_sent) if sent]


def _make_room(optimizer: Optimizer, param: nn.Parameter, described: Any) -> list[Tensor]:
    """Give `param` a state as described; its tensors, in which what they will hold is still to come.

    Those that are there already, of the same shape and type, are used again.
    """
    slots, spec = tree_flatten(described)
    known, known_spec = tree_flatten(optimizer.state.get(param, {}))
    known = known if known_spec == spec else [None] * len(slots)
    leaves, room = [], []
    for slot, old in zip(slots, known):
        if isinstance(slot, _Slot):
            fits = isinstance(old, Tensor) and (tuple(old.shape), old.dtype) == (slot.shape, slot.dtype)
            old = old if fits else torch.empty(slot.shape, dtype=slot.dtype, device=param.device)
            room.append(old)
            leaves.append(old)
        else:
            leaves.append(slot)
    optimizer.state[param] = tree_unflatten(leaves, spec)
    return room


def _sendable(problem: Exception | None) -> Exception | None:
    """`problem` as it is where it can be pickled and read again; else its kind and message."""
    try:
        copied = pickle.loads(pickle.dumps(problem))
        return problem if str(copied) == str(problem) else RuntimeError(f"{type(problem).__name__}: {problem}")
    except Exception:
        return RuntimeError(f"{type(problem).__name__}: {problem}")


def deal(sizes: Sequence[int], ranks: int) -> list[int]:
    """Which rank takes each of `sizes`, so that all have about the same: the largest first, to who has least."""
    owners, loads = [0] * len(sizes), [0] * ranks
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        owners[index] = loads.index(min(loads))
        loads[owners[index]] += sizes[index]
    return owners


def _turns(owners: Sequence[int], nbytes: Sequence[int], ranks: int) -> list[list[int]]:
    """What is sent at once: for each owner one parameter, or several as long as they are small."""
    turns: list[list[int]] = []
    for rank in range(ranks):
        filled, turn = 0, -1
        for index, owner in enumerate(owners):
            if owner != rank:
                continue
            if turn < 0 or filled + nbytes[index] > BUCKET_BYTES:
                filled, turn = 0, turn + 1
                if turn == len(turns):
                    turns.append([])
            turns[turn].append(index)
            filled += nbytes[index]
    return turns


@contextmanager
def _alone(optimizer: Optimizer, group: dict[str, Any], param: nn.Parameter, full: nn.Parameter) -> Iterator[None]:
    """Let `optimizer` have nothing but `full`, with the options and the state of `param`, and no hooks."""
    groups, state = optimizer.param_groups, optimizer.state
    hooks = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
    if param in state:
        state[full] = state.pop(param)
    # A copy: what the step counts in its group is counted by the step that follows.
    optimizer.param_groups = [{**group, "params": [full]}]
    optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        optimizer.param_groups = groups
        optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks = hooks
        if full in state:
            state[param] = state.pop(full)


def _with_gradient(optimizer: Optimizer) -> list[_Entry]:
    """The sharded parameters that some rank has a gradient of, with their groups and shards; the same on all ranks."""
    sharded = [
        _Entry(group, param, info)
        for group in optimizer.param_groups
        for param in group["params"]
        if (info := shard_info(param)) is not None and info.is_sharded
    ]
    by_mesh: dict[Any, list[int]] = {}
    for index, entry in enumerate(sharded):
        by_mesh.setdefault(entry.info.mesh, []).append(index)
    found: set[int] = set()
    for mesh, indices in by_mesh.items():
        # A rank that holds nothing of a small parameter may have no gradient either.
        has = on_any_rank(mesh, [sharded[index].param.grad is not None for index in indices])
        found.update(index for index, there in zip(indices, has) if there)
    return [entry for index, entry in enumerate(sharded) if index in found]


def _with_closure_called(args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Compute the gradients now, where the step would; it gets a closure that returns the same loss."""
    closure: Callable | None = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if closure is None:
        return args, kwargs
    with torch.enable_grad():
        loss = closure()
    if "closure" in kwargs:
        return args, {**kwargs, "closure": lambda: loss}
    return (args[0], lambda: loss, *args[2:]), kwargs
