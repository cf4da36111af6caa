"""One rank's training step without the ranks: what it keeps in memory, sends, copies and runs, exactly.

The model is made of fake tensors, which have shapes and no data, and the process group is torch's fake one, which has
any number of ranks and sends nothing. All else is what trains: the `Accelerator` with the plugin, the sharded modules,
DDP, clipping, the optimizer. So a figure is that of the code, without noise, and a model of any size fits a laptop.

What it cannot see: what a kernel allocates within itself, the allocator's rounding and fragmentation, the libraries'
own workspaces. Tensors are of device `cpu` (fake CUDA tensors crash in a CPU build of torch), so autocast casts what
it casts on the CPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import patch_environment
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from transformers import PreTrainedModel, masking_utils

from ..core.agreement import Ranks
from ..core.errors import BadInputError
from ..core.override import attributes
from ..core.randomness import RandomStream
from ..plugin import accelerator as hooks
from ..plugin.config import TensorParallelDDPPlugin
from ..training import zero1
from .tally import Collective, Copy, Held, Live, Memory, Point, Tally, Work, rows_of

__all__ = ["PRECISIONS", "Setting", "Simulation", "Trace", "one_of", "simulate", "trace"]

PHASES = ("forward", "backward", "clip", "step")
PRECISIONS = ("fp32", "bf16", "bf16-weights")


@dataclass(frozen=True)
class Setting:
    """What is simulated.

    Attributes:
        tp: Tensor-parallel ranks.
        dp: Replicas.
        micro_batch: Samples that one replica has in a forward.
        seq_len: Tokens of a sample.
        precision: `fp32`; `bf16`: Accelerate's mixed precision, of float32 weights; `bf16-weights`: all in bfloat16.
        checkpointing: Whether the layers' activations are computed again in the backward.
        max_norm: To which gradients are clipped; None: they are not.
        plugin: Further fields of the plugin.
        vocabulary: Tokens that logits are of, by which `Memory.logits` are told; 0: they are counted as activations.
        gpu: Whether it is as on a GPU: attention whose values are narrower than its keys runs in one kernel (on the
            CPU in several, which keep the scores), and `overlap="auto"` is what it is there.
    """

    tp: int = 1
    dp: int = 1
    micro_batch: int = 1
    seq_len: int = 128
    precision: str = "fp32"
    checkpointing: bool = False
    max_norm: float | None = 1.0
    plugin: Mapping[str, Any] = field(default_factory=dict)
    vocabulary: int = 0
    gpu: bool = False

    def __post_init__(self) -> None:
        for name in ("tp", "dp", "micro_batch", "seq_len"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise BadInputError(f"{name} is {value!r}; it has to be a whole number of at least 1.")
        if self.precision not in PRECISIONS:
            raise BadInputError(f"precision is {self.precision!r}; it has to be one of {', '.join(PRECISIONS)}.")


@dataclass(frozen=True)
class Trace:
    """One training step of one rank, operation by operation, with the optimizer's state made before."""

    points: tuple[Point, ...]
    work: tuple[Work, ...]
    collectives: tuple[Collective, ...]
    resting: Memory
    without_gradient: tuple[str, ...]


@dataclass(frozen=True)
class Simulation:
    """One training step of one rank, after one that has made the optimizer's state.

    Attributes:
        peak: Memory at the step's peak.
        peak_at: The phase and the operation of the peak.
        resting: Memory between two steps, with gradients freed.
        kept: Bytes of activations when the forward has ended, by whomever they are held.
        saved: Bytes of storages that autograd holds by then, beside parameters and what else there was before.
        gradient_excess: Bytes of storage that gradients keep alive beyond their own.
        gradients_with_excess: How many do.
        collectives: What the step sends.
        copies: What it copies.
        kernels: For each phase, how many operations ran that are no mere views.
        held: What is alive at the peak, the largest first.
        graphs: Under `torch.compile`; None: not tried.
        breaks: Why there is more than one graph.
        seconds: How long the simulation took.
    """

    peak: Memory
    peak_at: str
    resting: Memory
    kept: int
    saved: int
    gradient_excess: int
    gradients_with_excess: int
    collectives: tuple[Collective, ...]
    copies: tuple[Copy, ...]
    kernels: Mapping[str, int]
    held: tuple[Held, ...] = ()
    graphs: int | None = None
    breaks: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "peak_total": self.peak.total, "resting_total": self.resting.total}


