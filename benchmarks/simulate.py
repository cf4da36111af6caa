"""One rank's training step at any size, without the ranks: memory by part, collectives, kernels and copies a layer.

    python -m benchmarks.simulate --model llama-3-8b --tp 8 --seq-len 8192 --precision bf16
    python -m benchmarks.simulate --config config.json --tp 4 --dp 2 --layers 4 --compile --json

Runs the real prepared step (forward, backward, clipping, AdamW, zero_grad) on fake tensors and a fake process group,
see `accel_tp_ddp.tools.simulate`; every figure is exact, and none was measured on a GPU.

The peak is compared with the least that this step can take: the peak of the same step of the plain module that has one
rank's sizes (its heads, its part of the MLP and of the vocabulary), in one process, without a line of this package.
That holds the rank's weights, gradients and optimizer state, and the activations that autograd keeps of transformers'
modules as they are; logits are joined to full width for the loss, as the plan says. It is what Korthikanti et al.
(arXiv:2205.05198, section 4.2) count for a layer under tensor parallelism, `s b h (10 + 24 / t)` bytes beside the
attention's scores (what is replicated, and what is cut by `t`), with the tensors that these modules save.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from accel_tp_ddp.core.errors import BadInputError, PlanError
from accel_tp_ddp.tools.simulate import PRECISIONS, Setting, Simulation, simulate

GIB = 2**30
#: As the models' config.json files have them.
MODELS: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        **{"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
        **{"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256},
        **{"rms_norm_eps": 1e-5, "max_position_embeddings": 8192, "tie_word_embeddings": False},
    },
    "llama-3-70b": {
        **{"model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80},
        **{"num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256},
        **{"rms_norm_eps": 1e-5, "max_position_embeddings": 8192, "tie_word_embeddings": False},
    },
    "qwen3-8b": {
        **{"model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36},
        **{"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936},
        **{"rms_norm_eps": 1e-6, "max_position_embeddings": 40960, "tie_word_embeddings": False},
    },
    "qwen2.5-7b": {
        **{"model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28},
        **{"num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064},
        **{"rms_norm_eps": 1e-6, "max_position_embeddings": 131072, "tie_word_embeddings": False},
    },
    "mixtral-8x7b": {
        **{"model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
        **{"num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2},
        **{"vocab_size": 32000, "rms_norm_eps": 1e-5, "max_position_embeddings": 32768},
    },
}
#: Model types whose layers, cut by heads and by the MLP's width, are those of a config with smaller numbers.
CUT_BY_CONFIG = ("llama", "qwen2", "qwen3", "mistral", "mixtral")


def config_of(values: dict[str, Any], layers: int | None = None) -> PretrainedConfig:
    config = AutoConfig.for_model(**values)
    config.use_cache = False
    if layers is not None:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    return config


def plain(config: PretrainedConfig) -> nn.Module:
    return AutoModelForCausalLM.from_config(copy.deepcopy(config))


class _Joined(nn.Module):
    """A head of which the other ranks have the rest."""

    def __init__(self, head: nn.Module, width: int):
        super().__init__()
        self.head, self.width = head, width

    def forward(self, hidden: Tensor) -> Tensor:
        return _Join.apply(self.head(hidden), self.width)


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, width: int) -> Tensor:
        ctx.own = part.size(-1)
        return part.new_empty(*part.shape[:-1], width)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad[..., : ctx.own], None


def of_local_sizes(config: PretrainedConfig, tp: int) -> nn.Module:
    """The plain module that computes what one of `tp` ranks does, where all sizes can be divided."""
    local = copy.deepcopy(config)
    local.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    local.num_attention_heads = -(-config.num_attention_heads // tp)
    local.num_key_value_heads = -(-config.num_key_value_heads // tp)
    local.intermediate_size = config.intermediate_size // tp
    local.vocab_size = -(-config.vocab_size // tp)
    model = AutoModelForCausalLM.from_config(local)
    if tp > 1:
        model.lm_head = _Joined(model.lm_head, config.vocab_size)
        model.config.vocab_size = model.vocab_size = config.vocab_size
    return model


def minimum(config: PretrainedConfig, setting: Setting) -> Simulation | None:
    """The step of the plain module of local sizes; None where a config cannot say them."""
    tied = config.tie_word_embeddings or config.num_attention_heads % setting.tp
    if config.model_type not in CUT_BY_CONFIG or (tied and setting.tp > 1):
        return None
    alone = Setting(
        dp=setting.dp,
        micro_batch=setting.micro_batch,
        seq_len=setting.seq_len,
        precision=setting.precision,
        checkpointing=setting.checkpointing,
    )
    return simulate(lambda: of_local_sizes(config, setting.tp), alone, held=True)


def per_layer(shallow: Simulation, deep: Simulation, layers: int, hidden_state: int) -> dict[str, float]:
    """What one layer adds: the difference of two depths. Copies are those of a hidden state or more."""

    def counts(run: Simulation) -> Counter[str]:
        found: Counter[str] = Counter()
        for phase, count in run.kernels.items():
            found[f"kernels, {phase}"] += count
        for each in run.copies:
            if each.elements >= hidden_state:
                found[f"{each.kind}s of hidden states, {each.phase}"] += each.count
        for sent in run.collectives:
            found[f"{sent.kind} {sent.dtype} over {sent.group}, {sent.phase}"] += sent.count
        found["activations kept, bytes"] = run.kept
        found["activations autograd saves, bytes"] = run.saved
        return found

    few, many = counts(shallow), counts(deep)
    return {name: (many[name] - few[name]) / layers for name in sorted(many | few) if many[name] != few[name]}


def report(args: argparse.Namespace, values: dict[str, Any]) -> dict[str, Any]:
    config = config_of(values, args.layers)
    setting = Setting(
        tp=args.tp,
        dp=args.dp,
        micro_batch=args.micro_batch,
        seq_len=args.seq_len,
        precision=args.precision,
        checkpointing=args.checkpointing,
    )
    run = simulate(lambda: plain(config), setting, held=True)
    least = None if args.no_minimum else minimum(config, setting)
    shallow, deep = (simulate(lambda n=n: plain(config_of(values, n)), setting) for n in (2, 4))
    hidden_state = args.micro_batch * args.seq_len * config.hidden_size
    result = {
        "model": args.model or args.config,
        "layers": config.num_hidden_layers,
        "setting": vars(setting) | {"plugin": dict(setting.plugin)},
        "simulation": run.as_dict(),
        "per_layer": per_layer(shallow, deep, 2, hidden_state),
        "minimum": least and least.as_dict(),
        "peak_over_minimum": least and run.peak.total / least.peak.total,
    }
    if args.compile:
        tried = simulate(lambda: plain(config_of(values, 2)), setting, graphs=True)
        result["graphs"], result["breaks"] = tried.graphs, dict(tried.breaks)
    return result


def as_text(result: dict[str, Any], top: int) -> str:
    run, least, setting = result["simulation"], result["minimum"], result["setting"]
    lines = [
        "{model}, {layers} layers: tp {tp} x dp {dp}, {micro_batch} x {seq_len} tokens, {precision}".format(
            **result, **setting
        ),
        "on fake tensors of device cpu and a fake process group; not measured on a GPU",
        "",
        f"memory at the peak ({run['peak_at']}), GiB".ljust(58) + ("" if least is None else "     least"),
    ]
    for part, size in run["peak"].items():
        lines.append(f"  {part:<14}{size / GIB:10.3f}".ljust(58) + _least(least, "peak", part))
    ratio = "" if least is None else f"{least['peak_total'] / GIB:10.3f}   ratio {result['peak_over_minimum']:.4f}"
    lines.append(f"  {'total':<14}{run['peak_total'] / GIB:10.3f}".ljust(58) + ratio)
    if least is not None:
        lines.append(f"  (the least has its peak in {least['peak_at']})")
    lines.append(f"between steps {run['resting_total'] / GIB:.3f} GiB")
    for name, meaning in (("kept", "after the forward"), ("saved", "of which autograd holds")):
        lines.append(f"  activations {meaning:<28}{run[name] / GIB:10.3f}".ljust(58) + _least(least, name))
    lines.append(f"gradients that keep more alive than themselves: {run['gradients_with_excess']}")
    lines.append(f"  bytes beyond their own: {run['gradient_excess']:,}")
    lines += ["", "collectives of a step"]
    for sent in run["collectives"]:
        lines.append("  {count:5} x {kind:<24}{dtype:<10}{group:<7}{phase:<10}{bytes:>16,} bytes".format(**sent))
    lines += ["", "a layer adds (difference of 4 and 2 layers)"]
    lines += [f"  {name:<58}{value:>16,.1f}" for name, value in result["per_layer"].items()]
    for title, held in (("this package", run["held"]), ("the least", least["held"] if least else ())):
        if top and held:
            lines += ["", f"largest at the peak, {title}: MiB together, count, part, made by, type, shape"]
            for row in held[:top]:
                size = row["bytes"] * row["count"] / 2**20
                shape = "x".join(map(str, row["shape"]))
                lines.append(
                    f"  {size:10.1f} {row['count']:5}  {row['part']:<12} {row['made']:<36} {row['dtype']} {shape}"
                )
    if "graphs" in result:
        lines += ["", f"graphs under torch.compile, 2 layers, forward: {result['graphs']}"]
        lines += [f"  {count} x {reason}" for reason, count in result["breaks"].items()]
    return "\n".join(lines)


def _least(least: dict[str, Any] | None, *path: str) -> str:
    if least is None:
        return ""
    found: Any = least
    for name in path:
        found = found[name]
    return f"{found / GIB:10.3f}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(MODELS), help="a published architecture")
    parser.add_argument("--config", help="a config.json, or a folder with one")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--dp", type=int, default=1)
    parser.add_argument("--seq-len", type=int, default=8192)
    parser.add_argument("--micro-batch", type=int, default=1)
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16")
    parser.add_argument("--layers", type=int, help="as many layers, and not the model's number")
    parser.add_argument("--checkpointing", action="store_true", help="activation checkpointing")
    parser.add_argument("--compile", action="store_true", help="count the graphs under torch.compile")
    parser.add_argument("--no-minimum", action="store_true", help="do not run the plain module of local sizes")
    parser.add_argument(
        "--top", type=int, default=0, metavar="N", help="list the N largest kinds of tensors at the peak"
    )
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    if (args.model is None) == (args.config is None):
        parser.error("give --model or --config")
    if args.layers is not None and args.layers < 1:
        parser.error(f"--layers is {args.layers}; give 1 or more")
    try:
        result = report(args, MODELS[args.model] if args.model else _read(args.config))
    except (BadInputError, PlanError) as error:
        print(f"simulate: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:  # of an operation that has no fake kernel, or none for these types
        why = str(error).strip().splitlines()[0]
        print(f"simulate: this model cannot run on fake CPU tensors: {why} Try another --precision.", file=sys.stderr)
        return 2
    print(json.dumps(result) if args.json else as_text(result, args.top))
    return 0


def _read(name: str) -> dict[str, Any]:
    path = Path(name)
    path = path / "config.json" if path.is_dir() else path
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInputError(f"--config {name} is no config.json that can be read: {error}") from error
    if not isinstance(values, dict) or "model_type" not in values:
        raise BadInputError(f"--config {name} has no `model_type`.")
    return values


if __name__ == "__main__":
    sys.exit(main())
