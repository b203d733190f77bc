"""Switching a process to the GPU's path, and back."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lab.gpu_path.plugin import BACKENDS, environment, gpu_path, register
from vllm_kvcompress.kernels.dispatch import for_device

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", BACKENDS)
def test_inside_backend_and_kernels_are_the_gpus(name: str) -> None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    own = AttentionBackendEnum.CPU_ATTN.get_path()
    with gpu_path(name):
        backend = AttentionBackendEnum.CPU_ATTN.get_class()
        assert f"{backend.__module__}.{backend.__name__}" == BACKENDS[name]
        assert backend.get_name() == "TRITON_ATTN"
        assert for_device("store_rows", CPU).__name__ == "vllm_kvcompress.kernels.store_rows"
    assert AttentionBackendEnum.CPU_ATTN.get_path() == own
    assert "reference" in for_device("store_rows", CPU).__name__


def test_other_processes_find_it_as_a_plugin(tmp_path: Path) -> None:
    code = (
        "from importlib.metadata import entry_points as points\n"
        "(plugin,) = points(group='vllm.general_plugins', name='kvcompress_gpu_path')\n"
        "plugin.load()()\n"
        "from vllm.v1.attention.backends.registry import AttentionBackendEnum\n"
        "print(AttentionBackendEnum.CPU_ATTN.get_path())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(tmp_path, "small_blocks"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines()[-1:] == [BACKENDS["small_blocks"]], done.stderr


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="must be strided, small_blocks, triton, got 'flash'"):
        register("flash")
