"""How much every key resembles the others: R-KV's redundancy before its softmax.

    S[i, j] = cos(k[i], k[j]),  S[i, i] = 0
    l(i) = the latest j with S[i, j] > threshold, or 0 if there is none;  S[i, l(i)] = 0
    r[j] = mean over i of S[i, j]

Of several similar keys the latest one is thus counted as less redundant than the earlier ones.
(arXiv 2505.24133.) Cosines of some keys at a time; quadratic in n.
Dimensions: KV key-value heads, n tokens, D head_dim.
"""

import torch
from torch.nn.functional import normalize

_ELEMENTS = 2**22  # of S at a time, 16 MiB in float32


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


def check_threshold(threshold: float) -> None:
    """Refuse what `key_redundancy` does not take.

    Raises
    ------
    ValueError
        Naming what is allowed.
    """
    if not threshold >= 0:
        raise ValueError(f"similarity_threshold must be 0 or more, got {threshold}")
