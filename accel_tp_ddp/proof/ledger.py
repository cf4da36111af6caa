"""What is known to be proved: fingerprints that the package ships, and those that a run on this machine has added."""

from __future__ import annotations

import json
import logging
import os
import secrets
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .sources import digest

__all__ = ["CACHE_VARIABLE", "Known", "Ledger", "read_shipped", "write_shipped"]

logger = logging.getLogger(__name__)

#: Names the folder of what this package keeps between runs.
CACHE_VARIABLE = "ACCEL_TP_DDP_CACHE"

_PACKAGE = Path(__file__).parents[1]
_SHIPPED = Path(__file__).parent / "data" / "ledger.json"
_PROVED_WITH = ("core", "styles", "plans", "model", "proof")
#: What this process has found and could not keep.
_unwritten: dict[tuple[Path, str], dict[str, Any]] = {}


class Known(NamedTuple):
    """A proof of before: "shipped" or from the user's "cache", and the names of what it did not reach."""

    source: str
    unproved: tuple[str, ...] = ()


class Ledger:
    """Looks up and keeps fingerprints of proved plans.

    A proof in the cache counts for the sources of this package and the version of torch that it was made with: a later
    version may be wrong where this one is right. What cannot be read counts as not proved; nothing here raises.

    Attributes:
        folder: The cache, `$ACCEL_TP_DDP_CACHE/proofs`, else `$HF_HOME/accel_tp_ddp/proofs`. Made when first needed.
    """

    def __init__(self, folder: str | os.PathLike | None = None):
        self.folder = Path(folder) if folder is not None else _cache_folder()

    def known(self, fingerprint: str | None) -> Known | None:
        """The proof of this fingerprint, if there is one."""
        if fingerprint is None:
            return None
        if fingerprint in read_shipped():
            return Known("shipped")
        held = self._read(fingerprint)
        if held is None:
            return None
        unproved = held.get("unproved")
        return Known("cache", tuple(map(str, unproved)) if isinstance(unproved, list) else ())

    def inferred(self, fingerprint: str | None) -> dict[str, str] | None:
        """The rules that were inferred for a model with this fingerprint, which it has without any, if they were."""
        held = self._read(f"{fingerprint} inferred") if fingerprint is not None else None
        rules = held.get("rules") if held is not None else None
        return {str(name): str(style) for name, style in rules.items()} if isinstance(rules, dict) and rules else None

    def remember(self, fingerprint: str | None, description: str, unproved: Iterable[str] = ()) -> None:
        """Keep a proof for later runs, and what it did not reach. Others may do so at the same time.

        A folder that cannot be written is one warning. None, which stands for what cannot be told apart, is not kept.
        """
        if fingerprint is not None:
            self._write(fingerprint, {"proved": description, "unproved": list(unproved)})

    def remember_inferred(self, fingerprint: str | None, rules: Mapping[str, str]) -> None:
        """Keep rules that were inferred, as `remember` does. That they are right is for a proof of its own to say."""
        if fingerprint is not None:
            self._write(f"{fingerprint} inferred", {"rules": dict(rules)})

    def _read(self, key: str) -> Mapping[str, Any] | None:
        if (self.folder, key) in _unwritten:
            return _unwritten[self.folder, key]
        try:
            held = json.loads(self._file(key).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        return held if isinstance(held, dict) and held.get("fingerprint") == key else None

    def _write(self, key: str, what: Mapping[str, Any]) -> None:
        file = self._file(key)
        held = {"fingerprint": key, **what}
        text = json.dumps({**held, "torch": torch.__version__}, indent=1)
        part = file.with_name(f".{file.name}.{os.getpid()}.{secrets.token_hex(4)}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                with open(part, "x", encoding="utf-8") as opened:
                    opened.write(f"{text}\n")
                os.replace(part, file)  # a reader finds all of it or nothing
            except BaseException:
                part.unlink(missing_ok=True)
                raise
        except OSError as error:
            _unwritten[self.folder, key] = held
            _warn_of(str(self.folder), error.strerror or type(error).__name__)

    def _file(self, fingerprint: str) -> Path:
        return self.folder / f"{digest(f'{fingerprint} {_own_sources()} {torch.__version__}')}.json"


def write_shipped(proved: Mapping[str, str], file: Path = _SHIPPED) -> None:
    """Write the ledger that the package ships: a description by fingerprint, sorted, one a line."""
    file.write_text(json.dumps(dict(sorted(proved.items())), indent=0, ensure_ascii=False) + "\n", encoding="utf-8")
    read_shipped.cache_clear()


@cache
def read_shipped() -> Mapping[str, str]:
    try:
        held = json.loads(_SHIPPED.read_text(encoding="utf-8"))
        if isinstance(held, dict):
            return held
        problem = f"it holds a {type(held).__name__}"
    except (OSError, ValueError) as error:
        problem = str(error)
    _warn_of_damage(problem)
    return {}


def _warn_of_damage(problem: str) -> None:
    logger.warning(
        "tensor-parallel plan: %s, a file of this package, cannot be read: %s. Plans are proved as if it were empty; "
        "install the package again.",
        _SHIPPED,
        problem,
    )


@cache
def _warn_of(folder: str, problem: str) -> None:
    logger.warning(
        "tensor-parallel plan: the proof of this plan cannot be kept in %s (%s), so the next run proves it again. "
        "Let %s name a folder that can be written.",
        folder,
        problem,
        CACHE_VARIABLE,
    )


def _cache_folder() -> Path:
    cache_home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    hub = os.environ.get("HF_HOME") or os.path.join(cache_home, "huggingface")
    root = os.environ.get(CACHE_VARIABLE) or os.path.join(hub, "accel_tp_ddp")
    return Path(os.path.expandvars(os.path.expanduser(root))) / "proofs"


@cache
def _own_sources() -> str:
    """Of the parts of this package that a proof depends on, as they are installed."""
    files = sorted(file for wing in _PROVED_WITH for file in (_PACKAGE / wing).rglob("*.py"))
    return digest("\n".join(f"{file.relative_to(_PACKAGE).as_posix()} {digest(file.read_bytes())}" for file in files))
