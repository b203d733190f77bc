"""How much cache a layer is worth by the attention at the end of a prompt (CAKE, 2503.12491).

    P = H ** (1 / tau1) * V ** (1 / tau2)
    H = mean over heads and queries of -sum_j A[h, i, j] log A[h, i, j]
    V = mean over heads of sum_j Var_i A[h, i, j]

H is large where attention is spread out, V where it moves from query to query.
"""

import torch

from vllm_kvcompress.kernels.formulas.softmax_terms import PLAIN, SoftmaxTerms
from vllm_kvcompress.kernels.formulas.window_attention import window_attention


def layer_preference(
    queries: torch.Tensor,
    keys: torch.Tensor,
    scale: float,
    tau1: float = 1.0,
    tau2: float = 1.0,
    terms: SoftmaxTerms = PLAIN,
) -> torch.Tensor:
    """Preference of one layer.

    Parameters
    ----------
    queries : torch.Tensor
        [H, w, D], any float dtype: the queries of the last w tokens, after RoPE.
    keys : torch.Tensor
        [KV, n, D], any float dtype: all keys of the prompt, after RoPE.
    scale : float
        Softmax scale of the layer.
    tau1, tau2 : float, default 1
        Temperatures of the two factors; the paper tunes them per model.
    terms : SoftmaxTerms, optional
        The layer's soft cap and sinks.

    Returns
    -------
    torch.Tensor
        Scalar float32.
    """
    entropies, variances = [], []
    for attention in window_attention(queries, keys, scale, terms):  # [g, w, n] by KV head
        entropies.append(-torch.special.xlogy(attention, attention).sum(dim=-1).mean(dim=-1))
        variances.append(attention.var(dim=1).sum(dim=-1))
    entropy, variance = torch.cat(entropies).mean(), torch.cat(variances).mean()
    return entropy ** (1 / tau1) * variance ** (1 / tau2)
