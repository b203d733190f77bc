"""How much every key resembles the others: torch version.

One request at a time, cosines of some keys at a time; see
`vllm_kvcompress.kernels.scores.redundancy`.
Dimensions: KV key-value heads, n tokens, D head_dim. Quadratic in n.
"""

import torch
from torch.nn.functional import normalize

from vllm_kvcompress.kernels.cache.pages import Pages
from vllm_kvcompress.kernels.scores.redundancy import check_threshold

_ELEMENTS = 2**22  # of S at a time, 16 MiB in float32


def key_redundancy(pages: Pages, threshold: float) -> torch.Tensor:
    """As `vllm_kvcompress.kernels.scores.redundancy.key_redundancy`."""
    out = torch.zeros(
        pages.num_requests, pages.num_kv_heads, pages.max_tokens, device=pages.keys.device
    )
    for request, length in enumerate(pages.num_tokens.tolist()):
        keys = pages.gather_keys(request, length)
        out[request, :, :length] = dense_redundancy(keys, threshold)
    return out


def dense_redundancy(keys: torch.Tensor, threshold: float) -> torch.Tensor:
    """Mean cosine of each key [KV, n, D] of one request with the others, [KV, n] float32."""
    check_threshold(threshold)
    num_kv_heads, num_tokens, _ = keys.shape
    unit = normalize(keys.float(), dim=-1)
    places = torch.arange(num_tokens, dtype=torch.int32, device=keys.device)
    sums = torch.zeros(num_kv_heads, num_tokens, dtype=torch.float32, device=keys.device)
    step = max(_ELEMENTS // (num_kv_heads * num_tokens), 1)
    for start in range(0, num_tokens, step):
        cosine = unit[:, start : start + step] @ unit.transpose(1, 2)  # [KV, step, n]
        cosine.clamp_(max=1.0)  # rounding gives equal keys a little more
        cosine.diagonal(offset=start, dim1=1, dim2=2).zero_()
        latest = torch.where(cosine > threshold, places, 0).amax(dim=2, keepdim=True)
        cosine.scatter_(2, latest.long(), 0.0)
        sums += cosine.sum(dim=1)
    return sums / num_tokens
