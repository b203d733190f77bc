"""How much every key resembles the others: R-KV's redundancy before its softmax.

    S[i, j] = cos(k[i], k[j]),  S[i, i] = 0
    l(i) = the latest j with S[i, j] > threshold, or 0 if there is none;  S[i, l(i)] = 0
    r[j] = mean over i of S[i, j]

Of several similar keys the latest one is thus counted as less redundant than the earlier ones.
(arXiv 2505.24133.) With unit keys u and their sum t, the mean needs no pair of keys:

    n r[j] = u[j] . t - u[j] . u[j] - sum over the i with l(i) = j of u[i] . u[j]

What is quadratic in n is the search for l(i) alone. A program looks for those of some keys from the
last key backwards, and stops when it has found them all: soon where keys repeat themselves, at the
first key where nothing is similar. Sums over i are taken in integers, so that the order in which
programs add to them makes no difference.

Cost, counted: at most 2 n^2 D floating-point operations per KV head on tensor cores, in the cache's
type (8-bit floats as float16, exactly; float32 in full), and six launches per layer.

Dimensions: R requests, KV key-value heads, D head_dim, B blocks, N slots per block, n tokens.
"""

import torch
import triton
import triton.language as tl

from vllm_kvcompress.kernels.cache.pages import Pages
from vllm_kvcompress.kernels.common import load_rows
from vllm_kvcompress.kernels.formulas.key_redundancy import check_threshold
from vllm_kvcompress.kernels.formulas.key_similarity import UNIT_EPS
from vllm_kvcompress.kernels.scores.keys import unit_sums

_PARTS = 4  # tiles of keys between two looks at whether all have been found
_SHARED_BYTES = 160 << 10  # of the 227 KiB a program may have on Hopper
FIXED_POINT = 2.0**40
"""What cosines are multiplied by before they are added up as 64-bit integers."""


@triton.jit
def _load_keys(key_head, table_row, tokens, num_tokens, stride_b, stride_n, stride_d, dims, D,
               N: tl.constexpr, WIDEN: tl.constexpr):  # fmt: skip
    """[tokens, BLOCK_D] keys of one head; tokens outside [0, num_tokens) are zero."""
    tokens = tl.where(tokens < 0, num_tokens, tokens)
    keys = load_rows(
        key_head, table_row, tokens, num_tokens, stride_b, stride_n, stride_d, dims, D, N
    )
    if WIDEN:  # every 8-bit float is a float16
        keys = keys.to(tl.float16)
    return keys


