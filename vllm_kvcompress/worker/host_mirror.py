"""A table that the host writes now and then and that kernels read in every step."""

import numpy as np
import torch

from vllm_kvcompress.kernels.host_copy import overwrite


class HostMirror:
    """Numbers of the host and their copy on the device, which changes only when told.

    vLLM's ``UvaBackedTensor`` alone would not do: kernels would read host memory that a later step
    writes again, and draft steps run after the output for which the next step's host code waits.
    The copy on the device is made in the order of the stream, so every kernel reads what was sent
    before it was launched.

    Parameters
    ----------
    shape : tuple of int
        Of the table.
    device : torch.device
        Where kernels run.

    Attributes
    ----------
    np : numpy.ndarray
        int32 on the host; written freely.
    gpu : torch.Tensor
        int32 on the device, at one address for ever; zeros until the first `send`.
    """

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        self.np = np.zeros(shape, dtype=np.int32)
        self.gpu = torch.zeros(shape, dtype=torch.int32, device=device)

    def send(self) -> None:
        """Let kernels launched from now on read what the host has written."""
        overwrite(self.gpu, self.np)
