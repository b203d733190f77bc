"""Attention that the last tokens of a prompt pay to all of it, reduced to one score per key.

    A[h, i, j] = softmax_j(q[h, i] . k[h // g, j] * scale),  j <= n - w + i
    score[kv, j] = mean over the g query heads of kv and over the w queries of A

(SnapKV, arXiv 2404.14469, before pooling; WindowKV's t_j, arXiv 2503.17922, up to a constant.)
Dimensions: H query heads, KV key-value heads, g = H / KV, w window, n tokens, D head_dim.
"""

import torch


def window_attention_scores(
    queries: torch.Tensor, keys: torch.Tensor, scale: float
) -> torch.Tensor:
    """Mean attention per key, one KV head at a time so that [H, w, n] never exists at once.

    Parameters
    ----------
    queries : torch.Tensor
        [H, w, D], any float dtype: the queries of the last w tokens, after RoPE.
    keys : torch.Tensor
        [KV, n, D], any float dtype: all n keys of the prompt, after RoPE, in logical order.
    scale : float
        Softmax scale of the layer, usually D ** -0.5.

    Returns
    -------
    torch.Tensor
        [KV, n] float32. The last w entries count fewer queries, because attention is causal.

    Raises
    ------
    ValueError
        If H is no multiple of KV or w exceeds n.
    """
    num_heads, window, head_dim = queries.shape
    num_kv_heads, num_tokens, _ = keys.shape
    if num_heads % num_kv_heads or window > num_tokens:
        raise ValueError(
            f"queries {tuple(queries.shape)} do not fit keys {tuple(keys.shape)}: query heads must "
            "be a multiple of KV heads and the window no longer than the prompt"
        )
    grouped = queries.reshape(num_kv_heads, -1, head_dim)  # [KV, g * w, D]
    offsets = torch.arange(window, device=keys.device)
    hidden = offsets[None, :] > offsets[:, None]  # [w, w], key after query
    hidden = hidden.repeat(num_heads // num_kv_heads, 1)  # [g * w, w]
    scores = torch.empty(num_kv_heads, num_tokens, dtype=torch.float32, device=keys.device)
    for head in range(num_kv_heads):
        logits = (grouped[head].float() @ keys[head].float().T) * scale  # [g * w, n]
        logits[:, num_tokens - window :].masked_fill_(hidden, float("-inf"))
        scores[head] = logits.softmax(dim=-1).mean(dim=0)
    return scores
