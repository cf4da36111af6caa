"""Saved results, and the document made of them."""

from __future__ import annotations

import inspect
import json
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

import transformers

RESULTS = Path(__file__).parent / "results"
ORDER = ("causal", "options", "odd", "planned", "curated", "encoders", "vision")  # of the sections; then others
Answers = dict[str, dict[str, dict[str, Any]]]  # by case, then by column


def load(group: str, folder: Path = RESULTS) -> Answers:
    path = folder / f"{group}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def save(group: str, answers: Answers, folder: Path = RESULTS) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{group}.json"
    lines = [f"{json.dumps(name)}: {json.dumps(own)}" for name, own in sorted(answers.items())]
    path.with_suffix(".part").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    path.with_suffix(".part").replace(path)


def document(groups: dict[str, ModuleType], folder: Path = RESULTS) -> str:
    """Everything that is saved, one section a group."""
    text = (
        f"Made by `python -m benchmarks.sweep` with transformers {transformers.__version__}: tiny models with random "
        "weights, each sharded on CPU ranks and compared with itself unsharded. What a run has to show, all in fp32, "
        "without dropout:"
    )
    lines = ["# Architectures", "", *textwrap.wrap(text, 119), ""]
    lines += _docstring("compare").split("\n\n", 2)[2].splitlines()
    lines += ["", *textwrap.wrap(_LEGEND, 119)]
    for group in [*filter(groups.__contains__, ORDER), *(group for group in groups if group not in ORDER)]:
        answers = load(group, folder)
        if answers:
            lines += ["", *section(groups[group], answers)]
    return "\n".join(lines) + "\n"


_LEGEND = (
    "A case passes a column only if all of that holds. `refused`: an error before any weight is touched says why. "
    "`skipped`: the unsharded model does not run at this size. `peer`: the same comparison (without the export) of "
    "transformers' own tensor parallelism, where it shards while loading (`from_pretrained(distributed_config=...)`), "
    "and where it shards a model that has been built. Sharded: how many parameters are; where few are, the plan names "
    "no more. Collectives: how many calls in one forward and in one backward at the first tp. Error: the largest of "
    "all gradients' in our layouts."
)


def section(module: ModuleType, answers: Answers) -> list[str]:
    title, _, rest = inspect.getdoc(module).partition("\n")
    names = [case.name for case in module.cases() if case.name in answers]
    notes = {case.name: case.note for case in module.cases()}
    columns = list(dict.fromkeys(column for name in names for column in answers[name]))
    columns.sort(key=lambda column: (not column.startswith("tp"), " x " in column, column))
    lines = [f"## {title.rstrip('.')}", ""]
    for paragraph in _paragraphs(rest):
        lines += [*textwrap.wrap(paragraph, 119), ""]
    counts = [f"| {column} | {' | '.join(_counts(answers, names, column))} |" for column in columns]
    lines += [
        "| layout | of | pass | fail | refused | skipped |",
        "| --- | --- | --- | --- | --- | --- |",
        *counts,
        "",
    ]
    lines += [f"| architecture | {' | '.join(columns)} | sharded | collectives | error | remarks |"]
    lines += ["| --- " * (len(columns) + 5) + "|"]
    for name in names:
        own = answers[name]
        cells = [own.get(column, {}).get("result", "") for column in columns]
        ours = [own[column] for column in columns if column.startswith("tp") and "error" in own.get(column, {})]
        first = ours[0] if ours else {}
        collectives = f"{first['forward']} + {first['backward']}" if "forward" in first else ""
        error = f"{max(answer['error'] for answer in ours):.0e}" if ours else ""
        remarks = dict.fromkeys(filter(None, [notes[name] or first.get("note"), *_reasons(own, columns)]))
        lines.append(
            f"| {name} | {' | '.join(cells)} | {first.get('sharded', '')} | {collectives} | {error} | "
            f"{'; '.join(remarks)} |"
        )
    return lines


def _counts(answers: Answers, names: list[str], column: str) -> list[str]:
    results = [answers[name][column]["result"] for name in names if column in answers[name]]
    return [str(len(results)), *(str(results.count(kind)) for kind in ("pass", "fail", "refused", "skipped"))]


def _reasons(own: dict[str, dict[str, Any]], columns: list[str]) -> list[str]:
    by_reason: dict[str, list[str]] = {}
    for column in columns:
        reason = own.get(column, {}).get("reason", "")
        if reason:
            by_reason.setdefault(reason.replace("|", "\\|"), []).append(column)
    return [f"{', '.join(where)}: {reason}" for reason, where in by_reason.items()]


def _docstring(module: str) -> str:
    return inspect.getdoc(__import__(f"{__package__}.{module}", fromlist=["x"]))


def _paragraphs(text: str) -> list[str]:
    return [" ".join(paragraph.split()) for paragraph in text.strip().split("\n\n") if paragraph.strip()]
