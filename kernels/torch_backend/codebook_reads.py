"""Attention over a codebook's tokens, put together in full, one request at a time.

See `codebook.attention`.
"""

from dataclasses import replace

import torch

from vllm_kvcompress.kernels.codebook.packing import unpack_codes
from vllm_kvcompress.kernels.codebook.pages import CodebookPages, TailPages, check_codebook
from vllm_kvcompress.kernels.formulas.rotary import Rotary
from vllm_kvcompress.kernels.formulas.softmax_terms import PLAIN, SoftmaxTerms


def codebook_attention(
    queries: torch.Tensor,
    book: CodebookPages,
    inv_freq: torch.Tensor,
    is_neox: bool,
    scale: float,
    tail: TailPages | None = None,
    terms: SoftmaxTerms = PLAIN,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `codebook.attention.codebook_attention`."""
    check_codebook(queries, book, inv_freq, tail)
    out = torch.zeros_like(queries, memory_format=torch.contiguous_format)
    lse = torch.full(queries.shape[:2], float("-inf"), device=queries.device)
    rotary = Rotary(inv_freq, is_neox)
    lengths = zip(book.num_tokens.tolist(), book.entries.num_tokens.tolist(), strict=True)
    tails = tail.pages.num_tokens.tolist() if tail is not None else [0] * len(queries)
    for request, (num_tokens, num_entries) in enumerate(lengths):
        stretches = []
        if num_tokens:
            stretches.append(_decoded(book, request, num_tokens, num_entries, rotary))
        if tail is not None and tails[request]:
            stretches.append(_gather_tail(tail, request, tails[request]))
        if not stretches:
            continue
        keys, values = (torch.cat(parts, dim=1) for parts in zip(*stretches, strict=True))
        grouped = queries[request].float().unflatten(0, (len(keys), -1))  # [KV, g, D]
        logits = terms.cap_(grouped @ keys.transpose(1, 2) * scale)
        attention = terms.attention(logits.flatten(0, 1)).view_as(logits)
        lse[request] = logits.logsumexp(dim=2).flatten()
        out[request] = (attention @ values).flatten(0, 1).to(out.dtype)
    if terms.sinks is not None:
        lse = lse.logaddexp(terms.sinks.float())
    return out, lse


def _decoded(
    book: CodebookPages, request: int, num_tokens: int, num_entries: int, rotary: Rotary
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys (after RoPE) and values [KV, num_tokens, D] float32 of one request's codes."""
    entries, block_size = book.entries, book.entries.block_size
    num_rows = -(-num_tokens // book.codes_per_row)
    blocks = book.code_table[request, : -(-num_rows // block_size)].long()
    rows = book.codes[blocks].transpose(0, 1).flatten(1, 2)[:, :num_rows]  # [KV, C, W]
    key_index, value_index, key_length, value_length, positions = unpack_codes(rows, num_tokens)
    heads = torch.arange(len(rows), device=rows.device)[:, None]
    keys = entries.gather_keys(request, num_entries).float()[heads, key_index]
    values = entries.gather_values(request, num_entries).float()[heads, value_index]
    keys = rotary.rotate(keys * key_length[..., None], positions)
    return keys, values * value_length[..., None]


def _gather_tail(
    tail: TailPages, request: int, num_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [KV, num_tokens, D] float32 of one request's tail."""
    skipped, first = divmod(int(tail.first_slot[request]), tail.pages.block_size)
    pages = replace(tail.pages, block_table=tail.pages.block_table[:, skipped:])
    last = first + num_tokens
    keys = pages.gather_keys(request, last)[:, first:]
    return keys.float(), pages.gather_values(request, last)[:, first:].float()
