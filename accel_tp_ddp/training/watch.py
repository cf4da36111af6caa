"""How fast a training is: tokens a second, the share of the GPUs' peak, memory, time in collectives.

Forwards and steps are counted on the host; nothing is sent and no device is waited for but where a report is due. What
a rank has to report it puts up for the others. It looks for theirs at its next steps, so that no rank ever waits for
another one, which may take other steps. What costs more is sampled: the operations of a forward in the first one and
then ever more rarely, the time in tensor-parallel collectives in one step of a report's steps.
"""

from __future__ import annotations

import functools
import logging
import re
import resource
import sys
import time
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..core import collectives
from ..core.flops import factors, flops
from ..core.override import attributes
from ..core.shard import shard_info
from ..core.store import Board
from ..core.wrappers import unwrap

__all__ = ["Watch"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: Seconds that the end of a training waits for what the other ranks have to report.
FINAL_WAIT = 3.0
#: How many reports a rank keeps that others have no part in yet. Of more, the oldest is told without them.
KEPT = 8
#: The functions of `core.collectives` that all compute collectives go through.
_TIMED = ("_sum_in_place", "gather_into", "_reduce_scatter")
_TOKENS = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")
_GIB = 2**30
_boards = 0


class Watch:
    """What one accelerator's training does, and how fast.

    Args:
        every: Steps between two reports.
        tp_size: Ranks of a replica, neighbours in rank order.
        device_type: Where the models are.
        peak: Operations a second that the device is made for in a data type; None where that is not known.
        take_gradients: Autograd functions that compute gradients in their forward.
    """

    def __init__(
        self,
        every: int,
        tp_size: int,
        device_type: str,
        peak: Callable[[torch.dtype], float | None],
        take_gradients: Sequence[Any] = (),
    ):
        self.every, self.tp_size, self.device_type, self.peak = every, tp_size, device_type, peak
        self.take_gradients = take_gradients
        self.reports: list[_Report] = []
        self.noted = 0  # how many this rank had a part in
        self.alone = False  # whether other replicas may take fewer steps, so that reports would not be of the same
        self._steps = 0  # since the last report, as all ranks count them
        self._taken = 0  # since then by this one
        self._forwards: list[_Forwards] = []
        self._stepping = False
        self._begun: float | None = None  # None: nothing was trained since `finish`
        self._timer: _Timer | None = None
        self._counting = False
        self._board: Board | None = None
        self._round = 0  # how many trainings have come to their end
        self._number = 0  # of this rank's latest report in the round
        self._due: deque[_Due] = deque()
        self._fresh: list[tuple[Callable[[dict[str, float]], None] | None, dict[str, float]]] = []
        self._rank, self._ranks = 0, 1
        self._told = 0

    @property
    def is_main(self) -> bool:
        """Whether this rank is the one that prints."""
        return self._rank == 0

    def follow(self, model: nn.Module) -> None:
        """Count the forwards of a prepared model, as it is called."""
        global _boards
        if not self._forwards:  # here, as ranks prepare the same models, but may make other accelerators
            self._board = Board(f"watch/{_boards}")
            _boards += 1
        if not any(getattr(hook, "watch", None) is self for hook in model._forward_pre_hooks.values()):
            forwards = _Forwards(self)
            self._forwards.append(forwards)
            model.register_forward_pre_hook(forwards, with_kwargs=True)
            model.register_forward_hook(forwards.after, always_call=True)

    def forward(self, model: nn.Module, counts: bool) -> bool:
        """A forward of a training step begins; tell whether its operations are counted.

        Args:
            model: As it is called. What happens in one that is compiled cannot be seen.
            counts: Whether they are to be, if they can: a step in which they are takes longer, and is not timed.
        """
        self._begun = self._begun or time.perf_counter()
        self._stepping = True
        times = self._steps == self.every - 1 and self._timer is None and self.tp_size > 1
        if not (counts or times) or any(_is_compiled(module) for module in model.modules()):
            return False
        self._counting |= counts
        if times and not self._counting:
            self._timer = _Timer(self.device_type)
        return counts

    def step(self) -> None:
        """An optimizer has taken a step."""
        if not self._stepping:  # a second one, after the same forward
            return
        self._stepping = self._counting = False
        self._steps += 1
        self._taken += 1
        if self._timer is not None:
            self._timer.stop()
        self._look()  # first, so that a report is told at the same step however far the others are by now
        if self._steps >= self.every and not self.alone:
            self._note()

    def _note(self) -> None:
        """A report is due: put up this rank's part."""
        self._number += 1
        self.noted += 1
        due = _Due(f"{self._round}/{self._number}", self._take())
        self._due.append(due)
        if self._ranks > 1:
            self._ask(lambda board: board.post(due.topic, due.own), None)
        if self._ranks == 1 or self._board is None:
            self._look()

    def _look(self) -> None:
        """Tell the reports that all ranks have put up their parts of. Waits for none."""
        while self._due:
            due = self._due[0]
            known = self._known(due.topic, due.own)
            if len(known) < self._ranks and len(self._due) <= KEPT and self._board is not None:
                return
            self._pass(due, known)

    def _pass(self, due: _Due, known: Mapping[int, _Own]) -> None:
        self._due.popleft()
        self._tell(known, due.put)
        if self._ranks > 1:
            self._ask(lambda board: board.leave(due.topic), False)
        if len(known) < self._ranks:  # nobody will leave it as the last one
            number = int(due.topic.rpartition("/")[2]) - KEPT
            self._ask(lambda board: board.remove(f"{self._round}/{number}"), None)

    def _tell(self, known: Mapping[int, _Own], put: Callable[[dict[str, float]], None] | None) -> None:
        report = _Report.of(known[self._rank].steps, known, self._ranks, self.tp_size)
        self.reports.append(report)
        if report.known == self._ranks:  # a rate of some replicas would look like a slow one of all
            self._fresh = [each for each in self._fresh if each[0] is not None] + [(put, report.values())]
        self._log(f"steps to {sum(report.steps for report in self.reports):,}: {report}")

    def _known(self, topic: str, own: _Own | None = None) -> dict[int, _Own]:
        """What is known of a report, by rank in their order."""
        known = {rank: _Own(*each) for rank, each in self._read(topic).items()}
        if own is not None:
            known[self._rank] = own
        return dict(sorted(known.items()))

    def _read(self, topic: str) -> dict[int, Any]:
        nothing: dict[int, Any] = {}
        return self._ask(lambda board: board.read(topic), nothing) if self._ranks > 1 else nothing

    def _ask(self, ask: Callable[[Board], T], otherwise: T) -> T:
        if self._board is not None:
            try:
                return ask(self._board)
            except Exception:  # the store is gone, or cannot do it: what is watched goes on
                self._board = None
        return otherwise

    def _take(self) -> _Own:
        """What this rank has done since it was last asked."""
        assert self._begun is not None
        if dist.is_available() and dist.is_initialized():
            self._rank, self._ranks = dist.get_rank(), dist.get_world_size()
        tokens = sum(forwards.take_tokens() for forwards in self._forwards)  # waits for the device
        if self.device_type == "cuda":
            torch.cuda.synchronize()
        share = self._timer.share() if self._timer is not None else None
        operations, needed = self._operations()
        if needed is None and not self._taken:
            needed = 0.0
        now = time.perf_counter()
        memory = peak_memory(self.device_type)
        own = _Own(self._taken, now - self._begun, tokens, operations, needed, memory, share)
        self._steps = self._taken = 0
        self._timer, self._begun = None, now
        return own

    def _operations(self) -> tuple[float, float | None]:
        """How many there were, and how long the device takes for them at its peak."""
        counted = [forwards.take_operations() for forwards in self._forwards]
        by_dtype: dict[torch.dtype, float] = defaultdict(float)
        for each in counted:
            if each is None:
                return 0.0, None
            for dtype, count in each.items():
                by_dtype[dtype] += count
        if not by_dtype:
            return 0.0, None
        operations, peak = sum(by_dtype.values()), self.peak(max(by_dtype, key=lambda dtype: by_dtype[dtype]))
        return operations, operations / peak if peak else None

    def fresh(self) -> dict[str, float]:
        """The values of the last report that goes into no earlier row, once. Those that do go there."""
        self.flush()
        values = self._fresh[-1][1] if self._fresh else {}
        self._fresh = []
        return values

    def belongs(self, put: Callable[[dict[str, float]], None]) -> None:
        """A row of values was written: reports that are due, and could not be told yet, are to go there by `put`."""
        for due in self._due:
            due.put = due.put or put

    def flush(self) -> None:
        """Let values go into the rows they belong to."""
        placed = [(put, values) for put, values in self._fresh if put is not None]
        self._fresh = [each for each in self._fresh if each[0] is None]
        for put, values in placed:
            try:
                put(values)
            except Exception as error:  # a tracker that has been closed, say: what is watched goes on
                logger.warning("the values of a report could not be logged: %s: %s", type(error).__name__, error)

    @contextmanager
    def without_others(self) -> Iterator[None]:
        """Within the block, replicas may take unlike numbers of steps; it ends on all ranks."""
        self.alone = True
        try:
            yield
        finally:
            self.alone, self._steps = False, 0

    def finish(self, together: bool, wait: bool = True) -> None:
        """Tell about the whole training, if that was not told yet.

        Args:
            together: Whether all ranks call this, so that steps since the last report can be added.
            wait: Whether to wait, `FINAL_WAIT` seconds at most, for what the other ranks have to report.
        """
        if self._timer is not None:
            self._timer.stop()
        deadline = time.monotonic() + (FINAL_WAIT if wait else 0.0)
        if together and not self.alone and self._begun is not None:
            self._conclude(deadline)
        else:
            self._look()
            while self._due and time.monotonic() < deadline:
                time.sleep(0.005)
                self._look()
            while self._due:
                self._pass(self._due[0], self._known(self._due[0].topic, self._due[0].own))
        if len(self.reports) > self._told:
            self._told = len(self.reports)
            whole = _Report.whole(self.reports)
            rates = [report.rate for report in self.reports if report.tokens]
            middle = f" (median of {len(rates)} reports {median(rates):,.0f})" if len(rates) > 1 else ""
            self._log(f"{whole.steps:,} steps in {whole.seconds:,.1f} s, {whole.tokens:,} tokens: {whole}{middle}")

    def _conclude(self, deadline: float) -> None:
        """The last report of a round: the steps since the one before, and those that some ranks have not reported."""
        own, topic = self._take(), f"{self._round}/end"
        ends: dict[int, tuple[int, _Own]] = {self._rank: (self._number, own)}
        if self._ranks > 1:
            self._ask(lambda board: board.post(topic, (self._number, own)), None)
        while True:
            self._look()
            ends.update({rank: (number, _Own(*each)) for rank, (number, each) in self._read(topic).items()})
            if len(ends) == self._ranks or self._board is None or time.monotonic() > deadline:
                break
            time.sleep(0.005)
        self._look()  # whoever has come to its end has put up all before
        numbers = [number for number, _ in ends.values()]
        left = range(self._number - len(self._due) + 1, max(numbers) + 1)
        parts: dict[int, list[_Own]] = defaultdict(list)
        for due in self._due:
            parts[self._rank].append(due.own)
        for number in left:
            for rank, each in self._known(f"{self._round}/{number}").items():
                if rank != self._rank:
                    parts[rank].append(each)
        for rank, (_, each) in ends.items():
            parts[rank].append(each)
        known = {rank: _Own.joined(parts[rank]) for rank in sorted(parts)}
        if any(each.steps for each in known.values()):
            self._tell(known, self._due[-1].put if self._due else None)
        if len(ends) == self._ranks > 1 and self._ask(lambda board: board.leave(topic), False):
            for number in range(min(numbers) + 1, max(numbers) + 1):
                self._ask(lambda board: board.remove(f"{self._round}/{number}"), None)
        self._due.clear()
        self._round, self._number, self._begun = self._round + 1, 0, None

    def _log(self, line: str) -> None:
        if not self.is_main:
            return
        if not logger.hasHandlers():  # asked for, so it is seen also where nobody has set up logging
            logger.addHandler(logging.StreamHandler())
        if not logger.isEnabledFor(logging.INFO):
            logger.setLevel(logging.INFO)
        logger.info("%s", line)


def _mean(values: Iterable[float | None]) -> float | None:
    """Of those that are known."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


class _Own(NamedTuple):
    """What one rank has seen since the last report. `needed`: seconds for its operations at its device's peak."""

    steps: int
    seconds: float
    tokens: int
    operations: float
    needed: float | None
    memory: int
    share: float | None

    @classmethod
    def joined(cls, parts: Sequence[_Own]) -> _Own:
        """One after the other."""
        needed = [part.needed for part in parts if part.needed is not None]
        return cls(
            steps=sum(part.steps for part in parts),
            seconds=sum(part.seconds for part in parts),
            tokens=sum(part.tokens for part in parts),
            operations=sum(part.operations for part in parts),
            needed=sum(needed) if len(needed) == len(parts) else None,
            memory=max(part.memory for part in parts),
            share=_mean(part.share for part in parts),
        )


@dataclass
class _Due:
    """A report that this rank has put up its part of, and how its values get into the row that they belong to."""

    topic: str
    own: _Own
    put: Callable[[dict[str, float]], None] | None = None


class _Report(NamedTuple):
    """Some steps of `known` of all ranks. `mfu` and `share` are None where they are not known."""

    steps: int
    seconds: float
    tokens: int
    operations: float
    mfu: float | None
    memory: tuple[int, ...]  # 0 of ranks that are not known
    share: float | None
    known: int

    @classmethod
    def of(cls, steps: int, known: Mapping[int, _Own], size: int, tp_size: int) -> _Report:
        ranks = list(known.values())
        seconds = ranks[0].seconds
        # A replica's ranks have the same batches.
        tokens = {rank // tp_size: own.tokens for rank, own in known.items()}
        needed = [rank.needed for rank in ranks if rank.needed is not None]
        return cls(
            steps=steps,
            seconds=seconds,
            tokens=sum(tokens.values()),
            operations=sum(rank.operations for rank in ranks),
            mfu=sum(needed) / len(ranks) / seconds if len(needed) == len(ranks) else None,
            memory=tuple(known[rank].memory if rank in known else 0 for rank in range(size)),
            share=_mean(rank.share for rank in ranks),
            known=len(known),
        )

    @classmethod
    def whole(cls, reports: Sequence[_Report]) -> _Report:
        seconds = sum(report.seconds for report in reports)
        used = [report.mfu * report.seconds for report in reports if report.mfu is not None]
        return cls(
            steps=sum(report.steps for report in reports),
            seconds=seconds,
            tokens=sum(report.tokens for report in reports),
            operations=sum(report.operations for report in reports),
            mfu=sum(used) / seconds if len(used) == len(reports) else None,
            memory=tuple(max(ranks) for ranks in zip(*(report.memory for report in reports))),
            share=_mean(report.share for report in reports),
            known=min(report.known for report in reports),
        )

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds

    def values(self) -> dict[str, float]:
        """For trackers."""
        found = {
            "tp/tokens_per_second": self.rate if self.tokens else None,
            "tp/mfu": self.mfu,
            "tp/peak_memory_gib": max(self.memory) / _GIB,
            "tp/collective_share": self.share,
        }
        return {name: value for name, value in found.items() if value is not None}

    def __str__(self) -> str:
        parts = [f"peak memory {max(self.memory) / _GIB:.2f} GiB a rank"]
        if self.mfu is not None:
            parts.insert(0, f"MFU {self.mfu:.1%}")
        if self.share is not None:
            parts.append(f"{self.share:.1%} of a step in tensor-parallel collectives")
        if self.tokens:
            parts.insert(0, f"{self.rate:,.0f} tokens/s")
        if self.known < len(self.memory):
            parts.append(f"from {self.known} of {len(self.memory)} ranks")
        return ", ".join(parts)


class _Forwards:
    """The forwards of one model, as hooks before and after them."""

    def __init__(self, watch: Watch):
        self.watch: Watch | None = watch
        self._tokens: int | Tensor = 0
        self._positions = 0  # since the last report; padding counts
        self._counted: dict[torch.dtype, float] = defaultdict(float)
        self._counted_positions = 0
        self._next = 0  # how many reports there are when operations are counted again
        self._mode: _Operations | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"watch": None, "_mode": None}  # a copy of the model is another one, which nobody has prepared

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self.watch is None or torch.compiler.is_compiling():
            return
        bare = unwrap(model)
        if not (bare.training and torch.is_grad_enabled()):
            return
        positions, tokens = _size_of(args, kwargs)
        self._positions += positions
        self._tokens = self._tokens + tokens
        reports = self.watch.noted
        due = reports >= self._next and self._mode is None
        if due:
            self._next = max(1, 2 * reports)
        if self.watch.forward(model, counts=due):
            self._counted_positions += positions
            self._mode = _Operations(bare, self.watch)
            self._mode.__enter__()

    def after(self, model: nn.Module, args: tuple, output: Any) -> None:
        if self._mode is not None:
            mode, self._mode = self._mode, None
            mode.__exit__(None, None, None)
            for dtype, count in mode.counted.items():
                self._counted[dtype] += count

    def take_tokens(self) -> int:
        tokens, self._tokens = int(self._tokens), 0
        return tokens

    def take_operations(self) -> Mapping[torch.dtype, float] | None:
        """As many as the forwards that were counted had for as many positions; None if there was none of them."""
        positions, self._positions = self._positions, 0
        if not positions:
            return {}
        if not self._counted:
            return None
        return {dtype: count * positions / self._counted_positions for dtype, count in self._counted.items()}


def _size_of(args: tuple, kwargs: Mapping[str, Any]) -> tuple[int, int | Tensor]:
    """Positions of an input, or its samples if it has none, and how many of them are tokens that are no padding."""
    given = {**args[0], **kwargs} if args and isinstance(args[0], Mapping) else kwargs
    found = next((given[name] for name in _TOKENS if isinstance(given.get(name), Tensor)), None)
    if found is None and args and isinstance(args[0], Tensor) and not args[0].is_floating_point():
        found = args[0]
    if found is None:
        first = next((value for value in (*args, *given.values()) if isinstance(value, Tensor) and value.ndim), None)
        return (len(first) if first is not None else 1), 0
    shape, mask = found.shape[:2], given.get("attention_mask")
    positions = shape.numel()
    if isinstance(mask, Tensor) and mask.shape == shape:
        return positions, mask.detach().ne(0).sum()
    return positions, positions


def _is_compiled(module: nn.Module) -> bool:
    return "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None


class _Operations(TorchDispatchMode):
    """Counts the operations of a forward and of the backward that belongs to it, as they would be without sharding.

    The gradient of a factor of a product takes another product of that size. A recomputed forward counts once, so it
    is only this one that is looked at. What all ranks of a replica compute alike is shared out among them.
    """

    def __init__(self, model: nn.Module, watch: Watch):
        super().__init__()
        self.counted: dict[torch.dtype, float] = defaultdict(float)
        self._params = {param.untyped_storage()._cdata: param for param in model.parameters()}
        self._tp_size, self._take_gradients = watch.tp_size, watch.take_gradients
        self._inside = 0  # functions that take their gradients themselves
        self._patches = ExitStack()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # kernels that a model compiles by itself stay compiled

    def __enter__(self) -> _Operations:
        for function in self._take_gradients:
            self._patches.enter_context(attributes(function, forward=staticmethod(self._as_it_is(function.forward))))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._patches.close()
        super().__exit__(*error)

    def _as_it_is(self, forward: Callable) -> Callable:
        @functools.wraps(forward)
        def run(*args: Any) -> Any:
            self._inside += 1
            try:
                return forward(*args)
            finally:
                self._inside -= 1

        return run

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        count = flops(func, args, kwargs, result)
        if count:
            pair = factors(func, args)
            whole = any(_is_whole(self._params.get(tensor.untyped_storage()._cdata)) for tensor in pair)
            gradients = 0 if self._inside else sum(self._has_gradient(tensor) for tensor in pair)
            self.counted[pair[0].dtype] += count * (1 + gradients) / (self._tp_size if whole else 1)
        return result

    def _has_gradient(self, tensor: Tensor) -> bool:
        if torch.is_grad_enabled():
            return tensor.requires_grad
        # Within a function with a backward of its own, or a checkpoint: activations have one there as a rule.
        param = self._params.get(tensor.untyped_storage()._cdata)
        return param is None or param.requires_grad


def _is_whole(param: nn.Parameter | None) -> bool:
    info = shard_info(param) if param is not None else None
    return param is not None and (info is None or not info.is_sharded)


class _Timer:
    """The time in tensor-parallel collectives from now on until `stop`, and how long that is.

    On GPUs by events, which the device notes as it comes to them; on CPUs by the clock, as they wait inside.
    """

    def __init__(self, device_type: str):
        self.on_gpu = device_type == "cuda"
        self.spans: list[tuple[Any, Any]] = []
        if not list(_timers):
            _patch_collectives()
        _timers.add(self)
        weakref.finalize(self, _put_collectives_back)  # of a step that was given up, with all that belongs to it
        self._begin = self.now()
        self._end: Any = None

    def now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def stop(self) -> None:
        """Once."""
        if self in _timers:
            _timers.discard(self)
            _put_collectives_back()
            self._end = self.now()

    def share(self) -> float | None:
        """After the device has come to the end; None where there was nothing to time."""
        whole = self._between(self._begin, self._end)
        return sum(self._between(*span) for span in self.spans) / whole if whole else None

    def _between(self, begin: Any, end: Any) -> float:
        return begin.elapsed_time(end) if self.on_gpu else end - begin


#: Those that are running. Steps of several accelerators may overlap in any way.
_timers: weakref.WeakSet[_Timer] = weakref.WeakSet()
_patches = ExitStack()


def _patch_collectives() -> None:
    """While any timer is running, let all of them know how long collectives take."""
    _patches.close()  # what a timer has left that came to no end: it may not have been put back yet
    replaced = {name: _timed(getattr(collectives, name)) for name in _TIMED}
    _patches.enter_context(attributes(collectives, **replaced))


def _put_collectives_back() -> None:
    if not list(_timers):  # its length may count some that are gone
        _patches.close()


def _timed(function: Callable) -> Callable:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        begun = [(timer, timer.now()) for timer in _timers]
        result = function(*args, **kwargs)
        for timer, begin in begun:
            timer.spans.append((begin, timer.now()))
        return result

    return run


def peak_memory(device_type: str) -> int:
    """The most bytes that this process has had: of tensors on its GPU, or of the machine's memory without one."""
    if device_type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"VmHWM:\s*(\d+) kB", status.read_text())):
        return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
