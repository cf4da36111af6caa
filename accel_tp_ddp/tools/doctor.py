"""`accel-tp-ddp doctor`: what is installed, what the launcher's YAML says, and whether the ranks see each other.

accel-tp-ddp doctor --config_file tp2_dp4.yaml
accel-tp-ddp doctor --launch "accelerate launch --config_file tp2_dp4.yaml"
accelerate launch --config_file tp2_dp4.yaml -m accel_tp_ddp.doctor      (on every host)
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import torch
from accelerate.commands.config.config_args import default_config_file

from ..core.errors import BadInputError
from ..core.upstream import release
from ..plugin.config import TensorParallelDDPPlugin
from ..plugin.start import read_config
from .links import Finding, check_ranks, interfaces

__all__ = ["as_lines", "doctor", "main"]

TIMEOUT = 20.0
#: Where rank 0 of a launch leaves what was found for the process that launches.
_REPORT = "ACCEL_TP_DDP_DOCTOR_REPORT"
_STARTED_BY_GPU = "MULTI_"


def doctor(config_file: str | None = None, launch: str | None = None, timeout: float = TIMEOUT) -> dict[str, Any]:
    """All checks that one process can do, and, with `launch`, those of the ranks that it starts.

    Args:
        config_file: The launcher's YAML; None: that of `launch`, or the user's default one, where there is one.
        launch: A launch line, without a script: "accelerate launch --config_file x.yaml".
        timeout: Seconds that a step may take.

    Returns:
        `ok`, and `findings`: for each its `check`, what was `told`, and the `fix`, None where nothing is wrong.

    Raises:
        BadInputError: If the file cannot be read, or the line cannot be started.
    """
    if timeout <= 0:
        raise BadInputError(f"--timeout is {timeout:g}; it has to be a positive number of seconds.")
    line = _line(launch) if launch is not None else None
    found = [*_installed(), *_layout(config_file or _named_in(line or []))]
    if line is not None and all(each.check != "address" or each.fix is None for each in found):
        found += _launched(line, timeout)
    return _report(found)


def as_lines(report: dict[str, Any]) -> str:
    """The report as text: a line for each finding, its fix below it, and how many there are to mend."""
    lines = []
    for each in report["findings"]:
        lines.append(f"{'ok     ' if each['fix'] is None else 'WRONG  '}{each['check']:<11}{each['told']}")
        if each["fix"] is not None:
            lines.append(f"{'':18}-> {each['fix']}")
    wrong = sum(each["fix"] is not None for each in report["findings"])
    return "\n".join([*lines, f"{wrong} to mend" if wrong else "nothing found"])


def main(argv: Sequence[str] | None = None) -> int:
    """On each rank of a launch: the checks of the ranks, which rank 0 prints."""
    parser = argparse.ArgumentParser("python -m accel_tp_ddp.doctor", description="Started by a launcher.")
    parser.add_argument("--tp_size", type=int, help="default: that of the launcher's YAML")
    parser.add_argument("--timeout", type=float, default=TIMEOUT, help="seconds that a step may take (%(default)s)")
    args = parser.parse_args(argv)
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        line = "accelerate launch --config_file YOURS.yaml -m accel_tp_ddp.doctor"
        print(f"accel-tp-ddp doctor: no launcher has started this process: {line}", file=sys.stderr)
        return 2
    found = check_ranks(args.tp_size, args.timeout)
    report, is_first = _report(found), os.environ["RANK"] == "0"
    alone = any(each.check == "address" for each in found)  # that rank never met the others
    if is_first and os.environ.get(_REPORT):
        part = Path(os.environ[_REPORT] + ".part")
        part.write_text(json.dumps(report))
        part.rename(os.environ[_REPORT])
    elif is_first or alone:
        print(as_lines(report), flush=True)
    return 0 if report["ok"] else 1


def _report(found: Sequence[Finding]) -> dict[str, Any]:
    return {"ok": all(each.fix is None for each in found), "findings": [asdict(each) for each in found]}


# --- what is installed -----------------------------------------------------------------------------------------------


def _installed() -> list[Finding]:
    python = ".".join(map(str, sys.version_info[:3]))
    devices = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    found = [Finding("installed", f"Python {python}, torch {torch.__version__}, {devices or 'no'} accelerators")]
    try:
        wanted = requires("accel-tp-ddp") or []
    except PackageNotFoundError:
        told = "accel-tp-ddp has no metadata here: releases of the others were not compared"
        return [*found, Finding("installed", told, "pip install -e . (in the checkout)")]
    for requirement in wanted:
        match = re.match(r"([\w.-]+)\s*>=\s*([\d.]+)\s*(;.*extra.*)?", requirement)
        if match is None:
            continue
        try:
            there = version(match[1])
        except PackageNotFoundError:
            if match[3] is None:
                told = f"{match[1]} is not installed; at least {match[2]} is needed"
                found.append(Finding("installed", told, f"pip install '{match[1]}>={match[2]}'"))
            continue
        if release(there) < release(match[2]):
            told = f"{match[1]} {there} is older than {match[2]}, the oldest release that works"
            found.append(Finding("installed", told, f"pip install '{match[1]}>={match[2]}'"))
        elif match[1] in ("accelerate", "transformers", "peft", "trl"):
            found.append(Finding("installed", f"{match[1]} {there} (from {match[2]} on)"))
    return list(dict.fromkeys(found))


# --- what the YAML says ----------------------------------------------------------------------------------------------


def _layout(path: str | None) -> list[Finding]:
    if path is None:
        if not os.path.isfile(default_config_file):
            return [Finding("layout", "no launcher's YAML was given, and there is no default one (--config_file)")]
        path = default_config_file
    config = read_config(path)
    kind = str(getattr(config.distributed_type, "value", config.distributed_type))
    processes, machines = int(config.num_processes or 1), int(getattr(config, "num_machines", 1) or 1)
    sizes = dict(getattr(config, "parallelism_config", None) or {})
    tp, dp = sizes.get("parallelism_config_tp_size", 1), sizes.get("parallelism_config_dp_replicate_size")
    told = f"{path}: {kind}, {processes} processes on {machines} host{'s' * (machines > 1)}"
    found = [Finding("layout", f"{told}, mixed precision {config.mixed_precision}")]
    if kind in ("MULTI_CPU", "NO") and processes > 1:
        fix = "Write `distributed_type: MULTI_GPU`; ranks on CPU get ACCELERATE_USE_CPU=true besides."
        found.append(Finding("layout", f"distributed_type {kind} starts one process, not {processes}", fix))
    elif not kind.startswith(_STARTED_BY_GPU) and kind != "NO":
        fix = "Write `distributed_type: MULTI_GPU`, and leave out the settings of the other engine."
        found.append(
            Finding("layout", f"distributed_type {kind} does not go with this plugin, which is plain DDP", fix)
        )
    if not sizes:
        fix = "Add `parallelism_config:` with `parallelism_config_tp_size: 2` below it."
        found.append(Finding("layout", "it asks for no tensor parallelism", fix))
    try:
        plugin = TensorParallelDDPPlugin(tp_size=tp, dp_replicate_size=None if dp in (None, 1) else dp)
        plugin._settle_sizes(processes)
        found.append(Finding("layout", f"tp {plugin.tp_size} x dp {plugin.dp_replicate_size}"))
    except ValueError as error:
        found.append(Finding("layout", str(error), "Correct num_processes, or the sizes of parallelism_config."))
    if processes % machines:
        found.append(Finding("layout", f"{processes} processes over {machines} hosts", "Launch as many on each host."))
    elif isinstance(tp, int) and tp > 1 and (processes // machines) % tp:
        told = f"tp_size={tp} with {processes // machines} processes a host: a replica lies on several hosts"
        found.append(Finding("layout", told, f"Set tp_size to a divisor of {processes // machines}: it is slow else."))
    if machines > 1:
        found += _first_host(config)
    return found


def _first_host(config: Any) -> list[Finding]:
    address = config.main_process_ip
    if not address:
        fix = "Set main_process_ip to the first host's address."
        return [Finding("address", f"{config.num_machines} hosts, and no main_process_ip", fix)]
    try:
        there = socket.gethostbyname(address)
    except OSError as error:
        fix = "Set it to an address of the first host that this one can resolve."
        return [Finding("address", f"main_process_ip {address}: no such address ({error})", fix)]
    if int(config.machine_rank or 0) == 0:
        own = interfaces()
        if own and there not in own.values() and not there.startswith("127."):
            fix = f"Set it to one of {', '.join(f'{ip} ({nic})' for nic, ip in own.items())}, or set machine_rank."
            return [Finding("address", f"main_process_ip {address} is no address of this host, machine_rank 0", fix)]
    return [Finding("address", f"main_process_ip {address} ({there}), port {config.main_process_port}")]


# --- the ranks of a launch line --------------------------------------------------------------------------------------


def _line(launch: str) -> list[str]:
    try:
        words = shlex.split(launch)
    except ValueError as error:
        raise BadInputError(f"--launch {launch!r} is no command line: {error}.") from None
    if not words or shutil.which(words[0]) is None:
        first = words[0] if words else ""
        raise BadInputError(
            f"--launch: there is no program {first!r}. Give a launch line without the script: "
            '--launch "accelerate launch --config_file x.yaml".'
        )
    return words


def _named_in(line: Sequence[str]) -> str | None:
    for at, word in enumerate(line):
        if word.replace("-", "_").startswith("__config_file="):
            return word.partition("=")[2]
        if word in ("--config_file", "--config-file") and at + 1 < len(line):
            return line[at + 1]
    return None


def _launched(line: Sequence[str], timeout: float) -> list[Finding]:
    patience = 8 * timeout + 60
    with tempfile.TemporaryDirectory() as folder:
        path, log = Path(folder, "report.json"), Path(folder, "log")
        command = [*line, "-m", "accel_tp_ddp.doctor", "--timeout", str(timeout)]
        with log.open("w") as written:
            process = subprocess.Popen(
                command,
                env={**os.environ, _REPORT: str(path)},
                stdout=written,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                process.wait(patience)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGTERM)
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                told = f"`{shlex.join(line)}` started no ranks that answer within {patience:.0f} s"
                fix = "See that every host is started, that main_process_ip is the first one's, and its port is open."
                return [Finding("launch", told, fix)]
        if path.exists():
            return [Finding(**each) for each in json.loads(path.read_text())["findings"]]
        said = [text for text in log.read_text(errors="replace").splitlines() if text.strip()]
        told = next(
            (text for text in reversed(said) if re.match(r"\w*(Error|Exception)\b", text)), (said or ["nothing"])[-1]
        )
        fix = f"Run `{shlex.join(command)}` to see all that it prints."
        return [Finding("launch", f"`{shlex.join(line)}` ended with exit code {process.returncode}: {told}", fix)]
