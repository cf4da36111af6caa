"""What `benchmarks/gpu.py` runs, each function in processes of its own, on every rank.

A check raises AssertionError where something is wrong and `Skipped` where it cannot be run here, and returns a few
words on what it saw. It uses what users use, and compares with one plain process where there is something to compare.
"""

from __future__ import annotations

import copy
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from accel_tp_ddp import TensorParallelDDPPlugin, full_state_dict, grad_scaler

TOLERANCE = 2e-4
BATCH, LENGTH, VOCABULARY, LAYERS = 4, 32, 256, 2
NUMBERS = (0, 1, 0, 1, 0, 1)  # of batches, each seen again, so that the losses fall


class Skipped(Exception):
    """Why a check cannot be run here."""


@dataclass(frozen=True)
class Place:
    """Where the ranks are.

    Attributes:
        device: `cuda` or `cpu`.
        backend: What their default group goes over.
        gpus: How many GPUs this machine has; the ranks have one each, or share the only one.
    """

    device: str
    backend: str
    gpus: int


@dataclass(frozen=True)
class Check:
    """`ranks`: on how many it runs; `seconds`: how long it may take."""

    function: Callable[[Place], str | None]
    ranks: int
    seconds: float


CHECKS: dict[str, Check] = {}
FIGURES: dict[str, Check] = {}


def check(ranks: int = 2, seconds: float = 180, into: dict[str, Check] = CHECKS) -> Callable:
    def add(function: Callable[[Place], str | None]) -> Callable[[Place], str | None]:
        into[function.__name__] = Check(function, ranks, seconds)
        return function

    return add


# ------------------------------------------------------------------------------------------------------- what they use


def device_of(place: Place) -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if place.device == "cuda" else torch.device("cpu")


