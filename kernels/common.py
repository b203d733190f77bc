"""Device functions and launch arithmetic that several kernels share."""

import triton
import triton.language as tl

LOG2E = 1.4426950408889634
"""exp(x) = exp2(x * LOG2E): the hardware's exponential is of base 2."""

TARGET_PROGRAMS = 512
"""Programs a launch aims at: about four for each of the 132 multiprocessors of an H200."""


@triton.jit
def token_slots(table_row, tokens, limit, N: tl.constexpr):
    """Block (int64) and offset of tokens; blocks of tokens from `limit` on are not looked up."""
    blocks = tl.load(table_row + tokens // N, mask=tokens < limit, other=0)
    return blocks.to(tl.int64), tokens % N


@triton.jit
def load_rows(cache_head, table_row, tokens, limit, stride_b, stride_n, stride_d, dims, D,
              N: tl.constexpr):  # fmt: skip
    """[tokens, dims] rows of one head of a paged cache; tokens from `limit` on are zero."""
    blocks, offsets = token_slots(table_row, tokens, limit, N)
    at = (blocks * stride_b + offsets * stride_n)[:, None] + dims[None, :] * stride_d
    mask = (tokens < limit)[:, None] & (dims < D)[None, :]
    return tl.load(cache_head + at, mask=mask, other=0.0)


@triton.jit
def load_channels(rows, stride, channels, valid, limit):
    """[ROWS, CHANNELS] elements of rows that start at some pointers, zero where not valid."""
    at = rows[:, None] + channels[None, :] * stride
    return tl.load(at, mask=valid[:, None] & (channels < limit)[None, :], other=0.0)


@triton.jit
def capped(logits, CAP: tl.constexpr):
    """CAP * tanh(logits / CAP) of float32 logits and a cap of base 2; as they are if CAP is 0."""
    if CAP > 0:
        x = logits / CAP
        far = 1.0 - 2.0 / (tl.exp2(x * 2.8853900817779268) + 1.0)
        square = x * x  # near 0 the difference above has few digits left
        near = x - x * square * (1 / 3 - square * (2 / 15 - square * (17 / 315)))
        logits = CAP * tl.where(square < 0.0625, near, far)
    return logits


def split_length(num_tokens: int, num_programs: int, tile: int) -> int:
    """Tokens one program takes, a multiple of `tile`, so that a launch fills the device.

    Parameters
    ----------
    num_tokens : int
        Tokens of the longest request.
    num_programs : int
        Programs that work on each stretch of tokens (heads times requests).
    tile : int
        Tokens a program loads at once.
    """
    splits = max(TARGET_PROGRAMS // num_programs, 1)
    return max(triton.cdiv(triton.cdiv(num_tokens, splits), tile), 1) * tile
