"""Numbers of the host on their way to the device, while neither waits for the other.

A copy runs beside the host only from pinned memory. From ordinary memory the driver stages it
first, and the host waits until the stream has come that far, whatever ``non_blocking`` says. A
source must then stay as it is until the copy has run. Here each is made for one copy and dropped:
torch's allocator of pinned memory hands it out again only once the stream is past the copy.
"""

from collections.abc import Sequence

import numpy as np
import torch

ALIGNMENT = 16
"""Bytes at which every part of a packed copy begins: Triton compiles a kernel anew for a pointer
that is no multiple of 16."""


def host_buffer(size: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Uninitialised memory of the host that is about to be copied to `device`; pinned on a GPU."""
    return torch.empty(tuple(size), dtype=dtype, pin_memory=device.type == "cuda")


def to_device(
    numbers: np.ndarray | Sequence[int], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """One array, as a tensor of its own memory; see `send_together` for several.

    Parameters
    ----------
    numbers : np.ndarray or sequence of int
        Any shape; it may be changed as soon as this returns.
    dtype : torch.dtype
        Of the tensor.
    device : torch.device
        Where it goes.
    """
    source = torch.from_numpy(np.asarray(numbers))
    return host_buffer(source.shape, dtype, device).copy_(source).to(device, non_blocking=True)


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the host, there once the stream has come that far: whoever reads it knows when."""
    if tensor.device.type != "cuda":
        return tensor.clone()
    return host_buffer(tensor.shape, tensor.dtype, tensor.device).copy_(tensor, non_blocking=True)


def overwrite(target: torch.Tensor, numbers: np.ndarray) -> None:
    """Write an array of the host into a tensor of the device, of the same shape."""
    source = host_buffer(target.shape, target.dtype, target.device).copy_(torch.from_numpy(numbers))
    target.copy_(source, non_blocking=True)


def send_together(arrays: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """Several arrays in one copy.

    Parameters
    ----------
    arrays : sequence of np.ndarray
        Of any shapes and of types that torch has; they may be changed as soon as this returns.
    device : torch.device
        Where they go.

    Returns
    -------
    list of torch.Tensor
        Contiguous views of one tensor, with the arrays' shapes and types. Each begins at a multiple
        of `ALIGNMENT` bytes.
    """
    starts, end = [], 0
    for array in arrays:
        starts.append(end)
        end += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
    source = host_buffer([end], torch.uint8, device)
    for start, array in zip(starts, arrays, strict=True):
        plain = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        source[start : start + array.nbytes].copy_(torch.from_numpy(plain))
    sent = source.to(device, non_blocking=True)
    return [
        sent[start : start + array.nbytes].view(_dtype(array)).view(array.shape)
        for start, array in zip(starts, arrays, strict=True)
    ]


def _dtype(array: np.ndarray) -> torch.dtype:
    return torch.from_numpy(np.empty(0, dtype=array.dtype)).dtype
