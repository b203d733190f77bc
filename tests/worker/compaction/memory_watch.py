"""Counts the memory that operations hold on the stand-in device."""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROUNDING = 512
"""Bytes that torch's allocator on a GPU rounds blocks up to."""


class MemoryWatch(TorchDispatchMode):
    """Sums storages of the device that were made since it was entered, while they live.

    Attributes
    ----------
    peak : int
        Most bytes that were held at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:  # in inference mode, operations made of others arrive whole
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        before = {_storage(each) for each in tree_leaves((args, kwargs)) if _counts(each)}
        result = func(*args, **kwargs)
        for each in tree_leaves(result):
            if _counts(each) and _storage(each) not in before:
                self._add(each.untyped_storage())
        return result

    def _add(self, storage: Any) -> None:
        if storage in self._seen:
            return
        size = -(-storage.nbytes() // ROUNDING) * ROUNDING
        self._seen.add(storage)
        weakref.finalize(storage, self._drop, size)
        self.held += size
        self.peak = max(self.peak, self.held)

    def _drop(self, size: int) -> None:
        self.held -= size


def _counts(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == "meta"


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
