"""The sum behind every query's softmax: the first pass of what measures attention.

    L[h, i, j] = q[h, i] . k[h // g, j] * scale,  j <= n - w + i
    lse[h, i]  = log2 of the sum over j of 2^(L[h, i, j] log2 e)

where a layer may cap L and add a sink to the sum (`formulas.softmax_terms`).

The sequence is split over programs. Each leaves the logarithm of its split's sum, and a small
launch adds up the splits. The same pass can leave the sums over units of a few tokens, for windows.

Dimensions: R requests, H query heads, KV key-value heads, g = H / KV, w queries, D head_dim,
B blocks, N slots per block, n tokens, S splits, M = g * w rows per KV head: row m is query
m // g of query head m % g of the KV head.
"""

import torch
import triton
import triton.language as tl

from vllm_kvcompress.kernels.cache.checks import check_window
from vllm_kvcompress.kernels.cache.pages import Pages
from vllm_kvcompress.kernels.common import LOG2E, capped, load_rows, split_length
from vllm_kvcompress.kernels.formulas.softmax_terms import PLAIN, SoftmaxTerms


@triton.jit
def load_queries(query_row, rows, stride_w, stride_h, D, G: tl.constexpr, dims, M):
    """[BLOCK_M, BLOCK_D] queries of one KV head; rows from M on are zero."""
    at = (rows // G)[:, None] * stride_w + (rows % G)[:, None] * stride_h + dims[None, :]
    return tl.load(query_row + at, mask=(rows < M)[:, None] & (dims < D)[None, :], other=0.0)


@triton.jit
def row_logits(queries, keys, rows, tokens, num_tokens, scale_log2, W, G: tl.constexpr, M,
               CAP: tl.constexpr):  # fmt: skip
    """[BLOCK_M, BLOCK_N] logits in base 2; -inf behind a row's query and in rows from M on."""
    logits = tl.dot(queries, tl.trans(keys.to(queries.dtype)), input_precision="ieee")
    return seen_logits(logits, rows, tokens, num_tokens, scale_log2, W, G, M, CAP)


@triton.jit
def seen_logits(logits, rows, tokens, num_tokens, scale_log2, W, G: tl.constexpr, M,
                CAP: tl.constexpr):  # fmt: skip
    """[BLOCK_M, BLOCK_N] products of queries and keys as logits in base 2; -inf as above."""
    last = num_tokens - W + rows // G  # the query's own token
    seen = (tokens[None, :] <= last[:, None]) & (rows < M)[:, None]
    return tl.where(seen, capped(logits * scale_log2, CAP), float("-inf"))


@triton.jit(do_not_specialize=["W", "M", "stride_table", "num_splits", "num_units"])
def _stats_kernel(
    query_ptr,  # [R, w, H, D]
    key_ptr,  # [B, KV, N, D]
    table_ptr,  # [R, P]
    num_tokens_ptr,  # [R]
    lse_ptr,  # [R, KV, M, S] float32: log2 of a split's sum of exponentials
    sums_ptr,  # [R, KV, M, units] float32: log2 of sums of exponentials (UNIT > 0)
    scale_log2, W, M, D,
    stride_qr, stride_qw, stride_qh,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_table, split_len, num_splits, num_units,
    G: tl.constexpr,
    N: tl.constexpr,
    UNIT: tl.constexpr,  # tokens per sum, divides BLOCK_N; 0: no sums
    CAP: tl.constexpr,  # of logits in base 2; 0: none
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One split of one request, one tile of rows of one KV head."""
    row_tiles = tl.cdiv(M, BLOCK_M)
    split = tl.program_id(0)
    head = tl.program_id(1) // row_tiles
    request = tl.program_id(2)
    num_kv_heads = tl.num_programs(1) // row_tiles
    num_tokens = tl.load(num_tokens_ptr + request)
    rows = (tl.program_id(1) % row_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    query_row = query_ptr + request.to(tl.int64) * stride_qr + head * G * stride_qh
    key_head = key_ptr + head.to(tl.int64) * stride_kh
    table_row = table_ptr + request.to(tl.int64) * stride_table
    place = (request.to(tl.int64) * num_kv_heads + head) * M + rows  # [BLOCK_M]
    queries = load_queries(query_row, rows, stride_qw, stride_qh, D, G, dims, M)

    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    start = split * split_len
    seen = num_tokens - W + tl.minimum(tl.max(rows, 0), M - 1) // G + 1  # by any of the rows
    for first in range(start, tl.minimum(start + split_len, seen), BLOCK_N):
        tokens = first + tl.arange(0, BLOCK_N)
        keys = load_rows(
            key_head, table_row, tokens, num_tokens, stride_kb, stride_kn, stride_kd, dims, D, N
        )
        logits = row_logits(queries, keys, rows, tokens, num_tokens, scale_log2, W, G, M, CAP)
        top = tl.maximum(highest, tl.max(logits, 1))
        # A row that has seen no key yet has the maximum -inf, and -inf - -inf is not a number.
        base = tl.where(top == float("-inf"), 0.0, top)
        weights = tl.exp2(logits - base[:, None])
        total = total * tl.exp2(highest - base) + tl.sum(weights, 1)
        highest = top
        if UNIT > 0:
            # In logarithms, so that what a later tile adds to the maximum needs no correction.
            review = tl.where(tokens[None, :] < num_tokens - W, weights, 0.0)
            grid = tl.reshape(review, [BLOCK_M, BLOCK_N // UNIT, UNIT])
            sums = tl.log2(tl.sum(grid, 2)) + base[:, None]
            units = first // UNIT + tl.arange(0, BLOCK_N // UNIT)
            tl.store(
                sums_ptr + place[:, None] * num_units + units[None, :],
                sums,
                mask=(rows < M)[:, None] & (units < num_units)[None, :],
            )
    lse = tl.where(total > 0, tl.log2(total) + highest, float("-inf"))
    tl.store(lse_ptr + place * num_splits + split, lse, mask=rows < M)


@triton.jit(do_not_specialize=["num_rows", "num_splits"])
def _combine_kernel(
    lse_ptr,  # [rows, S] float32
    out_ptr,  # [rows] float32
    num_rows, num_splits,
    BLOCK: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    """log2 of the sum over splits; +inf for rows that see nothing, so that they weigh nothing."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    highest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, num_splits, BLOCK_S):
        splits = first + tl.arange(0, BLOCK_S)
        lse = tl.load(
            lse_ptr + rows[:, None].to(tl.int64) * num_splits + splits[None, :],
            mask=(rows < num_rows)[:, None] & (splits < num_splits)[None, :],
            other=float("-inf"),
        )
        top = tl.maximum(highest, tl.max(lse, 1))
        base = tl.where(top == float("-inf"), 0.0, top)
        total = total * tl.exp2(highest - base) + tl.sum(tl.exp2(lse - base[:, None]), 1)
        highest = top
    result = tl.where(total > 0, tl.log2(total) + highest, float("inf"))
    tl.store(out_ptr + rows, result, mask=rows < num_rows)


NUM_WARPS = 8
"""128 x 128 logits in float32 take 64 registers of each thread; with 4 warps they would spill."""


_SHARED_BYTES = 160 << 10  # of the 227 KiB a program may have on Hopper


_TILE, _WIDE_TILE, FLOAT32_TILE = 128, 32, 16
"""Rows of queries, and tokens, of a program; fewer where head_dim is above 128, and in float32,
which no tensor core takes: threads hold whole rows, and more would spill."""


def tiles(queries: torch.Tensor, pages: Pages, fit: bool = True) -> tuple[dict, tuple, int]:
    """Tile sizes, the grid (splits, KV heads * row tiles, requests), and tokens per split.

    Tiles of rows `fit` few rows, or have one size for any number: one variant of a kernel.
    """
    group = queries.shape[2] // pages.num_kv_heads
    num_rows = group * queries.shape[1]
    block_d = max(triton.next_power_of_2(pages.head_dim), 16)
    tile = _TILE if block_d <= 128 else _WIDE_TILE
    if queries.element_size() == 4:
        tile = FLOAT32_TILE
    while 4 * tile * block_d * queries.element_size() > _SHARED_BYTES:  # queries, 3 tiles of keys
        tile //= 2
    block_m = min(max(triton.next_power_of_2(num_rows), 16), tile) if fit else tile
    heads = pages.num_kv_heads * triton.cdiv(num_rows, block_m)
    split_len = split_length(pages.max_tokens, heads * pages.num_requests, tile)
    grid = (triton.cdiv(pages.max_tokens, split_len), heads, pages.num_requests)
    shape = {"G": group, "BLOCK_M": block_m, "BLOCK_N": tile, "BLOCK_D": block_d}
    return shape, grid, split_len


def scalars(queries: torch.Tensor, pages: Pages, scale: float) -> tuple:
    """Arguments that both passes have in common, in the kernels' order."""
    window, num_heads = queries.shape[1], queries.shape[2]
    return (
        scale * pages.key_scale * LOG2E, window, num_heads // pages.num_kv_heads * window,
        pages.head_dim, *queries.stride()[:3], *pages.keys.stride(), pages.block_table.stride(0),
    )  # fmt: skip


def cap_of(terms: SoftmaxTerms) -> dict[str, float]:
    """The soft cap as kernels are compiled with it; 0 leaves nothing of it in them."""
    return {"CAP": terms.soft_cap * LOG2E}


def first_pass(
    queries: torch.Tensor,
    pages: Pages,
    scale: float,
    terms: SoftmaxTerms = PLAIN,
    unit: int = 0,
    fit: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """log2 of each row's sum of exponentials [R, KV, M], and of unit sums [R, KV, M, units].

    Sinks, [H] or one row for each request [R, H], are in the former.
    """
    check_window(queries, pages.num_requests, pages.num_kv_heads, pages.head_dim)
    if queries.stride(3) != 1:
        raise ValueError("elements of a query must be neighbours in memory")
    shape, grid, split_len = tiles(queries, pages, fit)
    rows = (pages.num_requests, pages.num_kv_heads, shape["G"] * queries.shape[1])
    num_units = triton.cdiv(pages.max_tokens, unit) if unit else 0
    lse = torch.empty(*rows, grid[0], dtype=torch.float32, device=queries.device)
    sums = lse.new_empty(*rows, num_units)
    _stats_kernel[grid](
        queries, pages.keys, pages.block_table, pages.num_tokens, lse, sums,
        *scalars(queries, pages, scale), split_len, grid[0], num_units,
        N=pages.block_size, UNIT=unit, **cap_of(terms), **shape, num_warps=NUM_WARPS,
    )  # fmt: skip
    total = lse.new_empty(*rows)
    _combine_kernel[(triton.cdiv(total.numel(), 32),)](
        lse, total, total.numel(), grid[0], BLOCK=32, BLOCK_S=32
    )
    if terms.sinks is not None:
        sinks = terms.sinks.float().reshape(-1, rows[1], 1, shape["G"]) * LOG2E
        by_query = total.view(*rows[:2], -1, shape["G"])
        torch.logaddexp2(by_query, sinks, out=by_query)  # row m is of query head m % g
    return total, sums
