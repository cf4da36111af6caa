"""Saved results, and the document made of them."""

from __future__ import annotations

import inspect
import json
import re
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

import transformers

SAVED = Path(__file__).parent / "results"  # a folder for each version of transformers
RESULTS = SAVED / transformers.__version__
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


def versions() -> list[Path]:
    """The folders of saved results, the oldest version of transformers first."""
    folders = filter(Path.is_dir, SAVED.iterdir())
    return sorted(folders, key=lambda path: [int(part) for part in re.findall(r"\d+", path.name)])


def document(groups: dict[str, ModuleType], folder: Path = RESULTS) -> str:
    """Everything that is saved of the installed transformers, one section a group; of other versions what differs."""
    text = (
        f"Made by `python -m benchmarks.sweep` with transformers {transformers.__version__}: tiny models with random "
        "weights, each sharded on CPU ranks and compared with itself unsharded. What a run has to show, all in fp32, "
        "without dropout:"
    )
    lines = ["# Architectures", "", *textwrap.wrap(text, 119), ""]
    lines += _docstring("compare").split("\n\n", 2)[2].splitlines()
    lines += ["", *textwrap.wrap(_LEGEND, 119)]
    order = [*filter(groups.__contains__, ORDER), *(group for group in groups if group not in ORDER)]
    lines += ["", *compared_versions(order)]
    for group in order:
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


def compared_versions(groups: list[str]) -> list[str]:
    """How many cases pass in all of our layouts, by version of transformers, and the names of the others."""
    lines = ["## Versions of transformers", "", "Cases that pass in all of our layouts.", ""]
    lines += ["| transformers | group | of | pass | others | only there |", "| --- " * 6 + "|"]
    answers = {path.name: {group: load(group, path) for group in groups} for path in versions()}
    for version, by_group in answers.items():
        for group, own in by_group.items():
            others = [f"{name} ({kinds})" for name, columns in own.items() if (kinds := _not_passed(columns))]
            elsewhere = set().union(*(other[group] for name, other in answers.items() if name != version))
            new = sorted(own.keys() - elsewhere) if elsewhere else []
            cells = [version, group, str(len(own)), str(len(own) - len(others)), ", ".join(others), ", ".join(new)]
            lines += [f"| {' | '.join(cells)} |"] if own else []
    return lines


def _not_passed(columns: dict[str, dict[str, Any]]) -> str:
    kinds = {name: answer["result"] for name, answer in columns.items() if name.startswith("tp")}
    return ", ".join(f"{kind} at {name}" for name, kind in kinds.items() if kind != "pass")


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
