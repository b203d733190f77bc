"""Attention that queries drawn from a normal distribution are expected to pay to each key.

For q ~ N(mean, cov), E[exp(q . k * scale)] = exp(mean . k * scale + k^T cov k * scale^2 / 2), so

    score[kv, j] = mean over the query heads h of kv of
                   softmax_j(mean[h] . k[kv, j] * scale + k[kv, j]^T cov[h] k[kv, j] * scale^2 / 2)

(Expected Attention, arXiv 2510.00636.) The denominator has a layer's sink (`softmax_terms`). Under
a soft cap the expectation has no closed form: with x = q . k * scale of mean m and variance v,

    E[exp(cap * tanh(x / cap))] = sum over nodes u of weight * exp(cap * tanh((m + u sqrt v) / cap))

by Gauss-Hermite quadrature for the standard normal density, of `NUM_NODES` nodes.
Dimensions: H query heads, KV key-value heads, g = H / KV, n tokens, D head_dim.
"""

import numpy as np
import torch

from vllm_kvcompress.kernels.formulas.softmax_terms import PLAIN, SoftmaxTerms

NUM_NODES = 32
"""Of the quadrature: 0.01 in the logarithm where the deviation is half the cap, far less below."""


def expected_attention_scores(
    mean: torch.Tensor,
    covariance: torch.Tensor | None,
    keys: torch.Tensor,
    scale: float,
    terms: SoftmaxTerms = PLAIN,
) -> torch.Tensor:
    """Expected attention per key, one query head at a time so that [H, n, D] never exists.

    Parameters
    ----------
    mean : torch.Tensor
        [H, D] float32: mean query, after RoPE.
    covariance : torch.Tensor or None
        [H, D, D] float32, after RoPE; None leaves the second term out.
    keys : torch.Tensor
        [KV, n, D], any float dtype, after RoPE.
    scale : float
        Softmax scale of the layer, usually D ** -0.5.
    terms : SoftmaxTerms, optional
        The layer's soft cap and sinks.

    Returns
    -------
    torch.Tensor
        [KV, n] float32; each row adds up to 1, less what sinks take.

    Raises
    ------
    ValueError
        If H is no multiple of KV.
    """
    num_heads, num_kv_heads = mean.shape[0], keys.shape[0]
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads are no multiple of {num_kv_heads} KV heads")
    group = num_heads // num_kv_heads
    scores = torch.zeros(keys.shape[:2], dtype=torch.float32, device=keys.device)
    for kv_head in range(num_kv_heads):
        head_keys = keys[kv_head].float()  # [n, D]
        for head in range(kv_head * group, (kv_head + 1) * group):
            logits = head_keys @ mean[head] * scale  # [n]
            if covariance is not None:
                spread = (head_keys @ covariance[head] * head_keys).sum(dim=-1)
                if terms.soft_cap:
                    logits = _capped(logits, spread * scale**2, terms)
                else:
                    logits = logits + spread * (scale**2 / 2)
            else:
                logits = terms.cap_(logits)
            attention = terms.of_heads(head, head + 1).attention(logits[None])[0]
            scores[kv_head] += attention / group
    return scores


def _capped(mean: torch.Tensor, variance: torch.Tensor, terms: SoftmaxTerms) -> torch.Tensor:
    """[n] logarithm of the expectation of exp of a capped normal variable [n]."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(NUM_NODES)
    deviation = variance.clamp(min=0).sqrt()
    total = torch.full_like(mean, float("-inf"))
    for node, weight in zip(nodes, weights / weights.sum(), strict=True):
        total = torch.logaddexp(total, terms.cap_(mean + node * deviation) + float(np.log(weight)))
    return total
