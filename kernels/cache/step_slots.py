"""Where a step's tokens go: lengths and cache slots of compacted requests, slots of a query ring.

    physical length of row b in group g = seq_lens[b] - evicted[g, s],  s = idx_mapping[b]
    slot of token t of row b in group g = table[g][s, i // N] * N + i % N,
                                      i = positions[t] - evicted[g, s]
    place in the ring of token t of row b = slots[s] * size + positions[t] % size
                                      for the last `size` tokens of the sequence of a row that has
                                      a slot, else -1

A row whose `idx_mapping` is -1 is a dummy that pads the batch: it owns no request row. All
outputs are persistent storage whose addresses CUDA graphs replay, so each call writes in place,
in one launch and without a copy from the host.

Dimensions: G KV cache groups, B batch rows, S request rows, T tokens of the step, N tokens per
block of a group.
"""

import torch
import triton
import triton.language as tl

from vllm_kvcompress.kernels.cache.block_tables import BlockTables
from vllm_kvcompress.kernels.cache.checks import check_out, check_ring

ROW_TILE = 256
"""Rows a program takes."""

TOKEN_TILE = 1024
"""Tokens of a row that a program takes at once: 8 for each of the 128 threads of 4 warps."""


_STRIDES = ["stride_evicted", "stride_out"]  # draft steps have buffers of other widths


@triton.jit(do_not_specialize=["num_rows", "num_padded", *_STRIDES])
def _seq_lens_kernel(
    seq_lens_ptr,  # [>= padded rows] int32
    idx_mapping_ptr,  # [B]
    evicted_ptr,  # [G, S] int32
    out_ptr,  # [G, >= padded rows] int32
    stride_evicted, stride_out, num_rows, num_padded,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Some rows of one group."""
    group = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    request = tl.load(idx_mapping_ptr + rows, mask=rows < num_rows, other=-1)
    is_real = request >= 0
    logical = tl.load(seq_lens_ptr + rows, mask=is_real, other=0)
    lost = tl.load(evicted_ptr + group * stride_evicted + request, mask=is_real, other=0)
    tl.store(out_ptr + group * stride_out + rows, logical - lost, mask=rows < num_padded)


@triton.jit(do_not_specialize=["num_tokens", *_STRIDES])
def _slots_kernel(
    positions_ptr,  # [T] int64
    query_start_ptr,  # [>= B + 1] int32
    idx_mapping_ptr,  # [B]
    evicted_ptr,  # [G, S] int32
    table_pointers_ptr,  # [G] int64, addresses of int32
    table_strides_ptr,  # [G] int64
    block_sizes_ptr,  # [G] int32
    out_ptr,  # [G, >= T] int64
    stride_evicted, stride_out, num_tokens,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The tokens of one row in one group."""
    group = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1)
    request = tl.load(idx_mapping_ptr + row).to(tl.int64)
    if request >= 0:
        start = tl.load(query_start_ptr + row)
        end = tl.minimum(tl.load(query_start_ptr + row + 1), num_tokens)
        lost = tl.load(evicted_ptr + group * stride_evicted + request)
        block_size = tl.load(block_sizes_ptr + group)
        width = tl.load(table_strides_ptr + group)
        table = tl.load(table_pointers_ptr + group).to(tl.pointer_type(tl.int32))
        table_row = table + request * width
        for first in range(start, end, BLOCK):
            tokens = first + tl.arange(0, BLOCK)
            positions = tl.load(positions_ptr + tokens, mask=tokens < end, other=0)
            index = positions.to(tl.int32) - lost
            entry = index // block_size
            in_row = (tokens < end) & (index >= 0) & (entry < width)
            blocks = tl.load(table_row + entry, mask=in_row, other=0).to(tl.int64)
            slots = tl.where(in_row, blocks * block_size + index % block_size, -1)
            tl.store(out_ptr + group * stride_out + tokens, slots, mask=tokens < end)


