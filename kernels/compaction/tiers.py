"""Scores in two tiers: some tokens before all others, each tier in its own order.

A constant added to the upper tier's scores would round small differences away, and infinity would
lose the tier's order, so scores become ranks, which float32 holds exactly below 2 ** 24.
Dimensions: KV key-value heads, n tokens.
"""

import torch


def ranks(scores: torch.Tensor) -> torch.Tensor:
    """Replace each score of [..., n] by its rank in the last dimension.

    Returns
    -------
    torch.Tensor
        [..., n] float32, n - 1 for the best and 0 for the worst. Of equal scores the earlier one
        is better, as in `select_tokens`.
    """
    order = scores.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(scores.shape[-1], dtype=torch.float32, device=scores.device).flip(0)
    return torch.empty(scores.shape, dtype=torch.float32, device=scores.device).scatter_(
        -1, order, places.expand(scores.shape)
    )


def best_tokens(scores: torch.Tensor, forced: torch.Tensor, count: int) -> torch.Tensor:
    """Mark the `count` best tokens of each head; forced ones come first and count.

    Parameters
    ----------
    scores : torch.Tensor
        [KV, n] float, finite.
    forced : torch.Tensor
        [n] bool.
    count : int
        Tokens to mark; with more forced ones than that, the first of these.

    Returns
    -------
    torch.Tensor
        [KV, n] bool.
    """
    return ranks(scores.masked_fill(forced, float("inf"))) >= scores.shape[-1] - count


def two_tiers(upper: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Rank marked tokens by `first`, above all others, which are ranked by `second`.

    Parameters
    ----------
    upper : torch.Tensor
        [KV, n] bool.
    first, second : torch.Tensor
        [KV, n] or [1, n] float, finite.

    Returns
    -------
    torch.Tensor
        [KV, n] float32 in [0, 2 n).
    """
    return torch.where(upper, ranks(first) + upper.shape[-1], ranks(second))
