"""Rows of one layer's paged cache, read and written in logical order. Only this file knows strides.

Logical order of one request: keys [KV, n, D] and values [KV, n, Dv], n tokens that fill whole
blocks. Physical order depends on the device:

* GPU: the cache is a strided view [blocks, KV, N, C], C = the token's key followed by its value.
  vLLM has six physical layouts for it; indexing the view serves them all.
* CPU: blocks are packed for the CPU's attention kernel; see packed_layout.py.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from vllm_kvcompress.kernels.cache.layer_caches import LayerCaches
from vllm_kvcompress.kernels.cache.paged_rows import PagedBatch
from vllm_kvcompress.kernels.cache.pages import Pages
from vllm_kvcompress.kernels.cache.rows import CacheRows, DenseRows
from vllm_kvcompress.kernels.codebook.coded_tokens import CodedTokens
from vllm_kvcompress.kernels.codebook.pages import TailPages
from vllm_kvcompress.kernels.compaction.compact_pages import compact_pages
from vllm_kvcompress.kernels.compaction.gather_rows import gather_rows
from vllm_kvcompress.kernels.formulas.rotary import Rotary
from vllm_kvcompress.plans import BookLengths
from vllm_kvcompress.worker.group_batch import GroupBatch


class CacheLayout(ABC):
    """Reads and writes one layer's cache.

    What a compaction needs of it (`rows`, `move`) works on gathered copies here; a layout that
    kernels can address in place overrides both.
    """

    def rows(
        self,
        cache: torch.Tensor,
        group: GroupBatch,
        queries: Sequence[torch.Tensor | None],
        scale: float,
    ) -> Sequence[CacheRows]:
        """Every request's cached tokens, ready to be measured.

        Parameters
        ----------
        cache : torch.Tensor
            The layer's cache.
        group : GroupBatch
            The requests and their blocks.
        queries : sequence of torch.Tensor or None
            Each request's [H, w, D], all of one w; all None for a policy that reads none.
        scale : float
            Softmax scale of the layer.
        """
        found = []
        for request, (length, own) in enumerate(zip(group.lengths, queries, strict=True)):
            keys, values = self.read(cache, group.blocks(request))
            found.append(DenseRows(keys[:, :length], values[:, :length], own, scale))
        return found

    def rows_so_far(
        self,
        cache: torch.Tensor,
        blocks: torch.Tensor,
        num_tokens: int,
        queries: torch.Tensor,
        scale: float,
    ) -> CacheRows:
        """Cached tokens of one request whose prompt is being computed, ready to be measured.

        Parameters
        ----------
        cache : torch.Tensor
            The layer's cache.
        blocks : torch.Tensor
            [b] int32, blocks of the first `num_tokens` tokens.
        num_tokens : int
            Tokens whose keys and values are cached.
        queries : torch.Tensor
            [H, w, D] of the last w of them.
        scale : float
            Softmax scale of the layer.
        """
        keys, values = self.read(cache, blocks.long())
        return DenseRows(keys[:, :num_tokens], values[:, :num_tokens], queries, scale)

    def move(
        self,
        caches: Sequence[torch.Tensor],
        group: GroupBatch,
        indices: torch.Tensor,
        rotary: Rotary | None,
    ) -> None:
        """Fill destination blocks with survivors, in all layers of a KV cache group.

        Parameters
        ----------
        caches : sequence of torch.Tensor
            L caches, laid out alike.
        group : GroupBatch
            The requests and their blocks.
        indices : torch.Tensor
            [L, R, KV, K] int64, survivors in the order they are written.
        rotary : Rotary or None
            Turn keys to neighbouring positions that end where the uncompressed tail begins.
        """
        for cache, layer_indices in zip(caches, indices, strict=True):
            for request, plan in enumerate(group.plans):
                chosen = layer_indices[request, :, : plan.lengths.kept_len]  # [KV, K]
                keys, values = self.read(cache, group.blocks(request))
                kept = gather_rows(keys, chosen)
                if rotary is not None:
                    # Indices and positions differ by what earlier compactions evicted, the same
                    # before and after.
                    region, evicted = plan.lengths.region_len, plan.lengths.evicted
                    targets = torch.arange(evicted, region, device=chosen.device)
                    kept = rotary.rotate(kept, targets - chosen)
                self.write(cache, group.destination(request), kept, gather_rows(values, chosen))

    # --- codebooks: rows that no attention kernel of vLLM reads --------------------------------

    @abstractmethod
    def plain(self, cache: torch.Tensor) -> torch.Tensor:
        """View [blocks, KV, N, C] of the cache in which a slot's C elements are neighbours."""

    def plain_table(self, cache: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """Block table [R, P] int32 in blocks of `plain`."""
        return table

    def read_slots(self, cache: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
        """Return slot rows [KV, n, W] int16 of `blocks` [n / N] int64, copied."""
        plain = self.plain(cache).view(torch.int16)
        table = self.plain_table(cache, blocks[None])[0].long()
        return plain[table].transpose(0, 1).flatten(1, 2)

    def write_slots(self, cache: torch.Tensor, blocks: torch.Tensor, rows: torch.Tensor) -> None:
        """Fill `blocks` with slot rows [KV, n, W] int16; n = len(blocks) * N.

        As integers: a copy of floats may change what looks like no number.
        """
        plain = self.plain(cache).view(torch.int16)
        table = self.plain_table(cache, blocks[None])[0].long()
        plain[table] = rows.unflatten(1, (-1, plain.shape[2])).transpose(0, 1)

    def store_codes(
        self, cache: torch.Tensor, blocks: torch.Tensor, coded: CodedTokens, book: BookLengths
    ) -> None:
        """Fill `blocks` with one layer's codebook: entries, then codes."""
        entries = torch.cat([coded.keys.entries, coded.values.entries], dim=2).to(cache.dtype)
        slots = entries.view(torch.int16)
        codes = coded.pack(book.num_code_rows, slots.shape[2])
        self.write_slots(cache, blocks, torch.cat([slots, codes], dim=1))

    def load_codes(
        self, cache: torch.Tensor, blocks: torch.Tensor, book: BookLengths, counts: torch.Tensor
    ) -> CodedTokens:
        """What `store_codes` has written; `counts` [2, KV] are the entries in use."""
        slots = self.read_slots(cache, blocks)
        entries = slots[:, : book.num_entries].contiguous().view(cache.dtype)
        halves = entries.chunk(2, dim=2)
        return CodedTokens.unpack(
            (halves[0], halves[1]), counts, slots[:, book.num_entries :], book.num_tokens
        )

    @abstractmethod
    def tail(
        self,
        cache: torch.Tensor,
        table: torch.Tensor,
        first_slot: torch.Tensor,
        num_tokens: torch.Tensor,
        max_tokens: int,
    ) -> TailPages:
        """Ordinary tokens behind codebooks, as a kernel reads them.

        Parameters
        ----------
        cache : torch.Tensor
            The layer's cache.
        table : torch.Tensor
            [R, P] int32, whole block table rows.
        first_slot, num_tokens : torch.Tensor
            [R] int32, slots before the tail, and tokens of it.
        max_tokens : int
            At least the largest number of tokens.
        """

    @abstractmethod
    def read(self, cache: torch.Tensor, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys [KV, n, D] and values [KV, n, Dv] of `blocks` [n / N] int64, copied."""

    @abstractmethod
    def write(
        self, cache: torch.Tensor, blocks: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Fill `blocks` with keys [KV, n, D] and values [KV, n, Dv]; n = len(blocks) * N."""


class StridedLayout(CacheLayout):
    """The GPU's [blocks, KV, N, C] view.

    Parameters
    ----------
    head_size : int
        D; the first D of C elements are the key.
    block_size : int
        N of the block table. The view's blocks may be smaller by a whole factor.
    """

    def __init__(self, head_size: int, block_size: int) -> None:
        self.head_size = head_size
        self.block_size = block_size

    def _kernel_blocks(self, cache: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
        """Indices of the view's blocks that make up `blocks`."""
        ratio, rest = divmod(self.block_size, cache.shape[2])
        assert ratio and not rest, f"blocks of {cache.shape[2]} do not divide {self.block_size}"
        parts = torch.arange(ratio, device=blocks.device)
        return (blocks[:, None] * ratio + parts).flatten()

    def _kernel_table(self, cache: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """Block table [R, P] in the view's blocks."""
        ratio = self.block_size // cache.shape[2]
        if ratio == 1:
            return table
        return self._kernel_blocks(cache, table.flatten()).view(len(table), -1).to(torch.int32)

    def plain(self, cache: torch.Tensor) -> torch.Tensor:
        """See the base class."""
        return cache

    def plain_table(self, cache: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """See the base class."""
        return self._kernel_table(cache, table)

    def tail(
        self,
        cache: torch.Tensor,
        table: torch.Tensor,
        first_slot: torch.Tensor,
        num_tokens: torch.Tensor,
        max_tokens: int,
    ) -> TailPages:
        """In place: see the base class."""
        keys, values = cache[..., : self.head_size], cache[..., self.head_size :]
        table = self._kernel_table(cache, table)
        return TailPages(Pages(keys, values, table, num_tokens, max_tokens), first_slot)

    def rows(
        self,
        cache: torch.Tensor,
        group: GroupBatch,
        queries: Sequence[torch.Tensor | None],
        scale: float,
    ) -> Sequence[CacheRows]:
        """In place: see the base class."""
        pages = Pages(
            keys=cache[..., : self.head_size],
            values=cache[..., self.head_size :],
            block_table=self._kernel_table(cache, group.block_table),
            num_tokens=group.num_tokens,
            max_tokens=max(group.lengths),
        )
        given = [own.transpose(0, 1) for own in queries if own is not None]  # [w, H, D]
        stacked = None
        if given:
            stacked = given[0][None] if len(given) == 1 else torch.stack(given)
        return PagedBatch(pages, group.lengths, stacked, scale).rows()

    def rows_so_far(
        self,
        cache: torch.Tensor,
        blocks: torch.Tensor,
        num_tokens: int,
        queries: torch.Tensor,
        scale: float,
    ) -> CacheRows:
        """In place: see the base class."""
        pages = Pages(
            keys=cache[..., : self.head_size],
            values=cache[..., self.head_size :],
            block_table=self._kernel_table(cache, blocks[None]),
            num_tokens=torch.full((1,), num_tokens, dtype=torch.int32, device=cache.device),
            max_tokens=num_tokens,
        )
        return PagedBatch(pages, [num_tokens], queries.transpose(0, 1)[None], scale).rows()[0]

    def move(
        self,
        caches: Sequence[torch.Tensor],
        group: GroupBatch,
        indices: torch.Tensor,
        rotary: Rotary | None,
    ) -> None:
        """In one launch: see the base class."""
        first = caches[0]
        compact_pages(
            LayerCaches.of(caches, self.head_size, group.addresses),
            self._kernel_table(first, group.block_table),
            self._kernel_table(first, group.destination_table),
            indices,
            group.num_survivors,
            first_target=None if rotary is None else group.region_len - group.num_survivors,
            rotary=rotary,
        )

    def read(self, cache: torch.Tensor, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See the base class."""
        rows = cache[self._kernel_blocks(cache, blocks)]  # [b, KV, N', C]
        rows = rows.transpose(0, 1).flatten(1, 2)  # [KV, n, C]
        return rows[..., : self.head_size], rows[..., self.head_size :]

    def write(
        self, cache: torch.Tensor, blocks: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """See the base class."""
        rows = torch.cat([keys, values], dim=-1)  # [KV, n, C]
        rows = rows.unflatten(1, (-1, cache.shape[2])).transpose(0, 1)
        cache[self._kernel_blocks(cache, blocks)] = rows
