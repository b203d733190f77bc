"""What vLLM's layers say about the elements of their caches."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.platforms import current_platform

from vllm_kvcompress.worker.cache_numbers import numbers_of


def layer(dtype: str, backend: str = "CPU_ATTN") -> Any:
    return SimpleNamespace(
        kv_cache_dtype=dtype,
        get_attn_backend=lambda: SimpleNamespace(get_name=lambda: backend),
        _k_scale_float=0.5,
        _v_scale_float=0.25,
    )


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16"])
def test_numbers_as_the_model_computes_them_have_no_scales(dtype: str) -> None:
    numbers = numbers_of(layer(dtype))  # whose checkpoint may have some
    assert numbers.eight_bits is None and numbers.scales() == (1.0, 1.0)


@pytest.mark.parametrize(
    ("dtype", "backend", "expected"),
    [
        ("fp8", "CPU_ATTN", torch.float8_e4m3fn),
        ("fp8_e4m3", "CPU_ATTN", torch.float8_e4m3fn),
        ("fp8_e5m2", "CPU_ATTN", torch.float8_e5m2),
        ("fp8", "FLASH_ATTN", None),
        ("fp8", "TRITON_ATTN", None),
        ("fp8_e5m2", "TRITON_ATTN", None),
    ],
)
def test_formats(dtype: str, backend: str, expected: torch.dtype | None) -> None:
    """vLLM's GPU backends view bytes as the platform's type: nothing of e5m2 is in them."""
    numbers = numbers_of(layer(dtype, backend))
    assert numbers.eight_bits is (expected or current_platform.fp8_dtype())


def test_scales_are_read_when_they_are_asked_for() -> None:
    """Weights may be loaded again."""
    own = layer("fp8")
    numbers = numbers_of(own)
    assert numbers.scales() == (0.5, 0.25)
    own._k_scale_float = 2.0
    assert numbers.scales() == (2.0, 0.25)