def simulate(
    build: Callable[[], nn.Module],
    setting: Setting,
    *,
    inputs: Callable[[], Mapping[str, Tensor]] | None = None,
    optimizer: Callable[[Any], torch.optim.Optimizer] | None = None,
    held: bool = False,
    graphs: bool = False,
) -> Simulation:
    """Run the prepared training step of the first rank of `tp x dp`, on fake tensors.

    The process must have no process group and no accelerator of its own; it has none afterwards.

    Args:
        build: Makes the unsharded model; called where all that is made is fake.
        setting: The ranks, the batch and the precision. With one rank it is plain Accelerate, without the plugin.
        inputs: A batch; otherwise token ids, which are the labels too.
        optimizer: Of the model's parameters; otherwise torch's AdamW with `foreach`, its default on a GPU.
        held: Whether to list what is alive at the peak, which takes one more step.
        graphs: Whether to count the graphs under `torch.compile`, too.

    Raises:
        BadInputError: If the process has a process group or an accelerator.
        PlanError: If the model cannot be sharded.
    """
    started = time.perf_counter()
    with one_of(setting.tp * setting.dp):
        run = _Run(build, setting, inputs, optimizer)
        run.step()  # makes the optimizer's state
        tally = run.step()
        resting = Memory(**run.memory.bytes)
        saved = run.saved()
        listed = run.step(tally.peak_number).held if held else ()
        counted, breaks = run.graphs() if graphs else (None, {})
    return Simulation(
        peak=Memory(**tally.peak),
        peak_at=tally.peak_at,
        resting=resting,
        kept=tally.kept,
        saved=saved,
        gradient_excess=tally.excess,
        gradients_with_excess=tally.with_excess,
        collectives=tally.collectives,
        copies=tuple(rows_of(Copy, tally.copies)),
        kernels={phase: tally.kernels[phase] for phase in PHASES},
        held=listed,
        graphs=counted,
        breaks=breaks,
        seconds=time.perf_counter() - started,
    )


def trace(
    build: Callable[[], nn.Module],
    setting: Setting,
    inputs: Callable[[], Mapping[str, Tensor]] | None = None,
) -> Trace:
    """The step that `simulate` runs, operation by operation, in half of the time.

    The optimizer's state is made by a step on gradients that no backward has computed, and what layers learn of each
    other by a forward.

    Raises:
        BadInputError: If the process has a process group or an accelerator.
        PlanError: If the model cannot be sharded.
    """
    with one_of(setting.tp * setting.dp):
        run = _Run(build, setting, inputs, None)
        run.learn()
        run.make_state()
        tally = run.step(points=True)
        return Trace(
            points=tuple(tally.points),
            work=tuple(rows_of(Work, tally.work)),
            collectives=tally.collectives,
            resting=Memory(**run.memory.bytes),
            without_gradient=run.without_gradient,
        )


# ---------------------------------------------------------------------------------------------------------- the ranks


