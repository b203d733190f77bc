"""The sizes of one attention layer on one rank that a policy's memory depends on."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerShape:
    """Sizes of a layer.

    Attributes
    ----------
    num_heads, num_kv_heads : int
        Query heads and KV heads of this rank.
    head_dim : int
        Numbers per key, and per value.
    itemsize : int
        Bytes per cached number that is copied; at least those of a weight.
    window : int
        Queries of the observation window.
    hidden_size : int
        Numbers that the output projection makes of a token.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    itemsize: int
    window: int
    hidden_size: int

    @property
    def copy_bytes(self) -> int:
        """Bytes of a token's keys (or values) in all KV heads, which `CacheRows.keys` copies."""
        return self.num_kv_heads * self.head_dim * self.itemsize

    @property
    def float_bytes(self) -> int:
        """Bytes of one KV head's key of a token in float32."""
        return 4 * self.head_dim

    @property
    def logit_bytes(self) -> int:
        """Bytes of a token's logits in float32, of one KV head and all queries of the window."""
        return 4 * self.num_heads // self.num_kv_heads * self.window
