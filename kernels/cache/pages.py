"""Where the tokens of some requests lie in one layer's paged cache.

Dimensions: B blocks of the cache, KV key-value heads, N slots per block, D head_dim, R requests,
P entries of a block table row, n tokens.

    token t of request r  ->  cache[block_table[r, t // N], head, t % N]
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Pages:
    """Cached tokens of a ragged batch of requests in one layer.

    The caches may have any strides: vLLM has six physical orders of blocks, layers, heads and
    slots for them. Kernels read 16 bytes at a time where a row's elements are neighbours.

    Attributes
    ----------
    keys, values : torch.Tensor
        [B, KV, N, D] views of the layer's cache; float32, float16, bfloat16 or an 8-bit float.
        Usually two halves of the same storage.
    block_table : torch.Tensor
        [R, P] int32, blocks in units of N slots. Entries at and behind ``ceil(n / N)`` of a row are
        never followed, whatever they hold.
    num_tokens : torch.Tensor
        [R] int32 on the caches' device, tokens of each request.
    max_tokens : int
        The largest of them, known on the host: launches and outputs are sized by it.
    key_scale, value_scale : float, default 1.0
        What stored numbers are multiplied by, in 8-bit caches.

    Raises
    ------
    ValueError
        If a cache of another type has a scale.
    """

    keys: torch.Tensor
    values: torch.Tensor
    block_table: torch.Tensor
    num_tokens: torch.Tensor
    max_tokens: int
    key_scale: float = 1.0
    value_scale: float = 1.0

    def __post_init__(self) -> None:
        scaled = self.key_scale != 1.0 or self.value_scale != 1.0
        if scaled and self.keys.element_size() > 1:
            raise ValueError(f"only 8-bit caches are scaled, not those of {self.keys.dtype}")

    @property
    def num_requests(self) -> int:
        """R."""
        return self.block_table.shape[0]

    @property
    def num_kv_heads(self) -> int:
        """KV."""
        return self.keys.shape[1]

    @property
    def block_size(self) -> int:
        """N."""
        return self.keys.shape[2]

    @property
    def head_dim(self) -> int:
        """D."""
        return self.keys.shape[3]

    def gather_keys(self, request: int, num_tokens: int) -> torch.Tensor:
        """Keys [KV, num_tokens, D] of one request, copied: as stored, or scaled if of 8 bits."""
        return self._gather(self.keys, self.key_scale, request, num_tokens)

    def gather_values(self, request: int, num_tokens: int) -> torch.Tensor:
        """Values [KV, num_tokens, D] of one request, copied: as stored, or scaled if of 8 bits."""
        return self._gather(self.values, self.value_scale, request, num_tokens)

    def _gather(
        self, cache: torch.Tensor, scale: float, request: int, num_tokens: int
    ) -> torch.Tensor:
        num_blocks = -(-num_tokens // self.block_size)
        blocks = self.block_table[request, :num_blocks].long()
        stored = cache.view(torch.uint8) if cache.element_size() == 1 else cache
        rows = stored[blocks].transpose(0, 1).flatten(1, 2)[:, :num_tokens]  # [KV, n, D]
        if cache.element_size() > 1:
            return rows
        return rows.view(cache.dtype).float().mul_(scale)
