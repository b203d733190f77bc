"""Attention over a codebook's tokens: torch version, and codes as tensors.

Keys and values are put together in full, one request at a time; see
`vllm_kvcompress.kernels.codebook_attention`.
"""

import torch
from torch.nn.functional import pad

from vllm_kvcompress.kernels.codebook_attention import (
    CodebookPages,
    check_codebook,
    codes_per_row,
)
from vllm_kvcompress.kernels.rotary import Rotary

_LARGEST = torch.finfo(torch.float16).max


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
        length.float().clamp(max=_LARGEST).half().view(torch.int16)
        for length in (key_length, value_length)
    ]
    numbers = (key_index, value_index, *lengths, positions, positions >> 16)
    # Conversion to 16 bits keeps the low ones.
    codes = torch.stack([number.to(torch.int16) for number in numbers], dim=-2)  # [..., 6, n]
    codes = pad(codes, (0, -codes.shape[-1] % per_row)).unflatten(-1, (-1, per_row))
    return pad(codes.transpose(-3, -2).flatten(-2), (0, width - 6 * per_row))


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
    codes = rows[..., : 6 * per_row].unflatten(-1, (6, per_row)).transpose(-3, -2).flatten(-2)
    codes = codes[..., :num_tokens].contiguous()  # [..., 6, n]
    key_index, value_index, _, _, low, high = (codes.int() & 0xFFFF).unbind(-2)
    key_length, value_length = codes[..., 2:4, :].view(torch.float16).float().unbind(-2)
    return key_index, value_index, key_length, value_length, low | (high << 16)


def codebook_attention(
    queries: torch.Tensor,
    book: CodebookPages,
    inv_freq: torch.Tensor,
    is_neox: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `vllm_kvcompress.kernels.codebook_attention.codebook_attention`."""
    check_codebook(queries, book, inv_freq)
    entries, block_size = book.entries, book.entries.block_size
    out = torch.zeros_like(queries, memory_format=torch.contiguous_format)
    lse = torch.full(queries.shape[:2], float("-inf"), device=queries.device)
    lengths = zip(book.num_tokens.tolist(), entries.num_tokens.tolist(), strict=True)
    for request, (num_tokens, num_entries) in enumerate(lengths):
        if not num_tokens:
            continue
        num_rows = -(-num_tokens // book.codes_per_row)
        blocks = book.code_table[request, : -(-num_rows // block_size)].long()
        rows = book.codes[blocks].transpose(0, 1).flatten(1, 2)[:, :num_rows]  # [KV, C, W]
        key_index, value_index, key_length, value_length, positions = unpack_codes(rows, num_tokens)
        heads = torch.arange(len(rows), device=rows.device)[:, None]
        keys = entries.gather_keys(request, num_entries).float()[heads, key_index]
        keys = Rotary(inv_freq, is_neox).rotate(keys * key_length[..., None], positions)
        values = entries.gather_values(request, num_entries).float()[heads, value_index]
        values = values * value_length[..., None]
        grouped = queries[request].float().unflatten(0, (len(rows), -1))  # [KV, g, D]
        logits = grouped @ keys.transpose(1, 2) * scale
        lse[request] = logits.logsumexp(dim=2).flatten()
        out[request] = (logits.softmax(dim=2) @ values).flatten(0, 1).to(out.dtype)
    return out, lse
