"""Codebooks in a layer's blocks: rows that no attention kernel of vLLM reads.

A slot is a row of C elements of the cache, read as W = C * itemsize / 2 integers of 16 bits. A
book's blocks begin with slots of entries, then come slots of codes. They are laid out as the cache
tensor indexes them, packed nowhere.

Dimensions: n slots of n / N whole blocks, KV heads.
"""

import torch

from vllm_kvcompress.kernels.codebook.coded_tokens import CodedTokens
from vllm_kvcompress.plans import BookLengths
from vllm_kvcompress.worker.layout.layer_cache import LayerCache


class BookSlots:
    """Stores codebooks in the blocks of layers, and loads them."""

    def store(
        self, layer: LayerCache, blocks: torch.Tensor, coded: CodedTokens, book: BookLengths
    ) -> None:
        """Fill `blocks` [n / N] int64 with one layer's codebook: entries, then codes."""
        dtype = layer.cache().dtype
        entries = torch.cat([coded.keys.entries, coded.values.entries], dim=2).to(dtype)
        slots = entries.view(torch.int16)
        codes = coded.pack(book.num_code_rows, slots.shape[2])
        write_slots(layer, blocks, torch.cat([slots, codes], dim=1))

    def load(
        self, layer: LayerCache, blocks: torch.Tensor, book: BookLengths, counts: torch.Tensor
    ) -> CodedTokens:
        """What `store` has written; `counts` [2, KV] are the entries in use."""
        slots = read_slots(layer, blocks)
        entries = slots[:, : book.num_entries].contiguous().view(layer.cache().dtype)
        halves = entries.chunk(2, dim=2)
        return CodedTokens.unpack(
            (halves[0], halves[1]), counts, slots[:, book.num_entries :], book.num_tokens
        )


def read_slots(layer: LayerCache, blocks: torch.Tensor) -> torch.Tensor:
    """Slots [KV, n, W] int16 of `blocks` [n / N] int64, copied."""
    cache, table = _find(layer, blocks)
    return cache[table].transpose(0, 1).flatten(1, 2)


def write_slots(layer: LayerCache, blocks: torch.Tensor, rows: torch.Tensor) -> None:
    """Fill `blocks` [n / N] int64 with slots [KV, n, W] int16.

    As integers: a copy of floats may change what is no number.
    """
    cache, table = _find(layer, blocks)
    cache[table] = rows.unflatten(1, (-1, cache.shape[2])).transpose(0, 1)


def _find(layer: LayerCache, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The cache as integers, [its blocks, KV, N', W] int16, and which of its blocks these are."""
    cache = layer.cache()
    return cache.view(torch.int16), layer.layout.kernel_table(cache, blocks[None])[0].long()
