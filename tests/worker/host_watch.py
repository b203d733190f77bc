"""Watches what passes between the host and the stand-in device."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from vllm_kvcompress.kernels import host_copy

_MAKES_TENSORS = {torch.tensor, torch.as_tensor, torch.asarray, torch.Tensor.new_tensor}
_INDEXES = {torch.Tensor.__getitem__, torch.Tensor.__setitem__}
_BY_MASK = {torch.bool, torch.uint8}


class _Sources:
    """Host memory that may be copied without waiting, and what has been copied of it."""

    def __init__(self) -> None:
        self.pinned: dict[int, torch.Tensor] = {}
        self.sent: set[int] = set()
        self.num_copies = 0

    def check_copy(self, source: torch.Tensor, non_blocking: bool) -> None:
        place = _storage(source)
        if place not in self.pinned:
            raise AssertionError(f"a copy of {tuple(source.shape)} from memory that is not pinned")
        if not non_blocking:
            raise AssertionError(f"a copy of {tuple(source.shape)} that the host waits for")
        self.sent.add(place)
        self.num_copies += 1


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _is_host(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == "cpu"


def _is_device(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == "meta"


class _Operations(TorchDispatchMode):
    def __init__(self, sources: _Sources) -> None:
        super().__init__()
        self.sources = sources

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:  # in inference mode, operations made of others arrive whole
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        self._check_writes(func, args)
        name = func._schema.name
        if name == "aten::_to_copy" and _is_host(args[0]):
            if torch.device(kwargs.get("device") or "cpu").type == "meta":
                self.sources.check_copy(args[0], bool(kwargs.get("non_blocking")))
        elif name == "aten::copy_" and _is_device(args[0]) and _is_host(args[1]):
            self.sources.check_copy(args[1], len(args) > 2 and bool(args[2]))
        else:
            self._check_operands(name, args)
        return func(*args, **kwargs)

    def _check_writes(self, func: Any, args: Any) -> None:
        """Memory that a copy may still be reading stays as it is."""
        for argument, value in zip(func._schema.arguments, args, strict=False):
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and _is_host(value) and _storage(value) in self.sources.sent:
                raise AssertionError(f"{func} writes to memory that a copy may still read")

    def _check_operands(self, name: str, args: Any) -> None:
        flat = [each for arg in args for each in (arg if isinstance(arg, list) else [arg])]
        if not any(_is_device(each) for each in flat):
            return
        for each in flat:
            # A single number of the host becomes an argument of the launch.
            if _is_host(each) and each.dim() > 0:
                raise AssertionError(f"{name} copies an operand of {tuple(each.shape)}")
        if name.startswith("aten::index"):
            indices = [each for each in flat[1:] if _is_device(each)]
            single = name == "aten::index_put_" and args[2].numel() == 1
            if any(each.dtype in _BY_MASK for each in indices) and not single:
                raise AssertionError(f"{name} by a mask counts its ones, and waits")


class _Calls(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in _MAKES_TENSORS and _is_device(result):
            raise AssertionError(f"{func.__name__} makes a tensor of the device from host numbers")
        if func in _INDEXES and _is_device(args[0]):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(each, list) for each in index):
                raise AssertionError("a list of indices is copied to the device, and waited for")
        return result


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Sources]:
    """Raise where the host waits for the device, or copies what is not pinned.

    Memory that `host_copy.host_buffer` hands out counts as pinned, as it is on a GPU.
    """
    sources, real = _Sources(), host_copy.host_buffer

    def host_buffer(size: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        buffer = real(size, dtype, device)
        sources.pinned[_storage(buffer)] = buffer  # held: another must not get its address
        return buffer

    with monkeypatch.context() as patches, _Calls(), _Operations(sources):
        patches.setattr(host_copy, "host_buffer", host_buffer)
        yield sources
