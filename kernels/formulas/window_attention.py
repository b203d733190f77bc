"""Attention that the last tokens of a prompt pay to all of it.

    L[h, i, j] = q[h, i] . k[h // g, j] * scale,  j <= n - w + i
    A[h, i, j] = softmax_j L[h, i, j]   (soft caps and learned sinks: `softmax_terms`)
    score[kv, j] = mean over the g query heads of kv and over the w queries of A

(SnapKV, arXiv 2404.14469, before pooling; WindowKV's t_j, arXiv 2503.17922, up to a constant.)
Dimensions: H query heads, KV key-value heads, g = H / KV, w window, n tokens, D head_dim.

L and A come one KV head at a time, so that [H, w, n] never exists at once. Arguments of all
functions are the same:

queries : torch.Tensor
    [H, w, D], any float dtype: the queries of the last w tokens, after RoPE.
keys : torch.Tensor
    [KV, n, D], any float dtype: all n keys of the prompt, after RoPE, in logical order.
scale : float
    Softmax scale of the layer, usually D ** -0.5.
terms : SoftmaxTerms, optional
    The layer's soft cap and sinks.
"""

from collections.abc import Iterator

import torch

from vllm_kvcompress.kernels.formulas.softmax_terms import PLAIN, SoftmaxTerms


def window_logits(
    queries: torch.Tensor, keys: torch.Tensor, scale: float, terms: SoftmaxTerms = PLAIN
) -> Iterator[torch.Tensor]:
    """Yield every KV head's L: [g, w, n] float32, -inf where the key comes after the query.

    Raises
    ------
    ValueError
        If H is no multiple of KV or w exceeds n (when the first head is asked for).
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
    for head in range(num_kv_heads):
        logits = terms.cap_((grouped[head].float() @ keys[head].float().T) * scale)  # [g * w, n]
        logits = logits.view(-1, window, num_tokens)
        logits[:, :, num_tokens - window :].masked_fill_(hidden, float("-inf"))
        yield logits


def window_attention(
    queries: torch.Tensor, keys: torch.Tensor, scale: float, terms: SoftmaxTerms = PLAIN
) -> Iterator[torch.Tensor]:
    """Yield every KV head's A: [g, w, n] float32. Raises like `window_logits`.

    Rows sum to 1, less what sinks take.
    """
    group = queries.shape[0] // keys.shape[0]
    for head, logits in enumerate(window_logits(queries, keys, scale, terms)):
        yield terms.of_heads(head * group, (head + 1) * group).attention(logits)


def window_attention_scores(
    queries: torch.Tensor, keys: torch.Tensor, scale: float, terms: SoftmaxTerms = PLAIN
) -> torch.Tensor:
    """Mean attention per key. Raises like `window_logits`.

    Returns
    -------
    torch.Tensor
        [KV, n] float32. The last w entries count fewer queries, because attention is causal.
    """
    heads = window_attention(queries, keys, scale, terms)
    return torch.stack([attention.flatten(0, 1).mean(dim=0) for attention in heads])


def window_head_scores(
    queries: torch.Tensor, keys: torch.Tensor, scale: float, terms: SoftmaxTerms = PLAIN
) -> torch.Tensor:
    """Mean attention per key for every query head alone, [H, n] float32. Raises likewise."""
    heads = window_attention(queries, keys, scale, terms)
    return torch.cat([attention.mean(dim=1) for attention in heads])
