"""Errors that speak to the user."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

__all__ = [
    "BadInputError",
    "CheckpointError",
    "NoPlanError",
    "PlanError",
    "UpstreamError",
    "WrongPlanError",
    "nearest",
]


class PlanError(ValueError):
    """A tensor-parallel plan that cannot be carried out. Raised before any weight is touched."""


class NoPlanError(PlanError):
    """A model for which there is no plan: neither the user's, nor this package's, nor one of its own."""


class WrongPlanError(PlanError):
    """A plan that can be carried out, but with which the model computes something else.

    Attributes:
        compared: What was tried, as in `Proof`.
    """

    def __init__(self, message: str, compared: tuple[Any, ...] = ()):
        super().__init__(message)
        self.compared = compared


class BadInputError(ValueError):
    """What the user gave a command and has to change; one line."""


class CheckpointError(RuntimeError):
    """A state that cannot be saved or loaded; raised on every rank. Nothing has been changed, unless it says so."""


class UpstreamError(RuntimeError):
    """An installed release of another package is not as it would have to be: which, what is wrong, what to install."""


def nearest(name: str, names: Iterable[str], most: int = 3) -> str:
    """The names closest to `name`, as the end of an error message: "nearest: a, b"; empty without a near one."""
    close = difflib.get_close_matches(name, list(dict.fromkeys(names)), n=most, cutoff=0.4)
    return f" Nearest names that exist: {', '.join(close)}." if close else ""
