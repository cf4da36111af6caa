"""What only a GPU can show, in one command: checks first, then step time, tokens/s, MFU, memory, host time, a profile.

    python -m benchmarks.gpu                                  # a machine with one GPU: about 15 minutes at most
    python -m benchmarks.gpu --gpus 8                         # eight; or, which is the same,
    torchrun --nproc_per_node 8 -m benchmarks.gpu
    python -m benchmarks.gpu --cpu                            # all that runs on CPU ranks: tries this script itself
    python -m benchmarks.gpu --only one_graph generated       # by parts of names; --list prints them

Each check runs in processes of its own with a time limit, and gives one line: pass, FAIL or skipped, and why. Ranks
have a GPU each where there are enough, over NCCL; else they share it over gloo, and NCCL is tried by one rank.
Exit code: 0: all passed or skipped; 1: something failed; 2: no GPU.

NOT YET RUN ON A GPU. On CPU ranks all of it was run that can be.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpus", type=int, help="how many to use; all that there are, unless torchrun says how many")
    parser.add_argument("--cpu", action="store_true", help="CPU ranks instead: what can be run without a GPU")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="PART", help="checks and figures with this in their name"
    )
    parser.add_argument("--no-figures", action="store_true", help="checks only")
    parser.add_argument("--list", action="store_true", help="print the names")
    parser.add_argument("--trace", metavar="FILE", help="where the profile's trace is left")
    parser.add_argument("--json", metavar="FILE", help="where the results are left, too")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.run:
        return _rank(args.run)

    import torch

    from . import gpu_checks

    chosen = {name: each for name, each in gpu_checks.CHECKS.items() if _wanted(name, args.only)}
    if not args.no_figures:
        chosen |= {name: each for name, each in gpu_checks.FIGURES.items() if _wanted(name, args.only)}
    if args.list:
        print("\n".join(chosen))
        return 0
    if not chosen:
        parser.error(f"nothing has {' or '.join(args.only)} in its name; --list prints the names")
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if int(os.environ.get("RANK", "0")):
        return 0  # torchrun's first rank starts all others anew for each check
    found = torch.cuda.device_count() if torch.cuda.is_available() and not args.cpu else 0
    if not found and not args.cpu:
        print(
            f"there is no GPU here that torch {torch.__version__} can use. With --cpu all runs that CPU ranks can do."
        )
        return 2
    gpus = args.gpus or (launched if launched > 1 else found)
    if not args.cpu and not 1 <= gpus <= found:
        print(f"{gpus} GPUs are wanted, and {found} are here. Give --gpus 1 to {found}.")
        return 2
    gpus = 0 if args.cpu else gpus
    print(_machine(torch, gpus), flush=True)
    results = []
    for name, each in chosen.items():
        result = _run(name, each.ranks, each.seconds, gpus, args.trace)
        results.append({"name": name, **result})
        print(
            "{outcome:<8}{name:<36}{seconds:6.0f} s  {ranks} x {backend:<6}{words}".format(**results[-1]), flush=True
        )
    failed = [each["name"] for each in results if each["outcome"] == "FAIL"]
    counts = {word: sum(each["outcome"] == word for each in results) for word in ("pass", "FAIL", "skipped")}
    print(", ".join(f"{count} {word}" for word, count in counts.items()))
    if args.json:
        Path(args.json).write_text(json.dumps({"machine": _machine(torch, gpus), "results": results}, indent=1))
    return 1 if failed else 0


def _wanted(name: str, parts: Sequence[str]) -> bool:
    return not parts or any(part in name for part in parts)


def _machine(torch: Any, gpus: int) -> str:
    import accelerate
    import transformers

    versions = (
        f"torch {torch.__version__}, accelerate {accelerate.__version__}, transformers {transformers.__version__}"
    )
    if not gpus:
        return f"CPU ranks, {os.cpu_count()} cores; {versions}; nothing below says anything about a GPU"
    return f"{gpus} x {torch.cuda.get_device_name(0)}; {versions}; CUDA {torch.version.cuda}"


def _run(name: str, ranks: int, seconds: float, gpus: int, trace: str | None) -> dict[str, Any]:
    """A check in processes of its own."""
    alone = ranks < 0
    count = 1 if alone else ranks or max(gpus, 1 if gpus else 2)
    shared = 0 < gpus < count
    place = {"device": "cuda" if gpus else "cpu", "backend": "nccl" if gpus and not shared else "gloo", "gpus": gpus}
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(count):
            own = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": 0 if shared else rank, "LOCAL_WORLD_SIZE": count}
            variables = {**os.environ, "GPU_RENDEZVOUS": f"{folder}/rendezvous"}
            variables = {key: value for key, value in variables.items() if not key.startswith("TORCHELASTIC")}
            variables |= {} if alone else {key: str(value) for key, value in own.items()}
            if alone:
                for key in own:
                    variables.pop(key, None)
            if not gpus:
                variables |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
            if trace:
                variables["GPU_TRACE"] = str(Path(trace).resolve())
            task = json.dumps({"name": name, "place": place, "answer": f"{folder}/{rank}.json"})
            command = [sys.executable, "-m", "benchmarks.gpu", "--run", task]
            log = open(f"{folder}/{rank}.log", "w")  # noqa: SIM115  it is the process's
            processes.append(
                subprocess.Popen(command, cwd=ROOT, env=variables, stdout=log, stderr=log, start_new_session=True)
            )
            log.close()
        ended = _wait(processes, folder, started + seconds)
        answers = [_answer(folder, rank) for rank in range(count)]
    result = {"seconds": time.monotonic() - started, "ranks": count, "backend": "-" if alone else place["backend"]}
    failed = [answer for answer in answers if answer["outcome"] == "FAIL"]
    silent = [rank for rank, answer in enumerate(answers) if answer["outcome"] == "none"]
    if failed:
        return {**result, **failed[0]}
    if silent and not ended:
        return {**result, "outcome": "FAIL", "words": f"ranks {silent} did not end within {seconds:.0f} s"}
    if silent:
        return {**result, "outcome": "FAIL", "words": f"rank {silent[0]} died: {answers[silent[0]]['words']}"}
    return {**result, **answers[0]}


def _wait(processes: list[subprocess.Popen], folder: str, deadline: float) -> bool:
    """Whether all have ended by themselves. Once one has failed, the others get ten seconds more."""
    failing: float | None = None
    try:
        while any(process.poll() is None for process in processes):
            if failing is None and any(process.poll() not in (None, 0) for process in processes):
                failing = time.monotonic() + 10
            if time.monotonic() > min(deadline, failing or deadline):
                return False
            time.sleep(0.1)
        return True
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # its own session, with whatever it has started
            process.wait()


def _answer(folder: str, rank: int) -> dict[str, str]:
    path = Path(folder, f"{rank}.json")
    if path.exists():
        return json.loads(path.read_text())
    lines = Path(folder, f"{rank}.log").read_text(errors="replace").strip().splitlines()
    return {"outcome": "none", "words": lines[-1][:300] if lines else "it said nothing"}


def _rank(task: str) -> int:
    """One rank of a check."""
    import torch

    from . import gpu_checks

    given = json.loads(task)
    place = gpu_checks.Place(**given["place"])
    each = (gpu_checks.CHECKS | gpu_checks.FIGURES)[given["name"]]
    code = 0
    try:
        if place.device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        answer = {"outcome": "pass", "words": each.function(place) or ""}
    except gpu_checks.Skipped as why:
        answer = {"outcome": "skipped", "words": str(why)}
    except Exception as error:
        traceback.print_exc()
        where = traceback.extract_tb(error.__traceback__)[-1]
        words = " ".join(str(error).split())[:400]
        kind = (
            ""
            if isinstance(error, AssertionError)
            else f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}: "
        )
        answer, code = {"outcome": "FAIL", "words": f"{kind}{words}"}, 1
    part = Path(given["answer"] + ".part")
    part.write_text(json.dumps(answer))
    part.rename(given["answer"])
    sys.stdout.flush()
    sys.stderr.flush()
    if code == 0 and torch.distributed.is_initialized():
        torch.distributed.barrier()  # a rank that leaves first makes its peers abort
        torch.distributed.destroy_process_group()
    os._exit(code)  # whatever threads there are


if __name__ == "__main__":
    sys.exit(main())
