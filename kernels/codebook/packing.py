"""Codes of tokens in slot rows of a cache, as tensor operations on any device.

Codes of token t are element t % T of six runs of T int16 each, in row t // T: K entry, V entry, K
length, V length (bits of float16), position's low and its high 16 bits. Entry numbers count from 0
to 65535, as if the int16 had no sign.
"""

import torch
from torch.nn.functional import pad

from vllm_kvcompress.kernels.codebook.format import CODE_WIDTH, codes_per_row

LARGEST_LENGTH = torch.finfo(torch.float16).max


def pack_codes(
    key_index: torch.Tensor,
    value_index: torch.Tensor,
    key_length: torch.Tensor,
    value_length: torch.Tensor,
    positions: torch.Tensor,
    width: int,
) -> torch.Tensor:
    """Slot rows of int16 that hold tokens' codes.

    Parameters
    ----------
    key_index, value_index : torch.Tensor
        [..., n] integer, entry numbers in 0..65535.
    key_length, value_length : torch.Tensor
        [..., n] float; rounded to float16, larger ones than it has to its largest.
    positions : torch.Tensor
        [..., n] integer, 0 to 2^31 - 1.
    width : int
        W, int16 per row: head_dim times the bytes of a cached number.

    Returns
    -------
    torch.Tensor
        [..., ceil(n / T), W] int16, zero where there is no token. With W = 13, so T = 2, the
        tokens

            K entry 5, V entry 40000, K length 1.5, V length 2.0, position 65537
            K entry 7, V entry     0, K length 1.0, V length 0.5, position 3

        are one row (40000 - 65536 = -25536; 0x3E00 = 15872 is 1.5 in float16; 65537 = 1 + 2^16):

            [5, 7,  -25536, 0,  15872, 15360,  16384, 14336,  1, 3,  1, 0,  0]
    """
    per_row = codes_per_row(width)
    lengths = [
        length.float().clamp(max=LARGEST_LENGTH).half().view(torch.int16)
        for length in (key_length, value_length)
    ]
    numbers = (key_index, value_index, *lengths, positions, positions >> 16)
    # Conversion to 16 bits keeps the low ones.
    codes = torch.stack([number.to(torch.int16) for number in numbers], dim=-2)  # [..., 6, n]
    codes = pad(codes, (0, -codes.shape[-1] % per_row)).unflatten(-1, (-1, per_row))
    return pad(codes.transpose(-3, -2).flatten(-2), (0, width - CODE_WIDTH * per_row))


def unpack_codes(rows: torch.Tensor, num_tokens: int) -> tuple[torch.Tensor, ...]:
    """Inverse of `pack_codes`.

    Parameters
    ----------
    rows : torch.Tensor
        [..., C, W] int16.
    num_tokens : int
        n, at most C * T.

    Returns
    -------
    tuple of torch.Tensor
        Entry numbers of keys and of values (int32), lengths of keys and of values (float32),
        positions (int32); all [..., n]. The row of `pack_codes`'s example gives its five numbers
        of either token back.
    """
    per_row = codes_per_row(rows.shape[-1])
    codes = (
        rows[..., : CODE_WIDTH * per_row]
        .unflatten(-1, (CODE_WIDTH, per_row))
        .transpose(-3, -2)
        .flatten(-2)
    )
    codes = codes[..., :num_tokens].contiguous()  # [..., 6, n]
    key_index, value_index, _, _, low, high = (codes.int() & 0xFFFF).unbind(-2)
    key_length, value_length = codes[..., 2:4, :].view(torch.float16).float().unbind(-2)
    return key_index, value_index, key_length, value_length, low | (high << 16)