def build(kind: str = "llama", layers: int = LAYERS, **sizes: Any) -> nn.Module:
    """The same small model on every rank."""
    torch.manual_seed(0)
    values: dict[str, Any] = {
        **{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": layers, "vocab_size": VOCABULARY},
        **{"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8, "bos_token_id": 1, "eos_token_id": None},
    }
    config = AutoConfig.for_model(kind, **{**values, **sizes})
    return AutoModelForCausalLM.from_config(config)


def batch(place: Place, number: int = 0, size: int = BATCH, length: int = LENGTH) -> dict[str, Tensor]:
    ids = torch.randint(3, VOCABULARY, (size, length), generator=torch.Generator().manual_seed(number))
    ids = ids.to(device_of(place))
    return {"input_ids": ids, "labels": ids}


def start_group(place: Place) -> None:
    """The ranks meet in a file of this check's own: a port may be taken by the time it is used."""
    dist.init_process_group(
        place.backend,
        init_method=f"file://{os.environ['GPU_RENDEZVOUS']}",
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=timedelta(seconds=60),
    )


def accelerator_of(place: Place, tp: int | None = None, precision: str = "no", **fields: Any) -> Accelerator:
    """One with the plugin over all ranks; the replicas are what `tp` leaves."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if not dist.is_initialized():
        start_group(place)
    group = InitProcessGroupKwargs(backend=place.backend, timeout=timedelta(seconds=60))
    plugin = TensorParallelDDPPlugin(tp_size=tp or int(os.environ["WORLD_SIZE"]), **fields)
    kwargs = {"parallelism_config": plugin, "kwargs_handlers": [group], "mixed_precision": precision}
    return Accelerator(cpu=place.device == "cpu", **kwargs)


def prepared(place: Place, kind: str = "llama", **kwargs: Any) -> tuple[Accelerator, nn.Module, Any]:
    accelerator = accelerator_of(place, **kwargs)
    model = build(kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    unsharded = sum(param.numel() for param in model.parameters())
    model, optimizer = accelerator.prepare(model, optimizer)
    assert sum(param.numel() for param in model.parameters()) < 0.6 * unsharded, "the model is not sharded"
    return accelerator, model, optimizer


def steps(accelerator: Accelerator, model: nn.Module, optimizer: Any, place: Place, numbers: Any) -> list[float]:
    losses = []
    for number in numbers:
        loss = model(**batch(place, number)).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def plain_steps(place: Place, numbers: Any, kind: str = "llama") -> list[float]:
    """The same in one process, without any of this package or of Accelerate."""
    model = build(kind).to(device_of(place))
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for number in numbers:
        loss = model(**batch(place, number)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def close(own: list[float], other: list[float], tolerance: float = TOLERANCE) -> str:
    worst = max(abs(a - b) / abs(b) for a, b in zip(own, other, strict=True))
    assert worst < tolerance, f"losses {own} instead of {other}: {worst:.1e} apart, {tolerance:g} allowed"
    return f"{worst:.1e} apart at most"


def of_all_ranks(value: Any) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


@contextmanager
def folder_of_all_ranks(accelerator: Accelerator) -> Iterator[str]:
    """One folder for all ranks, until all of them are done with it."""
    with tempfile.TemporaryDirectory() as own:
        yield of_all_ranks(own)[0]
        accelerator.wait_for_everyone()


class Sent(TorchDispatchMode):
    """Counts collectives by kind, type and device."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[tuple[str, str, str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and func is not torch.ops.c10d.barrier.default:
            tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(args) if isinstance(leaf, Tensor)]
            name = func._schema.name.split("::")[1].strip("_")
            self.counts[name, str(tensors[0].dtype).removeprefix("torch."), tensors[0].device.type] += 1
        return func(*args, **(kwargs or {}))


# ---------------------------------------------------------------------------------------------------------- the checks


@check(ranks=1)
def collectives_of_one_rank(place: Place) -> str:
    """NCCL at world size 1: every collective of the package runs, and changes nothing."""
    from torch.distributed.device_mesh import init_device_mesh

    from accel_tp_ddp.core import collectives

    start_group(place)
    mesh = init_device_mesh(place.device, (1,), mesh_dim_names=("tp",))
    given = torch.randn(4, 6, device=device_of(place), requires_grad=True)
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "copy_to_tp": lambda tensor: collectives.copy_to_tp(mesh, tensor)[0],
        # Of a tensor of its own each: a sum may be taken in place.
        "reduce_from_tp": lambda tensor: collectives.reduce_from_tp(mesh, tensor + 0),
        "gather_from_tp": lambda tensor: collectives.gather_from_tp(mesh, tensor, 1, [6]),
        "scatter_to_tp": lambda tensor: collectives.scatter_to_tp(mesh, tensor, 1, [6]),
        "gather_replicas": lambda tensor: collectives.gather_replicas(mesh, tensor)[0],
    }
    for name, function in functions.items():
        given.grad = None
        result = function(given)
        (result * torch.arange(6.0, device=given.device)).sum().backward()
        assert torch.equal(result, given), name
        assert torch.equal(given.grad, torch.arange(6.0, device=given.device).expand(4, 6)), f"gradient of {name}"
    return f"{len(functions)} over {place.backend}"


@check()
def losses_of_one_process(place: Place) -> str:
    accelerator, model, optimizer = prepared(place)
    return close(steps(accelerator, model, optimizer, place, NUMBERS), plain_steps(place, NUMBERS))


@check(ranks=4)
def losses_of_plain_ddp(place: Place) -> str:
    """tp 2 x dp 2; both replicas get the same batch, so that one process on it is plain DDP's answer."""
    accelerator, model, optimizer = prepared(place, tp=2)
    assert isinstance(model, nn.parallel.DistributedDataParallel)
    return close(steps(accelerator, model, optimizer, place, NUMBERS), plain_steps(place, NUMBERS))


@check()
def losses_of_qwen3(place: Place) -> str:
    """Norms over heads, whose gradients are partial."""
    accelerator, model, optimizer = prepared(place, "qwen3")
    return close(steps(accelerator, model, optimizer, place, NUMBERS), plain_steps(place, NUMBERS, "qwen3"))


