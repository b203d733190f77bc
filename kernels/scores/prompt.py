"""Attention that all queries of a prompt's chunk pay to the keys they see, summed per key.

    A[h, i, j] = softmax_j(q[h, i] . k[h // g, j] * scale),  j <= n - w + i
    sums[kv, j] = mean over the g query heads of kv of the sum over the w queries of A

(H2O's accumulated attention, arXiv 2306.14048.) Summed over the chunks of a prompt it is the same
as over the whole prompt at once, because a query sees no later key.

Two passes over pairs of a query and a key it sees. The first is `softmax_sums`: the
logarithm of each query's sum of exponentials. In the second a program has a tile of keys and goes
through the queries that see them, so that no sum is shared between programs and each is taken in
the same order every time. Products are taken on tensor cores in the queries' type, sums in float32.

Cost, counted: 4 D floating-point operations per query head and pair, 2 D in each pass, exactly what
the attention of the same chunk takes for its two products. Over a prompt of n tokens that is
2 H D n^2 per layer. Three launches per layer and chunk, whatever their length.

Dimensions: R requests, H query heads, KV key-value heads, g = H / KV, w queries of the chunk,
D head_dim, B blocks, N slots per block, n tokens up to the chunk's end, M = g * w rows per KV head:
row m is query m // g of query head m % g of the KV head.
"""

import torch
import triton
import triton.language as tl

from vllm_kvcompress.kernels.cache.pages import Pages
from vllm_kvcompress.kernels.common import capped, load_rows
from vllm_kvcompress.kernels.formulas.softmax_terms import PLAIN, SoftmaxTerms
from vllm_kvcompress.kernels.scores.softmax_sums import (
    NUM_WARPS,
    cap_of,
    first_pass,
    load_queries,
    scalars,
    tiles,
)


@triton.jit(do_not_specialize=["W", "M", "stride_table", "max_tokens"])
def _key_sum_kernel(
    query_ptr,  # [R, w, H, D]
    key_ptr,  # [B, KV, N, D]
    table_ptr,  # [R, P]
    num_tokens_ptr,  # [R]
    lse_ptr,  # [R, KV, M] float32: log2 of each row's sum of exponentials
    out_ptr,  # [R, KV, max_tokens] float32
    scale_log2, W, M, D,
    stride_qr, stride_qw, stride_qh,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_table, max_tokens,
    G: tl.constexpr,
    N: tl.constexpr,
    CAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile of keys of one request and KV head: all rows that see any of them."""
    start = tl.program_id(0) * BLOCK_N
    head = tl.program_id(1)
    request = tl.program_id(2)
    num_tokens = tl.load(num_tokens_ptr + request)
    tokens = start + tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    query_row = query_ptr + request.to(tl.int64) * stride_qr + head * G * stride_qh
    table_row = table_ptr + request.to(tl.int64) * stride_table
    place = request.to(tl.int64) * tl.num_programs(1) + head
    keys = load_rows(
        key_ptr + head.to(tl.int64) * stride_kh, table_row, tokens, num_tokens,
        stride_kb, stride_kn, stride_kd, dims, D, N,
    ).to(query_ptr.dtype.element_ty)  # fmt: skip
    total = tl.zeros([BLOCK_N], tl.float32)
    first_row = tl.maximum(start - (num_tokens - W), 0) * G
    for first in range(tl.where(start < num_tokens, first_row, M), M, BLOCK_M):
        rows = first + tl.arange(0, BLOCK_M)
        queries = load_queries(query_row, rows, stride_qw, stride_qh, D, G, dims, M)
        lse = tl.load(lse_ptr + place * M + rows, mask=rows < M, other=float("inf"))
        logits = tl.dot(keys, tl.trans(queries), input_precision="ieee") * scale_log2
        logits = capped(logits, CAP)
        seen = tokens[:, None] <= (num_tokens - W + rows // G)[None, :]
        total += tl.sum(tl.where(seen, tl.exp2(logits - lse[None, :]), 0.0), 1)
    out = tl.where(tokens < num_tokens, total / G, 0.0)
    tl.store(out_ptr + place * max_tokens + tokens, out, mask=tokens < max_tokens)


def prompt_attention_sums(
    queries: torch.Tensor, pages: Pages, scale: float, terms: SoftmaxTerms = PLAIN
) -> torch.Tensor:
    """Sum of the attention each key receives, for a ragged batch of requests.

    Parameters
    ----------
    queries : torch.Tensor
        [R, w, H, D] float32, float16 or bfloat16, after RoPE: those of each request's last w
        tokens, first to last. Elements of a row must be neighbours.
    pages : Pages
        Where the R requests' keys are, those of the chunk among them; each has at least w tokens.
    scale : float
        Softmax scale of the layer, usually D ** -0.5.
    terms : SoftmaxTerms, optional
        Its soft cap and sinks.

    Returns
    -------
    torch.Tensor
        [R, KV, max_tokens] float32; zero from a request's length on, else each row adds up to w,
        less what sinks take.

    Raises
    ------
    ValueError
        If queries and pages do not fit.
    """
    lse, _ = first_pass(queries, pages, scale, terms, fit=False)
    shape, _, _ = tiles(queries, pages, fit=False)
    out = lse.new_empty(pages.num_requests, pages.num_kv_heads, pages.max_tokens)
    num_tiles = triton.cdiv(pages.max_tokens, shape["BLOCK_N"])
    _key_sum_kernel[(num_tiles, pages.num_kv_heads, pages.num_requests)](
        queries, pages.keys, pages.block_table, pages.num_tokens, lse, out,
        *scalars(queries, pages, scale), pages.max_tokens,
        N=pages.block_size, **cap_of(terms), **shape, num_warps=NUM_WARPS,
    )  # fmt: skip
    return out
