"""How compaction reaches an attention layer of vLLM, with keys and values or with latents (MLA)."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from vllm import _custom_ops as ops

from vllm_kvcompress.host.model_checks import is_latent
from vllm_kvcompress.worker.layout.base import CacheLayout
from vllm_kvcompress.worker.layout.latent import (
    Absorb,
    GatheredLatentLayout,
    LatentLayout,
    absorb,
)
from vllm_kvcompress.worker.queries.taps import QueryTaps


def query_size(layer: Any) -> int:
    """Numbers of one head's query as the layer gets it."""
    return layer.qk_head_dim if is_latent(layer) else layer.head_size


def watch_queries(taps: QueryTaps, name: str, layer: Any) -> None:
    """Let recorders see the queries of a layer that vLLM calls `name`."""
    if is_latent(layer):
        taps.watch_latent(name, layer)
    else:
        taps.watch(name, layer.impl)


def cache_of(layer: Any) -> Callable[[], torch.Tensor]:
    """The layer's cache [blocks, KV, N, C], which is bound late and may be rebound."""
    if is_latent(layer):
        return lambda: layer.kv_cache.unsqueeze(1)  # vLLM binds [blocks, N, C]
    return partial(getattr, layer, "kv_cache")


def latent_layout(layer: Any, block_size: int, in_place: bool) -> CacheLayout:
    """Layout of a latent cache; `in_place`: for kernels that read pages."""
    if in_place:
        return LatentLayout(layer.head_size, layer.kv_lora_rank, block_size, absorber(layer))
    return GatheredLatentLayout(layer.kv_lora_rank, absorber(layer))


def absorber(layer: Any) -> Absorb:
    """A function that absorbs the layer's queries, with what vLLM keeps for its own."""
    if layer.is_amx_bmm_enabled:
        return partial(_absorb_packed, layer)
    return lambda query: absorb(query, layer.W_UK_T)


def _absorb_packed(layer: Any, query: torch.Tensor) -> torch.Tensor:
    """With the weights that vLLM has packed for a CPU's tiles; the plain ones are gone."""
    nope, width = layer.qk_nope_head_dim, layer.kv_lora_rank
    absorbed = query.new_empty(*query.shape[:2], width)
    packed, scale = layer.impl._w_uk_packed, layer.impl._w_scale
    ops.bmm_cpu(absorbed, query[..., :nope].contiguous(), packed, True, scale)
    return torch.cat([absorbed, query[..., nope:]], dim=-1)
