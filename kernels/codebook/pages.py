"""Where codes, their books and the ordinary tokens behind them lie in one layer's paged cache.

Dimensions: R requests, H query heads, KV key-value heads, D head_dim, B blocks, N slots per block,
P entries of a block table row, n tokens, W int16 per slot row, T tokens per row of codes.
"""

from dataclasses import dataclass

import torch

from vllm_kvcompress.kernels.cache.checks import check_window
from vllm_kvcompress.kernels.cache.pages import Pages
from vllm_kvcompress.kernels.codebook.format import codes_per_row


@dataclass(frozen=True)
class CodebookPages:
    """Codebooks and codes of a ragged batch of requests, both in blocks of one layer's cache.

    Codes of token t are element t % T of six runs of T int16 each, in row t // T of the request:
    K entry, V entry, K length, V length (bits of float16), position's low and its high 16 bits.
    Entry numbers count from 0 to 65535, as if the int16 had no sign.

    Attributes
    ----------
    entries : Pages
        Unit vectors: the K book among the keys, the V book among the values. Entry e of request r
        is in block ``block_table[r, e // N]``, slot ``e % N``; ``num_tokens`` counts a request's
        entries, the larger number of all its books.
    codes : torch.Tensor
        [B, KV, N, W] int16 view of the same cache's slot rows, any strides. Row c of request r is
        in block ``code_table[r, c // N]``, slot ``c % N``.
    code_table : torch.Tensor
        [R, P2] int32; entries behind a request's last row are never followed.
    num_tokens : torch.Tensor
        [R] int32 on the caches' device, tokens of each request; may be 0.
    max_tokens : int
        The largest of them, known on the host.
    """

    entries: Pages
    codes: torch.Tensor
    code_table: torch.Tensor
    num_tokens: torch.Tensor
    max_tokens: int

    @property
    def codes_per_row(self) -> int:
        """T."""
        return codes_per_row(self.codes.shape[3])


@dataclass(frozen=True)
class TailPages:
    """Ordinary tokens of a ragged batch of requests, from some slot of each block table row on.

        token t of request r  ->  cache[block_table[r, s // N], head, s % N],  s = first_slot[r] + t

    A request may have several rows, one per query token: they differ in their numbers of tokens.

    Attributes
    ----------
    pages : Pages
        Caches, whole block table rows, and the tails' numbers of tokens, which may be 0. Of a row,
        entries before slot ``first_slot`` and from slot ``first_slot + n`` on are never followed.
    first_slot : torch.Tensor
        [R] int32 on the caches' device: slots before the tail, counted along the row; any number.
    """

    pages: Pages
    first_slot: torch.Tensor


def check_codebook(
    queries: torch.Tensor,
    book: CodebookPages,
    inv_freq: torch.Tensor,
    tail: TailPages | None,
) -> None:
    """Refuse what `codebook_attention` does not take.

    Raises
    ------
    ValueError
        If queries, books, codes, frequencies and tails do not fit.
    """
    entries = book.entries
    check_window(queries[:, None], entries.num_requests, entries.num_kv_heads, entries.head_dim)
    rows = entries.num_requests
    for name, numbers in (("entries", entries.num_tokens), ("tokens", book.num_tokens)):
        if numbers.shape != (rows,) or not numbers.is_contiguous():
            raise ValueError(
                f"numbers of {name} {tuple(numbers.shape)} are not one for each of {rows} requests,"
                " side by side"
            )
    if book.code_table.shape[0] != rows:
        raise ValueError(f"a code table of {book.code_table.shape[0]} rows for {rows} requests")
    if book.codes.dtype != torch.int16 or book.codes.shape[:3] != entries.keys.shape[:3]:
        raise ValueError(
            f"codes {tuple(book.codes.shape)} {book.codes.dtype} are no int16 view of a cache of"
            f" {tuple(entries.keys.shape[:3])} rows"
        )
    if inv_freq.dtype != torch.float32 or 2 * inv_freq.numel() > entries.head_dim:
        raise ValueError(
            f"{inv_freq.numel()} frequencies of {inv_freq.dtype} do not fit head_dim"
            f" {entries.head_dim}: float32, one for two channels"
        )
    if tail is not None:
        check_tail(tail, entries.num_requests, entries.num_kv_heads, entries.head_dim)


def check_tail(tail: TailPages, num_requests: int, num_kv_heads: int, head_dim: int) -> None:
    """Refuse a tail that does not belong to some requests.

    Raises
    ------
    ValueError
        If requests, heads or head_dim differ, or first slots or lengths are not one int32 for each
        request.
    """
    pages = tail.pages
    found = pages.num_requests, pages.num_kv_heads, pages.head_dim
    if found != (num_requests, num_kv_heads, head_dim):
        raise ValueError(
            f"a tail of {found[0]} requests, {found[1]} KV heads and head_dim {found[2]} is not one"
            f" of {num_requests} requests, {num_kv_heads} KV heads and head_dim {head_dim}"
        )
    for name, numbers in (("first_slot", tail.first_slot), ("num_tokens", pages.num_tokens)):
        fits = numbers.dtype == torch.int32 and numbers.shape == (num_requests,)
        if not fits or not numbers.is_contiguous():
            raise ValueError(
                f"{name} of a tail is {tuple(numbers.shape)} {numbers.dtype}, and not one int32 for"
                f" each of {num_requests} requests, side by side"
            )
