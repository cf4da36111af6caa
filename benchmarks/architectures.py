"""Which causal language models of the installed transformers train right under their plan, with every style it names.

    python benchmarks/architectures.py --tp 2 --output docs/ARCHITECTURES.md
    python benchmarks/architectures.py --only llama gpt_oss

Every architecture whose config has a `base_model_tp_plan`, or for which this package ships a plan, is built tiny with
random weights, in a process of its own with a time limit. Loss and the full gradient of each parameter are compared
with the unsharded model's. Exit code 1 if one that can be compared differs.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import json
import multiprocessing
import resource
import sys
import tempfile
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch.distributed.device_mesh import init_device_mesh
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from accel_tp_ddp import full_gradients, parallelize
from accel_tp_ddp.errors import PlanError
from accel_tp_ddp.rules import _SHIPPED as SHIPPED

LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 1e-3
FLOOR = (
    1e-4  # of the norm of all gradients together: what is below is compared with that, as it may be noise around zero
)
VOCABULARY, LENGTH = 128, 16
MEMORY = 12 << 30  # of addresses, for each process
forked = multiprocessing.get_context("fork")  # what is imported already need not be imported again

# Small values for whatever of these a config has. Head widths are unlike each other where a config allows it.
SIZES: dict[str, Any] = {
    **{"hidden_size": 64, "n_embd": 64, "d_model": 64, "intermediate_size": 128, "ffn_hidden_size": 128},
    **{"num_hidden_layers": 2, "n_layer": 2, "num_layers": 2, "vocab_size": VOCABULARY, "initializer_range": 0.1},
    **{"num_attention_heads": 8, "n_head": 8, "num_key_value_heads": 4, "head_dim": 16, "max_position_embeddings": 64},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "sliding_window": 8, "attention_chunk_size": 16},
    **{"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "expert_ffn_hidden_size": 32},
    **{"moe_num_experts": 4, "num_experts": 4, "n_routed_experts": 4, "num_local_experts": 4, "n_shared_experts": 1},
    **{"num_experts_per_tok": 2, "moe_k": 2, "moe_topk": 2, "num_experts_per_token": 2, "n_group": 1, "topk_group": 1},
    **{"first_k_dense_replace": 1, "moe_layer_start_index": 0, "shared_intermediate_size": 64},
    **{"kv_lora_rank": 24, "q_lora_rank": 24, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16},
    **{"index_n_heads": 4, "index_head_dim": 16, "index_topk": 8, "zero_expert_num": 2, "intermediate_size_mlp": 128},
    **{"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    **{"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_expand": 2},
    **{"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": VOCABULARY, "laurel_rank": 8},
    **{"partial_rotary_factor": 0.5, "rotary_pct": 0.5, "swa_num_attention_heads": 8, "swa_num_key_value_heads": 4},
    **{
        "swa_head_dim": 16,
        "swa_v_head_dim": 16,
        "num_nextn_predict_layers": 0,
        "num_kv_shared_layers": 0,
        "block_size": 8,
    },
}


def architectures() -> list[str]:
    """Model types with a plan, in alphabetical order."""
    shipped = {path.stem for path in SHIPPED.glob("*.yaml")}
    types = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    planned = (name for name in types if name in shipped or getattr(CONFIG_MAPPING[name], "base_model_tp_plan", None))
    return [
        name for name in planned if not CONFIG_MAPPING[name].sub_configs
    ]  # those with a text model are listed by it


def tiny_configs(architecture: str) -> Iterator[Any]:
    """Small configs; the first that runs is taken, as few of an architecture's sizes may be set freely."""
    kind = CONFIG_MAPPING[architecture]
    default = kind()
    known = set(inspect.signature(kind.__init__).parameters) | set(vars(default)) | set(dir(kind))
    optional = {name: value for name, value in SIZES.items() if name in known}
    given = {name: value for name, value in optional.items() if vars(default).get(name) is not None}
    latent = {"num_key_value_heads": SIZES["num_attention_heads"]} if "kv_lora_rank" in given else {}
    if {"head_dim", "qk_rope_head_dim"} <= given.keys() and vars(default)["head_dim"] == default.qk_rope_head_dim:
        latent["head_dim"] = given["qk_rope_head_dim"]
    anew = {name: None for name in ("layer_types", "mlp_layer_types") if name in vars(default)}  # one for each layer
    first = {name: list(getattr(default, name) or ())[:2] or None for name in anew}
    narrow = {"head_dim": SIZES["hidden_size"] // SIZES["num_attention_heads"]} if "head_dim" in given else {}
    for sizes in (given, optional, {**given, **narrow}, {**optional, "q_lora_rank": None}):
        for lists in (anew, first, {}, {"layer_types": ["full_attention"] * 2}):
            try:
                yield kind(**{**sizes, **latent, **lists})
            except Exception:
                continue


def working_config(architecture: str) -> Any:
    """Raises:
    RuntimeError: With the first problem, if no config works.
    """
    problem = None
    for config in tiny_configs(architecture):
        try:
            loss_of(build(config)).backward()
            return config
        except Exception as error:
            problem = problem or error
    raise RuntimeError(f"does not run unsharded at this size: {_first_line(problem)}")


def build(config: Any) -> torch.nn.Module:
    """Equal on every rank; what starts at one or zero is moved, so that it matters to the loss."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32)
    with torch.no_grad():
        for param in model.parameters():
            if param.ndim == 1 or not param.any() or not param.isfinite().all():
                param.nan_to_num_(0.0, 0.0, 0.0).add_(0.1 * torch.randn_like(param))
    return model.eval()


def loss_of(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.randint(3, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def compare(architecture: str, tp: int) -> dict[str, Any]:
    """On a rank: what there is to say about an architecture."""
    try:
        config = working_config(architecture)
    except RuntimeError as error:
        return {"result": "skipped", "reason": str(error)}
    reference = build(config)
    loss = loss_of(reference)
    loss.backward()
    gradients = {name: param.grad for name, param in reference.named_parameters() if param.grad is not None}
    try:
        model = parallelize(build(config), init_device_mesh("cpu", (tp,), mesh_dim_names=("tp",)))
    except PlanError as error:
        return {"result": "refused", "reason": _first_line(error)}
    sharded = sum(param.tp_shard is not None for param in model.parameters())
    actual_loss = loss_of(model)
    actual_loss.backward()
    actual = full_gradients(model)
    floor = FLOOR * torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    errors = {name: float((actual[name] - g).norm() / g.norm().clamp(min=floor)) for name, g in gradients.items()}
    worst = max(errors, key=lambda name: float("inf") if errors[name] != errors[name] else errors[name])
    off = abs(actual_loss.item() - loss.item()) / abs(loss.item())
    right = off < LOSS_TOLERANCE and errors[worst] < GRADIENT_TOLERANCE and actual.keys() == gradients.keys()
    return {
        "result": "pass" if right else "fail",
        "reason": "" if right else f"loss off by {off:.1e}, gradient of `{worst}` by {errors[worst]:.1e}",
        "sharded": f"{sharded} of {len(list(model.parameters()))}",
        "error": errors[worst],
    }


def rank_main(rank: int, architecture: str, tp: int, folder: str) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))  # a size left at its default may be that of a large model
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=tp)
    try:
        answer = compare(architecture, tp)
    except Exception as error:
        answer = {"result": "fail", "reason": _first_line(error)}
    Path(folder, f"{rank}.json").write_text(json.dumps(answer), encoding="utf-8")
    if answer["result"] == "pass":  # else a peer may be elsewhere
        dist.barrier()
        dist.destroy_process_group()


def run(architecture: str, tp: int, seconds: float) -> dict[str, Any]:
    """Compare in processes of their own, and end them when their time is over."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = [forked.Process(target=rank_main, args=(rank, architecture, tp, folder)) for rank in range(tp)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(seconds)
        late = [process for process in ranks if process.is_alive()]
        for process in late:
            process.kill()
            process.join()
        answers = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(Path(folder).glob("*.json"))]
    order = ("fail", "skipped", "refused", "pass")
    answers.sort(key=lambda answer: order.index(answer["result"]))
    if answers and (answers[0]["result"] != "pass" or len(answers) == tp):
        return answers[0]
    return {"result": "fail", "reason": f"no answer within {seconds:.0f} s" if late else "a rank died"}


