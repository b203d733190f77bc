"""Attention that the last tokens of each request pay to all of it, read from the paged cache.

    L[h, i, j] = q[h, i] . k[h // g, j] * scale,  j <= n - w + i
    A[h, i, j] = softmax_j L[h, i, j]
    token_scores[kv, j]  = mean over the g query heads of kv and the w queries of A
    window_scores[kv, b] = mean of token_scores[kv, j] over the tokens j of window b,
                           j < n - w: windows of `window_size` tokens, cut from token 0

(SnapKV, arXiv 2404.14469, before pooling; WindowKV's equation 4 with p = window, 2503.17922.)
The softmax is exact over all n keys. The sequence is split over programs, so the sum behind each
row's softmax is known only after a first pass:

* token scores: pass 1 leaves log2 of each split's sum of exponentials, a small launch adds up the
  splits, pass 2 reads the keys again and writes one number per token: [H, w, n] never exists.
* window scores: one pass over the keys, which leaves the logarithm of each window's sum,
  [H, w, n / window_size] numbers; a small launch puts them together.

Sizes that change from step to step are not specialised on, so that no launch waits for a compiler
once the first has run.

Dimensions: R requests, H query heads, KV key-value heads, g = H / KV, w queries, D head_dim,
B blocks, N slots per block, n tokens, S splits, M = g * w rows per KV head: row m is query
m // g of query head m % g of the KV head.
"""

import torch
import triton
import triton.language as tl

from vllm_kvcompress.kernels.common import LOG2E, check_window, split_length, token_slots
from vllm_kvcompress.kernels.pages import Pages


