"""Which tokens survive: per request, layer and KV head the best scores, in order of position.

Tokens rank by forced before not forced, then by higher score, then by earlier position; the first
`num_keep` of that ranking are written in ascending order. Every tensor-parallel rank and every
device must pick the same tokens, and ``torch.topk`` does not promise that: on CUDA nothing is said
about which of several equal scores it takes. It also takes one k for all rows, and its answer,
ordered by score, would have to be sorted again by position.

A program takes a row and sorts nothing. Scores become 32-bit unsigned integers of the same order.
Four passes find the integer of the last token that is kept, 8 bits each from the highest: a
histogram of the digit over the tokens that agree with the digits found so far says which digit is
next, and how many tokens with that digit are kept. A last pass keeps all tokens above that integer
and the first few that equal it; a running sum of the kept ones is each one's place in the row.

Dimensions: L layers, R requests, KV key-value heads, n tokens of the longest request, K max_keep.
"""

import torch
import triton
import triton.language as tl

from vllm_kvcompress.kernels.compaction.checks import check_scores

TILE, NUM_WARPS = 4096, 8
"""Tokens a program takes at once, and who takes them. At most 2 ** 14 tokens, as two counts share
32 bits in the last pass."""

LONE_TILE, LONE_WARPS = 8192, 16
"""The same where a group has few layers, so that most multiprocessors are idle and a program has
one to itself: half as many tiles follow one another. With 32 warps registers would spill."""

FEW_ROWS = 64
"""Layers times KV heads below which programs are alone. Not times requests: a variant of the kernel
must not depend on how many are compacted together, or the warm-up would miss it."""


@triton.jit
def _load_keys(score_row, forced_row, tokens, num_tokens):
    """[TILE] uint32 in the order of the scores: forced tokens highest, behind `num_tokens` zero."""
    inside = tokens < num_tokens
    bits = tl.load(score_row + tokens, mask=inside, other=0.0).to(tl.uint32, bitcast=True)
    forced = tl.load(forced_row + tokens, mask=inside, other=0)
    magnitude = bits & 0x7FFFFFFF
    bits = tl.where(magnitude == 0, magnitude, bits)  # -0.0 is 0.0
    # More magnitude is less where the sign bit is set, and every negative number is below zero.
    keys = bits ^ tl.where(bits > 0x7FFFFFFF, 0xFFFFFFFF, 0x80000000).to(tl.uint32)
    keys = tl.where(magnitude > 0x7F800000, 0x007FFFFF, keys)  # a NaN is -inf
    keys = tl.where(forced != 0, 0xFFFFFFFF, keys)
    return tl.where(inside, keys, 0).to(tl.uint32)


@triton.jit
def _next_digit(score_row, forced_row, num_tokens, found, shift, remaining, TILE: tl.constexpr):
    """The digit at `shift` of the last kept key, and how many tokens with that digit are kept.

    `found` has the higher digits and zeros; `remaining` tokens that agree with it are kept.
    """
    bins = tl.arange(0, 256)
    counts = tl.zeros([256], tl.int32)
    for first in range(0, num_tokens, TILE):
        tokens = first + tl.arange(0, TILE)
        keys = _load_keys(score_row, forced_row, tokens, num_tokens)
        # Above 255 where a higher digit differs. What is behind the tokens has key 0, below all of
        # them, so counting it does not move the digit.
        digits = (keys ^ found) >> shift
        counts += tl.histogram(digits, 256, mask=digits < 256)
    at_least = tl.sum(counts) - tl.cumsum(counts) + counts
    digit = tl.sum((at_least >= remaining).to(tl.int32)) - 1
    return digit, remaining - tl.sum(tl.where(bins > digit, counts, 0))


