"""Surviving rows of one request as copies, for caches that no kernel reads in place."""

import torch


def gather_rows(rows: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Take rows per KV head.

    Parameters
    ----------
    rows : torch.Tensor
        [KV, R, D], keys or values of a region in logical order; any dtype, copied bit for bit.
    indices : torch.Tensor
        [KV, K] int64, positions in [0, R).

    Returns
    -------
    torch.Tensor
        [KV, K, D], same dtype as `rows`.
    """
    return rows.gather(1, indices[:, :, None].expand(-1, -1, rows.shape[-1]))
