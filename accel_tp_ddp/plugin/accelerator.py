"""The hooked `Accelerator`: what `prepare` does under tensor parallelism, and which methods have to know of it.

Only methods of one accelerator object are replaced, as the tables at the end say; everything that is not about tensor
parallelism is left to the accelerator's own.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from ..checkpoint.background import buffers, wait_for_save
from ..checkpoint.deferred import materialized
from ..checkpoint.export import export, full_state_dict_of_main, save_config
from ..checkpoint.load import load_any_state, load_state
from ..checkpoint.save import end_after_save, save_state, save_state_or_in_background
from ..core.agreement import Ranks
from ..core.errors import NoPlanError
from ..core.override import Override, attributes, install
from ..core.randomness import agree_as_processes, draw_by_replica
from ..core.serving import stop_serving
from ..core.shard import check_mesh, full_shape, holds_shards
from ..core.wrappers import unwrap
from ..loss.heads import check_head, defer_logits
from ..model.check import Running, check_model
from ..model.parallelize import parallelize_with_map
from ..model.sequence import check_sequence
from ..plans.peft import check_adapters
from ..plans.plan import Plan
from ..plans.rules import InferredPlan, PlanLike
from ..proof.infer import infer_plan, log_inferred
from ..proof.prove import prove_plan
from ..training.drift import DriftGuard
from ..training.full_tensor_step import FullTensorStep, steps_on_full_tensors
from ..training.gradients import agree_on_overflow, clip_grad_norm_
from ..training.optimizer import check_optimizer, check_step, follow_model, take_full_state
from ..training.same_batch import watch_batches
from ..training.zero1 import Zero1, check_zero1, zero1_of
from .data_loader import serve_replicas
from .ddp import _OverReplicas
from .fp8 import check_fp8, check_fp8_sizes, convert_to_fp8, converted_already
from .placement import empty_cache, end_waiting
from .replica_view import current_view

__all__ = [
    "OVERRIDES",
    "OVERRIDES_WITHOUT_TP",
    "OVERRIDES_WITH_ZERO1",
    "Settings",
    "hook_accelerator",
    "hook_without_tp",
    "hook_zero1",
]

logger = logging.getLogger(__name__)

#: Elements of a layer's input from which on `overlap="auto"` is at work on GPUs. It takes the host 260 us a layer
#: (`benchmarks/host_time.py --overlap`), which does not show where kernels take longer than the host: reckoned for a
#: layer of 4,096 features at tp 8 on an H100, not measured.
OVERLAPS_FROM = 1 << 24


class Settings(Protocol):
    """What the hooks need to know; the plugin has it."""

    tp_size: int
    dp_replicate_size: int
    device_mesh: DeviceMesh
    tp_plan: PlanLike
    prove: str
    loss_parallel: Any
    sequence_parallel: bool
    overlap: Any
    zero1: bool
    replica_check_steps: int
    replica_drift: str
    async_save: bool

    def as_plain_ddp(self) -> AbstractContextManager[None]: ...


def on_gpus(mesh: DeviceMesh) -> bool:
    return mesh.device_type != "cpu"


def hook_accelerator(accelerator: Accelerator, plugin: Settings) -> None:
    """Replace the methods of `accelerator` that tensor parallelism concerns."""
    install(accelerator, OVERRIDES, _Hooks(accelerator, plugin))


def hook_without_tp(accelerator: Accelerator, async_save: bool) -> None:
    """Let an accelerator with tp_size=1 load states of any tp_size, and save in the background if asked to."""
    install(accelerator, OVERRIDES_WITHOUT_TP, async_save)


def hook_zero1(accelerator: Accelerator, group: ProcessGroup, async_save: bool) -> None:
    """Let an accelerator with tp_size=1 divide optimizer states over the ranks of `group`."""
    install(accelerator, OVERRIDES_WITH_ZERO1, _Zero1Hooks(group, async_save))


class _SavesStates:
    """A replaced method that both kinds of accelerators have."""

    def __init__(self, tp_size: int, async_save: bool):
        self.tp_size = tp_size
        self.async_save = async_save

    def save_state(
        self,
        stock: Callable,
        accelerator: Accelerator,
        /,
        output_dir: str | None = None,
        safe_serialization: bool = True,
        async_save: bool | None = None,
        **save_model_func_kwargs: Any,
    ) -> Path:
        behind = self.async_save if async_save is None else async_save
        return save_state(accelerator, output_dir, self.tp_size, behind)


class _Hooks(_SavesStates):
    """What the replaced methods of one accelerator share."""

    def __init__(self, accelerator: Accelerator, plugin: Settings):
        super().__init__(plugin.tp_size, plugin.async_save)
        self.accelerator = accelerator
        self.plugin = plugin
        self.tp_mesh = plugin.device_mesh["tp"]
        self.dp_size = plugin.dp_replicate_size
        self.dp_mesh = plugin.device_mesh["dp_replicate"]
        self.dp_group = self.dp_mesh.get_group()
        self._wrapped = _Wrapped()
        self._sharded: list[tuple[nn.Module, Running]] = []  # by `prepare`, and about to reach `prepare_model`
        self._guard = DriftGuard(self.tp_mesh, plugin.replica_check_steps, plugin.replica_drift)

    # ---------------------------------------------------------------------------------------------------- prepare

    def prepare(
        self, stock: Callable, accelerator: Accelerator, /, *args: Any, device_placement: list[bool] | None = None
    ) -> Any:
        """Mesh -> plan -> shard -> localize -> optimizer, and then Accelerate's own: DDP over the replicas."""
        models = [arg for arg in args if isinstance(arg, nn.Module) and not _is_prepared(arg)]
        optimizers = [arg for arg in args if isinstance(arg, Optimizer) and not _is_prepared(arg)]
        convert_to_fp8(accelerator, models)
        self._shard(models, optimizers)
        with self.plugin.as_plain_ddp():
            return stock(*args, device_placement=device_placement)

    def prepare_model(
        self,
        stock: Callable,
        accelerator: Accelerator,
        /,
        model: nn.Module,
        device_placement: bool | None = None,
        evaluation_mode: bool = False,
    ) -> nn.Module:
        if not _is_prepared(model) and not any(model is sharded for sharded, _ in self._sharded):
            self._shard([model])
        running = [running for sharded, running in self._sharded if sharded is model]
        self._sharded = [(sharded, running) for sharded, running in self._sharded if sharded is not model]
        if (device := end_waiting(model)) is not None:
            model.to(device)
        # One replica needs no DDP; the evaluation mode does all the rest.
        plainly = evaluation_mode or self.dp_size == 1
        settings = _OverReplicas(accelerator.ddp_handler, self.dp_group)
        with self.plugin.as_plain_ddp(), attributes(accelerator, ddp_handler=settings):
            prepared = stock(model, device_placement=device_placement, evaluation_mode=plainly)
        if running:
            Ranks(failed="rank {rank} cannot prepare: {problem}", otherwise=ValueError).together(running[0].check)
        return self._wrapped.add(prepared)

    def _shard(self, models: list[nn.Module], optimizers: Sequence[Optimizer] = ()) -> None:
        """Plan -> check -> proof -> shard -> localize -> optimizers. Raises on all ranks, before a weight changes."""
        rules: list[PlanLike] = [self.plugin.tp_plan] * len(models)
        found = self._agree(models, lambda: self._check(models, optimizers, rules))
        missing = [index for index, plan in enumerate(found) if isinstance(plan, NoPlanError)]
        if missing:
            for index in missing:
                rules[index] = infer_plan(unwrap(models[index]), self.tp_mesh)
            found = self._agree(models, lambda: self._check(models, optimizers, rules))
        plans = [plan for plan in found if not isinstance(plan, NoPlanError)]
        self._prove(models, plans, rules)
        mapping: dict[nn.Parameter, nn.Parameter] = {}
        for model, plan in zip(models, plans):
            if not holds_shards(model):
                mapping.update(parallelize_with_map(unwrap(model), self.tp_mesh, plan))
                defer_logits(unwrap(model), self.plugin.loss_parallel)
            self._sharded.append((model, Running(unwrap(model), plan)))
            self._watch(unwrap(model))
        for optimizer in [*optimizers, *(_bare(prepared) for prepared in self.accelerator._optimizers)]:
            follow_model(optimizer, mapping)
        if models:
            empty_cache(self.tp_mesh.device_type)
            agree_as_processes(self.plugin.device_mesh)

    def _check(
        self, models: list[nn.Module], optimizers: Sequence[Optimizer], rules: Sequence[PlanLike]
    ) -> list[Plan | NoPlanError | None]:
        """The plan of each model; None for one that is sharded already, an error where a plan may be inferred."""
        plans: list[Plan | NoPlanError | None] = []
        for model, own in zip(models, rules):
            if self.accelerator.verify_device_map(model):
                device_map = next(m.hf_device_map for m in model.modules() if len(getattr(m, "hf_device_map", ())) > 1)
                raise ValueError(
                    f"this {type(model).__name__} was loaded with a device_map over several devices "
                    f"({device_map}), which cannot be combined with tp_size={self.plugin.tp_size}. Load it "
                    "without device_map: the plugin spreads it over the devices itself."
                )
            check_fp8(self.accelerator, unwrap(model))
            check_adapters(unwrap(model))
            by_hand = holds_shards(model) and not isinstance(model, nn.parallel.DistributedDataParallel)
            if by_hand:
                check_mesh(model, self.tp_mesh)
            try:
                plan = None if by_hand else check_model(model, self.tp_mesh, own)
                if self.plugin.loss_parallel is True and not by_hand:
                    entries = plan.entries if plan is not None else ()
                    check_head(unwrap(model), {entry.site.module: entry.style for entry in entries})
                if plan is not None:
                    check_fp8_sizes(unwrap(model), plan)
                if self.plugin.sequence_parallel and not any(model is known for known in self._guard.models()):
                    plan = self._spread(model, plan)
                plans.append(self._overlapping(plan))
            except NoPlanError as error:
                if self.plugin.prove == "never":
                    raise NoPlanError(f'{error} With prove="auto", `prepare` infers a plan and proves it.') from None
                plans.append(error)
        known = [*models, *self.accelerator._models]
        for optimizer in optimizers if known else []:
            check_optimizer(optimizer, known)
        return plans

    def _overlapping(self, plan: Plan | None) -> Plan | None:
        asked = self.plugin.overlap
        if plan is None or not (on_gpus(self.tp_mesh) if asked == "auto" else asked):
            return plan
        return replace(plan, overlap=OVERLAPS_FROM if asked == "auto" else 0)

    @staticmethod
    def _spread(model: nn.Module, plan: Plan | None) -> Plan:
        if plan is None:
            raise ValueError(
                f"sequence_parallel=True: this {type(model).__name__} was sharded before `prepare`. Leave that to "
                "`prepare`, or set sequence_parallel=False."
            )
        check_sequence(unwrap(model), plan)
        return replace(plan, sequence_parallel=True)

    def _agree(
        self, models: list[nn.Module], check: Callable[[], list[Plan | NoPlanError | None]]
    ) -> list[Plan | NoPlanError | None]:
        """Run `check` on every rank; raise on all of them if it fails on any, or if they would not do the same."""
        if not models:  # nothing that the other ranks would wait for
            return check()
        ranks = Ranks(failed="rank {rank} cannot prepare: {problem}", otherwise=ValueError)
        with ranks.telling():
            plans = check()
            ranks.same([row for model, plan in zip(models, plans) for row in _describe(model, plan)], _DIFFERENT)
        return plans

    def _prove(self, models: list[nn.Module], plans: list[Plan | None], rules: Sequence[PlanLike]) -> None:
        """Raise on every rank if a model would not compute the same when sharded."""
        for model, plan, own in zip(models, plans, rules):
            if self.plugin.prove == "never":
                continue
            if plan is None:
                self._warn_of_sharded(unwrap(model))
                continue
            prove_plan(unwrap(model), self.tp_mesh, plan, own, self.plugin.prove)
            if isinstance(own, InferredPlan):
                log_inferred(plan, own)

    def _warn_of_sharded(self, model: nn.Module) -> None:
        """There is no unsharded model left to compare one with that was sharded before `prepare`."""
        if any(model is known for known in self._guard.models()) or not self.accelerator.is_main_process:
            return
        logger.warning(
            "The tensor-parallel plan of %s was not proved: it was sharded before `prepare`. If the plan is wrong "
            "somewhere, training may be wrong without a word. To prove it: `accel-tp-ddp verify`, or leave the "
            'sharding to `prepare`. prove="never" says that it is known to be right.',
            type(model).__name__,
        )

    def _watch(self, model: nn.Module) -> None:
        if any(model is known for known in self._guard.models()):
            return  # prepared once more, as Trainer does where it looks for a batch size
        watch_batches(model, self.tp_mesh, self.plugin.replica_check_steps)
        draw_by_replica(model, self.plugin.device_mesh.get_local_rank("dp_replicate"), self.tp_mesh.device_type)
        self._guard.add(model)
        view = current_view()
        if view is not None:
            view.knows(model)

    def _agree_on_overflow(self) -> None:
        """An overflow in one rank's gradients has to skip the step on all of them."""
        if self.accelerator.scaler is not None:
            agree_on_overflow(self.accelerator.scaler, self.tp_mesh)

    def prepare_data_loader(
        self, stock: Callable, accelerator: Accelerator, /, data_loader: DataLoader, *args: Any, **kwargs: Any
    ) -> DataLoader:
        fresh = not _is_prepared(data_loader)
        prepared = stock(data_loader, *args, **kwargs)
        return serve_replicas(prepared, self.plugin.device_mesh) if fresh else prepared

    def skip_first_batches(
        self, stock: Callable, accelerator: Accelerator, /, dataloader: DataLoader, num_batches: int = 0
    ) -> DataLoader:
        shortened = stock(dataloader, num_batches)
        return shortened if shortened is dataloader else serve_replicas(shortened, self.plugin.device_mesh)

    def prepare_optimizer(
        self, stock: Callable, accelerator: Accelerator, /, optimizer: Optimizer, device_placement: bool | None = None
    ) -> Optimizer:
        bare = _bare(optimizer)
        check_step(bare)  # again, for whoever calls this directly, or before there is a model
        zero1 = self.plugin.zero1 and self.dp_size > 1
        if zero1:
            check_zero1(bare)
        if self._guard.watch(bare):
            take_full_state(bare)
            divided = Zero1(bare, self.dp_group, self._wrapped) if zero1 else None
            if steps_on_full_tensors(bare):
                FullTensorStep(bare)  # after the guard, which agrees on the gradients
            if divided is not None:
                divided.stay_last(bare)
        self._agree_on_overflow()  # Accelerate hands its scaler to each optimizer here
        return stock(optimizer, device_placement=device_placement)

    # --------------------------------------------------------------------------------------------------- training

    def clip_grad_norm_(
        self, stock: Callable, accelerator: Accelerator, /, parameters: Any, max_norm: float, norm_type: float = 2
    ) -> Tensor:
        accelerator.unscale_gradients()
        return clip_grad_norm_(parameters, max_norm, norm_type)

    def join_uneven_inputs(
        self, stock: Callable, accelerator: Accelerator, /, joinables: list[Any], even_batches: bool | None = None
    ) -> AbstractContextManager[Any]:
        if self.dp_size == 1:  # a bare model cannot be joined, and there is nobody to join with
            return nullcontext(joinables)
        if self.plugin.zero1:
            raise RuntimeError(_JOINED)
        return stock(joinables, even_batches)

    # ----------------------------------------------------------------------------------------------------- saving

    def get_state_dict(
        self, stock: Callable, accelerator: Accelerator, /, model: nn.Module, unwrap: bool = True
    ) -> dict[str, Tensor]:
        state = full_state_dict_of_main(model, "get_state_dict")
        wrapped = isinstance(model, nn.parallel.DistributedDataParallel) and not unwrap
        return {f"module.{name}": tensor for name, tensor in state.items()} if wrapped else state

    def save_model(
        self,
        stock: Callable,
        accelerator: Accelerator,
        /,
        model: nn.Module,
        save_directory: str,
        max_shard_size: int | str = "10GB",
        safe_serialization: bool = True,
    ) -> None:
        def write(state: dict[str, Any]) -> None:
            # A pickle is one file after another, too, but torch.save wants to know each storage.
            weights = state if safe_serialization else {name: materialized(value) for name, value in state.items()}
            with attributes(accelerator, get_state_dict=lambda model: weights):
                stock(model, save_directory, max_shard_size, safe_serialization)
            save_config(bare, save_directory)

        bare = unwrap(model)
        export(model, "save_model", write, save_directory)

    def load_state(
        self,
        stock: Callable,
        accelerator: Accelerator,
        /,
        input_dir: str | None = None,
        load_kwargs: dict | None = None,
        **load_model_func_kwargs: Any,
    ) -> None:
        load_state(accelerator, input_dir, load_kwargs, **load_model_func_kwargs)

    def end_training(self, stock: Callable, accelerator: Accelerator, /) -> None:
        try:
            wait_for_save()
            buffers.clear()
        finally:
            # A rank that takes its groups down while others still talk makes them abort at exit.
            accelerator.wait_for_everyone()
            stop_serving()
            stock()
            view = current_view()
            if view is not None:
                view.let_go(accelerator)


