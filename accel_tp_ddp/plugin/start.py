"""Start the ranks of `python -m accel_tp_ddp.launch`: options of `accelerate launch` may stand before the script.

Accelerate's own parser reads them and its own launcher starts the processes, each of which is `accel_tp_ddp.launch`
again, with what is left: this package's options, the script and its arguments.
"""

from __future__ import annotations

import argparse
import os
import subprocess
from collections.abc import Sequence
from typing import Any, NoReturn

from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from ..core.errors import BadInputError

__all__ = ["asks_for_ranks", "read_config", "start_ranks"]

_NAME = "accel_tp_ddp.launch"
#: What Accelerate takes as flags for FSDP alone, and from a YAML for all: these two are this package's options.
_SIZES = {"tp_size": "parallelism_config_tp_size", "dp_replicate_size": "parallelism_config_dp_replicate_size"}


def asks_for_ranks(argv: Sequence[str]) -> bool:
    """Whether an option of `accelerate launch` stands first, or behind some of this package's own; see `start_ranks`.

    A rank starts no ranks: in one, every option before the script has to be this package's own.
    """
    if "RANK" in os.environ:
        return False
    theirs = {option for action in launch_command_parser()._actions for option in action.option_strings}
    is_value = False  # of an option of this package's own
    for word in argv:
        if is_value:
            is_value = False
        elif word.partition("=")[0] in theirs - {"-h", "--help", "-m", "--module"}:
            return True
        elif not word.startswith("--"):
            return False
        else:
            is_value = "=" not in word
    return False


def start_ranks(argv: Sequence[str], own: Sequence[str]) -> None:
    """Launch this package's launcher, as `accelerate launch OPTIONS -m accel_tp_ddp.launch OWN_OPTIONS SCRIPT ARGS`.

    Args:
        argv: The command line: options of both, in any order, the script (or `-m` and a module), and its arguments.
        own: Names of this package's options; each takes a value.

    Raises:
        SystemExit: With one line, for options that do not go together, and if a rank has failed.
    """
    parser = launch_command_parser()
    parser.prog = f"python -m {_NAME}"
    parser.error = _refuse  # type: ignore[method-assign, assignment]
    for name in own:
        parser.add_argument(f"--{name}", dest=f"own_{name}", help=argparse.SUPPRESS)
    args = parser.parse_args(list(argv))
    given = {name: getattr(args, f"own_{name}") for name in own}
    try:
        if args.config_file is not None:
            read_config(args.config_file)
    except BadInputError as error:
        _refuse(f"--config_file {error}. `accelerate config` writes one.")
    if args.no_python:
        _refuse("--no_python starts a program that is no Python, which cannot be given the plugin. Leave it out.")
    for name, theirs in _SIZES.items():
        size = getattr(args, theirs)
        if size != parser.get_default(theirs) and given[name] is None:
            given[name] = str(size)
        setattr(args, theirs, parser.get_default(theirs))
    args.use_parallelism_config = False  # a YAML sets it again, for its own sizes
    others = args.multi_gpu or args.tpu or args.use_deepspeed or args.use_fsdp
    if args.cpu and (args.num_processes or 1) > 1 and args.mpirun_hostfile is None and not others:
        # Accelerate starts one process for --cpu, unless mpirun starts the others.
        os.environ["ACCELERATE_USE_CPU"] = "true"
        args.cpu = False
    if args.config_file is None and (args.num_processes or 1) > 1:
        args.multi_gpu = args.multi_gpu or not (args.cpu or others)
    passed = [word for name, value in given.items() if value is not None for word in (f"--{name}", value)]
    script = ["-m"] if args.module else []
    args.training_script_args = [*passed, *script, args.training_script, *args.training_script_args]
    args.module, args.training_script = True, _NAME
    try:
        launch_command(args)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        raise SystemExit(
            f"{_NAME}: rank {rank} failed first (exit code {failure.exitcode}); see its error above"
        ) from None
    except subprocess.CalledProcessError as error:
        raise SystemExit(error.returncode) from None
    except ValueError as error:  # of options that do not go together
        _refuse(" ".join(str(error).split()))


def read_config(path: str) -> Any:
    """A launcher's YAML, as Accelerate reads it.

    Raises:
        BadInputError: If it cannot be read, and why.
    """
    try:
        return load_config_from_file(path)
    except Exception as error:  # YAML's own errors, and whatever a value in it leads to
        told = " ".join(str(error).split())
        raise BadInputError(f"{path} cannot be read: {type(error).__name__}: {told}") from None


def _refuse(message: str) -> NoReturn:
    raise SystemExit(f"{_NAME}: {message}")
