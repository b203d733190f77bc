"""Which tokens survive: the best scores, with some positions forced, in ascending order."""

import torch


def select_tokens(scores: torch.Tensor, forced: torch.Tensor, num_keep: int) -> torch.Tensor:
    """Pick `num_keep` tokens per KV head.

    Equal scores go to the earlier token, so that every device and every rank picks the same.

    Parameters
    ----------
    scores : torch.Tensor
        [KV, R] float, higher = keep. NaN counts as lowest.
    forced : torch.Tensor
        [R] bool: tokens that are kept whatever their score; at most `num_keep` of them.
    num_keep : int
        Tokens to keep, at most R.

    Returns
    -------
    torch.Tensor
        [KV, num_keep] int64, ascending per row.
    """
    lowest, highest = float("-inf"), float("inf")
    ranked = scores.float().nan_to_num(nan=lowest, posinf=torch.finfo(torch.float32).max)
    ranked = ranked.masked_fill(forced, highest)
    order = ranked.sort(dim=-1, descending=True, stable=True).indices
    return order[:, :num_keep].sort(dim=-1).values
