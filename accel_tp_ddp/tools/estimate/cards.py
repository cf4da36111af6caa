"""GPUs as data: `cards.json` has what their data sheets state, and where from; a file of one's own may have others.

Such a file is one row of `cards.json`, with its own `achieved`. Ranks on the CPU are a card too, with `apart` false.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from ...core.errors import BadInputError, nearest

__all__ = ["Card", "card", "card_names", "with_links"]

GB, GIB = 10**9, 2**30


@dataclass(frozen=True)
class Card:
    """A device and what connects it, in bytes and seconds.

    Attributes:
        memory: Bytes.
        bf16: Matrix products a second, dense, of 16-bit types; operations.
        fp32: The same of float32.
        bandwidth: Of its memory.
        link: To the others of its node, in one direction.
        network: To other nodes, in one direction, of this device's share.
        matmul, memory_share, links: Which shares of those are reached.
        launch: Seconds in which the host launches a kernel.
        start: Seconds until a collective's first bytes arrive, in a node.
        fresh: Bandwidth of an addition that makes a large tensor; None: as of any other. On CPU ranks that comes as
            fresh pages, each of which is a fault.
        apart: Whether kernels run beside the host that launches them, and beside collectives of the replicas. On CPU
            ranks, which are their own host, all take turns.
        source: Where this is from.
    """

    name: str
    memory: float
    bf16: float
    fp32: float
    bandwidth: float
    link: float
    network: float
    matmul: float
    memory_share: float
    links: float
    launch: float
    start: float
    fresh: float | None = None
    apart: bool = True
    source: str = ""

    @property
    def reached_bandwidth(self) -> float:
        """Bytes a second of a kernel."""
        return self.bandwidth * self.memory_share

    @property
    def fault(self) -> float:
        """Seconds that a byte of a large new tensor takes before it is written; an addition moves three for each."""
        return 3 * (1 / self.fresh - 1 / self.reached_bandwidth) if self.fresh is not None else 0.0

    def peak(self, dtype: str) -> float:
        return self.bf16 if dtype in ("bfloat16", "float16") else self.fp32


@cache
def _data() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(__file__).parent / "cards.json").read_text(encoding="utf-8"))
    return found


def card_names() -> list[str]:
    return list(_data()["cards"])


def card(name: str) -> Card:
    """The card of that name, or of a file that ends with `.json`.

    Raises:
        BadInputError: If there is none, or the file does not tell all that a card has.
    """
    data = _data()
    if name.endswith(".json"):
        return _of_file(name)
    if name not in data["cards"]:
        raise BadInputError(
            f"--gpu {name} is not known.{nearest(name, data['cards'])} Give one of {', '.join(data['cards'])}, a file "
            "of your own that ends with .json, or --gpu-memory GiB."
        )
    return _made(name, data["cards"][name], data["achieved"])


def _of_file(path: str) -> Card:
    try:
        row = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        said = error.strerror if isinstance(error, OSError) else error
        raise BadInputError(f"--gpu {path} cannot be read as JSON: {said}. {_FORMAT}") from error
    reached = {**_data()["achieved"], **row.get("achieved", {})} if isinstance(row, dict) else {}
    for values, names in ((row, _OF_CARD), (reached, _OF_REACHED)):
        for name in names:
            value = values.get(name) if isinstance(values, dict) else None
            if not isinstance(value, (int, float)) or not 0 < value < float("inf"):
                raise BadInputError(f"--gpu {path}: {name} is {value!r}; give a number above 0. {_FORMAT}")
    fresh = row.get("fresh_gbs", 1)
    if not isinstance(fresh, (int, float)) or not 0 < fresh < float("inf"):
        raise BadInputError(f"--gpu {path}: fresh_gbs is {fresh!r}; give a number above 0, or leave it out.")
    if not isinstance(row.get("apart", True), bool):
        raise BadInputError(f"--gpu {path}: apart is {row['apart']!r}; give true or false.")
    return _made(str(row.get("name", Path(path).stem)), row, reached)


_OF_CARD = ("memory_mib", "bf16_tflops", "fp32_tflops", "memory_gbs", "link_gbs", "network_gbs")
_OF_REACHED = ("matmul", "memory", "links", "launch_us", "start_us")
_FORMAT = f"It needs {', '.join(_OF_CARD)}, and may have achieved: {', '.join(_OF_REACHED)}."


def _made(name: str, row: Mapping[str, Any], reached: Mapping[str, Any]) -> Card:
    return Card(
        **{"name": name, "memory": row["memory_mib"] * 2**20, "bandwidth": row["memory_gbs"] * GB},
        **{"bf16": row["bf16_tflops"] * 1e12, "fp32": row["fp32_tflops"] * 1e12},
        **{"link": row["link_gbs"] * GB, "network": row["network_gbs"] * GB, "source": row.get("source", "")},
        **{"matmul": reached["matmul"], "memory_share": reached["memory"], "links": reached["links"]},
        **{"launch": reached["launch_us"] * 1e-6, "start": reached["start_us"] * 1e-6},
        fresh=row["fresh_gbs"] * GB if "fresh_gbs" in row else None,
        apart=row.get("apart", True),
    )


def with_links(of: Card, links: str) -> Card:
    """The card with other links: `IN_NODE,BETWEEN_NODES`, in GB/s and one direction.

    Raises:
        BadInputError: If these are no two positive numbers.
    """
    try:
        inside, between = (float(number) for number in links.split(","))
    except ValueError:
        inside = between = 0.0
    if not (0 < inside < float("inf") and 0 < between < float("inf")):
        raise BadInputError(
            f"--links is {links!r}; give two numbers of GB/s in one direction, within a node and between nodes, as in "
            "--links 450,50."
        )
    return replace(of, link=inside * GB, network=between * GB)
