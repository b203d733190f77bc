"""How far a token's value can move the layer's output.

    norm[kv, j] = mean over the g query heads h of kv of || W[h] v[kv, j] ||_1

(CriticalKV, arXiv 2502.03805.) Dimensions: H query heads, KV key-value heads, g = H / KV,
n tokens, D head_dim, M hidden size of the model.
"""

import torch

PROJECTED_AT_ONCE = 2**24  # of W v at a time, 32 MiB in bfloat16


def projected_value_norms(values: torch.Tensor, projection: torch.Tensor) -> torch.Tensor:
    """L1 norm of each value behind the output projection, some tokens of one KV head at a time.

    Products are in the projection's dtype and sums in float32: a norm adds up M roundings of
    either sign, so float32 products would cost much and change nothing.

    Parameters
    ----------
    values : torch.Tensor
        [KV, n, D], any float dtype.
    projection : torch.Tensor
        [H, M, D], any float dtype: the slice of the output projection of each query head.

    Returns
    -------
    torch.Tensor
        [KV, n] float32.

    Raises
    ------
    ValueError
        If H is no multiple of KV.
    """
    num_kv_heads, num_tokens, head_dim = values.shape
    if projection.shape[0] % num_kv_heads:
        raise ValueError(
            f"projection {tuple(projection.shape)} does not fit values {tuple(values.shape)}: "
            "query heads must be a multiple of KV heads"
        )
    group = projection.shape[0] // num_kv_heads
    weights = projection.reshape(num_kv_heads, -1, head_dim)  # [KV, g * M, D]
    norms = torch.empty(num_kv_heads, num_tokens, dtype=torch.float32, device=values.device)
    step = max(PROJECTED_AT_ONCE // weights.shape[1], 1)
    for head in range(num_kv_heads):
        for start in range(0, num_tokens, step):
            some = values[head, start : start + step].to(projection.dtype)
            projected = some @ weights[head].T  # [step, g * M]
            total = projected.abs_().sum(dim=-1, dtype=torch.float32)
            norms[head, start : start + step] = total / group
    return norms