@check()
def fp16_overflow_on_one_rank(place: Place) -> str:
    """An inf in one rank's gradients skips the step on all, whichever implementation, unscaled before or not."""
    accelerator, model, _ = prepared(place)
    mesh, rank = accelerator.torch_device_mesh["tp"], dist.get_rank()
    wrong = []
    for implementation in ({"foreach": True}, {"foreach": False}, {"fused": True}):
        for unscaled in (False, True):
            own = copy.deepcopy(model)
            optimizer = torch.optim.AdamW(own.parameters(), lr=1e-2, **implementation)
            scaler = grad_scaler(mesh, place.device, init_scale=16.0)
            before = [param.detach().clone() for param in own.parameters()]
            scaler.scale(own(**batch(place)).loss).backward()
            if rank == 0:
                next(own.parameters()).grad.view(-1)[0] = torch.inf
            if unscaled:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            stepped = any(not torch.equal(a, b) for a, b in zip(own.parameters(), before))
            outcomes = of_all_ranks((stepped, scaler.get_scale()))
            if set(outcomes) != {(False, 8.0)}:
                name = next(iter(implementation)) if next(iter(implementation.values())) else "for-loop"
                wrong.append(f"{name}, {'unscaled before' if unscaled else 'not unscaled'}: {outcomes}")
    assert not wrong, f"{6 - len(wrong)} of 6 agree; (stepped, scale) by rank: {'; '.join(wrong)}"
    return "6 of 6 agree"


@check()
def fp16_training(place: Place) -> str:
    if place.device == "cpu":
        raise Skipped("Accelerate has no fp16 on the CPU")
    accelerator, model, optimizer = prepared(place, precision="fp16")
    losses = steps(accelerator, model, optimizer, place, NUMBERS)
    return close(losses, plain_steps(place, NUMBERS), 0.05)


@check()
def fp8_is_right_or_refused(place: Place) -> str:
    try:
        accelerator, model, _ = prepared(place, precision="fp8")
    except (ImportError, ValueError, NotImplementedError, RuntimeError, TypeError) as error:
        words = str(error).lower()
        assert "fp8" in words or "float8" in words or "8-bit" in words, f"refused without a word of it: {error!r}"
        return f"refused: {str(error).strip().splitlines()[0][:100]}"
    with Sent() as sent:
        model(**batch(place))
    count = sum(n for (name, *_), n in sent.counts.items() if name.startswith("allreduce"))
    assert count == 2 * LAYERS + 1, f"{count} all-reduces in a forward instead of {2 * LAYERS + 1}"
    return "converted, with all its collectives"


@check()
def drifted_generators_are_healed(place: Place) -> str:
    accelerator, model, optimizer = prepared(place, replica_check_steps=1)
    steps(accelerator, model, optimizer, place, range(1))
    if place.device == "cuda":
        torch.cuda.manual_seed(1 + dist.get_rank())
        steps(accelerator, model, optimizer, place, range(1, 2))
        states = of_all_ranks(torch.cuda.get_rng_state().numpy().tobytes())
        assert len(set(states)) == 1, "the CUDA generators still differ after a step that compares them"
    torch.random.default_generator.manual_seed(1 + dist.get_rank())
    steps(accelerator, model, optimizer, place, range(2, 3))
    states = of_all_ranks(torch.get_rng_state().numpy().tobytes())
    assert len(set(states)) == 1, "the CPU's generators still differ after a step that compares them"
    return "CUDA and CPU" if place.device == "cuda" else "CPU"


