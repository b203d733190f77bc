"""The cache of latent attention (MLA): [blocks, 1, N, L + P], a token's latent and rotated key.

L is kv_lora_rank, P is qk_rope_head_dim. All query heads share this one row, which is their key
once a query is absorbed, and its first L numbers are their value before its projection:

    q_h . k_h = (W_UK_h q_nope_h) . c + q_pe_h . k_pe        (DeepSeek-V2, arXiv 2405.04434, 2.1.2)

Queries are kept as layers have them, [H, w, nope + P], and absorbed where tokens are scored: that
takes a third of the memory. Rows are moved as they are; no policy that turns keys comes here.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from vllm_kvcompress.kernels.cache.pages import Pages
from vllm_kvcompress.kernels.cache.rows import CacheRows
from vllm_kvcompress.worker.batch import GroupBatch
from vllm_kvcompress.worker.layout.base import CacheLayout
from vllm_kvcompress.worker.layout.strided import StridedLayout

Absorb = Callable[[torch.Tensor], torch.Tensor]
"""Takes queries [H, w, nope + P] of one layer and returns [H, w, L + P]."""


def absorb(query: torch.Tensor, up_keys: torch.Tensor) -> torch.Tensor:
    """Queries against latents in the place of queries against keys.

    Parameters
    ----------
    query : torch.Tensor
        [H, w, nope + P], after RoPE.
    up_keys : torch.Tensor
        [H, nope, L]: what makes a head's keys of latents, transposed (W_UK).

    Returns
    -------
    torch.Tensor
        [H, w, L + P] of the same type.
    """
    nope = up_keys.shape[1]
    return torch.cat([torch.bmm(query[..., :nope], up_keys), query[..., nope:]], dim=-1)


class _Absorbing(CacheLayout):
    """Queries are absorbed before anything is measured with them."""

    absorb: Absorb

    def rows(
        self,
        cache: torch.Tensor,
        group: GroupBatch,
        queries: Sequence[torch.Tensor | None],
        *softmax: Any,
        **named: Any,
    ) -> Sequence[CacheRows]:
        absorbed = [None if each is None else self.absorb(each) for each in queries]
        return super().rows(cache, group, absorbed, *softmax, **named)

    def rows_so_far(
        self,
        cache: torch.Tensor,
        blocks: torch.Tensor,
        num_tokens: int,
        queries: torch.Tensor,
        *softmax: Any,
        **named: Any,
    ) -> CacheRows:
        absorbed = self.absorb(queries)
        return super().rows_so_far(cache, blocks, num_tokens, absorbed, *softmax, **named)


class LatentLayout(_Absorbing, StridedLayout):
    """On a GPU, where kernels read and move rows in place.

    Parameters
    ----------
    width : int
        L + P.
    num_latent : int
        L.
    block_size : int
        N of the block table; the cache's blocks may be smaller by a whole factor.
    absorb : callable
        The layer's queries, absorbed.
    """

    def __init__(self, width: int, num_latent: int, block_size: int, absorb: Absorb) -> None:
        super().__init__(width, block_size)
        self.num_latent, self.absorb = num_latent, absorb

    def _pages(
        self, cache: torch.Tensor, table: torch.Tensor, num_tokens: torch.Tensor, max_tokens: int
    ) -> Pages:
        return Pages(
            keys=cache,
            values=cache[..., : self.num_latent],
            block_table=self.kernel_table(cache, table),
            num_tokens=num_tokens,
            max_tokens=max_tokens,
        )

    def read(self, cache: torch.Tensor, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows, _ = super().read(cache, blocks)
        return rows, rows[..., : self.num_latent]

    def write(
        self, cache: torch.Tensor, blocks: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Fill blocks with rows; values are part of them."""
        super().write(cache, blocks, keys, values[..., :0])


class GatheredLatentLayout(_Absorbing, CacheLayout):
    """On a CPU, where rows are gathered first. Parameters as for `LatentLayout`."""

    def __init__(self, num_latent: int, absorb: Absorb) -> None:
        super().__init__()
        self.num_latent, self.absorb = num_latent, absorb

    def read(self, cache: torch.Tensor, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = cache[blocks].transpose(0, 1).flatten(1, 2)  # [1, n, L + P]
        return rows, rows[..., : self.num_latent]

    def write(
        self, cache: torch.Tensor, blocks: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Fill blocks with rows; values are part of them."""
        cache[blocks] = keys.unflatten(1, (-1, cache.shape[2])).transpose(0, 1)

    def pages(
        self,
        cache: torch.Tensor,
        table: torch.Tensor,
        first_slot: torch.Tensor,
        num_tokens: torch.Tensor,
        max_tokens: int,
    ) -> tuple[Pages, torch.Tensor]:
        """In place: the cache is not packed."""
        values = cache[..., : self.num_latent]
        return Pages(cache, values, table, num_tokens, max_tokens), first_slot
