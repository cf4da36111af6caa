"""Shards for `torch.distributed.checkpoint`: which box of the full tensor each part of a local tensor is.

DCP takes any object that can list its boxes, so uneven shards and packed ones (several ranges on one rank) need no
DTensor. Loading copies into the local tensors themselves, whatever boxes the checkpoint has.
"""

from __future__ import annotations

import io
import shutil
import threading
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future as ConcurrentFuture
from concurrent.futures import wait as wait_for_futures
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Size, Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from ..core.control import control_group
from ..core.errors import CheckpointError
from ..core.layout import Ranges
from ..core.shard import ShardInfo

__all__ = [
    "BackgroundWriting",
    "HostBuffers",
    "Part",
    "StoredTensors",
    "own_ranges",
    "read_metadata",
    "read_tensors",
    "write_tensors",
]


class Part:
    """What one rank holds of a tensor, and where in the full tensor that lies.

    Args:
        local: This rank's part. Saving reads it, loading writes into it.
        info: Its layout; None for a tensor of which every rank holds all.
    """

    def __init__(self, local: Tensor, info: ShardInfo | None = None):
        self.local, self.info = local.detach(), info
        self._views: dict[Size, Tensor] = {}
        if info is None or not info.is_sharded:
            self.global_shape = local.shape
            self._add(Size([0] * local.dim()), self.local)
            return
        self.global_shape, taken = Size(info.global_shape), 0
        for start, stop in own_ranges(info):
            offset = Size(start if dim == info.layout.dim else 0 for dim in range(local.dim()))
            self._add(offset, self.local.narrow(info.layout.dim, taken, stop - start))
            taken += stop - start

    def _add(self, offset: Size, view: Tensor) -> None:
        if view.numel():  # a rank may hold nothing of a small tensor
            self._views[offset] = view

    @property
    def is_empty(self) -> bool:
        """Whether the full tensor has no elements, and so no place in a checkpoint."""
        return self.global_shape.numel() == 0

    def view(self, index: MetadataIndex) -> Tensor:
        """The part of the local tensor that `index` names by its offset in the full one."""
        return self._views[index.offset]

    def copy_from(self, full: Any) -> None:
        """Fill the local tensor from the full one, or from anything that can be sliced like it."""
        for offset, view in self._views.items():
            view.copy_(full[tuple(slice(start, start + size) for start, size in zip(offset, view.shape))])

    # What DCP asks a tensor for.

    def size(self) -> Size:
        return self.global_shape

    def __create_write_items__(self, name: str, _: Any) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.local)
        return [
            WriteItem(
                index=MetadataIndex(name, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.global_shape),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(offsets=offset, sizes=view.shape) for offset, view in self._views.items()]


def own_ranges(info: ShardInfo) -> Ranges:
    """The index ranges of a sharded tensor that this rank holds, in the order it holds them."""
    return info.layout.ranges[info.mesh.get_local_rank()]


class _SavePlanner(DefaultSavePlanner):
    def __init__(self):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def lookup_object(self, index: MetadataIndex) -> Any:
        value = self.state_dict[index.fqn]
        return value.view(index) if isinstance(value, Part) else value


class _LoadPlanner(DefaultLoadPlanner):
    def __init__(self):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        self.state_dict = self.original_state_dict = state_dict
        self.metadata = metadata
        self.is_coordinator = is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].view(index)


