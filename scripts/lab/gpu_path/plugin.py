"""Switches a process to the GPU path: this one, or any that is started with `environment`.

In other processes it is a vLLM plugin like any other: a folder on PYTHONPATH with the metadata
that an installer leaves, so that engine processes and tensor-parallel ranks load it as well.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from lab.places import importable, leave_entry_point
from vllm_kvcompress.kernels.dispatch import interpret_on_cpu

VARIABLE = "KVCOMPRESS_GPU_PATH_BACKEND"
"""Names the backend in processes that are started with `environment`."""

BACKENDS = {
    "strided": "lab.gpu_path.backend.StridedBackend",
    "small_blocks": "lab.gpu_path.backend.SmallBlocksBackend",
    "triton": "lab.gpu_path.backend.InterpretedBackend",
}
"""`triton` has vLLM's own attention kernel in the interpreter: for very short prompts."""

INTERPRETED_TILE = 128
"""Rows and tokens of a program in float32. What a GPU takes (16) is for its registers; the
interpreter has none, and its time goes by operations, not by their size."""


def register(name: str | None = None) -> None:
    """Entry point: from now on CPU engines of this process take the GPU path.

    vLLM's CPU platform asks for the backend CPU_ATTN whatever the user wants, so another class is
    registered under that name, as vLLM's registry of backends allows.

    Parameters
    ----------
    name : str or None
        One of `BACKENDS`; None reads the environment variable `VARIABLE`.

    Raises
    ------
    ValueError
        For another name.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    name = name or os.environ.get(VARIABLE, "")
    if name not in BACKENDS:
        raise ValueError(f"{VARIABLE}: must be {', '.join(BACKENDS)}, got {name!r}")
    register_backend(AttentionBackendEnum.CPU_ATTN, BACKENDS[name])
    interpret_on_cpu(True)
    _set_tiles(INTERPRETED_TILE)


@contextmanager
def gpu_path(name: str = "strided") -> Iterator[None]:
    """Engines opened inside take the GPU path, in this process."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.attention.selector import _cached_get_attn_backend

    tiles = _set_tiles(INTERPRETED_TILE)
    register(name)
    _cached_get_attn_backend.cache_clear()
    try:
        yield
    finally:
        AttentionBackendEnum.CPU_ATTN.clear_override()
        _cached_get_attn_backend.cache_clear()
        interpret_on_cpu(False)
        _set_tiles(tiles)


def _set_tiles(size: int) -> int:
    """Change the tiles of both kernels that have smaller ones in float32; returns the former."""
    # Not above: the CPU's Triton must be in place before kernels are imported.
    from vllm_kvcompress.kernels.codebook import attention
    from vllm_kvcompress.kernels.scores import softmax_sums

    former = softmax_sums.FLOAT32_TILE
    softmax_sums.FLOAT32_TILE = attention.FLOAT32_TILE = size
    return former


def environment(folder: Path, name: str = "strided") -> Mapping[str, str]:
    """Environment in which every process of vLLM takes the GPU path.

    Parameters
    ----------
    folder : pathlib.Path
        Where the plugin's metadata is written; it must exist.
    name : str
        One of `BACKENDS`.
    """
    target = f"{__name__}:register"
    leave_entry_point(folder, "kvcompress_gpu_path", "vllm.general_plugins", target)
    return {**os.environ, **importable(folder), VARIABLE: name}
