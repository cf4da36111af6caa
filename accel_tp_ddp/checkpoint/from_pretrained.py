"""Loading a transformers checkpoint in slices: each rank reads what it will hold, and no more.

`from_pretrained` goes its ordinary way: transformers finds the files, builds the model on the meta device, renames and
converts what it loads, initialises what is missing, ties weights and reports. Only three of its steps are exchanged
while `sharded_loading` is active: the tensors that it is given to load are lazy ones (`lazy`); what is put into the
model is this rank's slice, by the layouts of a plan that was resolved on the meta device; and what depends on a value
of which no rank has all (whether two weights are equal) is agreed on. The model is then as `slices` describes it.

The ranks meet before anything is read, after it, and at the end; one that fails meets the others with its error
instead, whatever it was doing, so none of them waits for it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ..core.agreement import Ranks
from ..core.collectives import send_first_rank
from ..core.errors import CheckpointError
from ..core.layout import Layout
from ..core.override import Override, overridden
from ..core.shard import ShardInfo
from ..core.slices import hold_slices
from ..plans.plan import Plan, resolve_plan
from ..plans.rules import PlanLike
from .lazy import LazyTensor, first_row, own_part, read_full

__all__ = ["OVERRIDES", "LoadSettings", "load_in_slices"]

_SAMPLE = 1024  # elements of each tensor that have to be equal on all ranks
_IN_ORDER = (
    "Every rank has to load the same models in the same order: take what is in the block out of "
    "`if accelerator.is_main_process:` and the like."
)
_DIFFERENT = (
    "rank {rank} and rank {own} load different things ({point}: {theirs!r} against {ours!r}). Load the same model, "
    "from the same files and with the same plan, on every rank."
)
_active = False


class LoadSettings(Protocol):
    """What loading needs to know; the plugin has it."""

    tp_size: int
    tp_plan: PlanLike
    device_mesh: DeviceMesh | None

    def get_device_mesh(self, device_type: str | None = None) -> DeviceMesh | None: ...


@contextmanager
def load_in_slices(settings: LoadSettings) -> Iterator[None]:
    """Let every `from_pretrained` of transformers in the block read this rank's slices only; see the plugin."""
    if settings.tp_size == 1 or not _is_launched():
        yield
        return
    if settings.device_mesh is None:
        device_type = _device_type()
        if device_type is None:
            raise ValueError(
                f"sharded_loading (tp_size={settings.tp_size}): it is not known yet which rank this is. Make the "
                "Accelerator first, `Accelerator(parallelism_config=plugin)`, or with Trainer the TrainingArguments."
            )
        settings.get_device_mesh(device_type)
    global _active
    if _active:
        raise ValueError(
            f"sharded_loading (tp_size={settings.tp_size}): it is active already. Leave out the inner one."
        )
    ranks = Ranks("sharded_loading", advice=_IN_ORDER)
    _active = True
    try:
        with ranks.telling():
            with _Loader(settings, ranks).in_transformers():
                yield
            ranks.all(None, "the end of sharded_loading")
    finally:
        _active = False


def _is_launched() -> bool:
    return dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) > 1


def _device_type() -> str | None:
    """What the ranks compute on, as Accelerate has settled it; None before it has."""
    from accelerate.state import PartialState

    return PartialState().device.type if PartialState._shared_state and dist.is_initialized() else None


