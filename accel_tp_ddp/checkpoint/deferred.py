"""Tensors that are computed when their values are asked for, and not before.

Libraries that write checkpoints take a state dict, look at shapes and at who shares a storage, cut and rename some
tensors, and reach for the values file by file. Handed deferred tensors, they need no more memory than one file takes.
(`lazy` is for loading: it reads parts of what files hold.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Size, Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

__all__ = ["DeferredTensor", "materialized"]


class DeferredTensor(Tensor):
    """A tensor with shape, data type and strides, whose values come from a function.

    What is done with it is remembered, and done with the values when somebody needs them (`tensor.to("cpu")`,
    `numpy`, `item`, pickling). Views share a storage, as those of ordinary tensors do, with an address that tells
    storages apart and a size; that storage has no contents. `device` is neither a real one nor `meta`, so that code
    that wants the values moves the tensor first.

    Values are kept as long as anything else holds them, and computed again after that.
    """

    _source: _Values
    _meta: Tensor

    @staticmethod
    def of(shape: Size | tuple[int, ...], dtype: torch.dtype, values: Callable[[], Tensor]) -> DeferredTensor:
        """A contiguous one. `values` gives them as a CPU tensor of that shape and data type."""
        meta = torch.empty(shape, dtype=dtype, device="meta")
        return DeferredTensor._made(meta, _Origin(meta, values))

    @staticmethod
    def _made(meta: Tensor, source: _Values) -> DeferredTensor:
        made = Tensor._make_subclass(DeferredTensor, meta)
        made._meta, made._source = meta, source
        return made

    def materialize(self) -> Tensor:
        """The ordinary CPU tensor."""
        return self._source.tensor()

    # What tells tensors and storages apart, for whoever looks for shared ones.

    device = property(lambda self: torch.device("lazy"))
    is_meta = property(lambda self: False)

    def untyped_storage(self) -> _Origin:  # type: ignore[override]  # without contents, on purpose
        return self._source.origin

    def data_ptr(self) -> int:
        if not self._meta.numel():  # so says torch
            return 0
        return self._source.origin.data_ptr() + int(self._meta.storage_offset()) * self._meta.element_size()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # mypy loses keyword names
        return f"DeferredTensor({tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        in_place = name in _CHANGES or (name.endswith("_") and not name.endswith("__"))
        if in_place or kwargs.get("out") is not None:
            raise TypeError(f"`{name}` would change a DeferredTensor, which can only be read.")
        try:
            outcome = func(*tree_map(_meta_of, args), **tree_map(_meta_of, kwargs))
        except Exception:  # it wants values; and if it was wrong to ask, it will say so better once it has some
            return func(*tree_map(materialized, args), **tree_map(materialized, kwargs))
        if func in _ABOUT_THE_SHAPE or name == "__get__" and not isinstance(outcome, Tensor):
            return outcome
        outputs, structure = tree_flatten(outcome)
        if not outputs or not all(isinstance(output, Tensor) for output in outputs):
            return func(*tree_map(materialized, args), **tree_map(materialized, kwargs))
        inputs = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, DeferredTensor)]
        made = [_output(output, _Call(func, args, kwargs, index), inputs) for index, output in enumerate(outputs)]
        return tree_unflatten(made, structure)


def materialized(value: Any) -> Any:
    """The values of a deferred tensor; anything else as it is."""
    return value.materialize() if isinstance(value, DeferredTensor) else value


def _meta_of(value: Any) -> Any:
    if isinstance(value, DeferredTensor):
        return value._meta
    return value.to("meta") if isinstance(value, Tensor) else value


def _output(meta: Tensor, call: _Call, inputs: list[DeferredTensor]) -> DeferredTensor:
    for source in inputs:
        if meta is source._meta:  # `contiguous` of what is contiguous
            return source
        if meta.untyped_storage()._cdata == source._meta.untyped_storage()._cdata:
            return DeferredTensor._made(meta, _View(call, source._source.origin))
    return DeferredTensor._made(meta, _Origin(meta, call))


class _Call:
    """Output number `index` of a function of deferred and other values."""

    def __init__(self, func: Callable, args: tuple, kwargs: dict[str, Any], index: int):
        self.func = func
        self.args = args
        self.kwargs = kwargs
        self.index = index

    @torch.no_grad()
    def __call__(self) -> Tensor:
        outcome = self.func(*tree_map(materialized, self.args), **tree_map(materialized, self.kwargs))
        return tree_flatten(outcome)[0][self.index]


class _Values:
    """Where the values of a deferred tensor come from, and which storage they are in."""

    origin: _Origin

    def tensor(self) -> Tensor:
        raise NotImplementedError


class _Origin(_Values):
    """Values in a storage of their own; it answers for that storage, too."""

    _next_address = 64

    def __init__(self, meta: Tensor, make: Callable[[], Tensor]):
        self.origin = self
        self._dtype = meta.dtype
        self._nbytes = meta.untyped_storage().nbytes()
        self._make = make
        self._kept: tuple[StorageWeakRef, Size, tuple[int, ...], int | torch.SymInt] | None = None
        self._address = _Origin._next_address
        _Origin._next_address += -(-self._nbytes // 64) * 64 + 64

    def data_ptr(self) -> int:
        return self._address if self._nbytes else 0

    def nbytes(self) -> int:
        return self._nbytes

    def size(self) -> int:
        return self._nbytes

    def tensor(self) -> Tensor:
        if self._kept is not None:
            reference, shape, stride, offset = self._kept
            storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
            if storage is not None:
                return torch.empty(0, dtype=self._dtype).set_(storage, offset, shape, stride)
        made = self._make().detach()
        self._kept = StorageWeakRef(made.untyped_storage()), made.shape, made.stride(), made.storage_offset()
        return made


class _View(_Values):
    """A view of values that are somewhere already."""

    def __init__(self, call: _Call, origin: _Origin):
        self.origin = origin
        self._call = call

    def tensor(self) -> Tensor:
        return self._call()


_CHANGES = {"__setitem__", "__set__", "__delete__"}
_ABOUT_THE_SHAPE = {
    *(Tensor.size, Tensor.stride, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.element_size),
    *(Tensor.storage_offset, Tensor.is_contiguous, Tensor.is_floating_point, Tensor.is_complex, Tensor.is_signed),
    *(Tensor.__len__, Tensor.__hash__, torch.numel, torch.is_floating_point, torch.is_complex),
}