# One variant for all strides: rows of any length start anywhere, so wide loads are the exception.
@triton.jit(
    do_not_specialize=["stride_l", "stride_r", "stride_h", "stride_forced", "n", "max_keep"]
)
def _select_kernel(
    score_ptr,  # [L, R, KV, n] float32
    forced_ptr,  # [R, n] bool
    num_tokens_ptr,  # [R]
    num_keep_ptr,  # [R]
    out_ptr,  # [L, R, KV, K] int64
    stride_l, stride_r, stride_h, stride_forced,
    n, max_keep,
    TILE: tl.constexpr,
):  # fmt: skip
    """One KV head of one request in one layer."""
    head = tl.program_id(0)
    request = tl.program_id(1)
    layer = tl.program_id(2)
    num_tokens = tl.minimum(tl.load(num_tokens_ptr + request), n)
    num_keep = tl.minimum(tl.load(num_keep_ptr + request), tl.minimum(num_tokens, max_keep))
    forced_row = forced_ptr + request.to(tl.int64) * stride_forced
    score_row = score_ptr + layer.to(tl.int64) * stride_l
    score_row += request.to(tl.int64) * stride_r + head.to(tl.int64) * stride_h
    place = (layer.to(tl.int64) * tl.num_programs(1) + request) * tl.num_programs(0) + head
    out_row = out_ptr + place * max_keep

    last = tl.full([], 0, tl.uint32)  # key of the last token that is kept
    remaining = num_keep
    shift = tl.full([], 24, tl.uint32)
    for _ in range(4):
        digit, remaining = _next_digit(
            score_row, forced_row, num_tokens, last, shift, remaining, TILE
        )
        last |= digit.to(tl.uint32) << shift
        shift -= 8

    num_above = tl.full([], 0, tl.int32)
    num_equal = tl.full([], 0, tl.int32)
    for first in range(0, num_tokens, TILE):
        tokens = first + tl.arange(0, TILE)
        keys = _load_keys(score_row, forced_row, tokens, num_tokens)
        above, equal = keys > last, keys == last
        # One running sum counts both: tokens above in the low 16 bits, equal ones in the high.
        both = above.to(tl.int32) + (equal.to(tl.int32) << 16)
        counts = tl.cumsum(both)  # up to and with each token
        rank = num_equal + (counts >> 16)
        kept = num_above + (counts & 0xFFFF) + tl.minimum(rank, remaining)
        chosen = above | (equal & (rank <= remaining))
        tl.store(out_row + kept - 1, tokens.to(tl.int64), mask=chosen)
        total = tl.sum(both)
        num_above += total & 0xFFFF
        num_equal += total >> 16

    for first in range(num_keep, max_keep, TILE):
        places = first + tl.arange(0, TILE)
        tl.store(out_row + places, tl.full([TILE], -1, tl.int64), mask=places < max_keep)


def select_tokens(
    scores: torch.Tensor,
    forced: torch.Tensor,
    num_tokens: torch.Tensor,
    num_keep: torch.Tensor,
    max_keep: int,
) -> torch.Tensor:
    """Pick each request's tokens to keep, per layer and KV head.

    Forced tokens come before all others; if there are more of them than a request keeps, the
    earliest are kept. Equal scores go to the earlier token; -0.0 equals 0.0; NaN equals -inf.

    Parameters
    ----------
    scores : torch.Tensor
        [L, R, KV, n] float32, higher = keep. The scores of a row must be neighbours; the other
        strides are free, also 0.
    forced : torch.Tensor
        [R, n] bool: tokens that are kept whatever their score.
    num_tokens : torch.Tensor
        [R] int32, tokens of each request that may be chosen; what lies behind is not read.
    num_keep : torch.Tensor
        [R] int32, tokens to keep of each request, at most its `num_tokens` and `max_keep`.
    max_keep : int
        K, the largest of them, known on the host.

    Returns
    -------
    torch.Tensor
        [L, R, KV, K] int64, ascending; -1 from a request's `num_keep` on.

    Raises
    ------
    ValueError
        If shapes or types do not fit, or the scores of a row are not neighbours.
    """
    check_scores(scores, forced)
    num_layers, num_requests, num_heads, n = scores.shape
    out = torch.empty(
        num_layers, num_requests, num_heads, max_keep, dtype=torch.int64, device=scores.device
    )
    is_lone = num_layers * num_heads < FEW_ROWS
    _select_kernel[(num_heads, num_requests, num_layers)](
        scores, forced, num_tokens, num_keep, out,
        *scores.stride()[:3], forced.stride(0), n, max_keep,
        TILE=LONE_TILE if is_lone else TILE, num_warps=LONE_WARPS if is_lone else NUM_WARPS,
    )  # fmt: skip
    return out
