"""Where a step's queries go in a ring that holds the last few queries of every request row.

    slot = row * size + position % size    for the last `size` tokens of a row's sequence
    slot = S * size                        for all others (a slot nobody reads)

Dimensions: B batch rows, S request rows (`idx_mapping`: B -> S), T tokens.
"""

import torch

from vllm_kvcompress.kernels.batch_rows import batch_rows


def ring_slots(
    positions: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    idx_mapping: torch.Tensor,
    size: int,
    unused: int,
    out: torch.Tensor,
) -> None:
    """Write the ring slot of every scheduled token; no two of them share one but `unused`.

    Parameters
    ----------
    positions : torch.Tensor
        [T] int64, logical positions.
    query_start_loc : torch.Tensor
        [>= B + 1] int32, first token of every batch row.
    seq_lens : torch.Tensor
        [>= B] int32, logical lengths after this step.
    idx_mapping : torch.Tensor
        [B] int64, batch row -> request row.
    size : int
        Queries per request row.
    unused : int
        Slot of the tokens that are not kept.
    out : torch.Tensor
        [>= T] int64; entries past T are set to `unused`.
    """
    num_tokens = positions.shape[0]
    rows = batch_rows(query_start_loc, idx_mapping.shape[0], num_tokens)
    slots = idx_mapping[rows] * size + positions % size
    is_recent = positions >= seq_lens[rows] - size
    out[:num_tokens] = torch.where(is_recent, slots, unused)
    out[num_tokens:].fill_(unused)
