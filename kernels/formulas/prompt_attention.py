"""Attention that all queries of a prompt's chunk pay to the keys they see, summed per key.

    A[h, i, j] = softmax_j(q[h, i] . k[h // g, j] * scale),  j <= n - m + i   (or `softmax_terms`)
    sums[kv, j] = mean over the g query heads of kv of the sum over the m queries of A

(H2O's accumulated attention, arXiv 2306.14048.)
Dimensions: H query heads, KV key-value heads, g = H / KV, m chunk, n tokens up to the chunk's end,
D head_dim.
"""

import torch

from vllm_kvcompress.kernels.formulas.softmax_terms import PLAIN, SoftmaxTerms

MAX_LOGITS = 2**24
"""Logits computed at once: 64 MiB in float32, and as much again for their softmax."""


def dense_attention_sums(
    queries: torch.Tensor,
    keys: torch.Tensor,
    scale: float,
    terms: SoftmaxTerms = PLAIN,
    max_logits: int = MAX_LOGITS,
) -> torch.Tensor:
    """Sum attention per key, one KV head and one block of queries at a time.

    Parameters
    ----------
    queries : torch.Tensor
        [H, m, D], any float dtype: the queries of the last m of n tokens, after RoPE.
    keys : torch.Tensor
        [KV, n, D], any float dtype: the keys of all tokens so far, after RoPE, in logical order.
    scale : float
        Softmax scale of the layer, usually D ** -0.5.
    terms : SoftmaxTerms, optional
        The layer's soft cap and sinks.
    max_logits : int, default MAX_LOGITS
        Logits to compute at once; never fewer than g * n, those of one token.

    Returns
    -------
    torch.Tensor
        [KV, n] float32; each row adds up to m, less what sinks take.

    Raises
    ------
    ValueError
        If H is no multiple of KV or m exceeds n.
    """
    num_heads, chunk_len, head_dim = queries.shape
    num_kv_heads, num_tokens, _ = keys.shape
    if num_heads % num_kv_heads or chunk_len > num_tokens:
        raise ValueError(
            f"queries {tuple(queries.shape)} do not fit keys {tuple(keys.shape)}: query heads must "
            "be a multiple of KV heads and the chunk no longer than the tokens so far"
        )
    group = num_heads // num_kv_heads
    grouped = queries.unflatten(0, (num_kv_heads, group))  # [KV, g, m, D]
    block_len = max(max_logits // (group * num_tokens), 1)
    sums = torch.zeros(num_kv_heads, num_tokens, dtype=torch.float32, device=keys.device)
    for head in range(num_kv_heads):
        head_keys = keys[head].float()  # [n, D]
        own_terms = terms.of_heads(head * group, (head + 1) * group)
        for start in range(0, chunk_len, block_len):
            block = grouped[head, :, start : start + block_len].float()  # [g, b, D]
            seen = num_tokens - chunk_len + start + block.shape[1]  # by the block's last query
            attention = _causal_attention(block, head_keys[:seen], scale, own_terms)  # [g, b, seen]
            sums[head, :seen] += attention.sum(dim=1).mean(dim=0)
    return sums


def _causal_attention(
    queries: torch.Tensor, keys: torch.Tensor, scale: float, terms: SoftmaxTerms
) -> torch.Tensor:
    """[g, b, seen] softmax of queries [g, b, D] of the last b tokens over keys [seen, D]."""
    block_len = queries.shape[1]
    logits = terms.cap_((queries @ keys.T) * scale)
    offsets = torch.arange(block_len, device=keys.device)
    hidden = offsets[None, :] > offsets[:, None]  # [b, b], key after query
    logits[:, :, keys.shape[0] - block_len :].masked_fill_(hidden, float("-inf"))
    return terms.attention(logits)