class _Writer(FileSystemWriter):
    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            # torch's own words are about positions in its archive; what the system said is what helps.
            said = next((e for e in _chain(error) if isinstance(e, OSError)), error)
            free = shutil.disk_usage(self.path).free
            raise OSError(f"{type(said).__name__}: {said}; {free:,} bytes are free there") from error


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def write_tensors(folder: Path, values: Mapping[str, Any]) -> None:
    """Save by DCP: each box of a `Part` once, whichever ranks hold it, everything else pickled. Collective.

    Raises:
        CheckpointError: On every rank, with what went wrong on the first rank where something did.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            group = control_group() if dist.is_initialized() else None
            planner = _SavePlanner()
            dcp.save(_with_contents(values), storage_writer=_Writer(folder), planner=planner, process_group=group)
    except CheckpointException as error:
        raise CheckpointError(_first_failure(error)) from None


class HostBuffers:
    """Copies in host memory, whose room is kept from one save to the next: pinned memory takes long to get."""

    def __init__(self) -> None:
        self._kept: dict[tuple[Any, ...], Tensor] = {}

    def filled(self, tensors: Mapping[MetadataIndex, Tensor], pin: bool) -> dict[MetadataIndex, Tensor]:
        """A copy of each; from a device, they are there once its current stream has come so far."""
        keys = {index: (index, tensor.shape, tensor.dtype, pin) for index, tensor in tensors.items()}
        wanted = set(keys.values())
        self._kept = {key: buffer for key, buffer in self._kept.items() if key in wanted}
        for index, tensor in tensors.items():
            if keys[index] not in self._kept:
                self._kept[keys[index]] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pin)
            self._kept[keys[index]].copy_(tensor, non_blocking=pin)
        return {index: self._kept[key] for index, key in keys.items()}

    def clear(self) -> None:
        self._kept.clear()


class _StagingPlanner(_SavePlanner):
    """Once the ranks have agreed on who writes what, it copies what this one is to write, and only that.

    What is written are the copies, whatever becomes of the tensors meanwhile.
    """

    def __init__(self, buffers: HostBuffers, device: torch.device | None):
        super().__init__()
        self.over = threading.Event()
        self.copies: dict[MetadataIndex, Tensor | io.BytesIO] | None = None
        self.problem: Exception | None = None
        self._buffers, self._device = buffers, device

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
        if self._device is not None:  # a new thread begins on the first one, and would open a context there
            torch.accelerator.set_device_index(self._device)
        super().set_up_planner(*args, **kwargs)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        plan = super().finish_plan(new_plan)
        try:
            self.copies = self._copied(plan)
        except Exception as error:
            self.problem = error
            raise
        finally:
            self.over.set()
        return plan

    @torch.no_grad()
    def _copied(self, plan: SavePlan) -> dict[MetadataIndex, Tensor | io.BytesIO]:
        found = {item.index: super(_StagingPlanner, self).resolve_data(item) for item in plan.items}
        tensors = {index: value for index, value in found.items() if isinstance(value, Tensor)}
        copies = self._buffers.filled(tensors, pin=self._device is not None)
        if self._device is not None:
            torch.accelerator.current_stream(self._device).synchronize()
        self.state_dict.clear()  # of which the thread needs nothing any more
        return {**found, **copies}

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        assert self.copies is not None, "plan first"
        return self.copies[write_item.index]


class _AsTheyAre(BlockingAsyncStager):
    """The planner stages."""

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        return state_dict


class BackgroundWriting:
    """As `write_tensors`, in a thread of torch's.

    Args:
        folder: Where to.
        values: What to save, as in `write_tensors`.
        group: For that thread alone.
        buffers: Of no other save that is under way.
    """

    def __init__(self, folder: Path, values: Mapping[str, Any], group: dist.ProcessGroup | None, buffers: HostBuffers):
        devices = {value.local.device for value in values.values() if isinstance(value, Part)}
        device = next((device for device in devices if device.type != "cpu"), None)
        if device is not None:
            torch.accelerator.current_stream(device).synchronize()  # the thread has another one
        self._planner = _StagingPlanner(buffers, device)
        writing = dcp.async_save(
            _with_contents(values),
            # Without copies ahead, which torch makes by a stream of the thread's device even of host memory.
            storage_writer=_Writer(folder, per_thread_copy_ahead=0),
            planner=self._planner,
            process_group=group,
            async_stager=_AsTheyAre(),
        )
        assert isinstance(writing, ConcurrentFuture), "staging leaves nothing to wait for"
        self._writing = writing
        writing.add_done_callback(lambda _: self._planner.over.set())

    def await_copies(self) -> None:
        """Until this rank has copied what it is to write: from then on the tensors may change.

        Raises:
            CheckpointError: If the ranks could not agree on who writes what; on all of them.
            Exception: If this rank could not copy. The others are told in the end only.
        """
        self._planner.over.wait()
        if self._planner.problem is not None:
            raise self._planner.problem
        if self._planner.copies is None:
            self.await_end()

    def await_end(self) -> None:
        """Until all ranks have written.

        Raises:
            CheckpointError: As `write_tensors`.
        """
        try:
            self._writing.result()
        except CheckpointException as error:
            raise CheckpointError(_first_failure(error)) from None

    def abandon(self) -> None:
        """Until no rank writes any more."""
        wait_for_futures([self._writing])


def read_metadata(folder: Path) -> dict[str, Size | None]:
    """Names in a DCP folder, with the shapes of tensors; None for objects."""
    stored = FileSystemReader(folder).read_metadata().state_dict_metadata
    return {name: value.size if isinstance(value, TensorStorageMetadata) else None for name, value in stored.items()}


def read_dtypes(folder: Path) -> dict[str, Any]:
    """The data types of the tensors in a DCP folder."""
    stored = FileSystemReader(folder).read_metadata().state_dict_metadata
    return {name: v.properties.dtype for name, v in stored.items() if isinstance(v, TensorStorageMetadata)}


def read_tensors(folder: Path, values: Mapping[str, Any], reader: FileSystemReader | None = None) -> dict[str, Any]:
    """Load by DCP what `values` names: into the tensors of each `Part`, and anything else as a new object.

    Not collective: each rank reads the boxes that it needs, at most one of them at a time in memory.

    Raises:
        CheckpointError: If a file cannot be read.
    """
    loaded = _with_contents(values)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(loaded, storage_reader=reader or FileSystemReader(folder), planner=_LoadPlanner(), no_dist=True)
    except CheckpointException as error:
        raise CheckpointError(_first_failure(error)) from None
    return loaded


class StoredTensors:
    """The tensors of a DCP folder, read one by one; what is there is read once."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._reader = _ReaderOfOne(folder)
        self._stored = self._reader.read_metadata().state_dict_metadata

    @property
    def names(self) -> list[str]:
        """Of tensors and other objects."""
        return list(self._stored)

    def shape(self, name: str) -> Size | None:
        """None for what is no tensor, or not there."""
        stored = self._stored.get(name)
        return stored.size if isinstance(stored, TensorStorageMetadata) else None

    def dtype(self, name: str) -> torch.dtype:
        return self._stored[name].properties.dtype

    def tensor(self, name: str) -> Tensor:
        """All of it. Takes the memory of the tensor and of one of the parts that it was saved in."""
        full = torch.empty(self._stored[name].size, dtype=self.dtype(name))
        read_tensors(self._folder, {name: Part(full)}, self._reader)
        return full


class _ReaderOfOne(FileSystemReader):
    """`FileSystemReader` that reads what the folder holds once, and not for each tensor again."""

    _metadata: Metadata | None = None

    def read_metadata(self) -> Metadata:
        if self._metadata is None:
            self._metadata = super().read_metadata()
        return self._metadata


def _with_contents(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if not (isinstance(value, Part) and value.is_empty)}


def _first_failure(error: CheckpointException) -> str:
    rank, (cause, _) = next(iter(sorted(error.failures.items())))
    world = dist.get_world_size() if dist.is_initialized() else 1
    also = f" (and on {len(error.failures) - 1} more of {world} ranks)" if len(error.failures) > 1 else ""
    return f"rank {rank}{also}: {type(cause).__name__}: {cause}"