class _Loader:
    """The steps of transformers' `from_pretrained` that are exchanged. Names and line numbers are those of 5.23."""

    def __init__(self, settings: LoadSettings, ranks: Ranks):
        self.settings = settings
        self.ranks = ranks
        self.mesh = settings.device_mesh["tp"]
        self.loads: list[_Load] = []

    @contextmanager
    def in_transformers(self) -> Iterator[None]:
        missing = [row.name for row in OVERRIDES if not hasattr(row.upstream(), row.name)]
        if missing:
            import transformers

            raise RuntimeError(
                f"sharded_loading: transformers {transformers.__version__} loads in another way than those that this "
                f"package knows ({', '.join(missing)} is not there). Load the model without sharded_loading."
            )
        with overridden(OVERRIDES, self):
            yield

    def load(
        self,
        stock: Callable,
        /,
        model: nn.Module,
        state_dict: Mapping[str, Tensor] | None,
        checkpoint_files: Sequence[str] | None,
        load_config: Any,
        expected_keys: list[str] | None = None,
    ) -> Any:
        """`PreTrainedModel._load_pretrained_model`: check, agree on what is to be read, read."""
        if expected_keys is not None:  # an adapter's few weights, which are cut when the model is parallelized
            return stock(model, state_dict, checkpoint_files, load_config, expected_keys)
        _check(model, load_config)
        plan = _plan_on_meta(model, self.mesh.size(), self.settings.tp_plan)
        if state_dict is not None:
            state_dict = {name: _lazy(tensor) for name, tensor in state_dict.items()}
        elif checkpoint_files is not None:
            state_dict = _lazily(checkpoint_files, load_config)
        else:  # transformers' own error says it best
            return stock(model, state_dict, checkpoint_files, load_config)
        contents = [f"{name} {tuple(tensor.shape)} {tensor.dtype}" for name, tensor in sorted(state_dict.items())]
        self.ranks.same([*plan.signature().split("\n"), *contents], _DIFFERENT, "what is to be loaded")
        # The place of the values is settled below, and transformers' allocation ahead is for the full model.
        device = torch.device(next(iter((load_config.device_map or {"": "cpu"}).values())))
        load = _Load(model, self.mesh, device, plan)
        self.loads.append(load)
        return stock(model, state_dict, checkpoint_files, replace(load_config, device_map=None))

    def put(
        self, stock: Callable, /, model: nn.Module, target_name: str, param_value: Tensor, *args: Any, **kwargs: Any
    ) -> None:
        """`core_model_loading.set_param_for_module`: put one converted tensor into the model."""
        load = self._of(model)
        if load is None:
            stock(model, target_name, param_value, *args, **kwargs)
        else:
            load.put(partial(stock, model), target_name, param_value, *args, **kwargs)

    def are_equal(self, stock: Callable, /, source: Tensor, target: Tensor) -> bool:
        """`_tied_params_are_equal`: two slices may be, where the weights are not."""
        return all(self.ranks.all(stock(source, target), "comparing tied weights"))

    def adjust_bias(
        self, stock: Callable, model: nn.Module, /, output_embeddings: nn.Module, input_embeddings: Any
    ) -> None:
        """`PreTrainedModel._adjust_bias`: pad or cut a bias to the rows of its weight, which are not all here."""
        if not any(load.is_cut(getattr(output_embeddings, "weight", None)) for load in self.loads):
            stock(output_embeddings, input_embeddings)

    def finalize(self, stock: Callable, /, model: nn.Module, load_config: Any, loading_info: Any) -> Any:
        """`PreTrainedModel._finalize_model_loading`: initialise what is missing, tie, report; then cut the rest."""
        loading_info = stock(model, load_config, loading_info)
        load = self._of(model)
        if load is not None:
            self.ranks.same(load.samples, _DIFFERENT, "what was read")
            load.finish()
            self.loads.remove(load)
        return loading_info

    def _of(self, model: nn.Module) -> _Load | None:
        return next((load for load in self.loads if load.model is model), None)


def _row(owner: str, name: str, function: Callable[..., Any], line: int, reason: str, since: str = "") -> Override:
    module = owner.removeprefix("transformers.").partition(".")[0]
    place = f"transformers 5.23, {module}.py:{line}"
    return Override(owner, name, function, place, reason, since=since, counts=False)  # an error where it is used


_MODEL = "transformers.modeling_utils.PreTrainedModel"
#: While `sharded_loading` is active.
OVERRIDES = (
    _row(_MODEL, "_load_pretrained_model", _Loader.load, 4480, "reads each tensor completely"),
    _row(_MODEL, "_finalize_model_loading", _Loader.finalize, 4596, "is the end of loading: what is left is cut then"),
    _row(_MODEL, "_adjust_bias", _Loader.adjust_bias, 2621, "pads a bias to the rows of its weight that are here"),
    _row("transformers.core_model_loading", "set_param_for_module", _Loader.put, 1426, "puts in the full tensor"),
    _row(
        *("transformers.modeling_utils", "_tied_params_are_equal", _Loader.are_equal, 2568, "compares slices only"),
        since="5.23",
    ),
)


