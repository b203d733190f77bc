"""How tokens stand out against the block of tokens that follows theirs.

Behind the sinks a sequence is cut into blocks of `lag_size`. Each channel of a block is put on the
scale that the next block's minimum and maximum make 0 and 1; a token's score is the standard
deviation over its channels, softmax over its block, averaged over keys and values. (LagKV, arXiv
2504.04704, before ranking.) Dimensions: KV key-value heads, n tokens, D head_dim, b blocks.
"""

import torch

SMALLEST_RANGE = 1e-6
"""Channels that are constant in a whole block would else be divided by 0."""


def lag_contrast(
    keys: torch.Tensor, values: torch.Tensor, num_sinks: int, lag_size: int
) -> torch.Tensor:
    """Score the tokens of all full blocks but the last.

    Parameters
    ----------
    keys, values : torch.Tensor
        [KV, n, D], any float dtype.
    num_sinks : int
        First tokens, outside the blocks.
    lag_size : int
        Tokens per block, at least 2.

    Returns
    -------
    torch.Tensor
        [KV, n] float32; each block's scores add up to 1. Zero for sinks, the last full block and
        what follows it.
    """
    num_kv_heads, num_tokens, _ = keys.shape
    num_blocks = (num_tokens - num_sinks) // lag_size
    scores = keys.new_zeros(num_kv_heads, num_tokens, dtype=torch.float32)
    if num_blocks < 2:
        return scores
    blocks = slice(num_sinks, num_sinks + num_blocks * lag_size)
    compared = slice(num_sinks, num_sinks + (num_blocks - 1) * lag_size)
    for head in range(num_kv_heads):  # one at a time: float32 copies of one head only
        both = _contrast(keys[head, blocks], lag_size) + _contrast(values[head, blocks], lag_size)
        scores[head, compared] = both.flatten() / 2
    return scores


def _contrast(states: torch.Tensor, lag_size: int) -> torch.Tensor:
    """[b - 1, lag_size] from [b * lag_size, D]: shares of each block's tokens."""
    blocks = states.float().unflatten(0, (-1, lag_size))  # [b, lag_size, D]
    lowest, highest = blocks[1:].amin(dim=1), blocks[1:].amax(dim=1)  # [b - 1, D]
    span = (highest - lowest).clamp(min=SMALLEST_RANGE)
    scaled = (blocks[:-1] - lowest[:, None]) / span[:, None]
    return scaled.std(dim=-1).softmax(dim=-1)


def check_lag(num_sinks: int, lag_size: int) -> None:
    """Refuse what `lag_scores` does not take.

    Raises
    ------
    ValueError
        Naming what is allowed.
    """
    if num_sinks < 0 or lag_size < 2:
        raise ValueError(
            f"num_sinks must be 0 or more and lag_size 2 or more, got {num_sinks} and {lag_size}"
        )
