"""`TensorParallelDDPPlugin`: the sizes and options, and the place where Accelerate lets them in."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from accelerate import ParallelismConfig
from torch.distributed.device_mesh import DeviceMesh

from ..checkpoint.from_pretrained import load_in_slices
from ..core.control import PATIENCE, be_patient
from ..plans.rules import PlanLike
from ..proof.prove import MODES
from .accelerator import hook_accelerator, hook_without_tp, hook_zero1
from .ddp import _adopt_timeout, outlive
from .replica_view import ReplicaView, current_view, present_replicas
from .trainer import override_trainers
from .upstream import check_upstream
from .watch import hook_watch

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["TensorParallelDDPPlugin"]

logger = logging.getLogger(__name__)

_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off", "")
_OTHER_ENGINES = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "XLA")


@dataclass(repr=False)
class TensorParallelDDPPlugin(ParallelismConfig):
    """Tensor parallelism inside plain DDP, as a `ParallelismConfig`.

    Pass it as `Accelerator(parallelism_config=...)` or `TrainingArguments(parallelism_config=...)`. A field that is
    not given comes from the environment that `accelerate launch` sets from its YAML, then from the default.

    Args:
        tp_size: Ranks that share one model replica, neighbours in rank order. Env `PARALLELISM_CONFIG_TP_SIZE`,
            default 1, which is plain DDP.
        dp_replicate_size: Number of replicas. Env `PARALLELISM_CONFIG_DP_REPLICATE_SIZE`, default: world size divided
            by `tp_size`, known once an `Accelerator` has been made.
        tp_plan: `"auto"`, a mapping of names to styles, or the path of a YAML or JSON file with one; see
            `resolve_plan`. Env `ACCEL_TP_DDP_PLAN`, default `"auto"`, which infers a plan for a model that has none,
            and uses it if the proof accepts it.
        prove: Whether `prepare` proves the plan on a small model of the same class before a weight is touched:
            `"auto"` where it was not proved before, `"always"`, or `"never"`, which trusts it. Env
            `ACCEL_TP_DDP_PROVE`, default `"auto"`.
        loss_parallel: Whether cross-entropy is computed from each rank's part of the vocabulary, with the output layer
            inside and without logits. True: in training, if the model is given labels; `outputs.logits` are then not
            computed, and say so when they are read. `"auto"`: where nobody reads them, which is known of Trainer's
            own loss and of TRL's. False: never. Env `ACCEL_TP_DDP_LOSS_PARALLEL`, default `"auto"`.
        sequence_parallel: Whether residuals, norms and dropout between the blocks of a decoder layer are spread over
            the sequence in training: 1/tp of their activations, in as many bytes of communication. Env
            `ACCEL_TP_DDP_SEQUENCE_PARALLEL`, default False.
        overlap: Whether the sum of a column-parallel layer's input gradient over the ranks is under way while its
            weight gradient is computed: the same values. `"auto"`: on GPUs, for inputs of 16 Mi elements or more. Off
            under `torch.use_deterministic_algorithms`. Env `ACCEL_TP_DDP_OVERLAP`, default `"auto"`.
        zero1: Whether each replica keeps the optimizer state of its part of every parameter only (docs/zero1.md). Env
            `ACCEL_TP_DDP_ZERO1`, default False.
        replica_check_steps: How often replicated parameters and the batch are compared over the ranks of a replica;
            0: never. Env `ACCEL_TP_DDP_REPLICA_CHECK_STEPS`, default 100.
        replica_drift: What happens if replicated parameters differ: `"heal"` sends the first rank's values to the
            others and logs their names, `"raise"` raises. Env `ACCEL_TP_DDP_REPLICA_DRIFT`, default `"heal"`.
        async_save: Whether `accelerator.save_state` writes in the background while training continues; its argument
            `async_save` beats this. Env `ACCEL_TP_DDP_ASYNC_SAVE`, default False.
        control_timeout: Seconds that ranks wait for one another between steps (in `prepare`, saving and loading),
            where the process group is that of GPUs; one of CPU ranks keeps its own timeout. Env
            `ACCEL_TP_DDP_CONTROL_TIMEOUT`, default 3600.
        watch: Optimizer steps between two reports of tokens a second, MFU, memory and time in collectives: to
            trackers, Trainer's logs and in a line of the main process; 0: none. Env `ACCEL_TP_DDP_WATCH`, default 0.
        peak_tflops: What MFU is a share of, in 10^12 operations a second of one device, where its data sheet is not
            known here. Env `ACCEL_TP_DDP_PEAK_TFLOPS`.

    Raises:
        ValueError: If a value is out of range or not available; it says what is allowed.
    """

    tp_plan: PlanLike | None = field(default=None, kw_only=True)
    prove: str | None = field(default=None, kw_only=True)
    loss_parallel: bool | str | None = field(default=None, kw_only=True)
    sequence_parallel: bool | None = field(default=None, kw_only=True)
    overlap: bool | str | None = field(default=None, kw_only=True)
    zero1: bool | None = field(default=None, kw_only=True)
    replica_check_steps: int | None = field(default=None, kw_only=True)
    replica_drift: str | None = field(default=None, kw_only=True)
    async_save: bool | None = field(default=None, kw_only=True)
    control_timeout: int | None = field(default=None, kw_only=True)
    watch: int | None = field(default=None, kw_only=True)
    peak_tflops: float | None = field(default=None, kw_only=True)

    def __post_init__(self):
        self._as_plain_ddp = False
        self._dp_is_open = False
        self.tp_size: int = _whole("tp_size", self.tp_size, "PARALLELISM_CONFIG_TP_SIZE", 1, least=1)
        for name in ("dp_shard_size", "cp_size", "sp_size"):
            size = _whole(name, getattr(self, name), f"PARALLELISM_CONFIG_{name.upper()}", 1, least=1)
            if size != 1:
                raise ValueError(
                    f"{name}={size}: this plugin combines tensor parallelism with plain DDP only. Set {name}=1, or "
                    "use accelerate.ParallelismConfig for that."
                )
        dp_size = self.dp_replicate_size
        if dp_size is None:
            # The launcher writes 1 also where its YAML says nothing.
            dp_size = _whole("dp_replicate_size", None, "PARALLELISM_CONFIG_DP_REPLICATE_SIZE", 1, least=1)
            self._dp_is_open = dp_size == 1
        else:
            dp_size = _whole("dp_replicate_size", dp_size, None, 1, least=1)
        if self.tp_plan is None:
            self.tp_plan = os.environ.get("ACCEL_TP_DDP_PLAN", "auto")
        if self.prove is None:
            self.prove = os.environ.get("ACCEL_TP_DDP_PROVE", "auto")
        if self.prove not in MODES:
            raise ValueError(f'prove is {self.prove!r}; it has to be "auto", "always" or "never".')
        self.loss_parallel = _flag_or_auto("loss_parallel", self.loss_parallel, "ACCEL_TP_DDP_LOSS_PARALLEL")
        self.sequence_parallel = _flag("sequence_parallel", self.sequence_parallel, "ACCEL_TP_DDP_SEQUENCE_PARALLEL")
        self.overlap = _flag_or_auto("overlap", self.overlap, "ACCEL_TP_DDP_OVERLAP")
        self.zero1 = _flag("zero1", self.zero1, "ACCEL_TP_DDP_ZERO1")
        self.replica_check_steps = _whole(
            "replica_check_steps", self.replica_check_steps, "ACCEL_TP_DDP_REPLICA_CHECK_STEPS", 100, least=0
        )
        if self.replica_drift is None:
            self.replica_drift = os.environ.get("ACCEL_TP_DDP_REPLICA_DRIFT", "heal")
        if self.replica_drift not in ("heal", "raise"):
            raise ValueError(f'replica_drift is {self.replica_drift!r}; it has to be "heal" or "raise".')
        self.async_save = _flag("async_save", self.async_save, "ACCEL_TP_DDP_ASYNC_SAVE")
        self.control_timeout = _whole(
            "control_timeout", self.control_timeout, "ACCEL_TP_DDP_CONTROL_TIMEOUT", PATIENCE, least=1
        )
        self.watch = _whole("watch", self.watch, "ACCEL_TP_DDP_WATCH", 0, least=0)
        self.peak_tflops = _positive("peak_tflops", self.peak_tflops, "ACCEL_TP_DDP_PEAK_TFLOPS")
        # The base class refuses tensor parallelism with replicas, which is what this plugin is for.
        self.dp_replicate_size: int | None = 1
        super().__post_init__()
        self._set_size("dp_replicate", dp_size)
        if self.tp_size > 1 or self.zero1:
            # Or arguments that are made with this, before an accelerator is, would count ranks.
            importlib.import_module("transformers.training_args")
            override_trainers(TensorParallelDDPPlugin)

    def __repr__(self) -> str:
        dp_size = "world size / tp_size" if self._dp_is_open else self.dp_replicate_size
        return (
            f"TensorParallelDDPPlugin(tp_size={self.tp_size}, dp_replicate_size={dp_size}, tp_plan={self.tp_plan!r})"
        )

    def __getstate__(self) -> dict[str, Any]:
        # Trainer saves its arguments; a mesh holds process groups, which stay behind.
        return {**self.__dict__, "device_mesh": None}

    @property
    def tp_enabled(self) -> bool:
        """Whether tensor parallelism is on. False while Accelerate's own code prepares the model for plain DDP."""
        return self.tp_size > 1 and not self._as_plain_ddp

    @property
    def dp_replicate_enabled(self) -> bool:
        """Whether the mesh has the dimension `dp_replicate`; with tensor parallelism it always does."""
        return self.dp_replicate_size > 1 or self.tp_size > 1

    @contextmanager
    def as_plain_ddp(self) -> Iterator[None]:
        """Let Accelerate take its plain DDP path: the model is sharded, and each rank's part is an ordinary one."""
        before, self._as_plain_ddp = self._as_plain_ddp, True
        try:
            yield
        finally:
            self._as_plain_ddp = before

    @contextmanager
    def sharded_loading(self) -> Iterator[None]:
        """Let `from_pretrained` in the block read no more of a checkpoint than this rank will hold.

        ```python
        accelerator = Accelerator(parallelism_config=plugin)
        with plugin.sharded_loading():
            model = AutoModelForCausalLM.from_pretrained(folder)
        model, optimizer = accelerator.prepare(model, optimizer)
        ```

        The model's parameters are then plain parameters of this rank's sizes, cut by `tp_plan`; everything else
        (dtype, ties, missing and unexpected weights, the loading report) is transformers' own. It can be wrapped in
        adapters, and runs once `prepare` or `parallelize` has had it. Collective: every rank runs the block, with the
        same models in the same order; an error on one rank is an error on all. With tp_size=1, or outside of a
        distributed launch, loading is as it always is.

        Raises:
            ValueError: Without an accelerator; for a quantized checkpoint, a `device_map` over several devices, or a
                model that the plan cannot shard.
            CheckpointError: If a file cannot be read, or the ranks read different ones.
        """
        with load_in_slices(self):
            yield

    def get_device_mesh(self, device_type: str | None = None) -> DeviceMesh | None:
        """The mesh `("dp_replicate", "tp")`; None in a single process.

        Raises:
            ValueError: If the world size is not `tp_size` times `dp_replicate_size`.
        """
        if self.device_mesh is None:
            self._settle_sizes(dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1)
            view = current_view()
            if view is not None and view.mesh.shape == (self.dp_replicate_size, self.tp_size):
                self.device_mesh: DeviceMesh | None = view.mesh
        return super().get_device_mesh(device_type)

    def present_replicas(self, device_type: str) -> ReplicaView:
        """Let the ranks of a replica present themselves as one process to Accelerate, and so to all that asks it.

        An `Accelerator` with this plugin does that. Call it where counts are asked before: once the process group
        exists. Collective over all ranks.
        """
        mesh = self.get_device_mesh(device_type)
        assert mesh is not None, "several processes have a mesh"
        return present_replicas(mesh)

    def _settle_sizes(self, world_size: int) -> None:
        if world_size % self.tp_size:
            raise ValueError(
                f"tp_size={self.tp_size} does not divide the {world_size} processes that were launched. Launch a "
                f"multiple of {self.tp_size} (`accelerate launch --num_processes`), or set tp_size to one of "
                f"{_divisors(world_size)}."
            )
        if self._dp_is_open:
            self._set_size("dp_replicate", world_size // self.tp_size)
        if self.tp_size * self.dp_replicate_size != world_size:
            raise ValueError(
                f"tp_size={self.tp_size} x dp_replicate_size={self.dp_replicate_size} are "
                f"{self.tp_size * self.dp_replicate_size} processes, but {world_size} were launched. Set "
                f"dp_replicate_size={world_size // self.tp_size}, or leave it out."
            )

    def _validate_accelerator(self, accelerator: Accelerator) -> None:
        """Called by `Accelerator.__init__`: the one place where this plugin takes hold of an accelerator."""
        be_patient(self.control_timeout or PATIENCE)
        engine = accelerator.distributed_type.value
        if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":  # which Accelerate passes over on the CPU
            engine = "FSDP"
        if engine in _OTHER_ENGINES:
            raise ValueError(
                f"TensorParallelDDPPlugin(tp_size={self.tp_size}) works with plain DDP, but the accelerator runs "
                f"{engine}. Leave out the FSDP, DeepSpeed, Megatron-LM or TPU settings "
                "(plugins, `accelerate config`, ACCELERATE_USE_* variables), or this plugin."
            )
        launched = self.tp_size * self.dp_replicate_size
        if current_view() is None and accelerator.num_processes != launched:
            # Without a GPU and without this switch Accelerate starts the ranks' group, and then forgets about it.
            raise ValueError(
                f"{launched} processes were launched, but the accelerator knows of "
                f"{accelerator.num_processes} ({accelerator.distributed_type.value}). On CPU ranks set "
                "ACCELERATE_USE_CPU=true, or pass Accelerator(cpu=True)."
            )
        if launched > 1:
            group = self.device_mesh["dp_replicate"].get_group() if self.tp_size > 1 else dist.group.WORLD
            assert group is not None, "several processes have a group"
            outlive(group)
        if self.tp_size > 1:
            assert self.device_mesh is not None, "several processes have a mesh"
            _warn_of_hosts(self.tp_size, launched)
            check_upstream()
            _adopt_timeout(accelerator, self.device_mesh)
            present_replicas(self.device_mesh).held_by(accelerator, self, _Shown(self))
            hook_accelerator(accelerator, self)
            override_trainers(TensorParallelDDPPlugin)
        else:
            hook_without_tp(accelerator, bool(self.async_save))
            if self.zero1 and launched > 1:
                assert dist.group.WORLD is not None, "several processes have a group"
                check_upstream()
                hook_zero1(accelerator, dist.group.WORLD, bool(self.async_save))
                override_trainers(TensorParallelDDPPlugin)
        if self.watch:
            hook_watch(accelerator, self)


def _warn_of_hosts(tp_size: int, launched: int) -> None:
    """Say so where a replica lies on several hosts, as the launcher tells how many ranks one has."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or launched)
    if local < launched and local % tp_size and dist.get_rank() == 0:
        logger.warning(
            "tp_size=%d, and each host has %d ranks: replicas lie on several hosts, and each layer waits for the "
            "network between them. Set tp_size to a divisor of %d, if the model allows it.",
            *(tp_size, local, local),
        )


class _Shown(TensorParallelDDPPlugin):
    """What an accelerator shows of its plugin: a replica is one process, which shares its model with nobody.

    Trainer and TRL's trainers divide by `tp_size` what they have counted by `num_processes`. Everything else is the
    plugin's, to read and to set.
    """

    __slots__ = ("_plugin",)

    def __init__(self, plugin: TensorParallelDDPPlugin):
        self._plugin = plugin
        self.__dict__ = plugin.__dict__

    @property
    def tp_size(self) -> int:  # type: ignore[override]
        return 1

    def __repr__(self) -> str:
        return repr(self._plugin)

    @property
    def tp_enabled(self) -> bool:
        return self._plugin.tp_enabled

    @property
    def dp_replicate_enabled(self) -> bool:
        return True

    def sharded_loading(self) -> Any:
        return self._plugin.sharded_loading()

    def _validate_accelerator(self, accelerator: Accelerator) -> None:
        self._plugin._validate_accelerator(accelerator)


def _whole(name: str, value: Any, variable: str | None, default: int, least: int) -> int:
    source = name
    if value is None and variable is not None and variable in os.environ:
        source, value = f"{name} (from the environment variable {variable})", os.environ[variable]
        value = int(value) if value.strip().removeprefix("-").isdecimal() else value
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{source} is {value!r}; it has to be a whole number of at least {least}.")
    return value


def _positive(name: str, value: Any, variable: str) -> float | None:
    source = name
    if value is None and variable in os.environ:
        source, value = f"{name} (from the environment variable {variable})", os.environ[variable]
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = 0.0
    if isinstance(value, bool) or not 0 < number < float("inf"):
        raise ValueError(f"{source} is {value!r}; it has to be a positive number.")
    return number


def _flag_or_auto(name: str, value: Any, variable: str) -> bool | str:
    if value is None:
        value = os.environ.get(variable, "auto")
    return "auto" if isinstance(value, str) and value.lower() == "auto" else _flag(name, value, variable, '"auto", ')


def _flag(name: str, value: Any, variable: str, besides: str = "") -> bool:
    if value is None:
        value = os.environ.get(variable, "")
    if isinstance(value, str) and value.lower() in _TRUE + _FALSE:
        return value.lower() in _TRUE
    if not isinstance(value, bool):
        raise ValueError(
            f"{name} is {value!r} (or so says the environment variable {variable}); it has to be "
            f"{besides}true or false."
        )
    return value


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