@check()
def trainer_moves_no_unsharded_model(place: Place) -> str:
    """The GPU's peak until the first step is that of the shards, and never that of the model."""
    if place.device == "cpu":
        raise Skipped("there is no GPU memory to look at")
    from transformers import Trainer, TrainingArguments

    model = build(hidden_size=1024, intermediate_size=4096, num_attention_heads=16, num_key_value_heads=16)
    unsharded = sum(param.nbytes for param in model.parameters())
    data = [{name: row[0].cpu() for name, row in batch(place, number, 1).items()} for number in range(4)]
    accelerator_of(place)  # starts the group
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            parallelism_config=TensorParallelDDPPlugin(tp_size=dist.get_world_size()),
            max_steps=1,
            per_device_train_batch_size=2,
            optim="sgd",  # which has no state, so that weights and gradients are all there is
            report_to=[],
            save_strategy="no",
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=data)
        made = torch.cuda.max_memory_allocated() - before
        trainer.train()
    peak = torch.cuda.max_memory_allocated() - before
    share = 1 / dist.get_world_size()
    assert made < 0.1 * unsharded, f"{made / unsharded:.2f} of the model was on the GPU before `prepare`"
    # A shard, its gradients, one unsharded tensor on its way, and little activations.
    assert peak < (2 * share + 0.35) * unsharded, f"the peak was {peak / unsharded:.2f} of the unsharded model"
    return f"{made / unsharded:.2f} of the model before `prepare`, {peak / unsharded:.2f} at the peak"


@check()
def control_messages_are_off_the_gpu(place: Place) -> str:
    if place.backend != "nccl":
        raise Skipped(f"the ranks talk over {place.backend} anyway")
    accelerator = accelerator_of(place)
    model = build()
    optimizer = torch.optim.AdamW(model.parameters())
    with tempfile.TemporaryDirectory() as folder, Sent() as sent:
        model, optimizer = accelerator.prepare(model, optimizer)
        # One folder for all ranks; this is sent by the check itself.
        folders = of_all_ranks(folder)
        before = sent.counts.copy()
        accelerator.save_state(folders[0])
        found = {
            key: n for key, n in (sent.counts - before).items() if key[2] == "cuda" and key[1] in ("uint8", "int64")
        }
        accelerator.wait_for_everyone()
    assert not found, f"object collectives on the GPU's group while saving: {found}"
    return "none of them while saving"


@check()
def gathered_cpu_tensors(place: Place) -> str:
    """At one replica, `gather_for_metrics` is what one plain process gives, of CPU tensors too."""
    accelerator, _, _ = prepared(place)
    for given in (torch.arange(5), torch.arange(5, device=device_of(place))):
        found = accelerator.gather_for_metrics(given)
        assert torch.equal(found.cpu(), torch.arange(5)), f"{found} of {given}"
        assert torch.equal(accelerator.gather(given).cpu(), torch.arange(5))
    return "of CPU tensors and of the device's"


@check()
def gradients_keep_nothing_else_alive(place: Place) -> str:
    accelerator, model, _ = prepared(place, "qwen3")
    accelerator.backward(model(**batch(place)).loss)
    larger = {
        name: (param.grad.nbytes, param.grad.untyped_storage().nbytes())
        for name, param in model.named_parameters()
        if param.grad is not None and param.grad.untyped_storage().nbytes() > param.grad.nbytes
    }
    assert not larger, f"{len(larger)} gradients keep a larger buffer (own bytes, bytes held): {larger}"
    return "each holds its own bytes"


@check()
def background_save(place: Place) -> str:
    """Saved while training goes on, and loaded again; no context on a GPU that is another rank's."""
    accelerator, model, optimizer = prepared(place, async_save=True)
    with folder_of_all_ranks(accelerator) as folder:
        steps(accelerator, model, optimizer, place, range(2))
        saved = {name: tensor.clone() for name, tensor in full_state_dict(model).items()}
        accelerator.save_state(folder)
        steps(accelerator, model, optimizer, place, range(2, 4))
        accelerator.load_state(folder)
        for name, tensor in full_state_dict(model).items():
            assert torch.equal(tensor, saved[name]), f"{name} is not what was saved"
    if place.gpus < 2:
        return "loaded as saved; contexts on other GPUs were not looked at, as there are none"
    import subprocess

    question = ["nvidia-smi", "--query-compute-apps=pid,gpu_uuid", "--format=csv,noheader"]
    rows = subprocess.run(question, capture_output=True, text=True, check=True).stdout.splitlines()
    own_rows = [row for row in rows if row.split(",")[0].strip() == str(os.getpid())]
    if not own_rows:
        return "loaded as saved; nvidia-smi lists no process of this container"
    assert len(own_rows) == 1, f"this process has contexts on {len(own_rows)} GPUs: {own_rows}"
    return "loaded as saved; one context a rank"


