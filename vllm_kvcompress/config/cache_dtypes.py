"""Types of a cache's numbers by vLLM's names, and what settings an 8-bit one does not go with."""

from typing import Any

from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.errors import ConfigError

AS_COMPUTED = ("auto", "float16", "bfloat16", "float32")
"""The cache holds what the model computes."""

EIGHT_BITS = ("fp8", "fp8_e4m3", "fp8_e5m2")
"""One scale for the keys of a layer and one for its values."""


def check_eight_bits(setting: CompressionConfig, codes: Any) -> None:
    """Refuse a setting beside an 8-bit cache that writes other rows than the model has written.

    Parameters
    ----------
    setting : CompressionConfig
        A setting for one task.
    codes : any
        The layer groups that it codes; none, if it is false.

    Raises
    ------
    ConfigError
        With what to leave out.
    """
    if setting.build_policy().rerotates_keys:
        raise ConfigError(
            f"policy.name: {setting.policy.name} turns cached keys, which a cache of 8 bits "
            "(--kv-cache-dtype fp8) would round once more; choose another policy, or "
            "--kv-cache-dtype auto."
        )
    if codes:
        raise ConfigError(
            "codebook: vectors of a cache of 8 bits (--kv-cache-dtype fp8) are not coded; leave "
            "codebook out, or set --kv-cache-dtype auto."
        )