@dataclass
class _Load:
    """One model on its way from the meta device to this rank's slices."""

    model: nn.Module
    mesh: DeviceMesh
    device: torch.device
    plan: Plan
    slices: list[tuple[nn.Parameter, ShardInfo]] = field(default_factory=list)
    samples: list[str] = field(default_factory=list)

    def __post_init__(self):
        self._cut: set[int] = set()  # parameters that `slices` keeps alive, by id
        self._layouts: dict[tuple[nn.Module, str], tuple[Layout, torch.Size]] = {}
        for entry in self.plan.entries:
            for name, layout in entry.layouts.items():
                param = entry.site.module._parameters.get(name)
                if param is not None:
                    self._layouts[entry.site.module, name] = layout, param.shape

    def put(self, stock: Callable, name: str, value: Tensor, *args: Any, **kwargs: Any) -> None:
        """Put this rank's part of `value` where `name` says; transformers' own checks see the sizes they expect."""
        path, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(path)
        expected = getattr(module, leaf, None)
        if not isinstance(expected, Tensor):
            stock(name, read_full(value, self.device), *args, **kwargs)
            return
        if value.shape != expected.shape:  # which is reported, or passed over; the value is not used
            stock(name, torch.empty(value.shape, dtype=value.dtype, device="meta"), *args, **kwargs)
            return
        self.samples.append(f"{name} {_sample(value)}")
        layout, _ = self._layouts.get((module, leaf), (None, None))
        if layout is None:
            stock(name, read_full(value, self.device), *args, **kwargs)
            return
        own = own_part(value, layout, self.mesh.get_local_rank(), self.device)
        module._parameters[leaf] = nn.Parameter(torch.empty_like(own, device="meta"), expected.requires_grad)
        stock(name, own, *args, **kwargs)
        self._hold(module.get_parameter(leaf), ShardInfo.sharded(self.mesh, value.shape, layout))

    def is_cut(self, param: Any) -> bool:
        return id(param) in self._cut

    def _hold(self, param: nn.Parameter, info: ShardInfo) -> None:
        self.slices.append((param, info))
        self._cut.add(id(param))

    def finish(self) -> None:
        """Cut what was not read but initialised, as it is on the first rank. Collective over the mesh."""
        for (module, name), (layout, shape) in self._layouts.items():
            param = module.get_parameter(name)
            if not self.is_cut(param):
                assert param.shape == shape, "a missing weight was to be initialised in full"
                info = ShardInfo.sharded(self.mesh, shape, layout)
                send_first_rank(self.mesh, param)
                param.data = info.local_part(param.data)
                self._hold(param, info)
        hold_slices(self.model, self.slices)


def _check(model: nn.Module, load_config: Any) -> None:
    name = type(model).__name__
    if load_config.hf_quantizer is not None:
        raise ValueError(
            f"sharded_loading: {name} is quantized ({type(load_config.hf_quantizer).__name__}), and quantized weights "
            "cannot be cut. Load it without quantization_config, from an unquantized checkpoint."
        )
    if load_config.device_mesh is not None:
        raise ValueError(
            f"sharded_loading: transformers is to parallelize this {name} itself. Leave out distributed_config, "
            "tp_plan and tp_size: the plan is the plugin's tp_plan."
        )
    places = set((load_config.device_map or {}).values())
    if len(places) > 1 or "disk" in places:
        raise ValueError(
            f"sharded_loading: the device_map of this {name} names several devices or the disk "
            f"({', '.join(sorted(map(str, places)))}). Leave it out, or name one device: the ranks share the model."
        )
    if not all(param.is_meta for param in model.parameters()):
        raise ValueError(
            f"sharded_loading: {name} was not built on the meta device, so each rank holds all of it already. Load it "
            "without sharded_loading, and leave its cutting to `prepare`."
        )


def _plan_on_meta(model: nn.Module, tp_size: int, plan: PlanLike) -> Plan:
    """The plan of a model whose weights are not there yet, and so not tied yet either."""
    places = []
    for target, source in getattr(model, "all_tied_weights_keys", {}).items():
        path, _, leaf = target.rpartition(".")
        module = model.get_submodule(path)
        if isinstance(module._parameters.get(leaf), nn.Parameter):
            places.append((module, leaf, module._parameters[leaf]))
            module._parameters[leaf] = model.get_parameter(source)
    try:
        return resolve_plan(model, tp_size, plan)
    finally:
        for module, leaf, own in reversed(places):
            module._parameters[leaf] = own


def _lazily(files: Sequence[str], load_config: Any) -> dict[str, LazyTensor]:
    """The tensors of a checkpoint, of which nothing but the headers has been read."""
    from safetensors import safe_open
    from transformers import modeling_utils

    state: dict[str, LazyTensor] = {}
    if not files[0].endswith(".safetensors"):
        for file in files:  # mapped into memory by torch where the file is of its newer format
            loaded = modeling_utils.load_state_dict(file, disable_mmap=load_config.disable_mmap)
            state.update({name: _lazy(tensor) for name, tensor in loaded.items()})
        return state
    for file in files:
        try:
            opened = safe_open(file, framework="pt", device="cpu")
        except Exception as error:  # safetensors' own errors do not name the file
            raise CheckpointError(
                f"{file} cannot be read: {error}. It is damaged, or was not copied completely."
            ) from error
        for name in opened.keys():  # a safe_open is no mapping
            part = opened.get_slice(name)
            dtype = modeling_utils.str_to_torch_dtype.get(part.get_dtype())
            state[name] = LazyTensor.of(part, part.get_shape(), dtype) if dtype else _lazy(opened.get_tensor(name))
    return state


def _lazy(tensor: Tensor) -> LazyTensor:
    return LazyTensor.of(tensor.detach(), tensor.shape, tensor.dtype)


def _sample(value: Tensor) -> str:
    bits = first_row(value, _SAMPLE).detach().cpu().reshape(-1).contiguous().view(torch.uint8)
    return hashlib.blake2b(bits.numpy().tobytes(), digest_size=8).hexdigest()
