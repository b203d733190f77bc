"""Copies of every step, and where its tokens go: see `cache.step_slots` and `cache.store_rows`."""

import torch

from vllm_kvcompress.kernels.cache.block_tables import BlockTables
from vllm_kvcompress.kernels.cache.checks import check_out, check_ring, check_rows


def physical_seq_lens(
    seq_lens: torch.Tensor, idx_mapping: torch.Tensor, evicted: torch.Tensor, out: torch.Tensor
) -> None:
    """As `cache.step_slots.physical_seq_lens`."""
    num_groups, num_padded, num_rows = evicted.shape[0], seq_lens.shape[0], idx_mapping.shape[0]
    check_out(out, num_groups, num_padded)
    physical = seq_lens[:num_rows] - evicted[:, idx_mapping.clamp(min=0)]
    out[:, :num_rows] = physical.masked_fill(idx_mapping < 0, 0)
    out[:, num_rows:num_padded] = 0


def physical_slots(
    positions: torch.Tensor,
    query_start_loc: torch.Tensor,
    idx_mapping: torch.Tensor,
    evicted: torch.Tensor,
    tables: BlockTables,
    out: torch.Tensor,
) -> None:
    """As `cache.step_slots.physical_slots`."""
    num_tokens = positions.shape[0]
    check_out(out, tables.num_groups, num_tokens)
    tokens, rows = _tokens_of_rows(query_start_loc, idx_mapping, num_tokens)
    requests = idx_mapping[rows].long()
    for group, block_size in enumerate(tables.block_sizes.tolist()):
        table = tables.tensors[group]
        index = positions[tokens] - evicted[group, requests]
        in_row = (index >= 0) & (index < table.shape[1] * block_size)
        index = index.where(in_row, 0)
        slots = table[requests, index // block_size].long() * block_size + index % block_size
        out[group, tokens] = slots.where(in_row, -1)


def ring_slots(
    positions: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    idx_mapping: torch.Tensor,
    slots: torch.Tensor,
    size: int,
    out: torch.Tensor,
) -> None:
    """As `cache.step_slots.ring_slots`."""
    num_tokens = positions.shape[0]
    check_ring(out, num_tokens, size)
    tokens, rows = _tokens_of_rows(query_start_loc, idx_mapping, num_tokens)
    owned = slots[idx_mapping[rows].long()].long()
    places = owned * size + positions[tokens] % size
    is_kept = (owned >= 0) & (positions[tokens] >= seq_lens[rows] - size)
    out.fill_(-1)
    out[tokens] = places.where(is_kept, -1)


def _tokens_of_rows(
    query_start_loc: torch.Tensor, idx_mapping: torch.Tensor, num_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens that belong to a request, and the batch row of each; rows may be empty."""
    num_rows = idx_mapping.shape[0]
    tokens = torch.arange(num_tokens, device=idx_mapping.device)
    ends = query_start_loc[1 : num_rows + 1].long()
    rows = torch.searchsorted(ends, tokens, right=True)
    tokens = tokens[rows < num_rows]  # what is behind all rows is padding
    rows = rows[: tokens.shape[0]]
    is_real = idx_mapping[rows] >= 0
    return tokens[is_real], rows[is_real]


def store_rows(rows: torch.Tensor, slots: torch.Tensor, out: torch.Tensor) -> None:
    """As `cache.store_rows.store_rows`."""
    check_rows(rows, slots, out)
    slots = slots[: rows.shape[0]]
    used = slots >= 0
    out[slots[used]] = rows[used]
