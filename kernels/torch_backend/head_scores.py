"""Attention that the last tokens pay to all of it, for every query head alone: torch version.

One request at a time, over gathered keys; see `vllm_kvcompress.kernels.scores.heads`.
"""

import torch

from vllm_kvcompress.kernels.cache.pages import Pages
from vllm_kvcompress.kernels.common import check_window
from vllm_kvcompress.kernels.formulas.window_attention import window_head_scores


def head_scores(queries: torch.Tensor, pages: Pages, scale: float) -> torch.Tensor:
    """As `vllm_kvcompress.kernels.scores.heads.head_scores`."""
    check_window(queries, pages.num_requests, pages.num_kv_heads, pages.head_dim)
    out = torch.zeros(pages.num_requests, queries.shape[2], pages.max_tokens, device=queries.device)
    for request, length in enumerate(pages.num_tokens.tolist()):
        keys = pages.gather_keys(request, length)
        own = queries[request].transpose(0, 1)
        out[request, :, :length] = window_head_scores(own, keys, scale)
    return out