@contextmanager
def one_of(ranks: int, cpu: bool = True) -> Iterator[None]:
    """In the block, this process is the first of `ranks`, of which there are no others.

    Args:
        ranks: How many there seem to be.
        cpu: Whether Accelerate is to be told that they are on the CPU, whatever there is.
    """
    if dist.is_available() and dist.is_initialized():
        raise BadInputError("a simulation needs a process without a process group. Run it in one of its own.")
    if AcceleratorState._shared_state:
        raise BadInputError("a simulation needs a process without an Accelerator. Run it in one of its own.")
    with ExitStack() as stack:
        stack.callback(AcceleratorState._reset_state, True)
        stack.enter_context(patch_environment(ACCELERATE_USE_CPU=str(cpu).lower()))
        # Positions have no values, by which packed samples are told, and so whether there has to be a mask.
        stack.enter_context(attributes(masking_utils, find_packed_sequence_indices=lambda *args, **kwargs: None))
        if ranks > 1:
            import torch.testing._internal.distributed.fake_pg  # noqa: F401  registers the backend

            launched = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
            stack.enter_context(patch_environment(**launched, MASTER_ADDR="localhost", MASTER_PORT="1"))
            # Nobody can be connected to.
            nobody = {"ProcessGroupGloo": lambda *args, **kwargs: None, "new_group": _fake_group(dist.new_group)}
            stack.enter_context(attributes(dist, **nobody))
            # DDP would send the order in which gradients came, by address; the buckets stay those it has made first.
            stack.enter_context(attributes(dist.Reducer, _rebuild_buckets=lambda reducer: False))
            stack.enter_context(attributes(RandomStream, enter=lambda stream: None))  # by numbers that are drawn
            # Nobody else can differ, and what an optimizer does by element is tried on real numbers.
            stack.enter_context(attributes(Ranks, same=lambda *args, **kwargs: None))
            stack.enter_context(attributes(zero1, steps_by_element=_on_real_numbers(zero1.steps_by_element)))
            dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=ranks)
            stack.callback(dist.destroy_process_group)
        yield


def _on_real_numbers(stock: Callable) -> Callable:
    def steps_by_element(optimizer: Any, group: dict[str, Any]) -> bool:
        with _disable_current_modes():
            return stock(optimizer, {**group, "params": []})

    return steps_by_element


def _fake_group(stock: Callable) -> Callable:
    def new_group(ranks: Any = None, timeout: Any = None, backend: Any = None, *args: Any, **kwargs: Any) -> Any:
        return stock(ranks, timeout, "fake", *args, **kwargs)

    return new_group


# ----------------------------------------------------------------------------------------------------------- the step


