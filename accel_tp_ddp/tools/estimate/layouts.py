"""What each `tp x dp` of so many GPUs takes, which to take, and what to change if none fits."""

from __future__ import annotations

import inspect
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ...core.errors import BadInputError, PlanError
from ..simulate import PRECISIONS, Setting, Trace, trace
from ..tally import collective_bytes
from ..target import said
from .cards import GIB, Card, card, with_links
from .depths import Depth, Model
from .duration import Duration, duration
from .extend import Extended, extended

__all__ = ["SWITCHES", "Layout", "Request", "estimate"]

#: Fields of the plugin that a command's options of the same name set, and what they do.
SWITCHES = {
    "zero1": "divide the optimizer's state over the replicas",
    "loss_parallel": "compute the loss from each rank's part of the vocabulary, without full logits",
    "sequence_parallel": "divide norms and residuals over the sequence",
}
CONTEXT = GIB  # what the driver, the libraries and NCCL's buffers take
FRAGMENTS = 0.05  # of the peak, which the allocator cannot give again
LORA = 16
REPLICAS = 64  # simulated at most; with more, a replica's part of the optimizer's state is counted as of so many


@dataclass(frozen=True)
class Request:
    """What is estimated.

    Attributes:
        gpus: All of them.
        card: What they are; None: only their memory is known.
        memory: Of one, in bytes.
        per_node: How many share a node; tensor-parallel ranks do.
        tp: Sizes to try; None: all that the model allows within a node.
        plugin: Fields of the plugin, by name.
        lora: Rank of adapters; 0: none.
    """

    model: str
    gpus: int
    memory: float
    card: Card | None = None
    per_node: int = 8
    tp: Sequence[int] | None = None
    seq_len: int = 4096
    micro_batch: int = 1
    precision: str = "bf16"
    checkpointing: bool = False
    lora: int = 0
    plan: str = "auto"
    plugin: Mapping[str, Any] = field(default_factory=dict)
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Layout:
    """A `tp x dp` and what it takes on one rank."""

    tp: int
    dp: int
    step: Extended
    time: Duration | None
    needed: float  # with what a driver and an allocator take beside tensors

    def tokens(self, request: Request) -> int:
        return self.dp * request.micro_batch * request.seq_len


