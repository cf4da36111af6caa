"""How two results are compared: the set of names first, then each tensor by the norm of its difference."""

from __future__ import annotations

from collections.abc import Mapping

import torch


def relative_error(actual: torch.Tensor, expected: torch.Tensor, floor: float = 0.0) -> float:
    """|actual - expected| / max(|expected|, floor); infinite where something non-zero stands for zero."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)} for {tuple(expected.shape)}"
    difference = (actual.double() - expected.double()).norm().item()
    norm = max(expected.double().norm().item(), floor)
    if difference == 0:
        return 0.0
    return difference / norm if norm else float("inf")


def relative_errors(
    actual: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], floor: float = 0.0
) -> dict[str, float]:
    assert expected, "nothing to compare with"
    missing, unexpected = expected.keys() - actual.keys(), actual.keys() - expected.keys()
    assert not missing and not unexpected, f"missing {sorted(missing)}, unexpected {sorted(unexpected)}"
    return {name: relative_error(actual[name], expected[name], floor) for name in expected}


def assert_tensors_close(
    actual: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], tolerance: float, floor: float = 0.0
) -> None:
    errors = relative_errors(actual, expected, floor)
    wrong = {name: error for name, error in errors.items() if not error <= tolerance}  # so that NaN is wrong
    assert not wrong, f"{len(wrong)} of {len(errors)} tensors off by more than {tolerance}: {wrong}"