class _Run:
    """A prepared model, its optimizer and its batch."""

    def __init__(
        self,
        build: Callable[[], nn.Module],
        setting: Setting,
        inputs: Callable[[], Mapping[str, Tensor]] | None,
        optimizer: Callable[[Any], torch.optim.Optimizer] | None,
    ):
        from torch._subclasses.fake_tensor import FakeTensorMode

        self.setting = setting
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.memory = Live(_widths(setting))
        self.without_gradient: tuple[str, ...] = ()
        self.tally: Tally | None = None
        several = setting.tp * setting.dp > 1
        # The periodic comparisons read checksums, of which fake tensors have none.
        fixed: dict[str, Any] = {"prove": "never", "replica_check_steps": 0}
        sizes: dict[str, Any] = {"tp_size": setting.tp, "dp_replicate_size": setting.dp}
        plugin = TensorParallelDDPPlugin(**sizes, **fixed, **setting.plugin) if several else None
        self.accelerator = Accelerator(
            cpu=True,
            device_placement=False,  # fake tensors cannot be moved, and need not be
            mixed_precision="bf16" if setting.precision == "bf16" else "no",
            parallelism_config=plugin,
        )
        with self.fake:
            # Values that nobody has need not be drawn, and some ways of drawing them look at them.
            with _default_type(torch.bfloat16 if setting.precision == "bf16-weights" else torch.float32):
                with attributes(PreTrainedModel, initialize_weights=lambda model: None):
                    with attributes(nn.Module, _apply=_converted):
                        model = build()
            model.train()
            if setting.checkpointing:
                model.gradient_checkpointing_enable()
            made = optimizer(model.parameters()) if optimizer else torch.optim.AdamW(model.parameters(), foreach=True)
            self.batch = dict(inputs() if inputs else _tokens(setting))
            for tensor in self.batch.values():
                self.memory.name(tensor, "buffers")
        self.groups = self._groups()
        overlaps = attributes(hooks, on_gpus=lambda mesh: self.setting.gpu)
        with _wrapped_in(self.fake, Tally(self.memory, "buckets", self.groups)), overlaps:
            self.model, self.optimizer = self.accelerator.prepare(model, made)
        if isinstance(self.model, nn.parallel.DistributedDataParallel):
            self.model.register_comm_hook(self, _reduce_bucket)
        self._name()
        for param in self.model.parameters():
            if param.requires_grad:
                param.register_post_accumulate_grad_hook(lambda p: self.memory.name(p.grad, "gradients"))

    def _groups(self) -> dict[str, dist.ProcessGroup]:
        mesh = self.accelerator.torch_device_mesh
        if mesh is None:
            return {}
        short = {"tp": "tp", "dp_replicate": "dp"}
        return {short[name]: mesh[name].get_group() for name in mesh.mesh_dim_names if name in short}

    def _name(self) -> None:
        for param in self.model.parameters():
            self.memory.name(param, "parameters")
        for buffer in self.model.buffers():
            self.memory.name(buffer, "buffers")

    def learn(self) -> None:
        """A forward, in which layers find those that share their input; see `styles.region.follow`."""
        with self._seen_by(Tally(self.memory, "activations", self.groups)):
            self.model(**self.batch)

    @contextmanager
    def _seen_by(self, tally: Tally) -> Iterator[None]:
        with self.fake, tally, _attention_of_gpus() if self.setting.gpu else nullcontext(), tally.following():
            yield

    def make_state(self) -> None:
        """The optimizer's state, as a step makes it; what zero1 gathers afterwards is of no use here."""
        with self.fake, ExitStack() as stack:
            for bucket in (zero1._InPlace, zero1._Rows, zero1._FromOwner):
                stack.enter_context(attributes(bucket, gather=lambda bucket, group: None))
            for param in self.model.parameters():
                if param.requires_grad:
                    param.grad = torch.empty_like(param)
            self._optimize()

    def _optimize(self) -> None:
        self.optimizer.step()
        for state in self.optimizer.optimizer.state.values():
            for value in state.values():
                if isinstance(value, Tensor):
                    self.memory.name(value, "optimizer")
        self.optimizer.zero_grad()

    def step(self, listed_at: int | None = None, points: bool = False) -> Tally:
        """A step, tallied; see `Tally.listed_at` and `Tally.points`."""
        self.tally = tally = Tally(self.memory, "activations", self.groups)
        tally.listed_at, tally.pointed = listed_at, points
        with self._seen_by(tally):
            tally.phase = "forward"
            outputs = self.model(**self.batch)
            loss = outputs.loss if hasattr(outputs, "loss") else outputs[0]
            tally.kept = self.memory.bytes["activations"] + self.memory.bytes["logits"]
            tally.enter("backward", "temporaries")
            self.accelerator.backward(loss)
            params = list(self.model.parameters())
            tally.see_gradients(params)
            named = self.accelerator.unwrap_model(self.model).named_parameters()
            self.without_gradient = tuple(name for name, p in named if p.requires_grad and p.grad is None)
            tally.enter("clip", "temporaries")
            if self.setting.max_norm is not None:
                self.accelerator.clip_grad_norm_(params, self.setting.max_norm)
            tally.enter("step", "temporaries")
            self._optimize()
            del outputs, loss
        return tally

    def saved(self) -> int:
        """Bytes of storages that a forward lets autograd hold."""
        before, found = self.memory.known(), {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            found[storage._cdata] = storage.nbytes()
            return tensor.detach()

        tally = Tally(self.memory, "activations", self.groups)
        with self.fake, tally, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            outputs = self.model(**self.batch)
            size = sum(size for key, size in found.items() if key not in before)
            del outputs
        return size

    def graphs(self) -> tuple[int, dict[str, int]]:
        """How many graphs a forward is compiled to, and the reasons for more than one."""
        torch._dynamo.reset()
        made: list[Any] = []

        def count(graph: torch.fx.GraphModule, example_inputs: Any) -> Callable:
            made.append(graph)
            return graph.forward

        compiled = torch.compile(self.model, backend=count)
        with self.fake:
            compiled(**self.batch)
        breaks = dict(torch._dynamo.utils.counters["graph_break"])
        torch._dynamo.reset()
        return len(made), breaks


@contextmanager
def _default_type(dtype: torch.dtype) -> Iterator[None]:
    """What floating-point tensors are made of; fake ones cannot be converted in place."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _converted(module: nn.Module, convert: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """`Module._apply`, where parameters cannot be converted in place."""
    for child in module.children() if recurse else ():
        _converted(child, convert)
    for name, param in module._parameters.items():
        if param is not None and (new := convert(param)) is not param:
            module._parameters[name] = nn.Parameter(new.detach(), param.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = convert(buffer)
    return module


def _tokens(setting: Setting) -> dict[str, Tensor]:
    ids = torch.zeros(setting.micro_batch, setting.seq_len, dtype=torch.long)
    return {"input_ids": ids, "labels": ids}


@contextmanager
def _wrapped_in(*modes: Any) -> Iterator[None]:
    """Let DDP make its buckets where `modes` hold; everything else that `prepare` does needs real numbers."""
    stock, assign = nn.parallel.DistributedDataParallel.__init__, dist._compute_bucket_assignment_by_size

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        def as_rebuilt(params: list[Tensor], limits: Any, *others: Any) -> tuple[list[list[int]], list[int]]:
            """The buckets after the first step, from the last parameter on; before it there would be one for all."""
            cap = self.bucket_bytes_cap
            first = cap if kwargs.get("bucket_cap_mb") else min(cap, dist._DEFAULT_FIRST_BUCKET_BYTES)
            buckets, caps = assign(params[::-1], [first, cap], *others)
            last = len(params) - 1
            return [[last - index for index in bucket] for bucket in reversed(buckets)], list(reversed(caps))

        with ExitStack() as stack:
            for mode in modes:
                stack.enter_context(mode)
            stack.enter_context(attributes(dist, _compute_bucket_assignment_by_size=as_rebuilt))
            stock(self, *args, **{**kwargs, "init_sync": False})  # there is nothing that could be compared

    with attributes(nn.parallel.DistributedDataParallel, __init__=init):
        yield


def _reduce_bucket(run, bucket):  # DDP wants no annotations but classes, which this file has none of
    """What DDP does by itself, where it can be seen. How many layers share a bucket depends on how many there are."""
    buffer, group = bucket.buffer(), run.groups["dp"]
    run.tally.pointed, pointed = False, run.tally.pointed
    buffer.div_(group.size())
    dist.all_reduce(buffer, group=group)
    run.tally.pointed = pointed
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(buffer)
    return done


def _widths(setting: Setting) -> frozenset[int]:
    """The last dimension of logits, all of them or one rank's part."""
    if not setting.vocabulary:
        return frozenset()
    parts = {setting.vocabulary // setting.tp, -(-setting.vocabulary // setting.tp)}
    return frozenset({setting.vocabulary, -(-setting.vocabulary // setting.tp) * setting.tp, *parts})


@contextmanager
def _attention_of_gpus() -> Iterator[None]:
    """Attention whose values are as wide as its keys stays; other is that of the kernel that a GPU has for it."""
    stock = nn.functional.scaled_dot_product_attention

    def attention(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, dropout_p: float = 0.0, **named: Any
    ):
        if query.size(-1) == value.size(-1):
            return stock(query, key, value, attn_mask, dropout_p, **named)
        if attn_mask is not None:
            attn_mask = attn_mask.to(query.dtype).expand(*query.shape[:-1], key.size(-2))
        repeats = query.size(1) // key.size(1)
        key, value = (tensor.repeat_interleave(repeats, 1) if repeats > 1 else tensor for tensor in (key, value))
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention
        causal = bool(named.get("is_causal"))
        return efficient(query, key, value, attn_mask, True, dropout_p, causal, scale=named.get("scale"))[0]

    with attributes(nn.functional, scaled_dot_product_attention=attention):
        yield
