"""Rows of one layer's paged cache, read and written in logical order. Only this file knows strides.

Logical order of one request: keys [KV, n, D] and values [KV, n, Dv], n tokens that fill whole
blocks. Physical order depends on the device:

* GPU: the cache is a strided view [blocks, KV, N, C], C = the token's key followed by its value.
  vLLM has six physical layouts for it; indexing the view serves them all.
* CPU: blocks are packed for the CPU's attention kernel. Per block and head of N tokens x D dims,
  keys come first, then values:
  - "vec", "vec16": key element (t, d) at d * N + t; value element (t, d) at t * D + d.
    Example, N = 2, D = 3: keys k00 k10 k01 k11 k02 k12, values v00 v01 v02 v10 v11 v12.
  - "amx": keys [N/16, D/2, 16, 2] indexed [t//16, d//2, t%16, d%2];
    values [D/16, N/2, 16, 2] indexed [d//16, t//2, d%16, t%2].
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from vllm_kvcompress.kernels.cache_rows import CacheRows, DenseRows
from vllm_kvcompress.kernels.compact_pages import compact_pages
from vllm_kvcompress.kernels.layer_caches import LayerCaches
from vllm_kvcompress.kernels.paged_rows import PagedBatch
from vllm_kvcompress.kernels.pages import Pages
from vllm_kvcompress.kernels.reference.compact_pages import gather_rows
from vllm_kvcompress.kernels.rotary import Rotary
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
            LayerCaches.of(caches, self.head_size),
            self._kernel_table(first, group.block_table),
            self._kernel_table(first, group.destination_table),
            indices,
            group.kept_len,
            first_target=None if rotary is None else group.region_len - group.kept_len,
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


class _PackedLayout(CacheLayout):
    """CPU blocks: keys and values of a head are two contiguous halves of N * D elements."""

    def __init__(self, head_size: int) -> None:
        self.head_size = head_size

    def _halves(self, packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Split [b, KV, N, 2D] into two [b, KV, N * D]."""
        flat = packed.flatten(2)
        half = flat.shape[2] // 2
        return flat[..., :half], flat[..., half:]

    @abstractmethod
    def _unpack(
        self, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Turn packed halves [b, KV, N * D] into [b, KV, N, D] each."""

    @abstractmethod
    def _pack(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Inverse of `_unpack`; the results have N * D elements per block and head."""

    def read(self, cache: torch.Tensor, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See the base class."""
        keys, values = self._unpack(*self._halves(cache[blocks]))
        return keys.transpose(0, 1).flatten(1, 2), values.transpose(0, 1).flatten(1, 2)

    def write(
        self, cache: torch.Tensor, blocks: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """See the base class."""
        block_size = cache.shape[2]
        keys = keys.unflatten(1, (-1, block_size)).transpose(0, 1)
        values = values.unflatten(1, (-1, block_size)).transpose(0, 1)
        packed = torch.cat([half.flatten(2) for half in self._pack(keys, values)], dim=-1)
        cache[blocks] = packed.view(-1, *cache.shape[1:])


class VectorLayout(_PackedLayout):
    """CPU layouts "vec" and "vec16"."""

    def _unpack(
        self, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        size = self.head_size
        return keys.unflatten(2, (size, -1)).transpose(2, 3), values.unflatten(2, (-1, size))

    def _pack(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return keys.transpose(2, 3), values


class AmxLayout(_PackedLayout):
    """CPU layout "amx": bfloat16 tiles of 16 x 2."""

    def _unpack(
        self, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        size = self.head_size
        tokens = keys.shape[2] // size
        keys = keys.unflatten(2, (tokens // 16, size // 2, 16, 2)).permute(0, 1, 2, 4, 3, 5)
        values = values.unflatten(2, (size // 16, tokens // 2, 16, 2)).permute(0, 1, 3, 5, 2, 4)
        shape = (*keys.shape[:2], tokens, size)
        return keys.reshape(shape), values.reshape(shape)

    def _pack(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, size = keys.shape[2:]
        keys = keys.unflatten(3, (size // 2, 2)).unflatten(2, (tokens // 16, 16))
        values = values.unflatten(3, (size // 16, 16)).unflatten(2, (tokens // 2, 2))
        return keys.permute(0, 1, 2, 4, 3, 5), values.permute(0, 1, 4, 2, 5, 3)


_CPU_LAYOUTS: dict[str, type[_PackedLayout]] = {
    "vec": VectorLayout,
    "vec16": VectorLayout,
    "amx": AmxLayout,
}


def cpu_layout(isa: str, head_size: int) -> CacheLayout:
    """Layout of a CPU attention layer by the instruction set its kernel was chosen for.

    Raises
    ------
    NotImplementedError
        For an instruction set whose packing is not known here.
    """
    try:
        return _CPU_LAYOUTS[isa](head_size)
    except KeyError:
        raise NotImplementedError(
            f"KV compression does not know how vLLM packs its cache for the CPU instruction set "
            f"{isa!r}; known are {', '.join(sorted(_CPU_LAYOUTS))}. Start without --kv-compression."
        ) from None
