"""Scores that need no queries: how alike keys are, and how tokens differ from those that follow.

Key similarity (KeyDiff, arXiv 2504.15364):

    anchor[kv]        = mean over the n tokens of k[kv, j] / |k[kv, j]|
    similarity[kv, j] = cos(k[kv, j], anchor[kv])

The sequence is split over programs: pass 1 leaves each split's sum of unit keys, torch adds up the
splits, pass 2 reads the keys again.

Lag scores (LagKV, arXiv 2504.04704). Behind the sinks a request is cut into blocks of L tokens;
x is its keys or its values, token j lies in block b:

    low[d], high[d] = minimum and maximum of x[j', d] over the tokens j' of block b + 1
    spread[j]       = standard deviation over d of (x[j, d] - low[d]) / max(high[d] - low[d], 1e-6)
    score[j]        = mean over keys and values of softmax over block b of spread

The last full block and what lies behind it have no full block after them and score zero, as sinks
do. One program does all of a lag block: it reads the next block for the channels' ranges, then its
own for the spreads. The program of the next block reads that one at about the same time, so one of
the two reads comes from the L2 cache.

Dimensions: R requests, KV key-value heads, D head_dim, B blocks of the cache, N slots per block,
P entries of a block table row, n tokens, S splits, L lag_size.
"""

import torch
import triton
import triton.language as tl

from vllm_kvcompress.kernels.cache.pages import Pages
from vllm_kvcompress.kernels.common import load_rows, split_length
from vllm_kvcompress.kernels.formulas.key_similarity import COSINE_EPS, UNIT_EPS
from vllm_kvcompress.kernels.formulas.lag_contrast import SMALLEST_RANGE, check_lag

_TILE_NUMBERS = 32 * 128  # 32 for each thread; with 64, rows of 8 bits would spill registers
_STAGES = 3  # tiles of a loop that are on their way at once


@triton.jit
def _store_zeros(row, start, end, BLOCK: tl.constexpr):
    """Zeros for the tokens from `start` up to `end`."""
    for first in range(start, end, BLOCK):
        tokens = first + tl.arange(0, BLOCK)
        tl.store(row + tokens, tl.zeros([BLOCK], tl.float32), mask=tokens < end)


