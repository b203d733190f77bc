"""Attention of one query per request over the ordinary tokens behind its codes.

    L[h, t] = q[h] . K[t] * scale,   part[h] = sum_t softmax_t(L[h, t]) V[t]

over the tokens t of one split. Tokens that a request appends to a compressed cache are keys (after
RoPE) and values of the same layer's blocks, which follow the codes' blocks in the request's block
table. Their splits are written beside those of the codes, and `split_merge` adds up both kinds.

Keys and values are read once, 16 bytes at a time.

Dimensions: R requests, H query heads, KV key-value heads, g = H / KV, D head_dim, B blocks, N slots
per block, P entries of a block table row, n tokens, S splits.
"""

import torch
import triton
import triton.language as tl

from vllm_kvcompress.kernels.codebook.pages import TailPages
from vllm_kvcompress.kernels.codebook.split_merge import (
    add_values,
    empty_softmax,
    softmax_step,
    store_split,
)
from vllm_kvcompress.kernels.common import LOG2E, capped, load_channels, split_length, token_slots


@triton.jit(
    do_not_specialize=["stride_table", "first_split", "num_splits"],
    do_not_specialize_on_alignment=["first_slot_ptr", "num_tokens_ptr"],  # rows of a table
)
def _tail_kernel(
    query_ptr,  # [R, H, D]
    key_ptr,  # [B, KV, N, D]
    value_ptr,  # [B, KV, N, D]
    table_ptr,  # [R, P]
    first_slot_ptr,  # [R]
    num_tokens_ptr,  # [R]
    part_ptr,  # [R, H, S, D] float32: softmax of a split times its values
    lse_ptr,  # [R, H, S] float32: log2 of a split's sum of exponentials
    scale_log2, value_scale, num_heads, D,
    stride_qr, stride_qh,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_table, split_len, first_split, num_splits,
    G: tl.constexpr,
    N: tl.constexpr,
    CAP: tl.constexpr,  # of logits in base 2; 0: none
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One split of one request: all query heads of one KV head."""
    split = tl.program_id(0)
    head = tl.program_id(1)
    request = tl.program_id(2).to(tl.int64)
    num_tokens = tl.load(num_tokens_ptr + request)
    group = tl.arange(0, BLOCK_M)
    place = (request * num_heads + head * G + group) * num_splits + first_split + split
    start = split * split_len
    if start >= num_tokens:
        tl.store(lse_ptr + place, float("-inf"), mask=group < G)
        return
    first_slot = tl.load(first_slot_ptr + request)
    table = table_ptr + request * stride_table
    key_head = key_ptr + head.to(tl.int64) * stride_kh
    value_head = value_ptr + head.to(tl.int64) * stride_vh
    dims = tl.arange(0, BLOCK_D)
    query_rows = query_ptr + request * stride_qr + (head * G + group) * stride_qh
    query = load_channels(query_rows, 1, dims, group < G, D)

    highest, total, out = empty_softmax(BLOCK_M, BLOCK_D)
    for first in range(start, tl.minimum(start + split_len, num_tokens), BLOCK_N):
        tokens = first + tl.arange(0, BLOCK_N)
        valid = tokens < num_tokens
        blocks, offsets = token_slots(table, first_slot + tokens, first_slot + num_tokens, N)
        rows = key_head + blocks * stride_kb + offsets * stride_kn
        keys = load_channels(rows, stride_kd, dims, valid, D).to(query.dtype)
        logits = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale_log2
        logits = capped(logits, CAP)
        logits = tl.where(valid[None, :], logits, float("-inf"))
        weights, shrink, highest, total = softmax_step(logits, highest, total)
        rows = value_head + blocks * stride_vb + offsets * stride_vn
        weights = weights.to(query.dtype)
        out = add_values(out, weights, shrink, rows, stride_vd, dims, valid, D)
    store_split(
        part_ptr, lse_ptr, place, group < G, out, highest, total, value_scale, dims, D
    )  # fmt: skip


def tail_splits(tail: TailPages, dtype: torch.dtype) -> tuple[int, int]:
    """Splits that `attend_tail` cuts the longest tail into (0: none has tokens), and their length.

    Parameters
    ----------
    tail : TailPages
        Where the tails are; at least one request.
    dtype : torch.dtype
        Of the queries.
    """
    pages = tail.pages
    programs = pages.num_requests * pages.num_kv_heads
    length = split_length(pages.max_tokens, programs, _tile(dtype))
    return triton.cdiv(pages.max_tokens, length), length


def attend_tail(
    queries: torch.Tensor,
    tail: TailPages,
    scale: float,
    part: torch.Tensor,
    part_lse: torch.Tensor,
    first_split: int,
    soft_cap: float = 0.0,
) -> None:
    """Write parts and lse of a tail's splits behind those of other tokens.

    Parameters
    ----------
    queries : torch.Tensor
        [R, H, D] float32, float16 or bfloat16, after RoPE. Elements of a row must be neighbours.
    tail : TailPages
        Where the R requests' tails are; checked by `pages.check_tail`.
    scale : float
        Softmax scale of the layer.
    part, part_lse : torch.Tensor
        As `merge_splits` takes them; split ``first_split`` and the `tail_splits` ones from there
        on are written.
    first_split : int
        Number of the tail's first split.
    soft_cap : float, default 0
        Of the layer's logits; 0: none.
    """
    pages = tail.pages
    num_splits, length = tail_splits(tail, queries.dtype)
    if not num_splits:
        return
    num_requests, num_heads, dim = queries.shape
    group = num_heads // pages.num_kv_heads
    _tail_kernel[(num_splits, pages.num_kv_heads, num_requests)](
        queries, pages.keys, pages.values, pages.block_table, tail.first_slot, pages.num_tokens,
        part, part_lse, scale * pages.key_scale * LOG2E, pages.value_scale, num_heads, dim,
        *queries.stride()[:2], *pages.keys.stride(), *pages.values.stride(),
        pages.block_table.stride(0), length, first_split, part.shape[2],
        G=group, N=pages.block_size, CAP=soft_cap * LOG2E,
        BLOCK_M=max(triton.next_power_of_2(group), 16),
        BLOCK_N=_tile(queries.dtype), BLOCK_D=max(triton.next_power_of_2(dim), 16),
        num_warps=8 if queries.dtype == torch.float32 else 4,
    )  # fmt: skip


def _tile(dtype: torch.dtype) -> int:
    """Tokens at a time; float32, which no tensor core takes, needs more registers for each."""
    return 32 if dtype == torch.float32 else 64