@triton.jit
def load_queries(query_row, rows, stride_w, stride_h, D, G: tl.constexpr, dims, M):
    """[BLOCK_M, BLOCK_D] queries of one KV head; rows from M on are zero."""
    at = (rows // G)[:, None] * stride_w + (rows % G)[:, None] * stride_h + dims[None, :]
    return tl.load(query_row + at, mask=(rows < M)[:, None] & (dims < D)[None, :], other=0.0)


@triton.jit
def load_keys(key_head, table_row, tokens, num_tokens, stride_b, stride_n, stride_d, dims, D,
              N: tl.constexpr):  # fmt: skip
    """[BLOCK_N, BLOCK_D] keys of one head; tokens from `num_tokens` on are zero."""
    blocks, offsets = token_slots(table_row, tokens, num_tokens, N)
    at = (blocks * stride_b + offsets * stride_n)[:, None] + dims[None, :] * stride_d
    return tl.load(
        key_head + at, mask=(tokens < num_tokens)[:, None] & (dims < D)[None, :], other=0.0
    )


@triton.jit
def _logits(queries, keys, rows, tokens, num_tokens, scale_log2, W, G: tl.constexpr, M):
    """[BLOCK_M, BLOCK_N] logits in base 2; -inf behind a row's query and in rows from M on."""
    logits = tl.dot(queries, tl.trans(keys.to(queries.dtype)), input_precision="ieee")
    last = num_tokens - W + rows // G  # the query's own token
    seen = (tokens[None, :] <= last[:, None]) & (rows < M)[:, None]
    return tl.where(seen, logits * scale_log2, float("-inf"))


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
        keys = load_keys(
            key_head, table_row, tokens, num_tokens, stride_kb, stride_kn, stride_kd, dims, D, N
        )
        logits = _logits(queries, keys, rows, tokens, num_tokens, scale_log2, W, G, M)
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


@triton.jit(do_not_specialize=["stride_table", "max_tokens"])
def _token_kernel(
    query_ptr,  # [R, w, H, D]
    key_ptr,  # [B, KV, N, D]
    table_ptr,  # [R, P]
    num_tokens_ptr,  # [R]
    lse_ptr,  # [R, KV, M] float32
    out_ptr,  # [R, KV, max_tokens] float32
    scale_log2, W, M, D,
    stride_qr, stride_qw, stride_qh,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_table, split_len, max_tokens,
    G: tl.constexpr,
    N: tl.constexpr,
    ROW_TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One split of one request and KV head: all its rows, tile by tile of tokens."""
    split = tl.program_id(0)
    head = tl.program_id(1)
    request = tl.program_id(2)
    num_tokens = tl.load(num_tokens_ptr + request)
    dims = tl.arange(0, BLOCK_D)
    query_row = query_ptr + request.to(tl.int64) * stride_qr + head * G * stride_qh
    key_head = key_ptr + head.to(tl.int64) * stride_kh
    table_row = table_ptr + request.to(tl.int64) * stride_table
    place = request.to(tl.int64) * tl.num_programs(1) + head
    out_row = out_ptr + place * max_tokens
    rows = tl.arange(0, BLOCK_M)
    queries = load_queries(query_row, rows, stride_qw, stride_qh, D, G, dims, M)
    lse = tl.load(lse_ptr + place * M + rows, mask=rows < M, other=float("inf"))
    start = split * split_len
    end = tl.minimum(start + split_len, num_tokens)
    for first in range(start, end, BLOCK_N):
        tokens = first + tl.arange(0, BLOCK_N)
        keys = load_keys(
            key_head, table_row, tokens, num_tokens, stride_kb, stride_kn, stride_kd, dims, D, N
        )
        logits = _logits(queries, keys, rows, tokens, num_tokens, scale_log2, W, G, M)
        scores = tl.sum(tl.exp2(logits - lse[:, None]), 0)
        if ROW_TILES > 1:  # a loop in here would keep the loop around it from being pipelined
            for tile in range(1, ROW_TILES):
                more = tile * BLOCK_M + rows
                queries_more = load_queries(query_row, more, stride_qw, stride_qh, D, G, dims, M)
                lse_more = tl.load(lse_ptr + place * M + more, mask=more < M, other=float("inf"))
                logits = _logits(queries_more, keys, more, tokens, num_tokens, scale_log2, W, G, M)
                scores += tl.sum(tl.exp2(logits - lse_more[:, None]), 0)
        tl.store(out_row + tokens, scores / M, mask=tokens < max_tokens)
    behind = tl.maximum(start, tl.cdiv(num_tokens, BLOCK_N) * BLOCK_N)
    for first in range(behind, tl.minimum(start + split_len, max_tokens), BLOCK_N):
        tokens = first + tl.arange(0, BLOCK_N)
        tl.store(out_row + tokens, tl.zeros([BLOCK_N], tl.float32), mask=tokens < max_tokens)


@triton.jit(do_not_specialize=["num_units", "num_windows"])
def _window_kernel(
    sums_ptr,  # [R, KV, M, units] float32, log2
    lse_ptr,  # [R, KV, M] float32
    num_tokens_ptr,  # [R]
    out_ptr,  # [R, KV, windows] float32
    W, M, num_kv_heads, num_units, num_windows,
    WINDOW: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Mean attention of some windows of one request and KV head."""
    windows = tl.program_id(0) * BLOCK_W + tl.arange(0, BLOCK_W)
    place = tl.program_id(1).to(tl.int64)
    num_tokens = tl.load(num_tokens_ptr + place // num_kv_heads)
    num_review = tl.maximum(num_tokens - W, 0)
    total = tl.zeros([BLOCK_W], tl.float32)
    for part in range(0, WINDOW // UNIT):
        units = windows * (WINDOW // UNIT) + part
        # Units behind the review context may never have been written by the first pass.
        written = units * UNIT < num_review
        for row_tile in range(0, M, BLOCK_M):
            rows = row_tile + tl.arange(0, BLOCK_M)
            sums = tl.load(
                sums_ptr + (place * M + rows[:, None]) * num_units + units[None, :],
                mask=(rows < M)[:, None] & written[None, :],
                other=float("-inf"),
            )
            lse = tl.load(lse_ptr + place * M + rows, mask=rows < M, other=float("inf"))
            total += tl.sum(tl.exp2(sums - lse[:, None]), 0)
    count = tl.minimum(num_review - windows * WINDOW, WINDOW)
    mean = tl.where(count > 0, total / (M * tl.maximum(count, 1)), 0.0)
    tl.store(out_ptr + place * num_windows + windows, mean, mask=windows < num_windows)


def token_scores(queries: torch.Tensor, pages: Pages, scale: float) -> torch.Tensor:
    """Mean attention per token, for a ragged batch of requests.

    Parameters
    ----------
    queries : torch.Tensor
        [R, w, H, D] float32, float16 or bfloat16, after RoPE: those of each request's last w
        tokens, first to last. Elements of a row must be neighbours.
    pages : Pages
        Where the R requests' keys are; each has at least w tokens.
    scale : float
        Softmax scale of the layer, usually D ** -0.5.

    Returns
    -------
    torch.Tensor
        [R, KV, max_tokens] float32; zero from a request's length on, else each row adds up to 1.

    Raises
    ------
    ValueError
        If queries and pages do not fit.
    """
    lse, _ = first_pass(queries, pages, scale)
    shape, grid, split_len = tiles(queries, pages)
    num_kv_heads, max_tokens = pages.num_kv_heads, pages.max_tokens
    out = lse.new_empty(pages.num_requests, num_kv_heads, max_tokens)
    _token_kernel[(grid[0], num_kv_heads, grid[2])](
        queries, pages.keys, pages.block_table, pages.num_tokens, lse, out,
        *scalars(queries, pages, scale), split_len, max_tokens,
        N=pages.block_size, ROW_TILES=grid[1] // num_kv_heads, **shape, num_warps=NUM_WARPS,
    )  # fmt: skip
    return out


def window_scores(
    queries: torch.Tensor, pages: Pages, scale: float, window_size: int
) -> torch.Tensor:
    """Mean attention per window, for a ragged batch of requests, in one pass over the keys.

    Parameters
    ----------
    queries, pages, scale
        As for `token_scores`.
    window_size : int
        Tokens per window, a power of two of at least `SMALLEST_WINDOW`.

    Returns
    -------
    torch.Tensor
        [R, KV, ceil(max_tokens / window_size)] float32. A window that reaches into the last w
        tokens averages what lies before them; windows without such tokens are zero.

    Raises
    ------
    ValueError
        If queries and pages do not fit, or for another window size.
    """
    check_window_size(window_size)
    unit = min(window_size, tiles(queries, pages)[0]["BLOCK_N"])
    lse, sums = first_pass(queries, pages, scale, unit)
    num_kv_heads, num_units = sums.shape[1], sums.shape[3]
    num_windows = triton.cdiv(pages.max_tokens, window_size)
    out = lse.new_empty(pages.num_requests, num_kv_heads, num_windows)
    _window_kernel[(triton.cdiv(num_windows, 64), pages.num_requests * num_kv_heads)](
        sums, lse, pages.num_tokens, out,
        queries.shape[1], sums.shape[2], num_kv_heads, num_units, num_windows,
        WINDOW=window_size, UNIT=unit, BLOCK_M=32, BLOCK_W=64,
    )  # fmt: skip
    return out


NUM_WARPS = 8
"""128 x 128 logits in float32 take 64 registers of each thread; with 4 warps they would spill."""

SMALLEST_WINDOW = 8
"""Below that, sums over windows would be no smaller a thing to store than scores per token."""


def takes_window_size(window_size: int) -> bool:
    """Whether `window_scores` takes windows of that many tokens."""
    return window_size >= SMALLEST_WINDOW and window_size & (window_size - 1) == 0


def check_window_size(window_size: int) -> None:
    """Refuse what `window_scores` does not take.

    Raises
    ------
    ValueError
        Naming what is allowed.
    """
    if not takes_window_size(window_size):
        raise ValueError(
            f"window_size must be a power of two from {SMALLEST_WINDOW} on, got {window_size}"
        )


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


def first_pass(
    queries: torch.Tensor, pages: Pages, scale: float, unit: int = 0, fit: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """log2 of each row's sum of exponentials [R, KV, M], and of unit sums [R, KV, M, units]."""
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
        N=pages.block_size, UNIT=unit, **shape, num_warps=NUM_WARPS,
    )  # fmt: skip
    total = lse.new_empty(*rows)
    _combine_kernel[(triton.cdiv(total.numel(), 32),)](
        lse, total, total.numel(), grid[0], BLOCK=32, BLOCK_S=32
    )
    return total, sums
