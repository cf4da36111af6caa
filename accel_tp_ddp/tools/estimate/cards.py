"""GPUs as data: `cards.json` has what their data sheets state, and where from."""

from __future__ import annotations

import json
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
    source: str = ""

    def peak(self, dtype: str) -> float:
        return self.bf16 if dtype in ("bfloat16", "float16") else self.fp32


@cache
def _data() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(__file__).parent / "cards.json").read_text(encoding="utf-8"))
    return found


def card_names() -> list[str]:
    return list(_data()["cards"])


def card(name: str) -> Card:
    """The card of that name.

    Raises:
        BadInputError: If there is none.
    """
    data, reached = _data(), _data()["achieved"]
    if name not in data["cards"]:
        raise BadInputError(
            f"--gpu {name} is not known.{nearest(name, data['cards'])} Give one of {', '.join(data['cards'])}, or "
            "--gpu-memory GiB."
        )
    row = data["cards"][name]
    return Card(
        **{"name": name, "memory": row["memory_mib"] * 2**20, "bandwidth": row["memory_gbs"] * GB},
        **{"bf16": row["bf16_tflops"] * 1e12, "fp32": row["fp32_tflops"] * 1e12},
        **{"link": row["link_gbs"] * GB, "network": row["network_gbs"] * GB, "source": row["source"]},
        **{"matmul": reached["matmul"], "memory_share": reached["memory"], "links": reached["links"]},
        launch=reached["launch_us"] * 1e-6,
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
