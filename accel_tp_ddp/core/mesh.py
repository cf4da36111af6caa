"""The tensor-parallel mesh."""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh

__all__ = ["tensor_parallel_mesh"]


def tensor_parallel_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The one-dimensional tensor-parallel mesh in `mesh`."""
    if mesh.ndim == 1:
        return mesh
    if "tp" not in (mesh.mesh_dim_names or ()):
        raise ValueError(f"{mesh} has no dimension named `tp`. Pass a one-dimensional mesh, or name its dimensions.")
    return mesh["tp"]