@triton.jit(do_not_specialize=["stride_table"])
def _unit_sum_kernel(
    key_ptr,  # [B, KV, N, D]
    table_ptr,  # [R, P] int32
    num_tokens_ptr,  # [R] int32
    sums_ptr,  # [R, KV, S, D] float32
    D, eps,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_table, split_len,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Sum of the unit keys in one split of one request and KV head; zero behind the request."""
    split = tl.program_id(0)
    head = tl.program_id(1)
    request = tl.program_id(2)
    num_tokens = tl.load(num_tokens_ptr + request)
    dims = tl.arange(0, BLOCK_D)
    key_head = key_ptr + head.to(tl.int64) * stride_kh
    table_row = table_ptr + request.to(tl.int64) * stride_table
    # A sum per row of the tile: threads exchange what they have once, not with every tile.
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    start = split * split_len
    end = tl.minimum(start + split_len, num_tokens)
    for first in tl.range(start, end, BLOCK_N, num_stages=STAGES):
        tokens = first + tl.arange(0, BLOCK_N)
        keys = load_rows(
            key_head, table_row, tokens, num_tokens, stride_kb, stride_kn, stride_kd, dims, D, N
        ).to(tl.float32)
        norms = tl.sqrt(tl.sum(keys * keys, 1))
        total += keys * (1.0 / tl.maximum(norms, eps))[:, None]
    place = (request.to(tl.int64) * tl.num_programs(1) + head) * tl.num_programs(0) + split
    tl.store(sums_ptr + place * D + dims, tl.sum(total, 0), mask=dims < D)


@triton.jit(do_not_specialize=["stride_table", "max_tokens"])
def _similarity_kernel(
    key_ptr,  # [B, KV, N, D]
    table_ptr,  # [R, P] int32
    num_tokens_ptr,  # [R] int32
    sums_ptr,  # [R, KV, D] float32
    out_ptr,  # [R, KV, max_tokens] float32
    D, eps,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_table, split_len, max_tokens,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Cosines of one split of one request and KV head, zeros behind the request."""
    split = tl.program_id(0)
    head = tl.program_id(1)
    request = tl.program_id(2)
    num_tokens = tl.load(num_tokens_ptr + request)
    dims = tl.arange(0, BLOCK_D)
    key_head = key_ptr + head.to(tl.int64) * stride_kh
    table_row = table_ptr + request.to(tl.int64) * stride_table
    place = request.to(tl.int64) * tl.num_programs(1) + head
    out_row = out_ptr + place * max_tokens
    anchor = tl.load(sums_ptr + place * D + dims, mask=dims < D, other=0.0)
    anchor = anchor / tl.maximum(num_tokens, 1)
    anchor = anchor / tl.maximum(tl.sqrt(tl.sum(anchor * anchor, 0)), eps)
    start = split * split_len
    end = tl.minimum(start + split_len, num_tokens)
    for first in tl.range(start, end, BLOCK_N, num_stages=STAGES):
        tokens = first + tl.arange(0, BLOCK_N)
        keys = load_rows(
            key_head, table_row, tokens, num_tokens, stride_kb, stride_kn, stride_kd, dims, D, N
        ).to(tl.float32)
        norms = tl.sqrt(tl.sum(keys * keys, 1))
        cosines = tl.sum(keys * anchor[None, :], 1) / tl.maximum(norms, eps)
        tl.store(out_row + tokens, cosines, mask=tokens < end)
    behind = tl.maximum(start, num_tokens)
    _store_zeros(out_row, behind, tl.minimum(start + split_len, max_tokens), BLOCK_N)


@triton.jit
def _spread(cache_head, table_row, spread_row, start, lag, scale, smallest_range,
            stride_b, stride_n, stride_d, D, N: tl.constexpr,
            BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Leave the spreads of a lag block in `spread_row`; return what their softmax needs.

    Returns the largest spread and the sum of exp(spread - largest).
    """
    dims = tl.arange(0, BLOCK_D)
    low = tl.full([BLOCK_D], float("inf"), tl.float32)
    high = tl.full([BLOCK_D], float("-inf"), tl.float32)
    end = start + 2 * lag
    for first in tl.range(start + lag, end, BLOCK_N, num_stages=STAGES):
        tokens = first + tl.arange(0, BLOCK_N)
        rows = load_rows(
            cache_head, table_row, tokens, end, stride_b, stride_n, stride_d, dims, D, N
        ).to(tl.float32)
        rows *= scale
        inside = (tokens < end)[:, None]
        low = tl.minimum(low, tl.min(tl.where(inside, rows, float("inf")), 0))
        high = tl.maximum(high, tl.max(tl.where(inside, rows, float("-inf")), 0))
    inverse = 1.0 / tl.maximum(high - low, smallest_range)

    largest = 0.0  # no standard deviation is below it
    total = 0.0
    end = start + lag
    for first in tl.range(start, end, BLOCK_N, num_stages=STAGES):
        tokens = first + tl.arange(0, BLOCK_N)
        rows = load_rows(
            cache_head, table_row, tokens, end, stride_b, stride_n, stride_d, dims, D, N
        ).to(tl.float32)
        rows = (rows * scale - low[None, :]) * inverse[None, :]
        rows = tl.where((dims < D)[None, :], rows, 0.0)
        rows = tl.where((dims < D)[None, :], rows - (tl.sum(rows, 1) / D)[:, None], 0.0)
        spread = tl.sqrt(tl.sum(rows * rows, 1) / (D - 1))
        tl.store(spread_row + tokens, spread, mask=tokens < end)
        top = tl.maximum(largest, tl.max(tl.where(tokens < end, spread, 0.0), 0))
        weights = tl.where(tokens < end, tl.exp(spread - top), 0.0)
        total = total * tl.exp(largest - top) + tl.sum(weights, 0)
        largest = top
    return largest, total


@triton.jit(do_not_specialize=["stride_table", "max_tokens"])
def _lag_kernel(
    key_ptr,  # [B, KV, N, D]
    value_ptr,  # [B, KV, N, D]
    table_ptr,  # [R, P] int32
    num_tokens_ptr,  # [R] int32
    key_spread_ptr,  # [R, KV, max_tokens] float32
    value_spread_ptr,  # [R, KV, max_tokens] float32
    out_ptr,  # [R, KV, max_tokens] float32
    num_sinks, lag, key_scale, value_scale, smallest_range, D,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_table, max_tokens,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One lag block of one request and KV head; the first one's program also writes the sinks."""
    block = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    request = tl.program_id(2).to(tl.int64)
    table_row = table_ptr + request * stride_table
    place = (request * tl.num_programs(1) + head) * max_tokens
    start = num_sinks + block * lag
    if block == 0:
        _store_zeros(out_ptr + place, 0, num_sinks, BLOCK_N)
    if start + 2 * lag <= tl.load(num_tokens_ptr + request):
        key_row = key_spread_ptr + place
        value_row = value_spread_ptr + place
        key_top, key_total = _spread(
            key_ptr + head * stride_kh, table_row, key_row, start, lag, key_scale, smallest_range,
            stride_kb, stride_kn, stride_kd, D, N, BLOCK_N, BLOCK_D, STAGES,
        )  # fmt: skip
        value_top, value_total = _spread(
            value_ptr + head * stride_vh, table_row, value_row, start, lag, value_scale,
            smallest_range, stride_vb, stride_vn, stride_vd, D, N, BLOCK_N, BLOCK_D, STAGES,
        )  # fmt: skip
        # Other threads of this program wrote what a thread reads now.
        tl.debug_barrier()
        for first in range(start, start + lag, BLOCK_N):
            tokens = first + tl.arange(0, BLOCK_N)
            inside = tokens < start + lag
            keys = tl.load(key_row + tokens, mask=inside, other=0.0)
            values = tl.load(value_row + tokens, mask=inside, other=0.0)
            score = tl.exp(keys - key_top) / key_total + tl.exp(values - value_top) / value_total
            tl.store(out_ptr + place + tokens, score / 2, mask=inside)
    else:
        _store_zeros(out_ptr + place, start, tl.minimum(start + lag, max_tokens), BLOCK_N)


def key_similarity(pages: Pages) -> torch.Tensor:
    """Cosine between each key and the mean of the unit keys, for a ragged batch of requests.

    Parameters
    ----------
    pages : Pages
        Where the R requests' keys are; values are not read.

    Returns
    -------
    torch.Tensor
        [R, KV, max_tokens] float32 in [-1, 1]; zero from a request's length on, and for keys that
        are zero.
    """
    sums = unit_sums(pages)
    grid, where, shape = _key_launch(pages)
    out = sums.new_empty(pages.num_requests, pages.num_kv_heads, pages.max_tokens)
    _similarity_kernel[grid](
        pages.keys, pages.block_table, pages.num_tokens, sums, out, pages.head_dim, COSINE_EPS,
        *where, pages.max_tokens, **shape,
    )  # fmt: skip
    return out


def unit_sums(pages: Pages) -> torch.Tensor:
    """Sum of each request's unit keys, [R, KV, D] float32; values are not read."""
    grid, where, shape = _key_launch(pages)
    sums = torch.empty(
        pages.num_requests, pages.num_kv_heads, grid[0], pages.head_dim,
        dtype=torch.float32, device=pages.keys.device,
    )  # fmt: skip
    _unit_sum_kernel[grid](
        pages.keys, pages.block_table, pages.num_tokens, sums, pages.head_dim, UNIT_EPS,
        *where, **shape,
    )  # fmt: skip
    return sums.sum(2)


def _key_launch(pages: Pages) -> tuple[tuple[int, int, int], tuple[int, ...], dict[str, int]]:
    """The grid (splits, KV heads, requests), strides and tokens per split, and tile sizes."""
    num_requests, num_heads = pages.num_requests, pages.num_kv_heads
    block_d = triton.next_power_of_2(pages.head_dim)
    tile = max(_TILE_NUMBERS // block_d, 8)
    split_len = split_length(pages.max_tokens, num_requests * num_heads, tile)
    grid = (triton.cdiv(pages.max_tokens, split_len), num_heads, num_requests)
    shape = {"N": pages.block_size, "BLOCK_N": tile, "BLOCK_D": block_d, "STAGES": _STAGES}
    return grid, (*pages.keys.stride(), pages.block_table.stride(0), split_len), shape


def lag_scores(pages: Pages, num_sinks: int, lag_size: int) -> torch.Tensor:
    """How much tokens stand out against the block that follows, for a ragged batch of requests.

    Parameters
    ----------
    pages : Pages
        Where the R requests' keys and values are.
    num_sinks : int
        First tokens of each request, which belong to no block.
    lag_size : int
        Tokens per block, 2 or more. One program works on each block, so blocks of many thousand
        tokens leave most of the device idle.

    Returns
    -------
    torch.Tensor
        [R, KV, max_tokens] float32. The tokens of each compared block add up to 1; sinks, the last
        full block, what follows it, and tokens from a request's length on are zero.

    Raises
    ------
    ValueError
        If num_sinks is negative or lag_size below 2.
    """
    check_lag(num_sinks, lag_size)
    max_tokens = pages.max_tokens
    # What is longer than any request acts the same, and could overflow int32 in the kernel.
    num_sinks, lag = min(num_sinks, max_tokens), min(lag_size, max(max_tokens, 1))
    block_d = triton.next_power_of_2(pages.head_dim)
    # float32 comes by way of three stages of shared memory, whose addresses take registers, too.
    numbers = _TILE_NUMBERS // 2 if pages.keys.element_size() == 4 else _TILE_NUMBERS
    tile = max(min(triton.next_power_of_2(lag), numbers // block_d), 16)
    out = torch.empty(
        pages.num_requests, pages.num_kv_heads, max_tokens,
        dtype=torch.float32, device=pages.keys.device,
    )  # fmt: skip
    spreads = out.new_empty(out.shape), out.new_empty(out.shape)
    num_blocks = max(triton.cdiv(max_tokens - num_sinks, lag), 1)  # the first writes the sinks
    _lag_kernel[(num_blocks, pages.num_kv_heads, pages.num_requests)](
        pages.keys, pages.values, pages.block_table, pages.num_tokens, *spreads, out,
        num_sinks, lag, pages.key_scale, pages.value_scale, SMALLEST_RANGE, pages.head_dim,
        *pages.keys.stride(), *pages.values.stride(), pages.block_table.stride(0), max_tokens,
        N=pages.block_size, BLOCK_N=tile, BLOCK_D=block_d, STAGES=_STAGES,
    )  # fmt: skip
    return out
