"""The GPU's cache: a strided view [blocks, KV, N, C], C = the token's key followed by its value.

vLLM has six physical layouts for it; indexing the view serves them all.
"""

from collections.abc import Sequence

import torch

from vllm_kvcompress.kernels.cache.layer_caches import LayerCaches
from vllm_kvcompress.kernels.cache.paged_rows import PagedBatch
from vllm_kvcompress.kernels.cache.pages import Pages
from vllm_kvcompress.kernels.cache.rows import CacheRows
from vllm_kvcompress.kernels.compaction.compact_pages import compact_pages
from vllm_kvcompress.kernels.formulas.rotary import Rotary
from vllm_kvcompress.kernels.formulas.softmax_terms import PLAIN, SoftmaxTerms
from vllm_kvcompress.worker.batch import GroupBatch
from vllm_kvcompress.worker.layout.base import CacheLayout
from vllm_kvcompress.worker.layout.numbers import CacheNumbers


class StridedLayout(CacheLayout):
    """The GPU's [blocks, KV, N, C] view.

    Parameters
    ----------
    head_size : int
        D; the first D of C elements are the key.
    block_size : int
        N of the block table. The view's blocks may be smaller by a whole factor.
    numbers : CacheNumbers
        What the cache's elements stand for.
    """

    def __init__(
        self, head_size: int, block_size: int, numbers: CacheNumbers | None = None
    ) -> None:
        super().__init__(numbers)
        self.head_size = head_size
        self.block_size = block_size

    def _kernel_blocks(self, cache: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
        """Indices of the view's blocks that make up `blocks`."""
        ratio, rest = divmod(self.block_size, cache.shape[2])
        assert ratio and not rest, f"blocks of {cache.shape[2]} do not divide {self.block_size}"
        parts = torch.arange(ratio, device=blocks.device)
        return (blocks[:, None] * ratio + parts).flatten()

    def kernel_table(self, cache: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        ratio = self.block_size // cache.shape[2]
        if ratio == 1:
            return table
        return self._kernel_blocks(cache, table.flatten()).view(len(table), -1).to(torch.int32)

    def _pages(
        self, cache: torch.Tensor, table: torch.Tensor, num_tokens: torch.Tensor, max_tokens: int
    ) -> Pages:
        """The first `num_tokens` [R] of block table rows [R, P], in place."""
        typed = self.numbers.typed(cache)
        key_scale, value_scale = self.numbers.scales()
        return Pages(
            keys=typed[..., : self.head_size],
            values=typed[..., self.head_size :],
            block_table=self.kernel_table(cache, table),
            num_tokens=num_tokens,
            max_tokens=max_tokens,
            key_scale=key_scale,
            value_scale=value_scale,
        )

    def pages(
        self,
        cache: torch.Tensor,
        table: torch.Tensor,
        first_slot: torch.Tensor,
        num_tokens: torch.Tensor,
        max_tokens: int,
    ) -> tuple[Pages, torch.Tensor]:
        return self._pages(cache, table, num_tokens, max_tokens), first_slot

    def rows(
        self,
        cache: torch.Tensor,
        group: GroupBatch,
        queries: Sequence[torch.Tensor | None],
        scale: float,
        terms: SoftmaxTerms = PLAIN,
    ) -> Sequence[CacheRows]:
        pages = self._pages(cache, group.block_table, group.num_tokens, max(group.lengths))
        given = [own.transpose(0, 1) for own in queries if own is not None]  # [w, H, D]
        stacked = None
        if given:
            stacked = given[0][None] if len(given) == 1 else torch.stack(given)
        return PagedBatch(pages, group.lengths, stacked, scale, terms).rows()

    def rows_so_far(
        self,
        cache: torch.Tensor,
        blocks: torch.Tensor,
        num_tokens: int,
        queries: torch.Tensor,
        scale: float,
        terms: SoftmaxTerms = PLAIN,
    ) -> CacheRows:
        count = torch.full((1,), num_tokens, dtype=torch.int32, device=cache.device)
        pages = self._pages(cache, blocks[None], count, num_tokens)
        stacked = queries.transpose(0, 1)[None]
        return PagedBatch(pages, [num_tokens], stacked, scale, terms).rows()[0]

    def move(
        self,
        caches: Sequence[torch.Tensor],
        group: GroupBatch,
        indices: torch.Tensor,
        rotary: Rotary | None,
    ) -> None:
        """In one launch for all layers and requests."""
        assert rotary is None or self.numbers.eight_bits is None, "refused when settings are read"
        first = caches[0]
        compact_pages(
            LayerCaches.of(caches, self.head_size, group.addresses),
            self.kernel_table(first, group.block_table),
            self.kernel_table(first, group.destination_table),
            indices,
            group.num_survivors,
            first_target=None if rotary is None else group.region_len - group.num_survivors,
            rotary=rotary,
        )

    def move_in_place(
        self,
        caches: Sequence[torch.Tensor],
        group: GroupBatch,
        indices: torch.Tensor,
        rotary: Rotary | None,
    ) -> None:
        """One head of one layer at a time: no more is copied aside, and no head reads another's."""
        for cache, layer_indices in zip(caches, indices, strict=True):
            for request, plan in enumerate(group.plans):
                source = self._kernel_blocks(cache, group.blocks(request))
                destination = self._kernel_blocks(cache, group.destination(request))
                kept, region = plan.lengths.kept_len, plan.lengths.region_len
                targets = torch.arange(region - kept, region, device=cache.device)
                for head, chosen in enumerate(layer_indices[request, :, :kept]):
                    self._move_head(cache[:, head], source, destination, chosen, targets, rotary)

    def _move_head(
        self,
        cache: torch.Tensor,
        source: torch.Tensor,
        destination: torch.Tensor,
        chosen: torch.Tensor,
        targets: torch.Tensor,
        rotary: Rotary | None,
    ) -> None:
        """Of a view [blocks, N, C]; survivors [K] go to positions `targets` [K] where keys turn."""
        size = cache.shape[1]
        rows = cache[source[chosen // size], chosen % size]  # [K, C]
        if rotary is not None:
            keys = rows[None, :, : self.head_size]
            rows[:, : self.head_size] = rotary.rotate(keys, (targets - chosen)[None])[0]
        cache[destination] = rows.unflatten(0, (-1, size))

    def read(self, cache: torch.Tensor, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = cache[self._kernel_blocks(cache, blocks)]  # [b, KV, N', C]
        rows = rows.transpose(0, 1).flatten(1, 2)  # [KV, n, C]
        return rows[..., : self.head_size], rows[..., self.head_size :]

    def write(
        self, cache: torch.Tensor, blocks: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        rows = torch.cat([keys, values], dim=-1)  # [KV, n, C]
        rows = rows.unflatten(1, (-1, cache.shape[2])).transpose(0, 1)
        cache[self._kernel_blocks(cache, blocks)] = rows
