"""Device functions and launch arithmetic that several kernels share."""

import torch
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
def load_channels(rows, stride, channels, valid, limit):
    """[ROWS, CHANNELS] elements of rows that start at some pointers, zero where not valid."""
    at = rows[:, None] + channels[None, :] * stride
    return tl.load(at, mask=valid[:, None] & (channels < limit)[None, :], other=0.0)


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


def check_window(queries: torch.Tensor, num_requests: int, num_kv_heads: int, dim: int) -> None:
    """Refuse queries [R, w, H, D] that do not fit a cache.

    Raises
    ------
    ValueError
        If the number of requests or head_dim differ, or H is no multiple of KV.
    """
    if queries.shape[0] != num_requests or queries.shape[3] != dim:
        raise ValueError(
            f"queries {tuple(queries.shape)} do not fit {num_requests} requests of head_dim {dim}"
        )
    if queries.shape[2] % num_kv_heads:
        raise ValueError(
            f"{queries.shape[2]} query heads are no multiple of {num_kv_heads} KV heads"
        )
