"""Device memory that is kept free of cache blocks: what vLLM's profile has not seen.

The profile runs the model's forward pass. Compactions, and block tables beyond those of one KV
cache group, come later; without a reserve they could find no memory, which ends the engine.
"""

from typing import Any

import torch
from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype

from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.host.model_checks import is_latent
from vllm_kvcompress.lengths.budgets import layer_groups
from vllm_kvcompress.worker.compaction.working_memory import RankShape, compaction_bytes

_HOST_TABLES = 2
"""Block tables per KV cache group: vLLM's and the step's."""


def table_bytes(config: CompressionConfig, shape: RankShape, num_further: int = 0) -> int:
    """Block tables of all layer groups, int32, without the two that vLLM has for any model.

    `num_further` is the number of tables of features per group.
    """
    num_groups = max(layer_groups(shape.num_layers, config.layer_groups)) + 1
    table = 4 * shape.max_num_reqs * -(-shape.max_model_len // shape.block_size)
    return (_HOST_TABLES * (num_groups - 1) + num_further * num_groups) * table


def rank_shape(runner: Any) -> RankShape:
    """What a model runner runs, before it has a cache. All layers of a model have one shape."""
    layers = runner.compacted_layers.by_name()
    first = next(iter(layers.values()))
    latent = is_latent(first)
    return RankShape(
        num_layers=len(runner.compacted_layers),
        own_layers=sorted(map(runner.compacted_layers.place, layers)),
        num_heads=first.num_heads,
        num_kv_heads=first.num_kv_heads,
        head_dim=first.head_size,
        hidden_size=runner.model_config.get_hidden_size(),
        cache_dtype=_latent_dtype(runner, first) if latent else first.kv_cache_torch_dtype,
        block_size=runner.cache_config.block_size,
        max_model_len=runner.max_model_len,
        max_num_reqs=runner.max_num_reqs,
        absorbs_queries=latent,
    )


def _latent_dtype(runner: Any, layer: Any) -> torch.dtype:
    return kv_cache_dtype_str_to_dtype(layer.kv_cache_dtype, runner.model_config)


def reserved_bytes(runner: Any) -> int:
    """Bytes that compactions and block tables of a model runner will need beside the cache."""
    shape, config = rank_shape(runner), runner.model_state.config
    writers = [feature.writing_bytes for feature in runner.features]
    num_further = sum(feature.num_block_tables() for feature in runner.features)
    return compaction_bytes(config, shape, writers) + table_bytes(config, shape, num_further)
