"""Plans inferred for architectures that have one: what comes out as somebody has written it, and what does not.

    python -m benchmarks.inferred [--tp 2] [--only llama ...]

The model's own plan and this package's are hidden. For each: the share of the parameters that the inferred plan cuts
and that the written one does; how many of the elements that the written one shards are cut alike; the seconds to infer
it; whether the proof accepts it; and the modules that are cut otherwise, or have another style.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from tempfile import TemporaryDirectory
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from accel_tp_ddp import resolve_plan
from accel_tp_ddp.plans.names import wildcards
from accel_tp_ddp.proof.infer import infer_plan, sharded_share
from accel_tp_ddp.proof.prove import prove_plan

from .sweep.cases import build, groups
from .sweep.processes import on_ranks

CASES = (
    *(
        ("causal", name)
        for name in ("llama", "qwen3", "phi3", "phi", "gpt_neox", "gpt_oss", "gemma2", "olmo2", "starcoder2")
    ),
    *(("causal", name) for name in ("mixtral", "deepseek_v3", "jamba")),
    *(
        ("curated", name)
        for name in ("gpt2", "opt", "bloom", "falcon", "falcon, alibi", "mpt", "gptj", "gpt_neo", "codegen")
    ),
    *(
        ("curated", name)
        for name in ("falcon, new, 2 key/value heads", "stablelm, norms by head", "persimmon", "gpt_bigcode")
    ),
    *(
        ("encoders", name)
        for name in ("bert", "roberta", "albert", "deberta-v2", "modernbert", "t5 gated", "bart", "whisper")
    ),
    *(("vision", name) for name in ("vit", "dinov2", "clip")),
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.inferred", description=__doc__.split("\n")[0])
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=())
    args = parser.parse_args(argv)
    print(f"{'model':32} {'inferred':>8} {'written':>8} {'alike':>7} {'s':>5}  proof, and what is otherwise")
    failed = 0
    for group, name in CASES:
        if args.only and name not in args.only:
            continue
        model = build(next(case for case in groups()[group].cases() if case.name == name))
        answer = on_ranks(measured, args.tp, 180.0, model)
        if answer["result"] != "pass":
            failed += 1
            print(f"{name:32} {'-':>8} {'-':>8} {'-':>7} {'-':>5}  {answer['reason'][:160]}", flush=True)
            continue
        shares = f"{answer['inferred']:8.1%} {answer['written']:8.1%} {answer['alike']:7.1%} {answer['seconds']:5.1f}"
        print(f"{name:32} {shares}  {answer['proof']}; {', '.join(answer['otherwise']) or 'nothing'}", flush=True)
    return int(failed > 0)


def measured(model: nn.Module) -> dict[str, Any]:
    """On a rank: the plan inferred for the model beside the one that it has."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    with TemporaryDirectory() as folder:
        os.environ["ACCEL_TP_DDP_CACHE"] = folder
        start = time.perf_counter()
        rules = infer_plan(model, mesh)
        seconds = time.perf_counter() - start
        plan, written = resolve_plan(model, mesh.size(), rules), resolve_plan(model, mesh.size())
        how = prove_plan(model, mesh, plan, rules, "always").how
    sizes, got, want = {name: size.numel() for name, size in plan.parameters}, plan.layouts, written.layouts
    alike = sum(sizes[name] for name in want if name in sizes and got.get(name) == want[name])
    own = {entry.site.name: entry for entry in plan.entries if entry.layouts}
    others = {entry.site.name: entry for entry in written.entries if entry.layouts}
    otherwise = {
        f"{wildcards(name)}: {own[name].label if name in own else '-'} for "
        f"{others[name].label if name in others else '-'}": None
        for name in [*others, *(name for name in own if name not in others)]
        if name not in own
        or name not in others
        or own[name].layouts != others[name].layouts
        or type(own[name].style) is not type(others[name].style)
    }
    return {
        "result": "pass",
        "inferred": sharded_share(plan),
        "written": sharded_share(written),
        "alike": alike / max(sum(sizes[name] for name in want if name in sizes), 1),
        "seconds": seconds,
        "proof": how,
        "otherwise": list(otherwise),
    }


if __name__ == "__main__":
    sys.exit(main())