@triton.jit(do_not_specialize=["stride_table", "max_tokens"])
def _length_kernel(
    key_ptr,  # [B, KV, N, D]
    table_ptr,  # [R, P] int32
    num_tokens_ptr,  # [R] int32
    length_ptr,  # [R, KV, max_tokens] float32
    D, eps,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_table, max_tokens,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Lengths of some keys of one request and KV head, at least `eps`; 0 behind the request."""
    tokens = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    head = tl.program_id(1).to(tl.int64)
    request = tl.program_id(2).to(tl.int64)
    num_tokens = tl.load(num_tokens_ptr + request)
    keys = _load_keys(
        key_ptr + head * stride_kh, table_ptr + request * stride_table, tokens, num_tokens,
        stride_kb, stride_kn, stride_kd, tl.arange(0, BLOCK_D), D, N, False,
    ).to(tl.float32)  # fmt: skip
    length = tl.maximum(tl.sqrt_rn(tl.sum(keys * keys, 1)), eps)
    place = (request * tl.num_programs(1) + head) * max_tokens
    length = tl.where(tokens < num_tokens, length, 0.0)
    tl.store(length_ptr + place + tokens, length, mask=tokens < max_tokens)


@triton.jit(do_not_specialize=["stride_table", "max_tokens"])
def _latest_kernel(
    key_ptr,  # [B, KV, N, D]
    table_ptr,  # [R, P] int32
    num_tokens_ptr,  # [R] int32
    length_ptr,  # [R, KV, max_tokens] float32
    exempt_ptr,  # [R, KV, max_tokens] int64: sum of the cosines that leave their pair out
    threshold, fixed_point, D,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_table, max_tokens,
    N: tl.constexpr,
    WIDEN: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The latest similar key of some keys of one request and KV head."""
    start = tl.program_id(0) * BLOCK
    head = tl.program_id(1).to(tl.int64)
    request = tl.program_id(2).to(tl.int64)
    num_tokens = tl.load(num_tokens_ptr + request)
    rows = start + tl.arange(0, BLOCK)
    dims = tl.arange(0, BLOCK_D)
    key_head = key_ptr + head * stride_kh
    table_row = table_ptr + request * stride_table
    place = (request * tl.num_programs(1) + head) * max_tokens
    mine = _load_keys(
        key_head, table_row, rows, num_tokens, stride_kb, stride_kn, stride_kd, dims, D, N, WIDEN
    )
    lengths = tl.load(length_ptr + place + rows, mask=rows < num_tokens, other=1.0)
    bar = threshold * lengths
    latest = tl.where(rows < num_tokens, -1, 0)
    end = tl.where(start < num_tokens, num_tokens, 0)  # of the keys that nobody has looked at
    while (end > 0) & (tl.min(latest, 0) < 0):
        for part in range(PARTS):
            columns = end - (part + 1) * COLUMNS + tl.arange(0, COLUMNS)
            other = _load_keys(
                key_head, table_row, columns, num_tokens,
                stride_kb, stride_kn, stride_kd, dims, D, N, WIDEN,
            )  # fmt: skip
            across = tl.load(length_ptr + place + columns, mask=columns >= 0, other=1.0)
            products = tl.dot(mine, tl.trans(other), input_precision="ieee")
            similar = products * (1.0 / across)[None, :] > bar[:, None]
            similar = similar & (rows[:, None] != columns[None, :])
            latest = tl.maximum(latest, tl.max(tl.where(similar, columns[None, :], -1), 1))
        end -= PARTS * COLUMNS
    latest = tl.maximum(latest, 0)
    other = _load_keys(
        key_head, table_row, tl.where(rows < num_tokens, latest, num_tokens), num_tokens,
        stride_kb, stride_kn, stride_kd, dims, D, N, WIDEN,
    )  # fmt: skip
    across = tl.load(length_ptr + place + latest, mask=rows < num_tokens, other=1.0)
    cosine = tl.sum(mine.to(tl.float32) * other.to(tl.float32), 1) / lengths / across
    cosine = tl.where(latest == rows, 0.0, cosine)
    tl.atomic_add(
        exempt_ptr + place + latest,
        (cosine * fixed_point).to(tl.int64),
        mask=rows < num_tokens,
        sem="relaxed",
    )


@triton.jit(do_not_specialize=["stride_table", "max_tokens"])
def _mean_kernel(
    key_ptr,  # [B, KV, N, D]
    table_ptr,  # [R, P] int32
    num_tokens_ptr,  # [R] int32
    length_ptr,  # [R, KV, max_tokens] float32
    sums_ptr,  # [R, KV, D] float32
    exempt_ptr,  # [R, KV, max_tokens] int64
    out_ptr,  # [R, KV, max_tokens] float32
    fixed_point, D,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_table, max_tokens,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Redundancy of some keys of one request and KV head; zero behind the request."""
    tokens = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    head = tl.program_id(1).to(tl.int64)
    request = tl.program_id(2).to(tl.int64)
    num_tokens = tl.load(num_tokens_ptr + request)
    dims = tl.arange(0, BLOCK_D)
    place = request * tl.num_programs(1) + head
    total = tl.load(sums_ptr + place * D + dims, mask=dims < D, other=0.0)
    keys = _load_keys(
        key_ptr + head * stride_kh, table_ptr + request * stride_table, tokens, num_tokens,
        stride_kb, stride_kn, stride_kd, dims, D, N, False,
    ).to(tl.float32)  # fmt: skip
    at = place * max_tokens + tokens
    length = tl.load(length_ptr + at, mask=tokens < num_tokens, other=1.0)
    unit = keys / length[:, None]
    others = tl.sum(unit * (total[None, :] - unit), 1)
    exempt = tl.load(exempt_ptr + at, mask=tokens < num_tokens, other=0)
    mean = (others - exempt.to(tl.float32) / fixed_point) / tl.maximum(num_tokens, 1)
    tl.store(out_ptr + at, tl.where(tokens < num_tokens, mean, 0.0), mask=tokens < max_tokens)


def key_redundancy(pages: Pages, threshold: float) -> torch.Tensor:
    """Mean cosine of each key with the others, less the exempted pairs, of a ragged batch.

    Parameters
    ----------
    pages : Pages
        Where the R requests' keys are; values are not read.
    threshold : float
        Cosine above which two keys count as similar, not negative (a key would else be its own
        neighbour). From 1 on no keys are similar. Between cosines that differ from it by less
        than 1e-6, rounding decides.

    Returns
    -------
    torch.Tensor
        [R, KV, max_tokens] float32 in [-1, 1]; zero from a request's length on.

    Raises
    ------
    ValueError
        If the threshold is negative.
    """
    check_threshold(threshold)
    num_requests, num_heads, dim = pages.num_requests, pages.num_kv_heads, pages.head_dim
    block_d = max(triton.next_power_of_2(dim), 16)
    keys, lengths = pages.keys, pages.num_tokens
    element = max(keys.element_size(), 2)
    tile = 128
    while 4 * tile * block_d * element > _SHARED_BYTES:  # own keys, 3 tiles of others
        tile //= 2
    columns = min(tile, 64)  # 128 x 128 products would spill on sm_100
    if element == 4:  # without tensor cores, threads hold whole keys; larger tiles would spill
        tile, columns = 64 if block_d <= 64 else 32, 32  # and short rows' smaller ones, on sm_90
    narrow = max(4096 // block_d, 16)
    shape = {"N": pages.block_size, "BLOCK_D": block_d}
    where = (*keys.stride(), pages.block_table.stride(0), pages.max_tokens)
    length = torch.empty(
        num_requests, num_heads, pages.max_tokens, dtype=torch.float32, device=keys.device
    )
    flat_grid = (triton.cdiv(pages.max_tokens, narrow), num_heads, num_requests)
    _length_kernel[flat_grid](
        keys, pages.block_table, lengths, length, dim, UNIT_EPS, *where, BLOCK=narrow, **shape
    )
    exempt = torch.zeros(length.shape, dtype=torch.int64, device=keys.device)
    _latest_kernel[(triton.cdiv(pages.max_tokens, tile), num_heads, num_requests)](
        keys, pages.block_table, lengths, length, exempt,
        float(threshold) if threshold < 1 else float("inf"), FIXED_POINT, dim, *where,
        WIDEN=keys.element_size() == 1, PARTS=_PARTS, BLOCK=tile, COLUMNS=columns, **shape,
        num_warps=8,
    )  # fmt: skip
    out = torch.empty_like(length)
    _mean_kernel[flat_grid](
        keys, pages.block_table, lengths, length, unit_sums(pages), exempt, out,
        FIXED_POINT, dim, *where, BLOCK=narrow, **shape,
    )  # fmt: skip
    return out
