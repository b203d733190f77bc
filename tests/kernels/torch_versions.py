"""Torch versions of the kernels that have none in the package, with the same signatures.

One request at a time, over gathered keys and values.
"""

from collections.abc import Callable

import torch

from vllm_kvcompress.kernels.cache.checks import check_window
from vllm_kvcompress.kernels.cache.layer_caches import LayerCaches
from vllm_kvcompress.kernels.cache.pages import Pages
from vllm_kvcompress.kernels.formulas import key_similarity as similarity
from vllm_kvcompress.kernels.formulas.key_redundancy import dense_redundancy
from vllm_kvcompress.kernels.formulas.lag_contrast import check_lag, lag_contrast
from vllm_kvcompress.kernels.formulas.prompt_attention import dense_attention_sums
from vllm_kvcompress.kernels.formulas.rotary import Rotary
from vllm_kvcompress.kernels.formulas.softmax_terms import PLAIN, SoftmaxTerms
from vllm_kvcompress.kernels.formulas.window_attention import (
    window_attention_scores,
    window_head_scores,
)


def compact_pages(
    layers: LayerCaches,
    source_table: torch.Tensor,
    destination_table: torch.Tensor,
    indices: torch.Tensor,
    num_keep: torch.Tensor,
    first_target: torch.Tensor | None = None,
    rotary: Rotary | None = None,
) -> None:
    """As `compaction.compact_pages.compact_pages`."""
    heads = torch.arange(layers.caches[0].shape[1], device=indices.device)[:, None]
    size = layers.caches[0].shape[2]
    for request, count in enumerate(num_keep.tolist()):
        slots = torch.arange(count, device=indices.device)
        to = destination_table[request, slots // size].long()
        for cache, layer_indices in zip(layers.caches, indices, strict=True):
            chosen = layer_indices[request, :, :count]  # [KV, K]
            blocks = source_table[request, chosen // size].long()
            stored = cache.view(torch.uint8) if cache.element_size() == 1 else cache
            rows = stored[blocks, heads, chosen % size].view(cache.dtype)  # [KV, K, C]
            if rotary is not None:
                assert first_target is not None
                distance = first_target[request] + slots - chosen
                keys = rotary.rotate(rows[..., : layers.head_dim].float(), distance)
                largest = torch.finfo(cache.dtype).max
                keys = keys.clamp(-largest, largest).to(cache.dtype)
                rows = torch.cat([keys, rows[..., layers.head_dim :]], dim=-1)
            stored[to, heads, slots % size] = rows.view(stored.dtype)


def _per_request(
    pages: Pages, num_heads: int, measure: Callable[[int, int], torch.Tensor]
) -> torch.Tensor:
    """[R, num_heads, max_tokens]: what `measure(request, length)` finds, zero behind a request."""
    out = torch.zeros(pages.num_requests, num_heads, pages.max_tokens, device=pages.keys.device)
    for request, length in enumerate(pages.num_tokens.tolist()):
        out[request, :, :length] = measure(request, length)
    return out


def _per_window(
    measure: Callable[..., torch.Tensor],
    queries: torch.Tensor,
    pages: Pages,
    scale: float,
    num_heads: int,
    terms: SoftmaxTerms,
) -> torch.Tensor:
    """What each request's queries and keys measure, [R, num_heads, max_tokens]."""
    check_window(queries, pages.num_requests, pages.num_kv_heads, pages.head_dim)

    def measure_request(request: int, length: int) -> torch.Tensor:
        keys = pages.gather_keys(request, length)
        return measure(queries[request].transpose(0, 1), keys, scale, terms)

    return _per_request(pages, num_heads, measure_request)


def token_scores(
    queries: torch.Tensor, pages: Pages, scale: float, terms: SoftmaxTerms = PLAIN
) -> torch.Tensor:
    """As `scores.window.token_scores`."""
    return _per_window(window_attention_scores, queries, pages, scale, pages.num_kv_heads, terms)


def window_scores(
    queries: torch.Tensor,
    pages: Pages,
    scale: float,
    window_size: int,
    terms: SoftmaxTerms = PLAIN,
) -> torch.Tensor:
    """As `scores.window.window_scores`, for any window size."""
    scores = token_scores(queries, pages, scale, terms)
    num_windows = -(-pages.max_tokens // window_size)
    out = scores.new_zeros(*scores.shape[:2], num_windows)
    for request, length in enumerate(pages.num_tokens.tolist()):
        for window in range(num_windows):
            start = window * window_size
            end = min(start + window_size, length - queries.shape[1])
            if end > start:
                out[request, :, window] = scores[request, :, start:end].mean(dim=1)
    return out


def head_scores(
    queries: torch.Tensor, pages: Pages, scale: float, terms: SoftmaxTerms = PLAIN
) -> torch.Tensor:
    """As `scores.heads.head_scores`."""
    return _per_window(window_head_scores, queries, pages, scale, queries.shape[2], terms)


def prompt_attention_sums(
    queries: torch.Tensor, pages: Pages, scale: float, terms: SoftmaxTerms = PLAIN
) -> torch.Tensor:
    """As `scores.prompt.prompt_attention_sums`."""
    return _per_window(dense_attention_sums, queries, pages, scale, pages.num_kv_heads, terms)


def key_similarity(pages: Pages) -> torch.Tensor:
    """As `scores.keys.key_similarity`."""

    def measure(request: int, length: int) -> torch.Tensor:
        return similarity.key_similarity(pages.gather_keys(request, length))

    return _per_request(pages, pages.num_kv_heads, measure)


def key_redundancy(pages: Pages, threshold: float) -> torch.Tensor:
    """As `scores.redundancy.key_redundancy`."""

    def measure(request: int, length: int) -> torch.Tensor:
        return dense_redundancy(pages.gather_keys(request, length), threshold)

    return _per_request(pages, pages.num_kv_heads, measure)


def lag_scores(pages: Pages, num_sinks: int, lag_size: int) -> torch.Tensor:
    """As `scores.keys.lag_scores`."""
    check_lag(num_sinks, lag_size)

    def measure(request: int, length: int) -> torch.Tensor:
        keys, values = pages.gather_keys(request, length), pages.gather_values(request, length)
        return lag_contrast(keys, values, num_sinks, lag_size)

    return _per_request(pages, pages.num_kv_heads, measure)
