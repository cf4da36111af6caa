"""Local CPU ranks for a command."""

from __future__ import annotations

import os
import pickle
import socket
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ..core.errors import CheckpointError, PlanError

__all__ = ["on_cpu_ranks"]


def on_cpu_ranks(size: int, function: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """What `function(mesh, *args)` returns on the first of `size` tensor-parallel ranks of this machine.

    Raises:
        PlanError: If the function does.
        CheckpointError: If it raises something else.
    """
    method = "fork" if "fork" in torch.multiprocessing.get_all_start_methods() else "spawn"  # imports once
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(_rank, (size, folder, function, args), size, start_method=method)
        answer = pickle.loads(Path(folder, "answer").read_bytes())
    if isinstance(answer, PlanError):
        raise answer
    if isinstance(answer, str):
        raise CheckpointError(f"the command itself failed: {answer}")
    return answer


def _rank(rank: int, size: int, folder: str, function: Callable[..., dict[str, Any]], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // size))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", _loopback())
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    answer: Any
    try:
        mesh: DeviceMesh = init_device_mesh("cpu", (size,), mesh_dim_names=("tp",))
        answer = function(mesh, *args)
    except PlanError as error:
        answer = PlanError(str(error))
    except Exception:
        answer = traceback.format_exc()
    if rank == 0:
        part = Path(folder, "part")
        part.write_bytes(pickle.dumps(answer))
        part.rename(Path(folder, "answer"))
    dist.barrier()
    dist.destroy_process_group()


def _loopback() -> str:
    names = [name for _, name in socket.if_nameindex() if name.startswith("lo")]
    return names[0] if names else ""
