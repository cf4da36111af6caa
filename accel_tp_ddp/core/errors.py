"""Errors that speak to the user."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["BadInputError", "CheckpointError", "PlanError", "UpstreamError", "nearest"]


class PlanError(ValueError):
    """A tensor-parallel plan that cannot be carried out. Raised before any weight is touched."""


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
