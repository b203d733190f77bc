"""Engines with latent attention (MLA) on a CPU that do what a GPU's do, for tests.

vLLM's platform for CPUs switches chunked prefill and the prefix cache off for models with MLA
where the CPU has no tiles (AMX), although its code for the context of a chunk runs there, in
float32, too. It is the GPU's code, but for the last step.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

ENGINE: Mapping[str, Any] = {"attention_backend": "CPU_MLA", "block_size": 16}
"""Arguments of an engine that computes in float32 on any CPU; its kernel takes no other blocks."""


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Engines opened inside split prompts and keep prefixes."""
    from vllm.platforms import current_platform

    platform = type(current_platform)
    original = platform.check_and_update_config

    def check_and_update_config(vllm_config: Any) -> None:
        scheduler, cache = vllm_config.scheduler_config, vllm_config.cache_config
        chunked, caching = scheduler.enable_chunked_prefill, cache.enable_prefix_caching
        max_num_tokens = scheduler.max_num_batched_tokens
        original(vllm_config)
        scheduler.enable_chunked_prefill, cache.enable_prefix_caching = chunked, caching
        scheduler.max_num_batched_tokens = max_num_tokens

    with patch.object(platform, "check_and_update_config", staticmethod(check_and_update_config)):
        yield