@triton.jit(do_not_specialize=["num_tokens", "num_slots", "size"])
def _ring_kernel(
    positions_ptr,  # [T] int64
    query_start_ptr,  # [>= B + 1] int32
    seq_lens_ptr,  # [>= B] int32
    idx_mapping_ptr,  # [B]
    owned_ptr,  # [S] int32
    out_ptr,  # [slots] int64
    num_tokens, num_slots, size,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The tokens of one row; the last program writes what is behind all rows."""
    row = tl.program_id(0)
    start = tl.minimum(tl.load(query_start_ptr + row), num_tokens)
    if row == tl.num_programs(0) - 1:
        for first in range(start, num_slots, BLOCK):
            tokens = first + tl.arange(0, BLOCK)
            tl.store(out_ptr + tokens, tl.full([BLOCK], -1, tl.int64), mask=tokens < num_slots)
    else:
        end = tl.minimum(tl.load(query_start_ptr + row + 1), num_tokens)
        request = tl.load(idx_mapping_ptr + row).to(tl.int64)
        slot = tl.load(owned_ptr + request, mask=request >= 0, other=-1).to(tl.int64)
        oldest = tl.load(seq_lens_ptr + row) - size
        for first in range(start, end, BLOCK):
            tokens = first + tl.arange(0, BLOCK)
            positions = tl.load(positions_ptr + tokens, mask=tokens < end, other=0).to(tl.int32)
            is_kept = (positions >= oldest) & (slot >= 0)
            slots = tl.where(is_kept, slot * size + positions % size, -1)
            tl.store(out_ptr + tokens, slots, mask=tokens < end)


def physical_seq_lens(
    seq_lens: torch.Tensor, idx_mapping: torch.Tensor, evicted: torch.Tensor, out: torch.Tensor
) -> None:
    """Write per-group sequence lengths.

    Parameters
    ----------
    seq_lens : torch.Tensor
        [B padded] int32, tokens: logical lengths; rows from B on are padding.
    idx_mapping : torch.Tensor
        [B] int32 or int64, batch row -> request row, -1 for a dummy.
    evicted : torch.Tensor
        [G, S] int32, tokens.
    out : torch.Tensor
        [G, >= B padded] int32: zero for dummies and for padded rows, untouched behind them.

    Raises
    ------
    ValueError
        If `out` has not G rows of B padded entries.
    """
    num_groups, num_padded = evicted.shape[0], seq_lens.shape[0]
    check_out(out, num_groups, num_padded)
    _seq_lens_kernel[(num_groups, triton.cdiv(num_padded, ROW_TILE))](
        seq_lens, idx_mapping, evicted, out,
        evicted.stride(0), out.stride(0), idx_mapping.shape[0], num_padded,
        BLOCK=ROW_TILE,
    )  # fmt: skip


def physical_slots(
    positions: torch.Tensor,
    query_start_loc: torch.Tensor,
    idx_mapping: torch.Tensor,
    evicted: torch.Tensor,
    tables: BlockTables,
    out: torch.Tensor,
) -> None:
    """Write the slot of every scheduled token into the step's slot mappings.

    Parameters
    ----------
    positions : torch.Tensor
        [T] int64, logical positions, below 2 ** 31.
    query_start_loc : torch.Tensor
        [>= B + 1] int32, first token of every batch row.
    idx_mapping : torch.Tensor
        [B] int32 or int64, batch row -> request row, -1 for a dummy.
    evicted : torch.Tensor
        [G, S] int32, tokens.
    tables : BlockTables
        Of the G groups.
    out : torch.Tensor
        [G, >= T] int64. Tokens of dummy rows and entries behind the rows' tokens stay as they are
        (the host pads them); a token outside its row of the table gets -1.

    Raises
    ------
    ValueError
        If `out` has not G rows of T entries.
    """
    check_out(out, tables.num_groups, positions.shape[0])
    _slots_kernel[(tables.num_groups, idx_mapping.shape[0])](
        positions, query_start_loc, idx_mapping, evicted,
        tables.pointers, tables.strides, tables.block_sizes, out,
        evicted.stride(0), out.stride(0), positions.shape[0],
        BLOCK=TOKEN_TILE,
    )  # fmt: skip


def ring_slots(
    positions: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    idx_mapping: torch.Tensor,
    slots: torch.Tensor,
    size: int,
    out: torch.Tensor,
) -> None:
    """Write the place in the ring of every scheduled token; no two of them share one.

    Parameters
    ----------
    positions : torch.Tensor
        [T] int64, logical positions, below 2 ** 31.
    query_start_loc : torch.Tensor
        [>= B + 1] int32, first token of every batch row.
    seq_lens : torch.Tensor
        [>= B] int32, logical lengths after this step.
    idx_mapping : torch.Tensor
        [B] int32 or int64, batch row -> request row, -1 for a dummy.
    slots : torch.Tensor
        [S] int32, slot of every request row, -1 for one that has none.
    size : int
        Queries per slot, at least 1.
    out : torch.Tensor
        [>= T] int64. -1 for tokens that are not kept, tokens of dummy rows and of rows without a
        slot, and all entries behind the rows' tokens.

    Raises
    ------
    ValueError
        If `out` has fewer than T entries, or for a ring without any room.
    """
    check_ring(out, positions.shape[0], size)
    _ring_kernel[(idx_mapping.shape[0] + 1,)](
        positions, query_start_loc, seq_lens, idx_mapping, slots, out,
        positions.shape[0], out.shape[0], size,
        BLOCK=TOKEN_TILE,
    )  # fmt: skip
