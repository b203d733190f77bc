"""Scores that need no queries: torch version.

One request at a time, over gathered keys and values; see `vllm_kvcompress.kernels.scores.keys`.
"""

import torch
from torch.nn.functional import cosine_similarity, normalize

from vllm_kvcompress.kernels.cache.pages import Pages
from vllm_kvcompress.kernels.formulas.lag_contrast import lag_contrast
from vllm_kvcompress.kernels.scores.keys import COSINE_EPS, UNIT_EPS, check_lag


def key_similarity(pages: Pages) -> torch.Tensor:
    """As `vllm_kvcompress.kernels.scores.keys.key_similarity`."""
    out = _zeros(pages)
    for request, length in enumerate(pages.num_tokens.tolist()):
        keys = pages.gather_keys(request, length).float()
        anchor = normalize(keys, dim=2, eps=UNIT_EPS).mean(dim=1, keepdim=True)
        out[request, :, :length] = cosine_similarity(keys, anchor, dim=2, eps=COSINE_EPS)
    return out


def lag_scores(pages: Pages, num_sinks: int, lag_size: int) -> torch.Tensor:
    """As `vllm_kvcompress.kernels.scores.keys.lag_scores`."""
    check_lag(num_sinks, lag_size)
    out = _zeros(pages)
    for request, length in enumerate(pages.num_tokens.tolist()):
        keys = pages.gather_keys(request, length)
        values = pages.gather_values(request, length)
        out[request, :, :length] = lag_contrast(keys, values, num_sinks, lag_size)
    return out


def _zeros(pages: Pages) -> torch.Tensor:
    return torch.zeros(
        pages.num_requests, pages.num_kv_heads, pages.max_tokens, device=pages.keys.device
    )
