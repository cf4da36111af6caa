"""How right `accel-tp-ddp estimate` is, on CPU ranks, and what it costs for published configs.

    python -m benchmarks.estimates --what pairs [--only NAME]
    python -m benchmarks.estimates --what limits [--only NAME]
    python -m benchmarks.estimates --what published

`pairs` trains small models on four gloo ranks, or fewer, in layouts and with features, and compares two figures of a
step with the estimate, which has seen two or three layers of each. Memory: the peak of the process as the kernel keeps
it (VmHWM, set back before the step), above what the process had before it built the model, of the first rank. Another
such model has taken steps by then and is gone: what libraries load, generate once and keep is no model's. As in the
estimate, outputs are held until the step ends. So that freed memory counts as freed, glibc maps every block of 64 KiB
or more by itself. Collectives: the bytes that go over each group, counted on the ranks. Exit code 1 where memory is
off by more than 5 %, or bytes differ at all.

`published` estimates what others have measured on GPUs, and prints both ratios; docs/estimate.md explains differences.

`limits` runs the command, in a process of its own, for each config of `benchmarks/configs`. Exit code 1 where one
takes more than 60 s or 4 GiB. Seconds are those of the processor, which others on the machine do not change; those of
the clock are printed besides.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.algorithms.ddp_comm_hooks.default_hooks as hooks
from accelerate import Accelerator
from torch import Tensor, nn
from transformers.utils import logging

from accel_tp_ddp import TensorParallelDDPPlugin
from accel_tp_ddp.tools.estimate.depths import Depth, Model
from accel_tp_ddp.tools.estimate.extend import extended
from accel_tp_ddp.tools.simulate import Setting, trace
from accel_tp_ddp.tools.tally import Live, Tally, collective_bytes
from benchmarks.launch import CONFIGS, run_command
from benchmarks.memory import give_back_what_is_freed, resident_memory, run

MOST_SECONDS, MOST_GIB = 60.0, 4.0
MOST_OFF = 0.05
MIB = 2**20
GROUPS = ("tp", "dp")

SIZES: dict[str, Any] = {
    **{"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "vocab_size": 8192},
    **{"num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 32, "max_position_embeddings": 512},
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **SIZES},
    "gemma3": {
        **{"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "sliding_window": 64},
        **{**SIZES, "tie_word_embeddings": True, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    },
    "qwen3_moe": {
        **{"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], **SIZES},
        **{"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256},
    },
}


@dataclass(frozen=True)
class Pair:
    model: str
    tp: int
    dp: int
    changes: dict[str, Any] = field(default_factory=dict)
    lora: int = 0

    @property
    def name(self) -> str:
        told = {**self.changes, **self.changes.get("plugin", {})}
        features = [f"{key}" if value is True else f"{value}" for key, value in told.items() if key != "plugin"]
        features += [f"lora {self.lora}"] if self.lora else []
        return f"{self.model} {self.tp}x{self.dp} {' '.join(features)}".strip()

    def setting(self, vocabulary: int) -> Setting:
        given = {"micro_batch": 2, "seq_len": 256, "vocabulary": vocabulary, **self.changes}
        return Setting(tp=self.tp, dp=self.dp, **given)


PAIRS = [
    *(Pair("llama", 2, 2), Pair("llama", 4, 1, {"precision": "bf16"}), Pair("llama", 1, 4)),
    *(Pair("llama", 2, 2, {"plugin": {"zero1": True}}), Pair("llama", 2, 1, {"plugin": {"loss_parallel": True}})),
    *(Pair("llama", 2, 2, {"checkpointing": True}), Pair("llama", 2, 2, lora=8)),
    *(Pair("gemma3", 2, 2), Pair("gemma3", 4, 1, {"checkpointing": True})),
    *(Pair("qwen3_moe", 2, 2), Pair("qwen3_moe", 2, 1, {"precision": "bf16"})),
    Pair("qwen3_moe", 2, 2, {"checkpointing": True, "plugin": {"zero1": True}}),
]


def parts(pair: Pair, folder: Path) -> tuple[Model, Setting, torch.dtype]:
    path = folder / f"{pair.model}.json"
    path.write_text(json.dumps(MODELS[pair.model]))
    model = Model(str(path), lora=pair.lora)
    setting = pair.setting(model.vocabulary)
    return model, setting, torch.bfloat16 if setting.precision == "bf16-weights" else torch.float32


def estimated(pair: Pair, folder: Path, results: Any) -> None:
    model, setting, dtype = parts(pair, folder)
    depths = model.depths()
    traces = [trace(model.builder(depth, dtype), setting) for depth in depths]
    step = extended(traces[0], [(made, depth.times) for made, depth in zip(traces[1:], depths[1:])])
    sent = {group: collective_bytes(step.collectives, group) for group in GROUPS}
    shallow = max(len(kept) for depth in depths for kept in depth.layers.values())
    results.put({"rank": 0, "peak": step.peak.total, "at": step.peak_at, "sent": sent, "layers": shallow})


def prepared(
    accelerator: Accelerator, model: Model, setting: Setting, dtype: torch.dtype
) -> tuple[Any, Callable[[], None]]:
    """The model with all its layers, and its training step."""
    full = Depth({count: tuple(range(count)) for count in model.depths()[0].layers})
    torch.manual_seed(0)
    built = model.builder(full, dtype)()
    built.train()
    if setting.checkpointing:
        built.gradient_checkpointing_enable()
    ids = torch.randint(3, setting.vocabulary, (setting.micro_batch, setting.seq_len))
    return estimated_step(accelerator, built, ids)


def estimated_step(accelerator: Accelerator, model: nn.Module, ids: Tensor) -> tuple[Any, Callable[[], None]]:
    """The prepared model, and the step that `estimate` tells of: clipped, torch's AdamW, outputs held to its end."""
    wrapped, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), foreach=True))

    def step() -> None:
        outputs = wrapped(input_ids=ids, labels=ids)
        accelerator.backward(outputs.loss)
        accelerator.clip_grad_norm_(wrapped.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return wrapped, step


def measured(rank: int, pair: Pair, folder: Path, results: Any) -> None:
    give_back_what_is_freed()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    size = pair.tp * pair.dp
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), ACCELERATE_USE_CPU="true")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    model, setting, dtype = parts(pair, folder / str(rank))
    plugin = TensorParallelDDPPlugin(
        tp_size=pair.tp, dp_replicate_size=pair.dp, prove="never", replica_check_steps=0, **setting.plugin
    )
    mixed = "bf16" if setting.precision == "bf16" else "no"
    accelerator = Accelerator(cpu=True, mixed_precision=mixed, parallelism_config=plugin)
    # MKL keeps the scratch of its largest product, 6 MiB (none with MKL_DISABLE_FAST_MM=1), and oneDNN the code that
    # it generates for each shape of a product in bfloat16, 0.6 MiB.
    wrapped, step = prepared(accelerator, model, setting, dtype)
    step()
    step()
    del wrapped, step
    accelerator.free_memory()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or what is free in the heap would be used again, and not seen
    before = resident_memory()[0]
    wrapped, step = prepared(accelerator, model, setting, dtype)
    step()
    step()  # DDP makes its buckets anew after the first
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins again
    step()
    peak = _status("VmHWM") - _status("RssFile") - _status("RssShmem") - before
    mesh = accelerator.torch_device_mesh
    groups = {"tp": mesh["tp"].get_group()} if pair.tp > 1 else {}
    groups |= {"dp": mesh["dp_replicate"].get_group()} if pair.dp > 1 else {}
    tally = Tally(Live(), "activations", groups)
    bucketed = [0]

    def reduced(state, bucket):  # DDP wants no annotations but classes
        bucketed[0] += bucket.buffer().nbytes  # which DDP sends from where nothing looks
        return hooks.allreduce_hook(groups["dp"], bucket)

    if pair.dp > 1:
        wrapped.register_comm_hook(None, reduced)
    tally.phase = "forward"
    with tally:
        step()
    rows = tally.collectives
    in_hook = {row for row in rows if row.group == "dp" and row.kind == "all_reduce"}
    sent = {group: collective_bytes([row for row in rows if row not in in_hook], group) for group in GROUPS}
    sent["dp"] += bucketed[0]
    results.put({"rank": rank, "peak": peak, "sent": sent})
    dist.barrier()
    dist.destroy_process_group()


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def compare_pairs(only: str | None) -> bool:
    print(f"{'pair':<44}{'measured':>12}{'estimated':>12}{'error':>8}   {'bytes sent, tp':<28}dp", flush=True)
    passed = True
    for pair in PAIRS:
        if only is not None and not pair.name.startswith(only):
            continue
        with tempfile.TemporaryDirectory() as root:
            folder = Path(root)
            for rank in range(pair.tp * pair.dp):
                (folder / str(rank)).mkdir()
            (told,) = run(estimated, [(pair, folder)])
            first = run(measured, [(rank, pair, folder) for rank in range(pair.tp * pair.dp)])[0]
        error = told["peak"] / first["peak"] - 1
        sent = [_compared(told["sent"][group], first["sent"][group]) for group in GROUPS]
        sizes = f"{first['peak'] / MIB:>8.1f} MiB{told['peak'] / MIB:>8.1f} MiB{error:>+8.1%}"
        print(f"{pair.name:<44}{sizes}   {sent[0]:<28}{sent[1]}   peak in {told['at']}", flush=True)
        passed = passed and abs(error) <= MOST_OFF and told["sent"] == first["sent"]
    return passed