@check(seconds=400)
def one_graph_with_inductor(place: Place) -> str:
    import shutil

    from torch._dynamo.testing import CompileCounterWithBackend

    if place.device == "cpu" and not any(map(shutil.which, ("g++", "clang++"))):
        raise Skipped("inductor needs a C++ compiler on the CPU, and there is none")
    accelerator, model, _ = prepared(place)
    eager = model(**batch(place)).loss
    eager.backward()
    gradients = {name: param.grad.clone() for name, param in model.named_parameters()}
    model.zero_grad()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, backend=counter)
    loss = compiled(**batch(place)).loss
    loss.backward()
    words = close([loss.item()], [eager.item()], 1e-4)
    for name, param in model.named_parameters():
        error = (param.grad - gradients[name]).norm() / gradients[name].norm()
        assert error < 1e-3, f"the gradient of {name} is {error:.1e} from eager's"
    assert counter.frame_count == 1, f"{counter.frame_count} graphs"
    return f"one graph; loss {words}"


@check()
def autocast_sums_in_bf16(place: Place) -> str:
    accelerator, model, _ = prepared(place, precision="bf16")
    loss = model(**batch(place)).loss
    with Sent() as sent:
        accelerator.backward(loss)
    backward = {key[1]: n for key, n in sent.counts.items() if key[0].startswith("allreduce")}
    assert backward, "there are no all-reduces in the backward"
    assert backward.get("float32", 0) <= 1, f"all-reduces of the backward by type: {backward}"
    return f"all-reduces of the backward by type: {backward}"


@check()
def overlapping_changes_no_bit(place: Place) -> str:
    """Weight gradients computed beside the sum of input gradients, which is the default on GPUs."""
    found = []
    for overlap in (True, False):
        AcceleratorState._reset_state()
        accelerator, model, _ = prepared(place, overlap=overlap)
        for number in range(2):  # which layers share an input is learned in the first
            accelerator.backward(model(**batch(place, number)).loss)
        found.append([param.grad.clone() for param in model.parameters() if param.grad is not None])
    apart = sum(not torch.equal(*each) for each in zip(*found))
    assert apart == 0, f"{apart} of {len(found[0])} gradients are not equal to the bit"
    return f"{len(found[0])} gradients equal to the bit"


@check()
def generated_tokens(place: Place) -> str:
    accelerator, model, _ = prepared(place)
    kwargs = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    ids = batch(place, 0, 2, 8)["input_ids"]
    own = accelerator.unwrap_model(model).eval().generate(ids, **kwargs)
    plain = build().to(device_of(place)).eval().generate(ids, **kwargs)
    assert torch.equal(own, plain), f"{own.tolist()} instead of {plain.tolist()}"
    return f"{own.numel() - ids.numel()} greedy tokens are the plain model's"


@check()
def resumed_run(place: Place) -> str:
    """As if it had not been interrupted."""
    accelerator, model, optimizer = prepared(place)
    with folder_of_all_ranks(accelerator) as folder:
        steps(accelerator, model, optimizer, place, range(2))
        accelerator.save_state(folder)
        expected = steps(accelerator, model, optimizer, place, range(2, 5))
        accelerator.load_state(folder)
        words = close(steps(accelerator, model, optimizer, place, range(2, 5)), expected, 1e-6)
    return words


