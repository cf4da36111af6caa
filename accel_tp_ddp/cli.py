"""`accel-tp-ddp COMMAND ...`, or `python -m accel_tp_ddp.cli COMMAND ...`: what needs no run, on one machine's CPU.

A command is a parser, the function that does it, and what is printed of the outcome without `--json`. Exit codes: 0 as
it should be, 1 for a failed check (CheckpointError), 2 for input that has to be changed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from .checkpoint.merge import merge
from .core.errors import BadInputError, CheckpointError, PlanError
from .plugin.overrides import as_markdown, as_rows
from .tools.doctor import TIMEOUT, as_lines, doctor
from .tools.estimate import SWITCHES, card_names, estimate
from .tools.estimate import as_text as estimate_as_text
from .tools.plan import as_text, show_plan, show_sizes
from .tools.plots import check_plot, draw_estimate, draw_plan
from .tools.simulate import PRECISIONS
from .tools.verify import as_table, verify

__all__ = ["BAD_INPUT", "CHECK_FAILED", "main"]

CHECK_FAILED = 1
BAD_INPUT = 2


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise BadInputError(f"{message}. See {self.prog} --help.")


def _add_merge(commands: Any) -> None:
    text = "turn what accelerator.save_state has saved into an ordinary Hugging Face checkpoint, in one process"
    parser = commands.add_parser("merge", help=text, description=text)
    parser.add_argument("state", metavar="STATE_DIR", type=Path, help="folder that save_state has written")
    parser.add_argument("out", metavar="OUT_DIR", type=Path, help="new folder for the checkpoint")
    parser.add_argument("--max-shard-size", default="5GB", help="largest file; memory goes with it (%(default)s)")
    parser.add_argument("--model", type=int, metavar="N", help="which model, where the state holds several: 0, ...")
    parser.add_argument("--config", type=Path, help="folder or config.json of the model, for states without one")
    parser.add_argument("--no-verify", action="store_true", help="do not compare checksums first")
    parser.set_defaults(run=_merge, text=_merged)


def _merge(args: argparse.Namespace) -> dict[str, Any]:
    sizes = {"max_shard_size": args.max_shard_size, "model": args.model, "config": args.config}
    return merge(args.state, args.out, **sizes, verify=not args.no_verify, progress=True)


def _merged(result: dict[str, Any]) -> str:
    counts = {name: len(value) if isinstance(value, list) else value for name, value in result.items()}
    return "{out}: {kind}, {tensors} tensors, {bytes:,} bytes in {files} files".format(**counts)


def _add_verify(commands: Any) -> None:
    text = "prove a tensor-parallel plan numerically, on CPU ranks of this machine"
    parser = commands.add_parser("verify", help=text, description=text)
    _add_model(parser)
    parser.add_argument("--full", action="store_true", help="compare the model as large as it is, not a small one")
    parser.set_defaults(run=_verify, text=as_table, failed=lambda result: not result["ok"])


def _add_plan(commands: Any) -> None:
    text = "print the plan as a tree: which module gets which style, and what a rank holds"
    parser = commands.add_parser("plan", help=text, description=f"{text}; without --tp, which sizes there are")
    _add_model(parser, tp="optional")
    parser.add_argument("--infer", action="store_true", help="infer a plan, whatever others there are, as a YAML file")
    parser.add_argument("--plot", metavar="FILE", help="draw what a rank holds by kind of module, as a PNG")
    parser.set_defaults(run=_plan, text=as_text)


def _plan(args: argparse.Namespace) -> dict[str, Any]:
    if args.tp is None:
        if args.infer:
            raise BadInputError("--infer needs --tp N: a plan is inferred for that many ranks.")
        if args.plot is not None:
            raise BadInputError("--plot needs --tp N: what one of so many ranks holds is drawn.")
        return show_sizes(args.model, args.plan, trust_remote_code=args.trust_remote_code)
    if args.plot is not None:
        check_plot(args.plot)
    found = show_plan(args.model, args.tp, args.plan, infer=args.infer, trust_remote_code=args.trust_remote_code)
    if args.plot is not None:
        draw_plan(found, args.plot)
    return found


def _add_estimate(commands: Any) -> None:
    text = "tell memory by part and step time of every tp x dp of so many GPUs, which to take, what to change"
    parser = commands.add_parser("estimate", help=text, description=text)
    _add_model(parser, tp=None)
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="all GPUs: tp x dp")
    parser.add_argument("--gpu", metavar="NAME|FILE", help=f"{', '.join(card_names())}; or a card of your own as JSON")
    parser.add_argument("--gpu-memory", type=float, metavar="GIB", help="of one GPU, if it is another")
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="%(default)s; tp stays within")
    parser.add_argument("--links", metavar="GBS,GBS", help="of a GPU, one direction: in its node, to other nodes")
    parser.add_argument("--tp", type=int, nargs="+", metavar="N", help="sizes to try; else all that are allowed")
    parser.add_argument("--seq-len", type=int, default=4096, metavar="N", help="tokens of a sample (%(default)s)")
    parser.add_argument("--micro-batch", type=int, default=1, metavar="N", help="samples of a replica (%(default)s)")
    parser.add_argument("--precision", default="bf16", metavar="P", help=f"{', '.join(PRECISIONS)} (%(default)s)")
    parser.add_argument("--checkpointing", action="store_true", help="compute activations again in the backward")
    parser.add_argument("--lora", type=int, default=0, metavar="RANK", help="train adapters of all linear layers")
    parser.add_argument("--plot", metavar="FILE", help="draw memory by part of every layout, as a PNG")
    for name, what in SWITCHES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", action="store_true", help=what)
    parser.set_defaults(run=_estimate, text=estimate_as_text)


def _estimate(args: argparse.Namespace) -> dict[str, Any]:
    named = ("tp", "seq_len", "micro_batch", "precision", "checkpointing", "lora", "plan", "trust_remote_code")
    if args.plot is not None:
        check_plot(args.plot)
    found = estimate(
        args.model,
        args.gpus,
        args.gpu,
        args.gpu_memory,
        args.links,
        per_node=args.gpus_per_node,
        plugin={name: True for name in SWITCHES if getattr(args, name)},
        **{name: getattr(args, name) for name in named},
    )
    if args.plot is not None:
        draw_estimate(found, args.plot)
    return found


def _add_model(parser: argparse.ArgumentParser, tp: str | None = "required") -> None:
    parser.add_argument("model", metavar="MODEL", help="folder, config.json, hub name, or module:function")
    if tp is not None:
        parser.add_argument("--tp", type=int, required=tp == "required", metavar="N", help="tensor-parallel ranks")
    parser.add_argument("--plan", default="auto", metavar="FILE", help="YAML or JSON; else the model's own")
    parser.add_argument("--trust-remote-code", action="store_true", help="let code that comes with MODEL run")


def _verify(args: argparse.Namespace) -> dict[str, Any]:
    return verify(args.model, args.tp, args.plan, full=args.full, trust_remote_code=args.trust_remote_code)


def _add_doctor(commands: Any) -> None:
    text = "check what is installed, what the launcher's YAML says, and whether the ranks see each other"
    parser = commands.add_parser("doctor", help=text, description=text)
    parser.add_argument("--config_file", metavar="YAML", help="of accelerate launch; else the default one")
    parser.add_argument("--launch", metavar="LINE", help='launch line without a script: "accelerate launch ..."')
    parser.add_argument("--timeout", type=float, default=TIMEOUT, help="seconds that a step may take (%(default)s)")
    parser.set_defaults(run=_doctor, text=as_lines, failed=lambda result: not result["ok"])


def _doctor(args: argparse.Namespace) -> dict[str, Any]:
    return doctor(args.config_file, args.launch, args.timeout)


def _add_overrides(commands: Any) -> None:
    text = "list what this package replaces in Accelerate, transformers, TRL and PEFT, and why"
    parser = commands.add_parser("overrides", help=text, description=text)
    parser.set_defaults(run=_overrides, text=lambda result: as_markdown())


def _overrides(args: argparse.Namespace) -> dict[str, Any]:
    return {"overrides": as_rows()}


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; returns the exit code. `--json` puts errors on the output as well."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _Parser(prog="accel-tp-ddp", description="Tools for tensor parallelism inside plain DDP.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)
    _add_doctor(commands)
    _add_estimate(commands)
    _add_merge(commands)
    _add_overrides(commands)
    _add_plan(commands)
    _add_verify(commands)
    for command in commands.choices.values():
        command.add_argument("--json", action="store_true", help="print the result as JSON")
        if command.get_default("failed") is None:
            command.set_defaults(failed=lambda result: False)
    try:
        args = parser.parse_args(argv)
        result = args.run(args)
    except (BadInputError, PlanError) as error:
        return _failed(BAD_INPUT, error, "--json" in argv)
    except CheckpointError as error:
        return _failed(CHECK_FAILED, error, "--json" in argv)
    print(json.dumps(result) if args.json else args.text(result))
    return CHECK_FAILED if args.failed(result) else 0


def _failed(code: int, error: Exception, as_json: bool) -> int:
    line = " ".join(str(error).split())
    if as_json:
        print(json.dumps({"error": line}))
    print(f"accel-tp-ddp: {line}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
