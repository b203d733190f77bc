"""vLLM's functions that lay out KV cache groups; release 0.33 has them in a file of their own."""

try:
    from vllm.v1.core.kv_cache_planning import (
        _get_kv_cache_groups_uniform_page_size as groups_of_one_page_size,
    )
    from vllm.v1.core.kv_cache_planning import get_kv_cache_groups
except ModuleNotFoundError:
    from vllm.v1.core.kv_cache_utils import (
        _get_kv_cache_groups_uniform_page_size as groups_of_one_page_size,
    )
    from vllm.v1.core.kv_cache_utils import get_kv_cache_groups

__all__ = ["get_kv_cache_groups", "groups_of_one_page_size"]
