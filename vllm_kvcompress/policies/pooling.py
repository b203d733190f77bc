"""Pooling of scores over neighbouring tokens: what is near an important token is kept with it."""

from typing import Literal

import torch
from torch.nn.functional import avg_pool1d, max_pool1d

Pooling = Literal["avg", "max"]


def pool(scores: torch.Tensor, kernel_size: int, pooling: Pooling) -> torch.Tensor:
    """Mean or maximum of each token's neighbourhood.

    Parameters
    ----------
    scores : torch.Tensor
        [KV, n] float.
    kernel_size : int
        Width of the neighbourhood, in tokens; odd.
    pooling : {"avg", "max"}
        Neighbours beyond the ends count as 0 in a mean and not at all in a maximum.

    Returns
    -------
    torch.Tensor
        [KV, n].
    """
    pooled = avg_pool1d if pooling == "avg" else max_pool1d
    return pooled(scores, kernel_size, stride=1, padding=kernel_size // 2)


def pool_before_window(
    scores: torch.Tensor, window: int, kernel_size: int, pooling: Pooling
) -> torch.Tensor:
    """As `pool`, up to the last `window` tokens, whose scores stay and are not pooled in."""
    past = scores[:, : scores.shape[1] - window]
    return torch.cat([pool(past, kernel_size, pooling), scores[:, past.shape[1] :]], dim=1)
