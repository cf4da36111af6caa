# python recipes/compare_runs.py outputs/plain/trainer_state.json outputs/tp2/trainer_state.json --out runs.png
"""Overlay losses, learning rates and gradient norms of several runs in a PNG, and say where they part.

A run is a `trainer_state.json` of Trainer, one with lists (`{"losses": [...], "norms": [...], "rates": [...]}`),
or one with a JSON object a line (`{"step": 1, "loss": 2.3, "grad_norm": 0.7, "learning_rate": 1e-4}`). The first is
what the others are compared with. Exit code 1 if they part. The picture needs matplotlib, the extra `benchmarks`.
"""

import argparse
import json
import math
import sys
from pathlib import Path

#: Curves, and the names that they go by.
CURVES = {
    "loss": ("loss", "losses", "train_loss"),
    "learning rate": ("learning_rate", "rates", "lr", "learning_rates"),
    "gradient norm": ("grad_norm", "norms", "grad_norms"),
}


class BadInput(Exception):
    pass


def read(path):
    """The curves of a run: for each a mapping of steps to values."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from None
    try:
        data = json.loads(text)
    except ValueError:
        try:
            data = [json.loads(line) for line in text.splitlines() if line.strip()]
        except ValueError as error:
            raise BadInput(f"{path} is neither JSON nor a JSON object a line: {error}") from None
    if isinstance(data, dict) and isinstance(data.get("log_history"), list):
        data = data["log_history"]
    found = {}
    for curve, names in CURVES.items():
        if isinstance(data, dict):
            values = next((data[name] for name in names if isinstance(data.get(name), list)), [])
            found[curve] = dict(enumerate(values, 1))
        else:
            rows = [row for row in data if isinstance(row, dict)]
            name = next((name for name in names if any(name in row for row in rows)), None)
            found[curve] = {row.get("step", at): row[name] for at, row in enumerate(rows, 1) if name in row}
    if not any(found.values()):
        known = ", ".join(name for names in CURVES.values() for name in names)
        raise BadInput(f"{path} has none of: {known}")
    return found


def parting(reference, other, tolerance):
    """The first step at which the two differ by more than that, the values there, and the largest difference."""
    first, largest = None, 0.0
    for step in sorted(reference.keys() & other.keys()):
        a, b = reference[step], other[step]
        off = abs(a - b) / max(abs(a), 1e-12) if math.isfinite(a) and math.isfinite(b) else math.inf
        if math.isnan(a) and math.isnan(b):
            off = 0.0
        largest = max(largest, off)
        if off > tolerance and first is None:
            first = (step, a, b)
    return first, largest


def compare(runs, tolerance):
    """A line for each run and curve, and whether all of them agree."""
    (name, reference), *others = runs.items()
    lines, agree = [], True
    for other, curves in others:
        for curve, values in curves.items():
            shared = reference[curve].keys() & values.keys()
            if not shared:
                if reference[curve] or values:
                    lines.append(f"{other}: {curve}: no step in common with {name}")
                    agree = False
                continue
            first, largest = parting(reference[curve], values, tolerance)
            if first is None:
                lines.append(f"{other}: {curve}: as {name} over {len(shared)} steps, at most {largest:.1e} apart")
            else:
                step, a, b = first
                lines.append(f"{other}: {curve}: parts from {name} at step {step}: {b:.6g} instead of {a:.6g}")
                lines[-1] += f" (tolerance {tolerance:g}; at most {largest:.1e} apart)"
                agree = False
    return lines, agree


def draw(runs, tolerance, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curves = [curve for curve in CURVES if any(run[curve] for run in runs.values())]
    figure, axes = plt.subplots(len(curves), 1, figsize=(9, 2.7 * len(curves)), sharex=True, squeeze=False)
    reference = next(iter(runs.values()))
    for axis, curve in zip(axes[:, 0], curves):
        for number, (name, run) in enumerate(runs.items()):
            steps = sorted(run[curve])
            # The first is drawn wide, and the dashes of the others take turns, so that what coincides is all seen.
            dashes = (5 * number, (5, 5 * max(1, len(runs) - 2)))
            style = {"linewidth": 5, "alpha": 0.35} if number == 0 else {"linewidth": 1.6, "linestyle": dashes}
            axis.plot(steps, [run[curve][step] for step in steps], label=name, color=f"C{number}", **style)
            first, _ = parting(reference[curve], run[curve], tolerance)
            if first is not None:
                axis.axvline(first[0], color=f"C{number}", linewidth=0.8, linestyle=":")
                axis.plot([first[0]], [first[2]], "o", color=f"C{number}", markersize=6, fillstyle="none")
        axis.set_ylabel(curve)
        axis.grid(alpha=0.25)
    axes[0, 0].legend(loc="upper right", frameon=False)
    axes[-1, 0].set_xlabel("step (circle: the first that differs)")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(argv=None):
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="the first is what the others are compared with")
    parser.add_argument("--names", nargs="+", help="one for each run, else their paths")
    parser.add_argument("--tolerance", type=float, default=2e-4, help="relative difference that counts")
    parser.add_argument("--out", type=Path, default=Path("compare_runs.png"))
    args = parser.parse_args(argv)
    try:
        if len(args.runs) < 2:
            raise BadInput("one run has nothing to be compared with. Give two or more.")
        names = args.names or [str(path) for path in args.runs]
        if len(names) != len(args.runs) or len(set(names)) != len(names):
            raise BadInput(f"{len(args.runs)} runs and the names {names}. Give as many, all different, by --names.")
        runs = dict(zip(names, map(read, args.runs)))
    except BadInput as error:
        print(f"compare_runs: {error}", file=sys.stderr)
        return 2
    lines, agree = compare(runs, args.tolerance)
    print("\n".join(lines))
    try:
        draw(runs, args.tolerance, args.out)
        print(f"drawn in {args.out}")
    except ImportError:
        print("not drawn: matplotlib is not installed")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
