"""Attention of one query per request over tokens that are stored as entries of a codebook.

    K[t] = rotate(key_entry[i[t]] * a[t], position[t]),   V[t] = value_entry[j[t]] * b[t]
    L[h, t] = q[h] . K[t] * scale
    out[h] = sum_t softmax_t(L[h, t]) V[t],   lse[h] = log sum_t exp L[h, t]

A layer's soft cap bounds L, and its learned sinks are in the sums (`formulas.softmax_terms`).

Entries are unit vectors, i and j entry numbers, a and b lengths; keys are turned by RoPE at the
token's own position, as the paper reconstructs them (SpindleKV, arXiv 2507.06517), here in the
registers of the program that reads them: K and V are never written. Requests may have a *tail* of
ordinary tokens behind the codes, over which the sums go too. With `lse` the result can be merged
with attention over anything else.

One launch gives every split of every request and KV head to a program, which keeps a running
maximum, another does so for the tails (`codebook_tail`), and a small last one adds up all splits
(`split_merge`). Where a request has no tokens in a split, the program writes one -inf per head.
Lengths are applied to logits and weights and not to vectors. Angles are float32 products of
position and frequency, as models compute theirs.

Per token a program reads 12 bytes of codes, runs of neighbouring int16 that a warp reads together,
and two entries, 16 bytes at a time (8 for 8-bit values, which are shuffled for the tensor cores on
their way); a book of some thousand entries stays in the L2 cache.

Dimensions: R requests, H query heads, KV key-value heads, g = H / KV, D head_dim, B blocks, N slots
per block, E entries, n tokens, W int16 per slot row, T tokens per row of codes, S splits.
"""

import torch
import triton
import triton.language as tl

from vllm_kvcompress.kernels.codebook.pages import CodebookPages, TailPages, check_codebook
from vllm_kvcompress.kernels.codebook.split_merge import (
    add_values,
    empty_softmax,
    merge_splits,
    softmax_step,
    store_split,
)
from vllm_kvcompress.kernels.codebook.tail import attend_tail, tail_splits
from vllm_kvcompress.kernels.common import (
    LOG2E,
    capped,
    load_channels,
    split_length,
    token_slots,
)
from vllm_kvcompress.kernels.formulas.softmax_terms import PLAIN, SoftmaxTerms


@triton.jit
def _unsigned(code_at, valid):
    """[BLOCK_N] int32 of 16 bits without a sign, 0 where not valid."""
    return tl.load(code_at, mask=valid, other=0).to(tl.int32) & 0xFFFF


@triton.jit
def _length(code_at, valid):
    """[BLOCK_N] float32 from the bits of float16, 0 where not valid."""
    bits = tl.load(code_at, mask=valid, other=0).to(tl.int16)
    return bits.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _cos_sin(angle):
    """Cosine and sine of float32 angles up to about 1e6, to 1e-7.

    tl.cos and tl.sin hold a table for the largest floats, which every thread keeps in memory.
    """
    quarter = tl.floor(angle * 0.6366197723675814 + 0.5)
    # pi / 2 in two float32: the first product is exact in a fused multiply-add.
    rest = tl.fma(quarter, -1.5707963705062866, angle)
    rest = tl.fma(quarter, 4.371139000186241e-08, rest)
    square = rest * rest
    sine = square * (1 / 362880) - 1 / 5040
    sine = rest + rest * square * (square * (square * sine + 1 / 120) - 1 / 6)
    cosine = square * (1 / 40320) - 1 / 720
    cosine = 1 + square * (square * (square * cosine + 1 / 24) - 1 / 2)
    turn = quarter.to(tl.int32)
    odd = (turn & 1) == 1
    cos = tl.where(odd, sine, cosine)
    sin = tl.where(odd, cosine, sine)
    cos = tl.where(((turn + 1) & 2) == 2, -cos, cos)
    return cos, tl.where((turn & 2) == 2, -sin, sin)


