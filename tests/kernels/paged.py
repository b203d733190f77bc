"""Random paged caches for kernel tests, with poison wherever a kernel must not look."""

from collections.abc import Sequence

import torch

from vllm_kvcompress.kernels.cache.pages import Pages

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Physical order of [layers, blocks, heads, slots, content], vLLM's six.
LAYOUTS = {
    "LBHNC": (0, 1, 2, 3, 4),
    "LBNHC": (0, 1, 3, 2, 4),
    "LHBNC": (0, 2, 1, 3, 4),
    "BLHNC": (1, 0, 2, 3, 4),
    "BLNHC": (1, 0, 3, 2, 4),
    "BHLNC": (1, 2, 0, 3, 4),
}
OUTSIDE = 10**8
"""Block number behind a request's last block: following it would end the process."""


def make_cache(
    num_blocks: int,
    num_kv_heads: int,
    block_size: int,
    content: int,
    dtype: torch.dtype,
    layout: str = "LBHNC",
    num_layers: int = 2,
) -> list[torch.Tensor]:
    """Views [B, KV, N, C] of every layer, all NaN."""
    logical = (num_layers, num_blocks, num_kv_heads, block_size, content)
    order = LAYOUTS[layout]
    physical = torch.full([logical[dim] for dim in order], float("nan"), device=DEVICE).to(dtype)
    return list(physical.permute([order.index(dim) for dim in range(5)]))


def fill(cache: torch.Tensor, blocks: Sequence[int], rows: torch.Tensor) -> None:
    """Write [KV, n, C] rows to blocks; the rest of the last block stays as it is."""
    block_size = cache.shape[2]
    for token in range(rows.shape[1]):
        cache[blocks[token // block_size], :, token % block_size] = rows[:, token].to(cache.dtype)


def random_pages(
    lengths: Sequence[int],
    num_kv_heads: int = 2,
    head_dim: int = 64,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    layout: str = "LBHNC",
    seed: int = 0,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
) -> tuple[Pages, list[torch.Tensor], list[torch.Tensor]]:
    """A ragged batch in one layer, and its exact keys and values.

    Returns
    -------
    tuple
        Pages; per request keys [KV, n, D] float64 and values [KV, n, D] float64, as stored and
        scaled.
    """
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-length // block_size) for length in lengths]
    num_blocks = sum(counts) + 3
    cache = make_cache(num_blocks, num_kv_heads, block_size, 2 * head_dim, dtype, layout)[1]
    order = torch.randperm(num_blocks, generator=generator).tolist()
    table = torch.full((len(lengths), max(counts) + 2), OUTSIDE, dtype=torch.int32)
    keys, values = [], []
    for request, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        blocks = [order.pop() for _ in range(count)]
        table[request, :count] = torch.tensor(blocks, dtype=torch.int32)
        rows = torch.randn(num_kv_heads, length, 2 * head_dim, generator=generator)
        stored = rows.to(dtype)
        fill(cache, blocks, stored.to(DEVICE))
        keys.append(stored[..., :head_dim].double() * key_scale)
        values.append(stored[..., head_dim:].double() * value_scale)
    pages = Pages(
        keys=cache[..., :head_dim],
        values=cache[..., head_dim:],
        block_table=table.to(DEVICE),
        num_tokens=torch.tensor(list(lengths), dtype=torch.int32, device=DEVICE),
        max_tokens=max(lengths),
        key_scale=key_scale,
        value_scale=value_scale,
    )
    return pages, keys, values


def nan_empty(monkeypatch) -> None:
    """Let `torch.empty` and `new_empty` hand out NaN: unwritten outputs show."""
    empty, new_empty = torch.empty, torch.Tensor.new_empty

    def poisoned(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor.fill_(-99)

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poisoned(empty(*a, **k)))
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda self, *a, **k: poisoned(new_empty(self, *a, **k))
    )
