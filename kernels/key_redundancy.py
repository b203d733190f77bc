"""How much every key resembles the others: R-KV's redundancy before its softmax.

    S[i, j] = cos(k[i], k[j]),  S[i, i] = 0
    S[i, l(i)] = 0,  l(i) = the latest j with S[i, j] > threshold, or 0 if there is none
    r[j] = mean over i of S[i, j]

Of several similar keys the latest one is thus counted as less redundant than the earlier ones.
(arXiv 2505.24133.) Dimensions: KV key-value heads, n tokens, D head_dim. Quadratic in n.
"""

import torch
from torch.nn.functional import normalize

_ELEMENTS = 2**22  # of S at a time, 16 MiB in float32


def key_redundancy(keys: torch.Tensor, threshold: float) -> torch.Tensor:
    """Mean cosine similarity of each key to the others, less the exempted pairs.

    Parameters
    ----------
    keys : torch.Tensor
        [KV, n, D], any float dtype.
    threshold : float
        Cosine above which two keys count as similar, not negative (a key would else be its own
        neighbour).

    Returns
    -------
    torch.Tensor
        [KV, n] float32 in [-1, 1].
    """
    num_kv_heads, num_tokens, _ = keys.shape
    unit = normalize(keys.float(), dim=-1)
    places = torch.arange(num_tokens, dtype=torch.int32, device=keys.device)
    sums = torch.zeros(num_kv_heads, num_tokens, dtype=torch.float32, device=keys.device)
    step = max(_ELEMENTS // (num_kv_heads * num_tokens), 1)
    for start in range(0, num_tokens, step):
        cosine = unit[:, start : start + step] @ unit.transpose(1, 2)  # [KV, step, n]
        cosine.diagonal(offset=start, dim1=1, dim2=2).zero_()
        latest = torch.where(cosine > threshold, places, 0).amax(dim=2, keepdim=True)
        cosine.scatter_(2, latest.long(), 0.0)
        sums += cosine.sum(dim=1)
    return sums / num_tokens
