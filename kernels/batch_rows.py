"""Which batch row every token of a step belongs to."""

import torch


def batch_rows(query_start_loc: torch.Tensor, num_reqs: int, num_tokens: int) -> torch.Tensor:
    """Spread rows over their tokens.

    Parameters
    ----------
    query_start_loc : torch.Tensor
        [>= num_reqs + 1] int32, first token of every batch row; rows may be empty.
    num_reqs, num_tokens : int
        Rows and tokens of the step, without padding.

    Returns
    -------
    torch.Tensor
        [num_tokens] int64.
    """
    tokens = torch.arange(num_tokens, device=query_start_loc.device, dtype=query_start_loc.dtype)
    ends = query_start_loc[1 : num_reqs + 1].contiguous()
    return torch.searchsorted(ends, tokens, right=True)
