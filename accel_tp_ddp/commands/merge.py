"""`accel-tp-ddp merge STATE_DIR OUT_DIR`: an ordinary Hugging Face checkpoint out of a sharded state."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..checkpoint.merge import merge

__all__ = ["Merge"]


class Merge:
    name = "merge"
    help = "turn what accelerator.save_state has saved into an ordinary Hugging Face checkpoint, in one process"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("state", metavar="STATE_DIR", type=Path, help="folder that save_state has written")
        parser.add_argument("out", metavar="OUT_DIR", type=Path, help="new folder for the checkpoint")
        parser.add_argument("--max-shard-size", default="5GB", help="largest file; memory goes with it (%(default)s)")
        parser.add_argument(
            "--model", type=int, metavar="N", help="which model, where the state holds several: 0, ..."
        )
        parser.add_argument("--config", type=Path, help="folder or config.json of the model, for states without one")
        parser.add_argument("--no-verify", action="store_true", help="do not compare checksums first")

    def run(self, args: argparse.Namespace) -> dict[str, Any]:
        return merge(
            args.state,
            args.out,
            max_shard_size=args.max_shard_size,
            model=args.model,
            config=args.config,
            verify=not args.no_verify,
            progress=True,
        )

    def text(self, result: dict[str, Any]) -> str:
        return (
            f"{result['out']}: {result['kind']}, {result['tensors']} tensors, {result['bytes']:,} bytes in "
            f"{len(result['files'])} files"
        )
