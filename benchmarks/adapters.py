"""LoRA and its relatives under tensor parallelism beside plain DDP, on many architectures: losses, weights and files.

    python -m benchmarks.adapters
    python -m benchmarks.adapters --only gpt2 phi3 --methods lora dora --tp 2 --dp 2
    python -m benchmarks.adapters --output docs/lora.md

Each case trains a tiny random model with frozen base weights for some optimizer steps with clipping, once under plain
Accelerate on dp processes and once under the plugin on tp x dp. Nothing drops out. The largest relative differences
are printed of losses, gradient norms, and the adapters in the files that `save_pretrained` has written. For equal
weights the files have to be those of an unsharded model byte for byte, and plain PEFT, which loads them in a single
process, has to have the loss that the sharded model has. Exit code 1 if a case differs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from accel_tp_ddp import TensorParallelDDPPlugin, full_state_dict
from accel_tp_ddp.core.errors import PlanError

from .sweep.cases import Case, build
from .sweep.causal import language_inputs, model_of
from .sweep.processes import each, first_line, on_ranks

STEPS = 6
LIMITS = {"losses": 2e-4, "norms": 2e-4, "weights": 1e-3, "loaded": 2e-4}
BEGIN, END = "<!-- made by benchmarks/adapters.py -->", "<!-- end -->"
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": "all-linear"},
    "dora": {"target_modules": "all-linear", "use_dora": True},
    "experts": {"target_modules": "all-linear", "target_parameters": EXPERTS, "use_rslora": True},
    "embedding": {"target_modules": r".*\.(embed_tokens|q_proj|o_proj|up_proj|down_proj)", "use_rslora": True},
    "tokens": {"target_modules": "all-linear", "trainable_token_indices": [0, 3, 64, 127]},
    "head": {"target_modules": "all-linear", "modules_to_save": ["lm_head"], "bias": "lora_only"},
}
CASES: dict[str, tuple[str, ...]] = {
    **{"llama": ("lora", "dora", "embedding", "tokens", "head"), "qwen3": ("lora", "dora"), "mistral": ("lora",)},
    **{"gemma2": ("lora",), "gemma3_text": ("lora", "dora"), "phi3": ("lora", "dora"), "glm4": ("lora",)},
    **{"gpt_neox": ("lora", "dora"), "gpt2": ("lora", "dora"), "opt": ("lora",), "bloom": ("lora",)},
    **{"falcon": ("lora",), "stablelm": ("lora",)},
    **{"mixtral": ("lora", "experts"), "qwen3_moe": ("lora", "experts"), "gpt_oss": ("lora", "experts")},
    **{"deepseek_v3": ("lora",)},
}


def base_model(architecture: str) -> nn.Module:
    return build(Case(architecture, partial(model_of, architecture), language_inputs))


def adapted(architecture: str, method: str) -> PeftModel:
    model = base_model(architecture)
    torch.manual_seed(1)
    options = {"r": 4, "lora_alpha": 16, "task_type": "CAUSAL_LM", **METHODS[method]}
    return get_peft_model(model, LoraConfig(**options)).eval()


def batch(step: int, replica: int, model: nn.Module) -> dict[str, Tensor]:
    torch.manual_seed(1000 * replica + step)
    return language_inputs(model)


def train(architecture: str, method: str, tp: int | None, folder: str) -> dict[str, Any]:
    """On a rank: train, and write the adapters and what was seen; `tp` None: plain Accelerate."""
    os.environ["ACCELERATE_USE_CPU"] = "true"
    accelerator = Accelerator(**({"parallelism_config": TensorParallelDDPPlugin(tp_size=tp)} if tp else {}))
    replica = accelerator.process_index
    model = adapted(architecture, method)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2, eps=1e-5)
    try:
        model, optimizer = accelerator.prepare(model, optimizer)
    except PlanError as error:
        return {"result": "refused", "reason": first_line(error)}
    bare = accelerator.unwrap_model(model)
    frozen = {name: param.detach().clone() for name, param in bare.named_parameters() if not param.requires_grad}
    seen: dict[str, Any] = {"losses": [], "norms": []}
    for step in range(STEPS):
        loss = model(**batch(step % 2, replica, bare)).loss
        accelerator.backward(loss)
        seen["norms"].append(float(accelerator.clip_grad_norm_(model.parameters(), 0.5)))
        optimizer.step()
        optimizer.zero_grad()
        seen["losses"].append(loss.item())
    params = dict(bare.named_parameters())
    moved = [name for name, before in frozen.items() if not torch.equal(before, params[name])]
    if moved:
        return {"result": "fail", "reason": f"frozen, and moved all the same: {moved[:3]}"}
    trained = [param for param in params.values() if param.requires_grad]
    seen["sharded"] = [sum(getattr(param, "tp_shard", None) is not None for param in trained), len(trained)]
    with torch.no_grad():
        seen["after"] = model(**batch(0, 0, bare)).loss.item()
    bare.save_pretrained(f"{folder}/adapters", is_main_process=accelerator.is_main_process)
    full = full_state_dict(bare)
    if dist.get_rank() == 0:
        plain = adapted(architecture, method)
        plain.load_state_dict(full)
        plain.save_pretrained(f"{folder}/unsharded")
    if dist.get_rank() % (tp or 1) == 0:
        Path(folder, f"{replica}.seen").write_text(json.dumps(seen), encoding="utf-8")
    return {"result": "pass", "reason": ""}


def compare(architecture: str, method: str, tp: int, dp: int, seconds: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        ours, plain = Path(folder, "ours"), Path(folder, "plain")
        for path, size in ((plain, None), (ours, tp)):
            path.mkdir()
            answer = on_ranks(train, dp * (size or 1), seconds, architecture, method, size, str(path))
            if answer["result"] != "pass":
                return {**answer, "reason": f"{'plain' if size is None else 'tp'}: {answer['reason']}"}
        return judge(architecture, method, ours, plain, dp)


def judge(architecture: str, method: str, ours: Path, plain: Path, dp: int) -> dict[str, Any]:
    errors = {"losses": 0.0, "norms": 0.0}
    for replica in reversed(range(dp)):
        seen, expected = (json.loads((path / f"{replica}.seen").read_text()) for path in (ours, plain))
        for what in errors:
            errors[what] = max(errors[what], *map(relative, seen[what], expected[what]))
    after = seen["after"]  # the first replica's
    written, expected = (load_file(path / "adapters" / "adapter_model.safetensors") for path in (ours, plain))
    wrong = []
    if described(written) != described(expected):
        wrong.append("names, sizes or types of the adapters")
    else:
        errors["weights"] = max(relative_norm(written[name], tensor) for name, tensor in expected.items())
    written_files = sorted(path.name for path in (ours / "adapters").iterdir())
    pairs = [(plain / "adapters", ["adapter_config.json"]), (ours / "unsharded", written_files)]
    for other, names in pairs:
        for name in names:
            if (ours / "adapters" / name).read_bytes() != (other / name).read_bytes():
                wrong.append(f"{name} is not that of {other.parent.name}/{other.name} byte for byte")
    loaded = PeftModel.from_pretrained(base_model(architecture), ours / "adapters").eval()
    with torch.no_grad():
        errors["loaded"] = relative(loaded(**batch(0, 0, loaded)).loss.item(), after)
    wrong += [f"{what} off by {error:.1e}" for what, error in errors.items() if not error <= LIMITS[what]]
    return {
        **{"result": "fail" if wrong else "pass", "reason": "; ".join(wrong), "errors": errors},
        **{"sharded": seen["sharded"], "first": seen["losses"][0], "last": seen["losses"][-1]},
    }


def described(tensors: dict[str, Tensor]) -> list[tuple]:
    return [(name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in tensors.items()]


def relative(actual: float, expected: float) -> float:
    return abs(actual - expected) / abs(expected)


def relative_norm(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-12))


def row(case: str, answer: dict[str, Any]) -> str:
    errors = answer.get("errors", {})
    architecture, method = case.split(" ")
    counted = "{} of {}".format(*answer["sharded"]) if "sharded" in answer else ""
    course = f"{answer['first']:.3f} → {answer['last']:.3f}" if "first" in answer else ""
    cells = [f"{errors[what]:.0e}" if what in errors else "" for what in LIMITS]
    reason = answer["reason"].replace("|", "\\|")
    return "| " + " | ".join([architecture, method, counted, course, *cells, answer["result"], reason]) + " |"


HEAD = [
    "| architecture | method | trained tensors cut | loss | losses | norms | weights | loaded | result | reason |",
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", help="model types")
    parser.add_argument("--methods", nargs="*", choices=METHODS, help="all that are listed for the model type")
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--dp", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=1, help="cases at the same time")
    parser.add_argument("--seconds", type=float, default=120.0, help="for each training")
    parser.add_argument("--output", type=Path, help="file with a table between the marks to be replaced")
    args = parser.parse_args()
    cases: dict[str, Callable[[], Any]] = {
        f"{name} {method}": partial(compare, name, method, args.tp, args.dp, args.seconds)
        for name in args.only or CASES
        for method in (args.methods or CASES.get(name, ("lora",)))
    }
    answers: dict[str, dict[str, Any]] = {}

    def done(case: str, answer: dict[str, Any]) -> None:
        answers[case] = answer
        print(row(case, answer), answer.get("trace", ""), flush=True)

    print("\n".join(HEAD))
    each(cases, args.jobs, 3 * args.seconds, done)
    if args.output:
        text = args.output.read_text(encoding="utf-8")
        before, after = text.partition(BEGIN)[0], text.partition(END)[2]
        table = "\n".join([BEGIN, "", *HEAD, *(row(case, answers[case]) for case in cases), "", END])
        args.output.write_text(before + table + after, encoding="utf-8")
    return int(any(answer["result"] != "pass" for answer in answers.values()))


if __name__ == "__main__":
    sys.exit(main())