@check()
def exported_model(place: Place) -> str:
    """`save_pretrained` writes what plain transformers loads."""
    accelerator, model, optimizer = prepared(place)
    with folder_of_all_ranks(accelerator) as folder:
        steps(accelerator, model, optimizer, place, range(2))
        accelerator.unwrap_model(model).save_pretrained(folder, state_dict=accelerator.get_state_dict(model))
        accelerator.wait_for_everyone()
        loss = model(**batch(place, 9)).loss.item()
        again = AutoModelForCausalLM.from_pretrained(folder).to(device_of(place))
        words = close([loss], [again(**batch(place, 9)).loss.item()])
    return words


# --------------------------------------------------------------------------------------------------------- the figures

#: Dense bf16 peaks, floating-point operations a second, from NVIDIA's data sheets (SXM where there are several).
PEAKS = {"H200": 989e12, "H100": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165.2e12}


def sizes_of(place: Place) -> dict[str, int]:
    """Of a billion parameters on a GPU; small on the CPU, where only the script itself is tried."""
    if place.device == "cpu":
        return {"layers": 4, "hidden_size": 64, "intermediate_size": 128, "size": 2, "length": 32, "steps": 3}
    return {"layers": 16, "hidden_size": 2048, "intermediate_size": 8192, "size": 4, "length": 2048, "steps": 20}


