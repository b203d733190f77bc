"""Which version of a kernel a device runs."""

import inspect
import subprocess
import sys

import pytest
import torch

from vllm_kvcompress.kernels import torch_backend, triton_backend
from vllm_kvcompress.kernels.dispatch import Backend, backend_of, interpret_on_cpu

FUNCTIONS = [name for name in vars(Backend) if not name.startswith("_")]


def test_a_cpu_runs_torch_and_every_other_device_triton() -> None:
    assert backend_of(torch.device("cpu")) is torch_backend
    assert backend_of(torch.device("meta")) is triton_backend
    assert backend_of(torch.device("cuda", 1)) is triton_backend


def test_a_cpu_runs_triton_too_where_a_test_asks_for_it() -> None:
    interpret_on_cpu(True)
    try:
        assert backend_of(torch.device("cpu")) is triton_backend
    finally:
        interpret_on_cpu(False)
    assert backend_of(torch.device("cpu")) is torch_backend


def test_backends_offer_what_the_protocol_says_and_no_more() -> None:
    assert sorted(FUNCTIONS) == torch_backend.__all__ == triton_backend.__all__


@pytest.mark.parametrize("name", FUNCTIONS)
def test_both_versions_take_the_same_arguments(name: str) -> None:
    said = list(inspect.signature(getattr(Backend, name)).parameters.values())[1:]
    for backend in (torch_backend, triton_backend):
        assert list(inspect.signature(getattr(backend, name)).parameters.values()) == said


def test_a_cpu_needs_no_triton() -> None:
    """Neither its kernels, nor what policies measure on gathered rows, nor formulas."""
    code = (
        "import sys\n"
        "sys.modules['triton'] = None\n"
        "import torch\n"
        "from vllm_kvcompress.kernels.dispatch import backend_of\n"
        "from vllm_kvcompress.kernels.cache import rows\n"
        "from vllm_kvcompress.kernels.codebook import coded_tokens\n"
        "print(backend_of(torch.device('cpu')).__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "vllm_kvcompress.kernels.torch_backend\n", done.stderr