@triton.jit(
    do_not_specialize=["stride_entry_table", "stride_code_table", "num_splits"],
    do_not_specialize_on_alignment=["num_entries_ptr", "num_tokens_ptr"],  # rows of a table
)
def _split_kernel(
    query_ptr,  # [R, H, D]
    key_ptr,  # [B, KV, N, D]
    value_ptr,  # [B, KV, N, D]
    entry_table_ptr,  # [R, P]
    num_entries_ptr,  # [R]
    code_ptr,  # [B, KV, N, W] int16
    code_table_ptr,  # [R, P2]
    num_tokens_ptr,  # [R]
    inv_freq_ptr,  # [HALF] float32
    part_ptr,  # [R, H, S, D] float32: softmax of a split times its values
    lse_ptr,  # [R, H, S] float32: log2 of a split's sum of exponentials
    scale_log2, value_scale, num_heads, D,
    stride_qr, stride_qh,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_cb, stride_ch, stride_cn, stride_cw,
    stride_entry_table, stride_code_table, split_len, num_splits,
    G: tl.constexpr,
    N: tl.constexpr,
    T: tl.constexpr,
    HALF: tl.constexpr,  # pairs of channels that RoPE turns
    NEOX: tl.constexpr,
    CAP: tl.constexpr,  # of logits in base 2; 0: none
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_REST: tl.constexpr,  # channels that are not turned; 0: none
):  # fmt: skip
    """One split of one request: all query heads of one KV head."""
    split = tl.program_id(0)
    head = tl.program_id(1)
    request = tl.program_id(2).to(tl.int64)
    num_tokens = tl.load(num_tokens_ptr + request)
    group = tl.arange(0, BLOCK_M)
    place = (request * num_heads + head * G + group) * num_splits + split
    start = split * split_len
    if start >= num_tokens:
        tl.store(lse_ptr + place, float("-inf"), mask=group < G)
        return
    num_entries = tl.load(num_entries_ptr + request)
    entry_table = entry_table_ptr + request * stride_entry_table
    code_table = code_table_ptr + request * stride_code_table
    key_head = key_ptr + head.to(tl.int64) * stride_kh
    value_head = value_ptr + head.to(tl.int64) * stride_vh
    code_head = code_ptr + head.to(tl.int64) * stride_ch
    pairs = tl.arange(0, BLOCK_H)
    dims = tl.arange(0, BLOCK_D)
    inv_freq = tl.load(inv_freq_ptr + pairs, mask=pairs < HALF, other=0.0)
    query_rows = query_ptr + request * stride_qr + (head * G + group) * stride_qh
    if NEOX:
        query_a = load_channels(query_rows, 1, pairs, group < G, HALF)
        query_b = load_channels(query_rows + HALF, 1, pairs, group < G, HALF)
    else:
        query_a = load_channels(query_rows, 2, pairs, group < G, HALF)
        query_b = load_channels(query_rows + 1, 2, pairs, group < G, HALF)
    if BLOCK_REST > 0:
        rest = tl.arange(0, BLOCK_REST)
        query_rest = load_channels(query_rows + 2 * HALF, 1, rest, group < G, D - 2 * HALF)

    highest, total, out = empty_softmax(BLOCK_M, BLOCK_D)
    for first in range(start, tl.minimum(start + split_len, num_tokens), BLOCK_N):
        tokens = first + tl.arange(0, BLOCK_N)
        valid = tokens < num_tokens
        blocks, offsets = token_slots(code_table, tokens // T, tl.cdiv(num_tokens, T), N)
        code_at = code_head + blocks * stride_cb + offsets * stride_cn + tokens % T * stride_cw
        run = T * stride_cw
        key_index = _unsigned(code_at, valid)
        value_index = _unsigned(code_at + run, valid)
        key_length = _length(code_at + 2 * run, valid)
        value_length = _length(code_at + 3 * run, valid)
        position = _unsigned(code_at + 4 * run, valid) | (_unsigned(code_at + 5 * run, valid) << 16)

        blocks, offsets = token_slots(entry_table, key_index, num_entries, N)
        rows = key_head + blocks * stride_kb + offsets * stride_kn
        if NEOX:
            a = load_channels(rows, stride_kd, pairs, valid, HALF)
            b = load_channels(rows + HALF * stride_kd, stride_kd, pairs, valid, HALF)
        else:
            both = load_channels(rows, stride_kd, tl.arange(0, 2 * BLOCK_H), valid, 2 * HALF)
            a, b = tl.split(tl.reshape(both, [BLOCK_N, BLOCK_H, 2]))
        a, b = a.to(tl.float32), b.to(tl.float32)
        cos, sin = _cos_sin(position.to(tl.float32)[:, None] * inv_freq[None, :])
        turned_a = (a * cos - b * sin).to(query_a.dtype)
        turned_b = (b * cos + a * sin).to(query_a.dtype)
        logits = tl.dot(query_a, tl.trans(turned_a), input_precision="ieee")
        logits = tl.dot(query_b, tl.trans(turned_b), logits, input_precision="ieee")
        if BLOCK_REST > 0:
            still = load_channels(rows + 2 * HALF * stride_kd, stride_kd, rest, valid, D - 2 * HALF)
            logits = tl.dot(
                query_rest, tl.trans(still.to(query_a.dtype)), logits, input_precision="ieee"
            )
        logits = capped(logits * (key_length * scale_log2)[None, :], CAP)
        logits = tl.where(valid[None, :], logits, float("-inf"))

        weights, shrink, highest, total = softmax_step(logits, highest, total)
        blocks, offsets = token_slots(entry_table, value_index, num_entries, N)
        rows = value_head + blocks * stride_vb + offsets * stride_vn
        weights = (weights * value_length[None, :]).to(query_a.dtype)
        out = add_values(out, weights, shrink, rows, stride_vd, dims, valid, D)

    store_split(
        part_ptr, lse_ptr, place, group < G, out, highest, total, value_scale, dims, D
    )  # fmt: skip


def codebook_attention(
    queries: torch.Tensor,
    book: CodebookPages,
    inv_freq: torch.Tensor,
    is_neox: bool,
    scale: float,
    tail: TailPages | None = None,
    terms: SoftmaxTerms = PLAIN,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend from one query per request to its tokens that are stored as codes, and to its tail.

    A request with several query tokens is as many requests here, each with its own length of tail.

    Parameters
    ----------
    queries : torch.Tensor
        [R, H, D] float32, float16 or bfloat16, after RoPE; R may be 0. Elements of a row must be
        neighbours.
    book : CodebookPages
        Where the R requests' entries (before RoPE) and codes are; a request may have none.
    inv_freq : torch.Tensor
        [rotary_dim / 2] float32, radians per position; further channels are not turned.
    is_neox : bool
        Whether pairs are channels (i, i + rotary_dim / 2); else (2 i, 2 i + 1).
    scale : float
        Softmax scale of the layer, usually D ** -0.5.
    tail : TailPages, optional
        Where the R requests' ordinary tokens (keys after RoPE) are; a request may have none.
    terms : SoftmaxTerms, optional
        Soft cap and sinks of the layer.

    Returns
    -------
    tuple
        Outputs [R, H, D] in the queries' dtype, and [R, H] float32 natural logarithms of the
        softmax's denominators. Zeros and -inf for a request without tokens.

    Raises
    ------
    ValueError
        If queries, books, codes, frequencies and tails do not fit.
    """
    check_codebook(queries, book, inv_freq, tail)
    if queries.stride(2) != 1:
        raise ValueError("elements of a query must be neighbours in memory")
    num_requests, num_heads, dim = queries.shape
    if not num_requests:
        return torch.empty_like(queries), queries.new_empty(0, num_heads, dtype=torch.float32)
    programs = num_requests * book.entries.num_kv_heads
    tile = FLOAT32_TILE if queries.dtype == torch.float32 else TILE
    split_len = split_length(book.max_tokens, programs, tile)
    code_splits = triton.cdiv(book.max_tokens, split_len)
    num_splits = code_splits + (tail_splits(tail, queries.dtype)[0] if tail is not None else 0)
    part_lse = queries.new_empty(num_requests, num_heads, num_splits, dtype=torch.float32)
    part = part_lse.new_empty(*part_lse.shape, dim)
    if code_splits:
        cap = terms.soft_cap * LOG2E
        _attend_codes(queries, book, inv_freq, is_neox, scale, cap, part, part_lse, split_len)
    if tail is not None:
        attend_tail(queries, tail, scale, part, part_lse, code_splits, terms.soft_cap)
    return merge_splits(part, part_lse, queries.dtype, terms.sinks)


def _attend_codes(
    queries: torch.Tensor,
    book: CodebookPages,
    inv_freq: torch.Tensor,
    is_neox: bool,
    scale: float,
    cap: float,
    part: torch.Tensor,
    part_lse: torch.Tensor,
    split_len: int,
) -> None:
    """Write parts and lse of the codes' splits of `split_len` tokens, from split 0 on."""
    entries, half = book.entries, inv_freq.numel()
    num_requests, num_heads, dim = queries.shape
    group, rest = num_heads // entries.num_kv_heads, dim - 2 * half
    wide = queries.dtype == torch.float32
    code_splits = triton.cdiv(book.max_tokens, split_len)
    _split_kernel[(code_splits, entries.num_kv_heads, num_requests)](
        queries, entries.keys, entries.values, entries.block_table, entries.num_tokens,
        book.codes, book.code_table, book.num_tokens, inv_freq, part, part_lse,
        scale * entries.key_scale * LOG2E, entries.value_scale, num_heads, dim,
        *queries.stride()[:2], *entries.keys.stride(), *entries.values.stride(),
        *book.codes.stride(), entries.block_table.stride(0), book.code_table.stride(0),
        split_len, part.shape[2],
        G=group, N=entries.block_size, T=book.codes_per_row, HALF=half, NEOX=is_neox,
        CAP=cap,
        BLOCK_M=max(triton.next_power_of_2(group), 16),
        BLOCK_N=FLOAT32_TILE if wide else TILE,
        BLOCK_D=max(triton.next_power_of_2(dim), 16),
        BLOCK_H=max(triton.next_power_of_2(half), 16),
        BLOCK_REST=max(triton.next_power_of_2(rest), 16) if rest else 0,
        num_warps=8 if wide else 4,
        num_stages=2,  # entries wait for their codes anyway, and a third stage spills registers
    )  # fmt: skip


TILE = 32
"""Tokens at a time: of 16 bits, three programs of 4 warps fit a multiprocessor side by side."""

FLOAT32_TILE = 16
"""With float32 queries, which no tensor core takes; more would spill registers, of 8 warps too."""
