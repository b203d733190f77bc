"""Where tokens of compacted requests live: slots and lengths with evicted tokens taken off.

    physical index = logical position - evicted[group, request]

Dimensions: G KV cache groups, B batch rows, S request rows (`idx_mapping`: B -> S), T tokens.
"""

from collections.abc import Sequence

import torch

from vllm_kvcompress.kernels.batch_rows import batch_rows


def physical_seq_lens(
    seq_lens: torch.Tensor, idx_mapping: torch.Tensor, evicted: torch.Tensor, out: torch.Tensor
) -> None:
    """Write per-group sequence lengths into persistent storage (CUDA graphs replay addresses).

    Parameters
    ----------
    seq_lens : torch.Tensor
        [B padded] int32, logical lengths; rows past B are padding.
    idx_mapping : torch.Tensor
        [B] int64, batch row -> request row.
    evicted : torch.Tensor
        [G, S] int32, tokens.
    out : torch.Tensor
        [G, >= B padded] int32; the padding of every row is zeroed.
    """
    num_reqs, num_padded = idx_mapping.shape[0], seq_lens.shape[0]
    torch.sub(seq_lens[:num_reqs], evicted[:, idx_mapping], out=out[:, :num_reqs])
    out[:, num_reqs:num_padded].zero_()


def physical_slots(
    positions: torch.Tensor,
    query_start_loc: torch.Tensor,
    idx_mapping: torch.Tensor,
    evicted: torch.Tensor,
    block_tables: Sequence[torch.Tensor],
    block_sizes: Sequence[int],
    out: torch.Tensor,
) -> None:
    """Write the slot of every scheduled token into the step's slot mappings.

    Parameters
    ----------
    positions : torch.Tensor
        [T] int64, logical positions.
    query_start_loc : torch.Tensor
        [>= B + 1] int32, first token of every batch row.
    idx_mapping : torch.Tensor
        [B] int64, batch row -> request row.
    evicted : torch.Tensor
        [G, S] int32, tokens.
    block_tables : sequence of torch.Tensor
        G tensors [S, max blocks] int32.
    block_sizes : sequence of int
        G block sizes in tokens.
    out : torch.Tensor
        [G, >= T] int64; entries past T are left as they are (the host pads them).
    """
    num_tokens = positions.shape[0]
    rows = idx_mapping[batch_rows(query_start_loc, idx_mapping.shape[0], num_tokens)]  # [T]
    for group, (table, block_size) in enumerate(zip(block_tables, block_sizes, strict=True)):
        index = positions - evicted[group, rows]
        blocks = table[rows, index // block_size].to(torch.int64)
        out[group, :num_tokens] = blocks * block_size + index % block_size