def large(place: Place, layers: int | None = None) -> nn.Module:
    sizes = sizes_of(place)
    wide = {
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "vocab_size": VOCABULARY if place.device == "cpu" else 32768,
    }
    wide |= {"head_dim": sizes["hidden_size"] // 16}
    return build(
        layers=layers or sizes["layers"],
        hidden_size=sizes["hidden_size"],
        intermediate_size=sizes["intermediate_size"],
        **wide,
    )


def synchronize(place: Place) -> None:
    if place.device == "cuda":
        torch.cuda.synchronize()


def timed(place: Place, step: Callable[[], None], count: int, warmup: int = 3) -> float:
    """Seconds of a step: the median."""
    seconds = []
    for number in range(warmup + count):
        synchronize(place)
        start = time.perf_counter()
        step()
        synchronize(place)
        if number >= warmup:
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def training(
    place: Place, tp: int | None = None, model: nn.Module | None = None
) -> tuple[Callable[[], None], nn.Module]:
    sizes = sizes_of(place)
    accelerator = accelerator_of(place, tp, "bf16", replica_check_steps=0, prove="never")
    model = model or large(place)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    model, optimizer = accelerator.prepare(model, optimizer)
    data = batch(place, 0, sizes["size"], sizes["length"])

    def step() -> None:
        accelerator.backward(model(**data).loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step, model


def multiplied(model: nn.Module) -> int:
    """The parameters that a token is multiplied by: all but the embedding, where it is looked up."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return sum(param.numel() for param in model.parameters()) - (0 if head is embedding else embedding.numel())


def operations_a_token(parameters: int, layers: int, width: int, length: int) -> float:
    """Of forward and backward: PaLM's 6 N + 12 L H Q T (Chowdhery et al., arXiv:2204.02311, appendix B)."""
    return 6.0 * parameters + 12.0 * layers * width * length


def _speed(place: Place, tp: int) -> str:
    sizes, ranks = sizes_of(place), int(os.environ["WORLD_SIZE"])
    unsharded = large(place)
    parameters, layers, width = multiplied(unsharded), sizes["layers"], sizes["hidden_size"]
    step, _ = training(place, tp, unsharded)
    if place.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = timed(place, step, sizes["steps"])
    tokens = sizes["size"] * sizes["length"] * (ranks // tp) / seconds
    words = f"tp {tp} x dp {ranks // tp}: {1e3 * seconds:.1f} ms a step, {tokens:,.0f} tokens/s"
    if place.device == "cpu":
        return f"{words}; no MFU and no peak memory on the CPU"
    words += f", {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB at the peak"
    name = torch.cuda.get_device_name()
    peak = next((peak for card, peak in PEAKS.items() if card in name), None)
    if peak is None:
        return f"{words}; {name} is not among the cards whose peak is known, so no MFU"
    share = tokens * operations_a_token(parameters, layers, width, sizes["length"]) / (peak * ranks)
    return f"{words}, MFU {share:.1%} of {peak / 1e12:.0f} TFLOP/s on {name}"


@check(ranks=0, seconds=400, into=FIGURES)
def step_time(place: Place) -> str:
    return _speed(place, int(os.environ["WORLD_SIZE"]))


@check(ranks=0, seconds=400, into=FIGURES)
def step_time_of_replicas(place: Place) -> str:
    ranks = int(os.environ["WORLD_SIZE"])
    if ranks < 4:
        raise Skipped("replicas beside tensor parallelism need four ranks")
    return _speed(place, ranks // 2)


@check(ranks=-1, seconds=400, into=FIGURES)
def one_rank_of_eight(place: Place) -> str:
    """The kernels of one of eight ranks, on a fake group that sends nothing: the compute alone."""
    with _alone(place, 8):
        step, _ = training(place, 8)
        if place.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = timed(place, step, sizes_of(place)["steps"])
        words = f"{1e3 * seconds:.1f} ms a step without its collectives"
        if place.device == "cuda":
            words += f", {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB at the peak"
    return words


@check(ranks=-1, seconds=400, into=FIGURES)
def host_time_of_a_layer(place: Place) -> str:
    """Until the calls return, of a layer so small that the host never waits: the difference of two depths."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def enqueue(ranks: int, layers: int) -> float:
        """Of the first of two ranks; or of the plain model with a rank's heads and width."""
        config = LlamaConfig(
            **{"hidden_size": 64, "intermediate_size": 64 * ranks, "num_hidden_layers": layers, "head_dim": 8},
            **{"num_attention_heads": 4 * ranks, "num_key_value_heads": 4 * ranks, "vocab_size": 64},
        )
        with _alone(place, ranks):
            model = LlamaForCausalLM(config).to(device_of(place))
            if ranks > 1:
                accelerator = accelerator_of(place, ranks, replica_check_steps=0, prove="never")
                model = accelerator.prepare(model)
            ids = torch.zeros(1, 8, dtype=torch.long, device=device_of(place))
            seconds = []
            for number in range(60):
                synchronize(place)
                start = time.perf_counter()
                model(input_ids=ids, labels=ids).loss.backward()
                seconds.append(time.perf_counter() - start)
                model.zero_grad()
            return min(seconds[10:])

    own, plain = ((enqueue(ranks, 12) - enqueue(ranks, 4)) / 8 for ranks in (2, 1))
    words = f"{1e6 * own:.0f} us forward and backward, {1e6 * plain:.0f} us of the plain layer of a rank's sizes"
    return f"{words} ({own / plain - 1:+.0%})"


@check(ranks=0, seconds=400, into=FIGURES)
def profile(place: Place) -> str:
    """Where a step's time goes; the trace of the first rank is left in $GPU_TRACE, if that is set."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as recording

    step, _ = training(place)
    for _ in range(3):
        step()
    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if place.device == "cuda" else [])
    with recording(activities=kinds) as recorded:
        for _ in range(3):
            step()
        synchronize(place)
    if os.environ.get("GPU_TRACE") and dist.get_rank() == 0:
        recorded.export_chrome_trace(str(Path(os.environ["GPU_TRACE"])))
    key = "self_device_time_total" if place.device == "cuda" else "self_cpu_time_total"
    rows = sorted(recorded.key_averages(), key=lambda row: -getattr(row, key))
    total = sum(getattr(row, key) for row in rows) or 1.0
    names = ("nccl", "gloo", "c10d::")
    sent = sum(getattr(row, key) for row in rows if any(name in row.key.lower() for name in names))
    shares = ", ".join(f"{row.key[:40]} {getattr(row, key) / total:.0%}" for row in rows[:8])
    return f"collectives {sent / total:.0%} of the {'device' if place.device == 'cuda' else 'CPU'} time; {shares}"


def _alone(place: Place, ranks: int) -> Any:
    from accel_tp_ddp.tools.simulate import one_of

    return one_of(ranks, cpu=place.device == "cpu")
