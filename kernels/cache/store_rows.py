"""Scatter of a step's rows (queries) into persistent storage, for the rows that have a slot.

    out[slots[t]] = rows[t]   for every token t with slots[t] >= 0

It runs in every attention layer and step, inside captured CUDA graphs: the grid follows from T
alone, and which tokens have a slot is known only on the device. Most have none in a prefill, so a
program looks at the slots of its tokens first and ends if there is none.

Dimensions: T tokens of the step, H heads, D head_dim, C = H * D numbers per row, S slots.
"""

import torch
import triton
import triton.language as tl

from vllm_kvcompress.kernels.cache.checks import check_rows

TOKENS = 16
"""Tokens per program: few enough to spread a decode step, many enough to skip a prefill fast."""

COLUMN_BYTES = 2048
"""Bytes of a row that a program copies: eight 16-byte accesses in flight per thread of 8 warps."""


@triton.jit(do_not_specialize=["num_tokens"])
def _store_kernel(
    row_ptr,  # [T, H, D]
    slot_ptr,  # [>= T] int64
    out_ptr,  # [S, H, D]
    num_tokens, stride_t, stride_h, num_heads,
    D: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """A stretch of the rows of some tokens."""
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    slots = tl.load(slot_ptr + tokens, mask=tokens < num_tokens, other=-1)
    if tl.max(slots, 0) >= 0:
        width = num_heads * D
        columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        used = (slots >= 0)[:, None] & (columns < width)[None, :]
        at = tokens[:, None].to(tl.int64) * stride_t
        at += (columns // D).to(tl.int64)[None, :] * stride_h + (columns % D)[None, :]
        rows = tl.load(row_ptr + at, mask=used)
        tl.store(out_ptr + slots[:, None] * width + columns[None, :], rows, mask=used)


def store_rows(rows: torch.Tensor, slots: torch.Tensor, out: torch.Tensor) -> None:
    """Copy rows to their slots, bit for bit.

    Parameters
    ----------
    rows : torch.Tensor
        [T, H, D] of a float type. Elements of a head must be neighbours; tokens and heads may be
        apart (a slice of a fused projection). Copied 16 bytes at a time if the address, the
        strides and D are multiples of 16 bytes.
    slots : torch.Tensor
        [>= T] int64, rows of `out`, all different; rows with -1 are not read.
    out : torch.Tensor
        [S, H, D] of the same type, contiguous. Rows that no slot names stay as they are.

    Raises
    ------
    ValueError
        If shapes, types or strides do not fit.
    """
    check_rows(rows, slots, out)
    num_tokens, num_heads, head_dim = rows.shape
    width = num_heads * head_dim
    columns = min(COLUMN_BYTES // rows.element_size(), triton.next_power_of_2(width))
    grid = (triton.cdiv(num_tokens, TOKENS), triton.cdiv(width, columns))
    _store_kernel[grid](
        rows, slots, out, num_tokens, rows.stride(0), rows.stride(1), num_heads,
        D=head_dim, TOKENS=TOKENS, COLUMNS=columns, num_warps=8,
    )  # fmt: skip
