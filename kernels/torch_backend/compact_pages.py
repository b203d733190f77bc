"""Copy surviving rows of paged caches to other pages: torch version."""

import torch

from vllm_kvcompress.kernels.cache.layer_caches import LayerCaches
from vllm_kvcompress.kernels.formulas.rotary import Rotary


def gather_rows(rows: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Take rows per KV head.

    Parameters
    ----------
    rows : torch.Tensor
        [KV, R, D], keys or values of a region in logical order; any dtype, copied bit for bit.
    indices : torch.Tensor
        [KV, K] int64, positions in [0, R).

    Returns
    -------
    torch.Tensor
        [KV, K, D], same dtype as `rows`.
    """
    return rows.gather(1, indices[:, :, None].expand(-1, -1, rows.shape[-1]))


def compact_pages(
    layers: LayerCaches,
    source_table: torch.Tensor,
    destination_table: torch.Tensor,
    indices: torch.Tensor,
    num_keep: torch.Tensor,
    first_target: torch.Tensor | None = None,
    rotary: Rotary | None = None,
) -> None:
    """As `vllm_kvcompress.kernels.compaction.compact_pages.compact_pages`."""
    heads = torch.arange(layers.caches[0].shape[1], device=indices.device)[:, None]
    size = layers.caches[0].shape[2]
    for request, count in enumerate(num_keep.tolist()):
        slots = torch.arange(count, device=indices.device)
        to = destination_table[request, slots // size].long()
        for cache, layer_indices in zip(layers.caches, indices, strict=True):
            chosen = layer_indices[request, :, :count]  # [KV, K]
            blocks = source_table[request, chosen // size].long()
            stored = cache.view(torch.uint8) if cache.element_size() == 1 else cache
            rows = stored[blocks, heads, chosen % size].view(cache.dtype)  # [KV, K, C]
            if rotary is not None:
                assert first_target is not None
                distance = first_target[request] + slots - chosen
                keys = rotary.rotate(rows[..., : layers.head_dim].float(), distance)
                largest = torch.finfo(cache.dtype).max
                keys = keys.clamp(-largest, largest).to(cache.dtype)
                rows = torch.cat([keys, rows[..., layers.head_dim :]], dim=-1)
            stored[to, heads, slots % size] = rows.view(stored.dtype)
