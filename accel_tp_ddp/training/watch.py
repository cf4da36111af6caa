"""How fast a training is: tokens a second, the share of the GPUs' peak, memory, time in collectives.

Forwards and steps are counted on the host; nothing is sent and no device is waited for but where a report is due.
What costs more is sampled: the operations of a forward in the first one and then ever more rarely, the time in
tensor-parallel collectives in one step of a report's steps.
"""

from __future__ import annotations

import functools
import logging
import re
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..core import collectives
from ..core.control import gather_objects
from ..core.flops import factors, flops
from ..core.override import attributes
from ..core.shard import shard_info
from ..core.wrappers import unwrap

__all__ = ["Watch"]

logger = logging.getLogger(__name__)

#: The functions of `core.collectives` that all compute collectives go through.
_TIMED = ("_sum_in_place", "gather_into", "_reduce_scatter")
_TOKENS = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")
_GIB = 2**30


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
        self.alone = False  # whether other replicas may take fewer steps, so that nobody can be waited for
        self._steps = 0  # since the last report, as all ranks count them
        self._taken = 0  # since then by this one
        self._forwards: list[_Forwards] = []
        self._stepping = False
        self._begun: float | None = None
        self._timer: _Timer | None = None
        self._share: float | None = None
        self._counting = False
        self._fresh: dict[str, float] = {}
        self._told = 0

    def follow(self, model: nn.Module) -> None:
        """Count the forwards of a prepared model, as it is called."""
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
        if self._steps >= self.every and not self.alone:
            self.report()

    def report(self) -> None:
        """Tell what was since the last report. Collective over all ranks, which have taken as many steps."""
        if self._begun is None or not self._taken:
            return
        tokens = sum(forwards.take_tokens() for forwards in self._forwards)  # waits for the device
        if self.device_type == "cuda":
            torch.cuda.synchronize()
        share = self._timer.share() if self._timer is not None else None
        operations, needed = self._operations()
        own = _Own(time.perf_counter() - self._begun, tokens, operations, needed, peak_memory(self.device_type), share)
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        ranks = gather_objects(own) if several else [own]
        report = _Report.of(self._taken, ranks, self.tp_size)
        self.reports.append(report)
        self._fresh = report.values()
        self._steps = self._taken = 0
        self._timer, self._begun = None, time.perf_counter()
        self._log(f"steps to {sum(report.steps for report in self.reports):,}: {report}")

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
        """The values of the last report, once."""
        values, self._fresh = self._fresh, {}
        return values

    @contextmanager
    def without_others(self) -> Iterator[None]:
        """Within the block, replicas may take unlike numbers of steps; it ends on all ranks."""
        self.alone = True
        try:
            yield
        finally:
            self.alone, self._steps = False, 0

    def finish(self, together: bool) -> None:
        """Tell about the whole training, if that was not told yet.

        Args:
            together: Whether all ranks call this, so that steps since the last report can be added.
        """
        if self._timer is not None:
            self._timer.stop()
        if together and not self.alone:
            self.report()
        if len(self.reports) > self._told:
            self._told = len(self.reports)
            whole = _Report.whole(self.reports)
            rates = [report.rate for report in self.reports if report.tokens]
            middle = f" (median of {len(rates)} reports {median(rates):,.0f})" if len(rates) > 1 else ""
            self._log(f"{whole.steps:,} steps in {whole.seconds:,.1f} s, {whole.tokens:,} tokens: {whole}{middle}")

    def _log(self, line: str) -> None:
        if dist.is_available() and dist.is_initialized() and dist.get_rank() > 0:
            return
        if not logger.hasHandlers():  # asked for, so it is seen also where nobody has set up logging
            logger.addHandler(logging.StreamHandler())
        if not logger.isEnabledFor(logging.INFO):
            logger.setLevel(logging.INFO)
        logger.info("%s", line)


class _Own(NamedTuple):
    """What one rank has seen since the last report. `needed`: seconds for its operations at its device's peak."""

    seconds: float
    tokens: int
    operations: float
    needed: float | None
    memory: int
    share: float | None


class _Report(NamedTuple):
    """Some steps of all ranks. `mfu` and `share` are None where they are not known."""

    steps: int
    seconds: float
    tokens: int
    operations: float
    mfu: float | None
    memory: tuple[int, ...]
    share: float | None

    @classmethod
    def of(cls, steps: int, ranks: Sequence[_Own], tp_size: int) -> _Report:
        seconds = ranks[0].seconds
        needed = [rank.needed for rank in ranks if rank.needed is not None]
        shares = [rank.share for rank in ranks if rank.share is not None]
        return cls(
            steps=steps,
            seconds=seconds,
            tokens=sum(rank.tokens for rank in ranks[::tp_size]),  # the ranks of a replica have the same batches
            operations=sum(rank.operations for rank in ranks),
            mfu=sum(needed) / len(ranks) / seconds if len(needed) == len(ranks) else None,
            memory=tuple(rank.memory for rank in ranks),
            share=sum(shares) / len(shares) if shares else None,
        )

    @classmethod
    def whole(cls, reports: Sequence[_Report]) -> _Report:
        seconds = sum(report.seconds for report in reports)
        used = [report.mfu * report.seconds for report in reports if report.mfu is not None]
        shares = [report.share for report in reports if report.share is not None]
        return cls(
            steps=sum(report.steps for report in reports),
            seconds=seconds,
            tokens=sum(report.tokens for report in reports),
            operations=sum(report.operations for report in reports),
            mfu=sum(used) / seconds if len(used) == len(reports) else None,
            memory=tuple(max(ranks) for ranks in zip(*(report.memory for report in reports))),
            share=sum(shares) / len(shares) if shares else None,
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
        reports = len(self.watch.reports)
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
        self._spans: list[tuple[Any, Any]] = []
        self._patches: ExitStack | None = ExitStack()
        replaced = {name: self._timed(getattr(collectives, name)) for name in _TIMED}
        self._patches.enter_context(attributes(collectives, **replaced))
        self._begin = self._now()
        self._end: Any = None

    def _now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _timed(self, function: Callable) -> Callable:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            begin = self._now()
            result = function(*args, **kwargs)
            self._spans.append((begin, self._now()))
            return result

        return run

    def stop(self) -> None:
        """Once."""
        if self._patches is not None:
            self._patches.close()
            self._patches, self._end = None, self._now()

    def share(self) -> float | None:
        """After the device has come to the end; None where there was nothing to time."""
        whole = self._between(self._begin, self._end)
        return sum(self._between(*span) for span in self._spans) / whole if whole else None

    def _between(self, begin: Any, end: Any) -> float:
        return begin.elapsed_time(end) if self.on_gpu else end - begin


def peak_memory(device_type: str) -> int:
    """The most bytes that this process has had: of tensors on its GPU, or of the machine's memory without one."""
    if device_type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"VmHWM:\s*(\d+) kB", status.read_text())):
        return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