def _is_prepared(obj: Any) -> bool:
    return bool(getattr(obj, "_is_accelerate_prepared", False))


def _bare(optimizer: Optimizer) -> Optimizer:
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer


class _Wrapped:
    """The models that an accelerator has prepared, as it gives them out; weakly, so that one not used is freed."""

    def __init__(self) -> None:
        self._models: list[weakref.ref[nn.Module]] = []

    def add(self, model: nn.Module) -> nn.Module:
        if not any(known() is model for known in self._models):
            self._models.append(weakref.ref(model))
        return model

    def __call__(self) -> list[nn.Module]:
        return [model for reference in self._models if (model := reference()) is not None]


_JOINED = (
    "join_uneven_inputs does not go with zero1=True: a replica that has run out of batches takes no more steps, and "
    "each replica has the optimizer state of its part only. Leave even_batches=True, which is the default, or set "
    "zero1=False."
)


class _Zero1Hooks(_SavesStates):
    """What the replaced methods of an accelerator with tp_size=1 and zero1 share."""

    def __init__(self, group: ProcessGroup, async_save: bool):
        super().__init__(1, async_save)
        self.group = group
        self._wrapped = _Wrapped()

    def prepare_model(self, stock: Callable, accelerator: Accelerator, /, *args: Any, **kwargs: Any) -> nn.Module:
        return self._wrapped.add(stock(*args, **kwargs))

    def prepare_optimizer(
        self, stock: Callable, accelerator: Accelerator, /, optimizer: Optimizer, device_placement: bool | None = None
    ) -> Optimizer:
        bare = _bare(optimizer)
        check_zero1(bare)
        if zero1_of(bare) is None:
            take_full_state(bare)
            Zero1(bare, self.group, self._wrapped).stay_last(bare)
        return stock(optimizer, device_placement=device_placement)

    def join_uneven_inputs(self, stock: Callable, accelerator: Accelerator, /, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError(_JOINED)


def _describe(model: nn.Module, plan: Plan | NoPlanError | None) -> list[str]:
    """What has to be the same on all ranks about a model, which is sharded already where it has no plan."""
    if isinstance(plan, Plan):
        return plan.signature().split("\n")
    rows = (f"{name} {tuple(full_shape(param))} {param.dtype}" for name, param in model.named_parameters())
    return ["parallelized" if plan is None else "without a plan", *rows]


_DIFFERENT = (
    "rank {rank} would shard otherwise than rank {own} ({theirs!r} against {ours!r}). Build the same model and give "
    "the same plan on every rank."
)


def _no_mesh(hooks: _Hooks, stock: Callable, accelerator: Accelerator, /) -> None:
    """The replicas are the processes already; see `replica_view`."""


def _row(function: Callable[..., Any], line: int, reason: str, name: str | None = None, **options: Any) -> Override:
    place = f"accelerate 1.15, accelerator.py:{line}"
    return Override("accelerate.Accelerator", name or function.__name__, function, place, reason, **options)


_SHARDS = "writes the main process's shards"
_DRIFTS = "lets replicated parameters drift, and one rank skip a step by itself"
_UNSHARDED = "wraps a model unsharded, and averages gradients over all ranks"

#: With tp_size > 1.
OVERRIDES = (
    _row(_Hooks.prepare, 1415, "wraps the unsharded model, and an optimizer of its parameters"),
    _row(_Hooks.prepare_model, 1770, _UNSHARDED, needs=("ddp_handler", "_models")),
    _row(converted_already, 2077, "replaces modules that are sharded, whose forwards are lost", "_prepare_ao"),
    _row(_no_mesh, 2620, "lets loaders distribute by the mesh what they have by process", "_prepare_device_mesh"),
    _row(_Hooks.prepare_data_loader, 2685, "lets peers shuffle, and fetch what is dispatched, by themselves"),
    _row(_Hooks.skip_first_batches, 4314, "builds a new loader, of which the same is true"),
    _row(_Hooks.prepare_optimizer, 2744, _DRIFTS, needs=("scaler", "_optimizers")),
    _row(_Hooks.clip_grad_norm_, 2989, "takes the norm of each rank's own shards"),
    _row(_Hooks.join_uneven_inputs, 1300, "joins DDP modules, and with one replica there is none", counts=False),
    _row(_Hooks.get_state_dict, 4043, "gives this rank's shards"),
    _row(_Hooks.save_model, 3480, _SHARDS, needs=("get_state_dict",)),
    _row(_Hooks.save_state, 3625, _SHARDS),
    _row(_Hooks.load_state, 3791, "gives every rank the main process's shards"),
    _row(_Hooks.end_training, 3429, "takes groups down that others, or a save in the background, still use"),
)

#: With tp_size=1.
OVERRIDES_WITHOUT_TP = (
    _row(load_any_state, 3791, "cannot read what was saved under tensor parallelism", "load_state"),
    _row(save_state_or_in_background, 3625, "knows no async_save", "save_state"),
    _row(end_after_save, 3429, "ends while a save in the background is under way", "end_training"),
)

#: With tp_size=1 and zero1, beside those.
OVERRIDES_WITH_ZERO1 = (
    _row(_Zero1Hooks.prepare_model, 1770, "tells nobody what it has wrapped in DDP"),
    _row(_Zero1Hooks.prepare_optimizer, 2744, "lets every rank keep all of the optimizer's state"),
    _row(
        *(_Zero1Hooks.join_uneven_inputs, 1300, "lets a rank without batches take no step, and the others wait"),
        counts=False,  # without it there is nothing to refuse
    ),
    _row(_Zero1Hooks.save_state, 3625, "writes the main process's part of the optimizer's state"),
)
