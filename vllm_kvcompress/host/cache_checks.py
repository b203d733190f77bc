"""Which kinds of KV caches are served: numbers as the model computes them, or 8 bits and a scale.

An 8-bit cache is served with one scale for all keys of a layer and one for all values, which vLLM
reads from the checkpoint, or takes to be 1. One sentence for each kind that is not.
"""

from typing import Any

from vllm_kvcompress.config.cache_dtypes import AS_COMPUTED, EIGHT_BITS


def has_eight_bits(config: Any) -> bool:
    """Whether the cache of a ``VllmConfig`` will have numbers of 8 bits."""
    return cache_dtype(config) in EIGHT_BITS


def cache_dtype(config: Any) -> str:
    """Name of the cache's type. For some checkpoints vLLM finds it only while it builds layers."""
    dtype = config.cache_config.cache_dtype
    return "fp8" if dtype == "auto" and _scheme(config) else dtype


def _scheme(config: Any) -> dict[str, Any]:
    """How a checkpoint says that the cache is to be quantised; empty if it does not."""
    return getattr(config.quant_config, "kv_cache_scheme", None) or {}


def cache_kind(config: Any) -> str | None:
    """Why the cache that a ``VllmConfig`` asks for is not served; None if it is."""
    dtype = cache_dtype(config)
    if dtype not in EIGHT_BITS:
        return _unknown_kind(dtype)
    if config.cache_config.kv_cache_dtype_skip_layers:
        return (
            f"layers with and without a cache of 8 bits ({dtype}) have not been tried together: "
            "remove --kv-cache-dtype-skip-layers"
        )
    if _scheme(config).get("strategy") == "attn_head":
        return _scales_per_head(f"the checkpoint {config.model_config.model} has")
    return _platform(dtype)


def layer_cache_kind(layer: Any) -> str | None:
    """The same of an attention layer once it is built."""
    dtype = getattr(layer, "kv_cache_dtype", "auto")
    if dtype not in EIGHT_BITS:
        reason = _unknown_kind(dtype)
        return None if reason is None else f"has {reason}"
    if any(getattr(layer, name).numel() != 1 for name in ("_q_scale", "_k_scale", "_v_scale")):
        return _scales_per_head("has")
    return None


def _unknown_kind(dtype: str) -> str | None:
    if dtype in AS_COMPUTED:
        return None
    return f"a quantised KV cache ({dtype}) that is not supported: set --kv-cache-dtype auto or fp8"


def _scales_per_head(who: str) -> str:
    return (
        f"{who} a cache scale for every head, and only one for all heads of a layer is supported: "
        "set --kv-cache-dtype auto, or choose a checkpoint with scales per tensor"
    )


def _platform(dtype: str) -> str | None:
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        return None
    if not current_platform.has_device_capability(89):
        return (
            f"vLLM's attention reads a cache of 8 bits ({dtype}) on GPUs of compute capability 8.9 "
            "and newer only: set --kv-cache-dtype auto"
        )
    if dtype == "fp8_e5m2":
        return (
            "vLLM's attention on NVIDIA GPUs stores e4m3 whatever the name of the cache's type: "
            "set --kv-cache-dtype fp8"
        )
    return None
