"""What differs between two runs of a program: figures within a tolerance, counts exactly, files by what is in them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

__all__ = ["DOUBLE_SCALE", "Run", "differences", "read_run"]

TOLERANCE = 2e-4  # losses, rates, norms, metrics
WEIGHT_TOLERANCE = 1e-3
DOUBLE_SCALE = 1e-6  # of both, for runs in double precision
FLOOR = 0.1  # of what the tolerance is taken: differences of log-probabilities near 0 are rounding
RELATIVE = ("rates", "norms")  # without a floor
TIMES = (
    "runtime",
    "per_second",
    "time",
    "flops_per",
    "memory",
    "gpu_peak",
    "epoch_time",
)  # in names of what is logged
BY_RANK = ("losses", "rates", "norms", "logs")
OF_MAIN = ("prints", "messages", "tracked")
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")
TENSOR_FILES = (".safetensors", ".bin", ".pt", ".pth")


@dataclass
class Run:
    """What one run left: the records of its ranks, and the files that it wrote."""

    records: list[dict[str, list[Any]]]
    files: dict[str, Path] = field(default_factory=dict)


def read_run(records: Path, folder: Path, before: set[str]) -> Run:
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    ranks = sorted(records.glob("rank*.json"), key=lambda path: int(re.sub(r"\D", "", path.name)))
    return Run([json.loads(path.read_text()) for path in ranks], {n: p for n, p in files.items() if n not in before})


def differences(got: Run, expected: Run, own: tuple[str, ...] = (), scale: float = 1.0) -> tuple[list[str], list[str]]:
    """What was compared, and what differs.

    Args:
        got: The run in question.
        expected: That under plain DDP.
        own: Parts of names of files whose format is the plugin's own.
        scale: Of the tolerances.
    """
    found: list[str] = []
    compared = [f"{len(expected.records[0][name])} {name}" for name in BY_RANK + OF_MAIN if expected.records[0][name]]
    peers = len(got.records) // len(expected.records)
    for rank, record in enumerate(got.records):
        reference = expected.records[rank // peers]
        for name in BY_RANK if rank else BY_RANK + OF_MAIN:
            pairs = _unequal(record[name], reference[name], name, scale * TOLERANCE)
            found += [f"rank {rank} {difference}" for difference in pairs]
    files = {n: p for n, p in expected.files.items() if not any(part in n for part in own)}
    written = {n: p for n, p in got.files.items() if not any(part in n for part in own)}
    found += [f"file {name} is missing" for name in sorted(files.keys() - written.keys())]
    found += [f"file {name} is there too" for name in sorted(written.keys() - files.keys())]
    for name in sorted(files.keys() & written.keys()):
        found += [f"file {name}: {difference}" for difference in _unequal_files(written[name], files[name], scale)]
    if files:
        tensors = sum(len(dict(_tensors(path))) for path in files.values())
        compared.append(f"{len(files)} files, {tensors} tensors")
    return compared, found


def _unequal(got: Any, expected: Any, name: str, tolerance: float) -> Iterator[str]:
    if isinstance(expected, dict) and isinstance(got, dict):
        got, expected = ({k: v for k, v in d.items() if not any(t in k for t in TIMES)} for d in (got, expected))
        if got.keys() != expected.keys():
            yield f"{name}: names differ: {sorted(got.keys() ^ expected.keys())}"
        for key in expected.keys() & got.keys():
            yield from _unequal(got[key], expected[key], f"{name}.{key}", tolerance)
    elif isinstance(expected, list) and isinstance(got, list):
        if len(got) != len(expected):
            yield f"{name}: {len(got)} of them for {len(expected)}"
        for index, (ours, plain) in enumerate(zip(got, expected)):
            yield from _unequal(ours, plain, f"{name}[{index}]", tolerance)
    elif isinstance(expected, str) and isinstance(got, str):
        numbers, wanted = (list(map(float, NUMBER.findall(text))) for text in (got, expected))
        same = NUMBER.sub("", got) == NUMBER.sub("", expected) and len(numbers) == len(wanted)
        if not same or not all(_close(*pair, tolerance) for pair in zip(numbers, wanted)):
            yield f"{name}: {got!r} for {expected!r}"
    elif isinstance(expected, float) and isinstance(got, (int, float)):
        if not _close(float(got), expected, tolerance, 0.0 if name.startswith(RELATIVE) else FLOOR):
            yield f"{name}: {got} for {expected}"
    elif got != expected:
        yield f"{name}: {got!r} for {expected!r}"


def _close(got: float, expected: float, tolerance: float, floor: float = FLOOR) -> bool:
    if math.isnan(expected) or (expected.is_integer() and got.is_integer()):
        return got == expected or math.isnan(got) and math.isnan(expected)
    return abs(got - expected) <= tolerance * max(abs(expected), floor)


def _tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The named tensors of a file, also those deep inside an optimizer's state."""
    if path.suffix not in TENSOR_FILES:
        return
    if path.suffix == ".safetensors":
        yield from load_file(path).items()
        return
    left: list[tuple[str, Any]] = [("", torch.load(path, map_location="cpu", weights_only=False))]
    while left:
        name, value = left.pop()
        if isinstance(value, torch.Tensor):
            yield name, value
        elif isinstance(value, dict):
            left += [(f"{name}.{key}", inner) for key, inner in value.items()]
        elif isinstance(value, (list, tuple)):
            left += [(f"{name}.{index}", inner) for index, inner in enumerate(value)]


def _unequal_files(got: Path, expected: Path, scale: float) -> Iterator[str]:
    ours, plain = dict(_tensors(got)), dict(_tensors(expected))
    if ours.keys() != plain.keys():
        yield f"names differ: {sorted(ours.keys() ^ plain.keys())[:6]}"
    for name in sorted(ours.keys() & plain.keys()):
        if ours[name].shape != plain[name].shape:
            yield f"{name}: {tuple(ours[name].shape)} for {tuple(plain[name].shape)}"
        elif plain[name].is_floating_point():
            off, norm = (ours[name] - plain[name]).double().norm().item(), plain[name].double().norm().item()
            if not off <= scale * WEIGHT_TOLERANCE * max(norm, 1e-6):
                yield f"{name}: off by {off / max(norm, 1e-6):.1e}"
