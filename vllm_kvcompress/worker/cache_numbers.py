"""What the cache elements of one of vLLM's attention layers stand for."""

from typing import Any

import torch
from vllm.platforms import current_platform

from vllm_kvcompress.config.cache_dtypes import EIGHT_BITS
from vllm_kvcompress.worker.layout.numbers import CacheNumbers


def numbers_of(layer: Any) -> CacheNumbers:
    """How the cache of one of vLLM's ``Attention`` layers holds its numbers.

    Only the CPU's attention tells e4m3 from e5m2 by the name of the cache's type; the others read
    bytes as the platform's 8-bit float, whatever the name. vLLM keeps scales on the host as well,
    so that reading them does not wait for the device.
    """
    if layer.kv_cache_dtype not in EIGHT_BITS:
        return CacheNumbers()
    eight_bits = current_platform.fp8_dtype()
    if layer.get_attn_backend().get_name() == "CPU_ATTN":
        is_e5m2 = layer.kv_cache_dtype == "fp8_e5m2"
        eight_bits = torch.float8_e5m2 if is_e5m2 else torch.float8_e4m3fn
    return CacheNumbers(eight_bits, lambda: (layer._k_scale_float, layer._v_scale_float))
