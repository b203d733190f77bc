"""Rows of one layer's paged cache, read and written in logical order.

Only this folder knows strides.

Logical order of one request: keys [KV, n, D] and values [KV, n, Dv], n tokens that fill whole
blocks. Physical order depends on the device:

* GPU: a strided view of the cache, see strided.py;
* CPU: blocks that are packed for the CPU's attention kernel, see packed.py.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from vllm_kvcompress.kernels.cache.pages import Pages
from vllm_kvcompress.kernels.cache.rows import CacheRows, DenseRows
from vllm_kvcompress.kernels.compaction.gather_rows import gather_rows
from vllm_kvcompress.kernels.formulas.rotary import Rotary
from vllm_kvcompress.kernels.formulas.softmax_terms import PLAIN, SoftmaxTerms
from vllm_kvcompress.worker.batch import GroupBatch
from vllm_kvcompress.worker.layout.numbers import CacheNumbers


class CacheLayout(ABC):
    """Reads and writes one layer's cache.

    What a compaction needs of it (`rows`, `move`) works on gathered copies here; a layout that
    kernels can address in place overrides both.

    Parameters
    ----------
    numbers : CacheNumbers
        What the cache's elements stand for. Rows that are measured are numbers; rows that are read,
        written or moved are elements.
    """

    def __init__(self, numbers: CacheNumbers | None = None) -> None:
        self.numbers = numbers or CacheNumbers()

    def rows(
        self,
        cache: torch.Tensor,
        group: GroupBatch,
        queries: Sequence[torch.Tensor | None],
        scale: float,
        terms: SoftmaxTerms = PLAIN,
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
        terms : SoftmaxTerms
            Its soft cap and sinks.
        """
        found = []
        for request, (length, own) in enumerate(zip(group.lengths, queries, strict=True)):
            found.append(self._measurable(cache, group.blocks(request), length, own, scale, terms))
        return found

    def rows_so_far(
        self,
        cache: torch.Tensor,
        blocks: torch.Tensor,
        num_tokens: int,
        queries: torch.Tensor,
        scale: float,
        terms: SoftmaxTerms = PLAIN,
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
        terms : SoftmaxTerms
            Its soft cap and sinks.
        """
        return self._measurable(cache, blocks.long(), num_tokens, queries, scale, terms)

    def _measurable(
        self,
        cache: torch.Tensor,
        blocks: torch.Tensor,
        num_tokens: int,
        queries: torch.Tensor | None,
        scale: float,
        terms: SoftmaxTerms,
    ) -> DenseRows:
        keys, values = self.read(cache, blocks)
        keys, values = self.numbers.decoded(keys[:, :num_tokens], values[:, :num_tokens])
        return DenseRows(keys, values, queries, scale, terms)

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
            Turn keys to neighbouring positions that end where the uncompressed tail begins. Not in
            caches of 8 bits, whose elements are no numbers.
        """
        assert rotary is None or self.numbers.eight_bits is None, "refused when settings are read"
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

    def move_in_place(
        self,
        caches: Sequence[torch.Tensor],
        group: GroupBatch,
        indices: torch.Tensor,
        rotary: Rotary | None,
    ) -> None:
        """Do what `move` does where destinations may be source blocks; its arguments.

        Survivors are copied aside before any of them is written.
        """
        CacheLayout.move(self, caches, group, indices, rotary)

    def kernel_table(self, cache: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """Block table [R, P] int32 in blocks of the cache tensor, which may be smaller ones."""
        return table

    @abstractmethod
    def pages(
        self,
        cache: torch.Tensor,
        table: torch.Tensor,
        first_slot: torch.Tensor,
        num_tokens: torch.Tensor,
        max_tokens: int,
    ) -> tuple[Pages, torch.Tensor]:
        """Tokens from some slot on as a kernel reads them, and the first one's slot in the pages.

        Parameters
        ----------
        cache : torch.Tensor
            The layer's cache.
        table : torch.Tensor
            [R, P] int32, whole block table rows.
        first_slot, num_tokens : torch.Tensor
            [R] int32, slots before these tokens, and how many there are.
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