def _first_line(error: Exception) -> str:
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text[:300]}"


def as_table(answers: dict[str, dict[str, Any]], tp: int) -> str:
    counts = {result: sum(a["result"] == result for a in answers.values()) for result in ("pass", "fail", "refused")}
    counts["skipped"] = len(answers) - sum(counts.values())
    heads = SIZES["num_key_value_heads"]
    text = (
        "Made by `python benchmarks/architectures.py`, which says what is compared: the causal language models of "
        f"transformers {transformers.__version__} that have a plan, tiny, with {heads} key/value heads where they can "
        f"have so many, at tp_size={tp} on CPU, against the unsharded model. Of {len(answers)}: "
        f"{counts['pass']} pass, "
        f"{counts['fail']} fail, {counts['refused']} are refused with an error before any weight is touched, "
        f"{counts['skipped']} were skipped. Where few parameters are sharded, the plan of transformers names no more "
        "(or, as for models of several kinds of layers, none of the kinds that were built here)."
    )
    lines = [
        "# Architectures",
        "",
        *textwrap.wrap(text, 119),
        "",
        "| architecture | result | parameters sharded | worst gradient | reason |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, answer in answers.items():
        error = f"{answer['error']:.0e}" if "error" in answer else ""
        reason = answer["reason"].replace("|", "\\|")
        lines.append(f"| {name} | {answer['result']} | {answer.get('sharded', '')} | {error} | {reason} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--only", nargs="*", help="model types; all by default")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each architecture")
    parser.add_argument("--output", type=Path, help="where to write the table")
    parser.add_argument("--key-value-heads", type=int, default=SIZES["num_key_value_heads"])
    args = parser.parse_args()
    SIZES["num_key_value_heads"] = args.key_value_heads
    answers = {}
    for name in args.only or architectures():
        answers[name] = run(name, args.tp, args.seconds)
        print(f"{name:28} {answers[name]['result']:8} {answers[name]['reason']}", flush=True)
    if args.output:
        args.output.write_text(as_table(answers, args.tp), encoding="utf-8")
    return int(any(answer["result"] == "fail" for answer in answers.values()))


if __name__ == "__main__":
    sys.exit(main())
