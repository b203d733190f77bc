"""Blocks as vLLM packs them for the CPU's attention kernel.

Per block and head of N tokens x D dims, keys come first, then values:

- "vec", "vec16": key element (t, d) at d * N + t; value element (t, d) at t * D + d.
  Example, N = 2, D = 3: keys k00 k10 k01 k11 k02 k12, values v00 v01 v02 v10 v11 v12.
- "amx": keys [N/16, D/2, 16, 2] indexed [t//16, d//2, t%16, d%2];
  values [D/16, N/2, 16, 2] indexed [d//16, t//2, d%16, t%2].
"""

from abc import abstractmethod

import torch

from vllm_kvcompress.kernels.cache.pages import Pages
from vllm_kvcompress.worker.layout.base import CacheLayout
from vllm_kvcompress.worker.layout.numbers import CacheNumbers


class _PackedLayout(CacheLayout):
    """CPU blocks: keys and values of a head are two contiguous halves of N * D elements."""

    def __init__(self, head_size: int, numbers: CacheNumbers | None = None) -> None:
        super().__init__(numbers)
        self.head_size = head_size

    def pages(
        self,
        cache: torch.Tensor,
        table: torch.Tensor,
        first_slot: torch.Tensor,
        num_tokens: torch.Tensor,
        max_tokens: int,
    ) -> tuple[Pages, torch.Tensor]:
        """Unpacked copies of the blocks."""
        block_size = cache.shape[2]
        first = first_slot.long() // block_size
        num_blocks = (first_slot + num_tokens + block_size - 1) // block_size - first
        columns = first[:, None] + torch.arange(int(num_blocks.max()), device=table.device)
        inside = columns < (first + num_blocks)[:, None]
        blocks = table.long().gather(1, columns.clamp(max=table.shape[1] - 1))
        used, numbers = torch.unique(blocks.masked_fill(~inside, 0), return_inverse=True)
        keys, values = self._unpack(*self._halves(cache[used]))
        pages = Pages(keys, values, numbers.int(), num_tokens, max_tokens)
        return pages, (first_slot % block_size).int()

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
        keys, values = self._unpack(*self._halves(cache[blocks]))
        return keys.transpose(0, 1).flatten(1, 2), values.transpose(0, 1).flatten(1, 2)

    def write(
        self, cache: torch.Tensor, blocks: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
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


def cpu_layout(isa: str, head_size: int, numbers: CacheNumbers | None = None) -> CacheLayout:
    """Layout of a CPU attention layer by the instruction set its kernel was chosen for.

    Raises
    ------
    NotImplementedError
        For an instruction set whose packing is not known here.
    """
    try:
        return _CPU_LAYOUTS[isa](head_size, numbers)
    except KeyError:
        raise NotImplementedError(
            f"KV compression does not know how vLLM packs its cache for the CPU instruction set "
            f"{isa!r}; known are {', '.join(sorted(_CPU_LAYOUTS))}. Start without --kv-compression."
        ) from None
