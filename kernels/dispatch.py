"""Which version of a kernel a device runs: Triton on a GPU, torch on a CPU.

Triton's interpreter would run the same kernels on a CPU, a thousand times slower.
"""

from importlib import import_module
from types import ModuleType

import torch


def for_device(name: str, device: torch.device) -> ModuleType:
    """Module of a kernel family.

    Parameters
    ----------
    name : str
        File name in ``kernels/`` and ``kernels/reference/``, without the ending.
    device : torch.device
        Where the tensors are.
    """
    folder = "kernels.reference" if device.type == "cpu" else "kernels"
    return import_module(f"vllm_kvcompress.{folder}.{name}")
