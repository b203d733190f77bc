"""Attention over sequences cut into splits: what a program of one split keeps, and their sum.

    m = max_t L[t],   s = sum_t exp2(L[t] - m),   part = sum_t exp2(L[t] - m) V[t] / s
    lse[split] = m + log2 s
    out = sum_split exp2(lse[split] - top) part[split] / sum_split exp2(lse[split] - top)

over the tokens t of a split, with logits L of base 2 and top the largest lse. A split is a softmax
of its own, so splits of different kinds of tokens, written by different kernels, can lie side by
side in the same two buffers: one small launch adds them all up. The number of splits changes from
step to step; the launch is compiled once for all of them.

Dimensions: R requests, H query heads, D head_dim, S splits.
"""

import torch
import triton
import triton.language as tl

from vllm_kvcompress.kernels.common import load_channels


@triton.jit
def empty_softmax(BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """Maximum [BLOCK_M], sum [BLOCK_M] and weighted values [BLOCK_M, BLOCK_D] of no tokens."""
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    return highest, total, tl.zeros([BLOCK_M, BLOCK_D], tl.float32)


@triton.jit
def softmax_step(logits, highest, total):
    """Weights [BLOCK_M, BLOCK_N] of one more tile, what earlier ones shrink by, maximum and sum.

    Every row needs a logit above -inf in the first tile already.
    """
    top = tl.maximum(highest, tl.max(logits, 1))
    weights = tl.exp2(logits - top[:, None])
    shrink = tl.exp2(highest - top)
    return weights, shrink, top, total * shrink + tl.sum(weights, 1)


@triton.jit
def add_values(out, weights, shrink, rows, stride_d, dims, valid, D):
    """Weighted values [BLOCK_M, BLOCK_D] with those of one more tile, whose rows start there."""
    values = load_channels(rows, stride_d, dims, valid, D).to(weights.dtype)
    return tl.dot(weights, values, out * shrink[:, None], input_precision="ieee")


@triton.jit
def store_split(part_ptr, lse_ptr, place, rows, out, highest, total, value_scale, dims, D):
    """Write the part and the lse of one split; `place` [BLOCK_M] counts [R, H, S]."""
    divisor = tl.where(total > 0, total, 1.0)
    lse = tl.where(total > 0, tl.log2(divisor) + highest, float("-inf"))
    tl.store(lse_ptr + place, lse, mask=rows)
    tl.store(
        part_ptr + place[:, None] * D + dims[None, :],
        out * (value_scale / divisor)[:, None],
        mask=rows[:, None] & (dims < D)[None, :],
    )


@triton.jit(do_not_specialize=["num_splits"])
def _merge_kernel(
    part_ptr,  # [R, H, S, D] float32
    lse_ptr,  # [R, H, S] float32, log2; -inf: the split has no tokens
    out_ptr,  # [R, H, D]
    out_lse_ptr,  # [R, H] float32, natural logarithm
    sink_ptr,  # [H] natural logits (SINKS)
    num_splits, num_heads, D,
    SINKS: tl.constexpr,
    BLOCK: tl.constexpr,  # splits at a time
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """All splits of one query head of one request; parts of splits without tokens are not read."""
    place = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, BLOCK_D)
    lse_row = lse_ptr + place * num_splits
    highest = tl.full([BLOCK], float("-inf"), tl.float32)
    for first in range(0, num_splits, BLOCK):
        splits = first + tl.arange(0, BLOCK)
        lse = tl.load(lse_row + splits, mask=splits < num_splits, other=float("-inf"))
        highest = tl.maximum(highest, lse)
    top = tl.max(highest, 0)
    if SINKS:
        sink = tl.load(sink_ptr + place % num_heads).to(tl.float32) * 1.4426950408889634
        top = tl.maximum(top, sink)
    base = tl.where(top == float("-inf"), 0.0, top)
    weight_sums = tl.zeros([BLOCK], tl.float32)
    out = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, num_splits, BLOCK):
        splits = first + tl.arange(0, BLOCK)
        lse = tl.load(lse_row + splits, mask=splits < num_splits, other=float("-inf"))
        parts = tl.load(
            part_ptr + (place * num_splits + splits)[:, None] * D + dims[None, :],
            mask=(lse > float("-inf"))[:, None] & (dims < D)[None, :],
            other=0.0,
        )
        weights = tl.exp2(lse - base)
        weight_sums += weights
        out += tl.sum(weights[:, None] * parts, 0)
    total = tl.sum(weight_sums, 0)
    if SINKS:  # a weight without a value
        total += tl.exp2(sink - base)
    divisor = tl.where(total > 0, total, 1.0)
    out = (out / divisor).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + place * D + dims, out, mask=dims < D)
    natural = (tl.log2(divisor) + base) * 0.6931471805599453
    tl.store(out_lse_ptr + place, tl.where(total > 0, natural, float("-inf")))


def merge_splits(
    part: torch.Tensor,
    part_lse: torch.Tensor,
    dtype: torch.dtype,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add up the splits of every request and query head.

    Parameters
    ----------
    part : torch.Tensor
        [R, H, S, D] float32, contiguous: outputs of the splits. Not read where the lse is -inf.
    part_lse : torch.Tensor
        [R, H, S] float32, contiguous: logarithms of base 2 of the splits' sums of exponentials,
        -inf for a split without tokens.
    dtype : torch.dtype
        Of the outputs.
    sinks : torch.Tensor, optional
        [H] learned logits, any float dtype: one more in each head's denominator.

    Returns
    -------
    tuple
        Outputs [R, H, D], and [R, H] float32 natural logarithms of the softmax's denominators.
        Zeros and -inf (or the sink) where no split has tokens.
    """
    num_requests, num_heads, num_splits, dim = part.shape
    out = torch.empty(num_requests, num_heads, dim, dtype=dtype, device=part.device)
    lse = torch.empty(num_requests, num_heads, dtype=torch.float32, device=part.device)
    block_d = max(triton.next_power_of_2(dim), 16)
    _merge_kernel[(num_requests * num_heads,)](
        part, part_lse, out, lse, lse if sinks is None else sinks, num_splits, num_heads, dim,
        SINKS=sinks is not None, BLOCK=16, BLOCK_D=block_d, num_warps=max(block_d // 128, 1),
    )  # fmt: skip
    return out, lse
