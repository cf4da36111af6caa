"""What a command is, and how it ends: 0 as it should, 1 for a failed check, 2 for input that has to be changed."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any, NoReturn, Protocol

from ..errors import BadInputError, CheckpointError, PlanError

__all__ = ["CHECK_FAILED", "BAD_INPUT", "Command", "run"]

CHECK_FAILED = 1
BAD_INPUT = 2


class Command(Protocol):
    """One module's worth: `accel-tp-ddp NAME ARGUMENTS`."""

    name: str
    help: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, args: argparse.Namespace) -> dict[str, Any]:
        """Do it. Returns what `--json` prints.

        Raises:
            BadInputError: With one line that says what to change (PlanError likewise).
            CheckpointError: If a check fails.
        """

    def text(self, result: dict[str, Any]) -> str:
        """What is printed without `--json`."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise BadInputError(f"{message}. See {self.prog} --help.")


def run(commands: Sequence[Command], argv: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; returns the exit code. `--json` puts errors on the output as well."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        args = _parse(commands, argv)
        result = args.command.run(args)
    except (BadInputError, PlanError) as error:
        return _failed(BAD_INPUT, error, "--json" in argv)
    except CheckpointError as error:
        return _failed(CHECK_FAILED, error, "--json" in argv)
    print(json.dumps(result) if args.json else args.command.text(result))
    return 0


def _parse(commands: Sequence[Command], argv: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(prog="accel-tp-ddp", description="Tools for tensor parallelism inside plain DDP.")
    choices = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)
    for command in commands:
        own = choices.add_parser(command.name, help=command.help, description=command.help)
        own.add_argument("--json", action="store_true", help="print the result as JSON")
        own.set_defaults(command=command)
        command.add_arguments(own)
    return parser.parse_args(argv)


def _failed(code: int, error: Exception, as_json: bool) -> int:
    line = " ".join(str(error).split())
    if as_json:
        print(json.dumps({"error": line}))
    print(f"accel-tp-ddp: {line}", file=sys.stderr)
    return code