def estimate(
    model: str,
    gpus: int,
    gpu: str | None = None,
    gpu_memory: float | None = None,
    links: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """What a step of each `tp x dp` takes: memory by part, time by what it is spent on, bytes sent.

    Args:
        model: See `build_target`.
        gpus: How many.
        gpu: A name of `cards.json`.
        gpu_memory: In GiB, of another; without `gpu` no times are told.
        links: See `with_links`.
        options: Fields of `Request`.

    Returns:
        `model`: its class; `layers`; `request`; `layouts`: rows, the best first; `refused`: for each tp size that the
        model does not allow why; `take`: the row's `tp`, `dp` and `why`, or None; `switches`: where none fits, what
        each change makes of the peak; `notes`: sentences; `seconds`.

    Raises:
        BadInputError: If a value is out of range, or the model cannot be run so.
        PlanError: If no size in question is allowed.
    """
    started = time.perf_counter()
    if gpu is None and gpu_memory is None:
        raise BadInputError("it is not said which GPUs these are. Give --gpu NAME, or --gpu-memory GiB.")
    if gpu_memory is not None and not 0 < gpu_memory < float("inf"):
        raise BadInputError(f"--gpu-memory is {gpu_memory}; give the GiB of one GPU, more than 0.")
    if links is not None and gpu is None:
        raise BadInputError("--links is of no use without --gpu, whose speed times are computed from. Give both.")
    found = card(gpu) if gpu is not None else None
    if found is not None and links is not None:
        found = with_links(found, links)
    memory = gpu_memory * GIB if gpu_memory is not None else found.memory if found else 0.0
    request = Request(model, gpus, memory, found, **options)
    _check(request)
    return {**_Estimate(request).answer(), "seconds": time.perf_counter() - started}


def _check(request: Request) -> None:
    for name, least in (("gpus", 1), ("per_node", 1), ("seq_len", 2), ("micro_batch", 1), ("lora", 0)):
        value = getattr(request, name)
        if value < least:
            option = {"per_node": "gpus-per-node"}.get(name, name.replace("_", "-"))
            raise BadInputError(f"--{option} is {value}; give {least} or more.")
    if request.precision not in PRECISIONS:
        raise BadInputError(f"--precision is {request.precision!r}; give one of {', '.join(PRECISIONS)}.")
    for size in request.tp or ():
        if size < 1 or request.gpus % size:
            raise BadInputError(
                f"--tp {size} does not divide the {request.gpus} GPUs. Give sizes that do, or leave --tp out."
            )


class _Estimate:
    def __init__(self, request: Request):
        self.request = request
        self.model = Model(request.model, request.plan, request.trust_remote_code, request.lora)
        self.refused: dict[int, str] = {}

    def answer(self) -> dict[str, Any]:
        request = self.request
        sizes = self._sizes()
        layouts = [self.layout(tp) for tp in sizes]
        fits = [each for each in layouts if each.needed <= request.memory]
        ranked = sorted(layouts, key=lambda each: (each not in fits, *self._rank(each, bool(fits))))
        result: dict[str, Any] = {
            **{"model": self.model.kind, "layers": self.model.layers},
            "request": {**asdict(request), "card": request.card and request.card.name},
            "layouts": [self._row(each, each in fits) for each in ranked],
            "refused": [{"tp": tp, "why": why} for tp, why in sorted(self.refused.items())],
            **{"take": self._take(ranked, fits), "switches": [] if fits else self._switches(layouts)},
        }
        return {**result, "notes": self._notes()}

    # ---------------------------------------------------------------------------------------------------- the layouts

    def _sizes(self) -> list[int]:
        request = self.request
        wanted = request.tp or [n for n in range(1, request.per_node + 1) if _fill(n, request)]
        allowed = []
        for tp in dict.fromkeys(wanted):
            try:
                self.model.resolve(tp)
                allowed.append(tp)
            except PlanError as error:
                self.refused[tp] = " ".join(str(error).removeprefix("tensor-parallel plan: ").split())
        if not allowed:
            raise BadInputError(
                f"{self.model.kind} allows none of the tensor-parallel sizes {', '.join(map(str, wanted))}: "
                f"{self.refused[max(self.refused)]} `accel-tp-ddp plan MODEL` lists those that it does."
            )
        return allowed

    def layout(self, tp: int, **changes: Any) -> Layout:
        """What `tp` takes, with other values of the request."""
        request = replace(self.request, **changes)
        dp = request.gpus // tp
        step = self._step(request, tp, dp)
        of = request.card
        return Layout(
            tp=tp,
            dp=dp,
            step=step,
            time=duration(step, of, tp, dp, request.per_node) if of else None,
            needed=step.peak.total * (1 + FRAGMENTS) + CONTEXT,
        )

    def _step(self, request: Request, tp: int, dp: int) -> Extended:
        setting = Setting(
            tp=tp,
            dp=min(dp, REPLICAS),
            micro_batch=request.micro_batch,
            seq_len=request.seq_len,
            precision=request.precision,
            checkpointing=request.checkpointing,
            gpu=request.card is None or request.card.apart,
            vocabulary=self.model.vocabulary,
        )
        model = self.model
        model.lora = request.lora
        least, *deeper = model.depths()
        first = self._trace(model, least, setting, request)
        if first.without_gradient and not model.frozen:
            model.freeze(first.without_gradient)
            least, *deeper = model.depths()
            first = self._trace(model, least, setting, request)
        return extended(first, [(self._trace(model, depth, setting, request), depth.times) for depth in deeper])

    def _trace(self, model: Model, depth: Depth, setting: Setting, request: Request) -> Trace:
        dtype = torch.bfloat16 if setting.precision == "bf16-weights" else torch.float32
        plugin = {**request.plugin, "tp_plan": model.rules_for(depth)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of addresses of fake tensors, and of what transformers deprecates
            try:
                return trace(model.builder(depth, dtype), replace(setting, plugin=plugin), _inputs(model, setting))
            except (BadInputError, PlanError):
                raise
            except Exception as error:  # of an operation without a fake kernel, or of the model's own code
                if isinstance(error, ValueError) and any(name in str(error) for name in request.plugin):
                    raise BadInputError(str(error)) from error
                raise BadInputError(
                    f"{model.kind} cannot be run on fake tensors with token ids and labels: {said(error)}. Try "
                    "another --precision, or estimate its language model alone."
                ) from error

    # -------------------------------------------------------------------------------------------------------- the rows

    def _rank(self, layout: Layout, fit: bool) -> tuple[float, ...]:
        if not fit:
            return (layout.needed,)
        if layout.time is None:  # the less is sent within a replica, the faster
            return (layout.tp, layout.needed)
        return (layout.time.total / layout.tokens(self.request), layout.needed)

    def _row(self, layout: Layout, fits: bool) -> dict[str, Any]:
        step, at = layout.step, layout.time
        tokens = layout.tokens(self.request)
        largest, parts = _parts(layout)
        row: dict[str, Any] = {
            **{"tp": layout.tp, "dp": layout.dp, "fits": fits, "peak": step.peak.total, "needed": layout.needed},
            **{"peak_at": step.peak_at, "memory": asdict(step.peak), "resting": step.resting.total, "parts": parts},
            **{"most_memory": largest, "tokens_per_step": tokens},
            "sent": {group: collective_bytes(step.collectives, group) for group in ("tp", "dp")},
            "collectives": {
                group: sum(each.count for each in step.collectives if each.group == group) for group in ("tp", "dp")
            },
            "flops": sum(each.flops * each.count for each in step.work),
        }
        if at is not None and self.request.card is not None:
            own = self.request.card.peak("float32" if self.request.precision == "fp32" else "bfloat16")
            row["seconds"] = {**asdict(at), "total": at.total}
            row["tokens_per_second"] = tokens / at.total
            row["share_of_peak"] = at.flops / at.total / own
            row["most_time"] = _most_time(at)
        return row

    def _take(self, ranked: Sequence[Layout], fits: Sequence[Layout]) -> dict[str, Any] | None:
        if not fits:
            return None
        best = ranked[0]
        others = [each for each in fits if each is not best]
        if not others:
            allowed = "was asked for" if self.request.tp else "is allowed"
            why = f"it is the only size that {allowed if len(ranked) == 1 else 'fits'}"
        elif best.time is None:
            why = "it is the smallest tp that fits, and so sends least within a replica"
        else:
            second = others[0] if len(others) == 1 else min(others, key=lambda each: self._rank(each, True))
            assert second.time is not None
            faster = self._rank(second, True)[0] / self._rank(best, True)[0]
            why = (
                f"of {len(fits)} that fit it has most tokens a second, {faster:.2f} times those of "
                f"{second.tp} x {second.dp}"
            )
        smaller = [each for each in ranked if each.tp < best.tp and each not in fits]
        if smaller:
            why += f"; {' and '.join(f'{each.tp} x {each.dp}' for each in sorted(smaller, key=_tp))} would not fit"
        return {"tp": best.tp, "dp": best.dp, "why": why}

    # ---------------------------------------------------------------------------------------------- where nothing fits

    def _switches(self, layouts: Sequence[Layout]) -> list[dict[str, Any]]:
        """What each change alone, and then all of them together, make of the layout that comes closest."""
        closest = min(layouts, key=lambda each: each.needed)
        together: dict[str, Any] = {}
        named: list[str] = []
        rows: list[dict[str, Any]] = []
        for name, changes in self._changes(closest):
            for row in self._tried(name, closest.tp, changes):
                rows.append(row)
                if row["needed"] < closest.needed and "lora" not in changes:
                    named.append(name)
                    plugin = {**together.get("plugin", self.request.plugin), **changes.get("plugin", {})}
                    together = {**together, **changes, "plugin": plugin}
        if not any(row["fits"] for row in rows) and len(named) > 1:
            rows += self._tried(" ".join(named), closest.tp, together)
            if not self.request.lora and not any(row["fits"] for row in rows):
                rows += self._tried(f"{' '.join(named)} --lora {LORA}", closest.tp, {**together, "lora": LORA})
        for tp in self._larger(closest.tp):
            rows += self._tried(f"--tp {tp}", tp, {})
        return sorted(rows, key=lambda row: (not row["fits"], row["needed"]))

    def _changes(self, layout: Layout) -> Iterator[tuple[str, dict[str, Any]]]:
        request = self.request
        if not request.checkpointing:
            yield "--checkpointing", {"checkpointing": True}
        for name in SWITCHES:
            useless = layout.dp == 1 if name == "zero1" else layout.tp == 1
            if not request.plugin.get(name) and not useless:
                yield f"--{name.replace('_', '-')}", {"plugin": {**request.plugin, name: True}}
        if request.precision != "bf16-weights":
            yield "--precision bf16-weights", {"precision": "bf16-weights"}
        if not request.lora:
            yield f"--lora {LORA}", {"lora": LORA}

    def _larger(self, tp: int) -> Iterator[int]:
        """Larger sizes within a node that the model allows and that were not asked for."""
        request = self.request
        if request.tp is None:
            return
        for size in range(tp + 1, request.per_node + 1):
            if request.gpus % size == 0 and size not in request.tp:
                try:
                    self.model.resolve(size)
                except PlanError:
                    continue
                yield size

    def _tried(self, name: str, tp: int, changes: Mapping[str, Any]) -> list[dict[str, Any]]:
        """One row; none of a change which this release, or this model, does not have."""
        try:
            made = self.layout(tp, **changes)
        except (BadInputError, ValueError):
            return []
        fits = made.needed <= self.request.memory
        return [{"change": name, "tp": made.tp, "dp": made.dp, "needed": made.needed, "fits": fits}]

    def _notes(self) -> list[str]:
        if not self.model.frozen:
            return []
        return [
            f"{len(self.model.frozen)} kinds of parameters get no gradient from text alone and are counted as "
            f"frozen: {', '.join(sorted(self.model.frozen)[:2])}, ..."
        ]


def _tp(layout: Layout) -> int:
    return layout.tp


def _fill(tp: int, request: Request) -> bool:
    """Whether replicas of that size fill the GPUs and the nodes."""
    return request.gpus % tp == 0 and (request.per_node % tp == 0 or request.gpus < request.per_node)


_PARTS = {
    "weights": ("parameters",),
    "gradients": ("gradients", "buckets"),  # with replicas, gradients lie in the buckets
    "optimizer": ("optimizer",),
    "activations": ("activations",),
    "logits": ("logits",),
    "other": ("temporaries", "buffers"),
}


def _parts(layout: Layout) -> tuple[str, dict[str, int]]:
    """Memory by what the user knows it as, and the largest part."""
    peak = asdict(layout.step.peak)
    parts = {name: sum(peak[each] for each in of) for name, of in _PARTS.items()}
    return max(parts, key=lambda name: parts[name]), parts


def _most_time(at: Duration) -> str:
    spent = {"kernels": at.forward + at.backward + at.optimizer, "tp collectives": at.tp_exposed}
    spent["dp collectives"] = at.dp_exposed
    most = max(spent, key=lambda name: spent[name])
    return f"kernels bound by {at.bound}" if most == "kernels" else most


def _inputs(model: Model, setting: Setting) -> Callable[[], Mapping[str, Tensor]]:
    taken = inspect.signature(type(model.full).forward).parameters
    for name in ("input_ids", "labels"):
        if name not in taken:
            raise BadInputError(
                f"the forward of {model.kind} takes no `{name}`; a step is estimated of models that take token ids "
                "and labels, and give a loss. Name a class with a head in the config's `architectures`."
            )

    def inputs() -> Mapping[str, Tensor]:
        ids = torch.zeros(setting.micro_batch, setting.seq_len, dtype=torch.long)
        more = {"token_type_ids": torch.zeros_like(ids)} if "token_type_ids" in taken else {}
        return {"input_ids": ids, "labels": ids, **more}

    return inputs
