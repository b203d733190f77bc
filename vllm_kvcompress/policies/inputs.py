"""What a policy may look at."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch

from vllm_kvcompress.kernels.cache.rows import CacheRows
from vllm_kvcompress.kernels.formulas.rotary import Rotary


class Queries(Enum):
    """Which queries a policy reads.

    ``NONE``: none. ``WINDOW``: those of the observation window. ``PROMPT``: those of all prompt
    tokens, folded into a summary chunk by chunk (`Policy.accumulate`); requests of such a policy
    take no prefix-cache hits, because queries of cached tokens are never computed.
    """

    NONE = "none"
    WINDOW = "window"
    PROMPT = "prompt"


def _identity(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


@dataclass(frozen=True)
class ScoreInputs:
    """What a policy may look at: one request, one layer, this rank's KV heads.

    ``n`` is the number of tokens in the cache: the prompt's length, or fewer than the sequence's
    length where an earlier compaction has evicted some. Tokens are in logical order (pinned ones
    may come first after an earlier compaction).

    Attributes
    ----------
    rows : CacheRows
        The cached tokens. Ask it for what it measures in place (`CacheRows.attention` and so on)
        rather than for `keys` and `values`, which must be copied together first.
    accumulated : Any
        What `Policy.accumulate` made of the prompt's queries; None for other policies, and in
        compactions during decoding.
    position : int
        Logical position of the next token: the prompt's length, or more during decoding.
    num_keep : int
        How many of the n tokens will remain in this layer, forced ones included.
    forced : torch.Tensor
        [n] bool: tokens that remain whatever their score (sinks, observation window, pins).
    num_sink_tokens : int
        First tokens that are kept anyway.
    layer_index : int
        Index of the layer in the model, from 0.
    seed : int
        Checksum of the prompt, equal on all ranks and in every run.
    output_projection : torch.Tensor or None
        [num_heads, hidden_size, head_dim], the slice of the attention's output projection each
        query head of this rank goes through; None unless `Policy.needs_output_projection`.
    rotary : Rotary or None
        The layer's rotary embedding; None unless `Policy.needs_rotary`.
    all_reduce : callable
        Sums a tensor over the tensor-parallel ranks; the identity without tensor parallelism.
    num_ranks : int
        Ranks `all_reduce` sums over.
    first_kv_head : int
        Number of this rank's first KV head in the model.
    """

    rows: CacheRows
    accumulated: Any
    position: int
    num_keep: int
    forced: torch.Tensor
    num_sink_tokens: int
    layer_index: int
    seed: int
    output_projection: torch.Tensor | None = None
    rotary: Rotary | None = None
    all_reduce: Callable[[torch.Tensor], torch.Tensor] = _identity
    num_ranks: int = 1
    first_kv_head: int = 0

    @property
    def keys(self) -> torch.Tensor:
        """[num_kv_heads, n, head_dim], the cache's dtype, after RoPE."""
        return self.rows.keys

    @property
    def values(self) -> torch.Tensor:
        """[num_kv_heads, n, head_dim], the cache's dtype."""
        return self.rows.values

    @property
    def queries(self) -> torch.Tensor | None:
        """[num_heads, window, head_dim] after RoPE, of the last ``window`` tokens.

        None unless the policy reads queries; for `Queries.PROMPT`, None at the end of the prompt.
        """
        return self.rows.queries

    @property
    def scale(self) -> float:
        """Softmax scale of the layer."""
        return self.rows.scale

    def mean_over_heads(self, scores: torch.Tensor) -> torch.Tensor:
        """Average [num_kv_heads, m] over the KV heads of all ranks and give every head the mean."""
        mean = self.all_reduce(scores.mean(dim=0, keepdim=True)) / self.num_ranks
        return mean.expand_as(scores)


@dataclass(frozen=True)
class ChunkInputs:
    """One chunk of a prompt, for policies that read all queries: one request, one layer.

    What it gives out lives as long as the call: a policy keeps none of it.

    Attributes
    ----------
    rows : CacheRows
        Tokens [0, start + chunk_len), with the chunk's queries. As in `ScoreInputs`.
    start : int
        Position of the chunk's first token.
    prompt_len : int
        Tokens of the whole prompt.
    num_sink_tokens : int
        First tokens that are kept anyway.
    rotary : Rotary or None
        The layer's rotary embedding; None unless `Policy.needs_rotary`.
    """

    rows: CacheRows
    start: int
    prompt_len: int
    num_sink_tokens: int
    rotary: Rotary | None = None

    @property
    def queries(self) -> torch.Tensor:
        """[num_heads, chunk_len, head_dim] after RoPE, of tokens [start, start + chunk_len)."""
        assert self.rows.queries is not None
        return self.rows.queries

    @property
    def keys(self) -> torch.Tensor:
        """[num_kv_heads, start + chunk_len, head_dim] after RoPE."""
        return self.rows.keys
