"""Which version of a kernel a device runs: Triton on a GPU, torch on a CPU.

Triton's interpreter would run the same kernels on a CPU, a thousand times slower. Tests of the
GPU path ask for that.
"""

from importlib import import_module
from types import ModuleType

import torch

_TRITON, _TORCH = "kernels", "kernels.torch_backend"
_FILES = {
    "store_rows": "cache.store_rows",
    "step_slots": "cache.step_slots",
    "select_tokens": "compaction.select_tokens",
    "codebook_build": "codebook.build",
    "codebook_attention": "codebook.attention",
}
_on_cpu = _TORCH


def for_device(name: str, device: torch.device) -> ModuleType:
    """Module of a kernel family.

    Parameters
    ----------
    name : str
        File name in ``kernels/torch_backend/``, without the ending.
    device : torch.device
        Where the tensors are.
    """
    folder = _on_cpu if device.type == "cpu" else _TRITON
    return import_module(f"vllm_kvcompress.{folder}.{name if folder == _TORCH else _FILES[name]}")


def interpret_on_cpu(enabled: bool) -> None:
    """Let a CPU run the Triton kernels too, in Triton's interpreter; for the whole process.

    What asked `for_device` before keeps what it was given.
    """
    global _on_cpu
    _on_cpu = _TRITON if enabled else _TORCH