def _compared(told: int, counted: int) -> str:
    return f"{counted:,} equal" if told == counted else f"{counted:,} not {told:,}"


def measure_limits(only: str | None) -> bool:
    print(f"{'config':<18}{'layouts':>9}{'take':>10}{'processor':>12}{'clock':>10}{'peak':>11}")
    passed = True
    for name in sorted(path.stem for path in CONFIGS.glob("*.json")):
        if only not in (None, name):
            continue
        ran = run_command("estimate", name, "--gpus", "1024", "--gpu", "h100-80", "--checkpointing", "--zero1")
        found = ran.found
        take = f"{found['take']['tp']} x {found['take']['dp']}" if found["take"] else "none"
        row = f"{len(found['layouts']):>9}{take:>10}{ran.processor:>10.1f} s{ran.clock:>8.1f} s{ran.peak:>7.2f} GiB"
        print(f"{name:<18}{row}", flush=True)
        passed = passed and ran.processor <= MOST_SECONDS and ran.peak <= MOST_GIB
    return passed


#: Of Accelerate's PR #4193, GRPO on 8 H100: tokens a second of two replicas of tp 4 over those of one of tp 8.
QWEN3_14B: dict[str, Any] = {
    **{"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "hidden_size": 5120, "intermediate_size": 17408},
    **{"num_hidden_layers": 40, "num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128},
    **{"vocab_size": 151936, "max_position_embeddings": 40960, "tie_word_embeddings": False},
}
PUBLISHED = 1.44


def compare_published(only: str | None) -> bool:
    print(
        f"{'tokens a step and replica':<28}{'tp 4 x dp 2':>14}{'tp 8 x dp 1':>14}{'ratio':>8}{'published':>11}",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as root:
        path = Path(root) / "qwen3-14b.json"
        path.write_text(json.dumps(QWEN3_14B))
        for batch, length in ((1, 512), (1, 2048), (4, 2048)):
            at = ("--gpus", "8", "--gpu", "h100-80", "--tp", "4", "8")
            features = ("--precision", "bf16-weights", "--checkpointing")
            size = ("--micro-batch", str(batch), "--seq-len", str(length))
            speeds = {
                row["tp"]: row["tokens_per_second"]
                for row in run_command("estimate", str(path), *at, *features, *size).found["layouts"]
            }
            cells = f"{speeds[4]:>14,.0f}{speeds[8]:>14,.0f}{speeds[4] / speeds[8]:>8.2f}{PUBLISHED:>11.2f}"
            print(f"{f'{batch} x {length}':<28}{cells}", flush=True)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measures: dict[str, Callable[[str | None], bool]] = {"pairs": compare_pairs, "limits": measure_limits}
    measures["published"] = compare_published
    parser.add_argument("--what", choices=sorted(measures), required=True)
    parser.add_argument("--only", metavar="NAME", help="how the pair begins, or the config")
    args = parser.parse_args()
    logging.set_verbosity_error()
    return 0 if measures[args.what](args.only) else 1


if __name__ == "__main__":
    sys.exit(main())
