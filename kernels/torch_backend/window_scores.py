"""Attention that the last tokens of each request pay to all of it: torch version.

One request at a time, over gathered keys; see `vllm_kvcompress.kernels.scores.window`.
"""

import torch

from vllm_kvcompress.kernels.cache.pages import Pages
from vllm_kvcompress.kernels.common import check_window
from vllm_kvcompress.kernels.formulas.window_attention import window_attention_scores


def token_scores(queries: torch.Tensor, pages: Pages, scale: float) -> torch.Tensor:
    """As `vllm_kvcompress.kernels.scores.window.token_scores`."""
    check_window(queries, pages.num_requests, pages.num_kv_heads, pages.head_dim)
    out = torch.zeros(
        pages.num_requests, pages.num_kv_heads, pages.max_tokens, device=queries.device
    )
    for request, length in enumerate(pages.num_tokens.tolist()):
        keys = pages.gather_keys(request, length)
        out[request, :, :length] = window_attention_scores(
            queries[request].transpose(0, 1), keys, scale
        )
    return out


def window_scores(
    queries: torch.Tensor, pages: Pages, scale: float, window_size: int
) -> torch.Tensor:
    """As `vllm_kvcompress.kernels.scores.window.window_scores`, for any window size."""
    scores = token_scores(queries, pages, scale)
    num_windows = -(-pages.max_tokens // window_size)
    out = scores.new_zeros(*scores.shape[:2], num_windows)
    for request, length in enumerate(pages.num_tokens.tolist()):
        for window in range(num_windows):
            start = window * window_size
            end = min(start + window_size, length - queries.shape[1])
            if end > start:
                out[request, :, window] = scores[request, :, start:end].mean(dim=1)
    return out
