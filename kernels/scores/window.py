"""Attention that the last tokens of each request pay to all of it, read from the paged cache.

    L[h, i, j] = q[h, i] . k[h // g, j] * scale,  j <= n - w + i
    A[h, i, j] = softmax_j L[h, i, j]   (soft caps and learned sinks: `formulas.softmax_terms`)
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

from vllm_kvcompress.kernels.cache.pages import Pages
from vllm_kvcompress.kernels.common import load_rows
from vllm_kvcompress.kernels.formulas.softmax_terms import PLAIN, SoftmaxTerms
from vllm_kvcompress.kernels.scores.softmax_sums import (
    NUM_WARPS,
    cap_of,
    first_pass,
    load_queries,
    row_logits,
    scalars,
    seen_logits,
    tiles,
)


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
    CAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DIMS: tl.constexpr,  # numbers of a row that are multiplied at once, divides BLOCK_D
):  # fmt: skip
    """One split of one request and KV head: all its rows, tile by tile of tokens."""
    split = tl.program_id(0)
    head = tl.program_id(1)
    request = tl.program_id(2)
    num_tokens = tl.load(num_tokens_ptr + request)
    dims = tl.arange(0, DIMS)
    query_row = query_ptr + request.to(tl.int64) * stride_qr + head * G * stride_qh
    key_head = key_ptr + head.to(tl.int64) * stride_kh
    table_row = table_ptr + request.to(tl.int64) * stride_table
    place = request.to(tl.int64) * tl.num_programs(1) + head
    out_row = out_ptr + place * max_tokens
    rows = tl.arange(0, BLOCK_M)
    if DIMS == BLOCK_D:
        queries = load_queries(query_row, rows, stride_qw, stride_qh, D, G, dims, M)
        lse = tl.load(lse_ptr + place * M + rows, mask=rows < M, other=float("inf"))
    start = split * split_len
    end = tl.minimum(start + split_len, num_tokens)
    for first in range(start, end, BLOCK_N):
        tokens = first + tl.arange(0, BLOCK_N)
        if DIMS == BLOCK_D:
            keys = load_rows(
                key_head, table_row, tokens, num_tokens, stride_kb, stride_kn, stride_kd, dims, D, N
            )
            logits = row_logits(queries, keys, rows, tokens, num_tokens, scale_log2, W, G, M, CAP)
            scores = tl.sum(tl.exp2(logits - lse[:, None]), 0)
            if ROW_TILES > 1:  # a loop in here would keep the one around it from being pipelined
                for tile in range(1, ROW_TILES):
                    more = tile * BLOCK_M + rows
                    queries_more = load_queries(
                        query_row, more, stride_qw, stride_qh, D, G, dims, M
                    )
                    lse_more = tl.load(
                        lse_ptr + place * M + more, mask=more < M, other=float("inf")
                    )
                    logits = row_logits(
                        queries_more, keys, more, tokens, num_tokens, scale_log2, W, G, M, CAP
                    )
                    scores += tl.sum(tl.exp2(logits - lse_more[:, None]), 0)
        else:  # threads that hold whole rows of queries and of keys would spill
            scores = tl.zeros([BLOCK_N], tl.float32)
            for tile in range(0, ROW_TILES):
                own = tile * BLOCK_M + rows
                products = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
                for part in range(0, BLOCK_D, DIMS):
                    some = part + dims
                    queries_part = load_queries(query_row, own, stride_qw, stride_qh, D, G, some, M)
                    keys_part = load_rows(
                        key_head, table_row, tokens, num_tokens, stride_kb, stride_kn, stride_kd,
                        some, D, N,
                    )  # fmt: skip
                    products = tl.dot(
                        queries_part, tl.trans(keys_part.to(queries_part.dtype)), products,
                        input_precision="ieee",
                    )  # fmt: skip
                logits = seen_logits(products, own, tokens, num_tokens, scale_log2, W, G, M, CAP)
                lse_own = tl.load(lse_ptr + place * M + own, mask=own < M, other=float("inf"))
                scores += tl.sum(tl.exp2(logits - lse_own[:, None]), 0)
        tl.store(out_row + tokens, scores / M, mask=tokens < max_tokens)
    behind = tl.maximum(start, tl.cdiv(num_tokens, BLOCK_N) * BLOCK_N)
    for first in range(behind, tl.minimum(start + split_len, max_tokens), BLOCK_N):
        tokens = first + tl.arange(0, BLOCK_N)
        tl.store(out_row + tokens, tl.zeros([BLOCK_N], tl.float32), mask=tokens < max_tokens)


_FLOAT32_DIMS, _FLOAT32_WARPS = 128, 4
"""Numbers of a row that `_token_kernel` multiplies at once, and its warps, in float32, where it
loops over rows of queries and rows are longer: 16 x 16 logits are few for more threads."""


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


def token_scores(
    queries: torch.Tensor, pages: Pages, scale: float, terms: SoftmaxTerms = PLAIN
) -> torch.Tensor:
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
    terms : SoftmaxTerms, optional
        Its soft cap and sinks, [H] or one row for each request [R, H].

    Returns
    -------
    torch.Tensor
        [R, KV, max_tokens] float32; zero from a request's length on, else each row adds up to 1,
        less what sinks take.

    Raises
    ------
    ValueError
        If queries and pages do not fit.
    """
    lse, _ = first_pass(queries, pages, scale, terms)
    shape, grid, split_len = tiles(queries, pages)
    num_kv_heads, max_tokens = pages.num_kv_heads, pages.max_tokens
    row_tiles, dims, num_warps = grid[1] // num_kv_heads, shape["BLOCK_D"], NUM_WARPS
    if queries.element_size() == 4 and row_tiles > 1 and dims > _FLOAT32_DIMS:
        dims, num_warps = _FLOAT32_DIMS, _FLOAT32_WARPS
    out = lse.new_empty(pages.num_requests, num_kv_heads, max_tokens)
    _token_kernel[(grid[0], num_kv_heads, grid[2])](
        queries, pages.keys, pages.block_table, pages.num_tokens, lse, out,
        *scalars(queries, pages, scale), split_len, max_tokens,
        N=pages.block_size, ROW_TILES=row_tiles, **cap_of(terms), **shape, DIMS=dims,
        num_warps=num_warps,
    )  # fmt: skip
    return out


def window_scores(
    queries: torch.Tensor,
    pages: Pages,
    scale: float,
    window_size: int,
    terms: SoftmaxTerms = PLAIN,
) -> torch.Tensor:
    """Mean attention per window, for a ragged batch of requests, in one pass over the keys.

    Parameters
    ----------
    queries, pages, scale, terms
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
    lse, sums = first_pass(queries, pages, scale, terms, unit)
    num_kv_heads, num_units = sums.shape[1], sums.shape[3]
    num_windows = triton.cdiv(pages.max_tokens, window_size)
    out = lse.new_empty(pages.num_requests, num_kv_heads, num_windows)
    _window_kernel[(triton.cdiv(num_windows, 64), pages.num_requests * num_kv_heads)](
        sums, lse, pages.num_tokens, out,
        queries.shape[1], sums.shape[2], num_kv_heads, num_units, num_windows,
        WINDOW=window_size, UNIT=unit, BLOCK_M=32, BLOCK_W=64,
    )  # fmt: skip
    return out


SMALLEST_WINDOW = 8
"""Smaller windows gain nothing: their sums take no less memory than scores per token."""


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
