"""The caches of several layers that one launch works on."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm_kvcompress.kernels.host_copy import to_device


@dataclass(frozen=True)
class LayerCaches:
    """Caches of layers that are laid out alike, as vLLM makes them for a KV cache group.

    Attributes
    ----------
    caches : tuple of torch.Tensor
        L views [B, KV, N, C] of one dtype, shape and strides; C = a token's key followed by its
        value, whose elements are neighbours.
    pointers : torch.Tensor
        [L] int64 on the caches' device: their addresses, all multiples of 16.
    head_dim : int
        D; the first D of C elements are the key.
    """

    caches: tuple[torch.Tensor, ...]
    pointers: torch.Tensor
    head_dim: int

    @classmethod
    def of(
        cls,
        caches: Sequence[torch.Tensor],
        head_dim: int,
        pointers: torch.Tensor | None = None,
    ) -> "LayerCaches":
        """Check the layers and collect their addresses.

        Parameters
        ----------
        caches : sequence of torch.Tensor
            L views.
        head_dim : int
            D.
        pointers : torch.Tensor or None
            Their addresses, for who has sent them to the device already.

        Raises
        ------
        ValueError
            If the layers differ, or rows are not contiguous or not aligned to 16 bytes.
        """
        first = caches[0]
        for cache in caches:
            if (cache.dtype, cache.shape, cache.stride()) != (
                first.dtype, first.shape, first.stride(),
            ):  # fmt: skip
                raise ValueError("layers of one launch must have one dtype, shape and strides")
            starts = [cache.data_ptr()] + [s * cache.element_size() for s in cache.stride()[:3]]
            if cache.stride(3) != 1 or any(start % 16 for start in starts):
                raise ValueError(
                    "rows of a cache must be contiguous and start at 16-byte addresses"
                )
        if pointers is None:
            pointers = to_device([c.data_ptr() for c in caches], torch.int64, first.device)
        if len(pointers) != len(caches):
            raise ValueError(f"{len(pointers)} addresses for {len(caches)} caches")
        return cls(tuple(caches), pointers, head_dim)
