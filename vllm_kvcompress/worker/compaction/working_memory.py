"""Device memory that compactions need beside the cache, worked out before there is one.

vLLM profiles the model's forward pass and gives nearly all that is left to the cache. A compaction
runs after the forward pass, whose own memory is free by then, but not known to be enough: what it
holds at once is reckoned here, from above, for the server's setting.

    scores    4 bytes per token, KV head and layer of the largest KV cache group
    one layer what the policy holds while it scores (`Policy.working_bytes`)
    indices   8 bytes per survivor, KV head and layer; while pins are put first, twice that and
              what sorting them takes
    writing   one head's survivors of one request, `_ASIDE` times, where they are copied aside
              because blocks of theirs are overwritten; or what it takes to write them in another
              form than they have
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.kernels.codebook.format import codes_per_row
from vllm_kvcompress.lengths.budgets import (
    after_compaction,
    layer_groups,
    next_lengths,
    permanent_ranges,
)
from vllm_kvcompress.plans import GroupCache, GroupLengths
from vllm_kvcompress.policies.inputs import Queries
from vllm_kvcompress.policies.layer_shape import LayerShape
from vllm_kvcompress.worker.compaction.compactor import MAX_TOKENS

_ASIDE = 4
"""Copies of survivors that are moved in place: as gathered, their keys in float32 while they are
turned, together again, and in the order of the cache."""

_DECODED_BYTES = 5
"""Per number that is copied out of an 8-bit cache: as it is stored (1), and in float32 (4)."""

_SORT_BYTES = 36
"""Per survivor, while pins are put first: marks (1), sorted marks (1), their order (8), survivors
in it (8), and as much again as the sort moves them through (18)."""


@dataclass(frozen=True)
class RankShape:
    """What one rank runs.

    Attributes
    ----------
    num_layers : int
        Layers of the whole model: their groups follow from it.
    own_layers : sequence of int
        Numbers of the layers on this rank.
    num_heads, num_kv_heads, head_dim, hidden_size : int
        Of every layer, heads on this rank.
    cache_dtype : torch.dtype
        Of cached keys and values.
    block_size : int
        Tokens per block.
    max_model_len, max_num_reqs : int
        Longest request, and most requests at once.
    absorbs_queries : bool
        Whether queries become as wide as a cached row before they score it (MLA): `head_dim`.
    """

    num_layers: int
    own_layers: Sequence[int]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    cache_dtype: torch.dtype
    block_size: int
    max_model_len: int
    max_num_reqs: int
    absorbs_queries: bool = False

    def layer(self, window: int) -> LayerShape:
        """One layer, under an observation window."""
        size = self.cache_dtype.itemsize
        return LayerShape(
            self.num_heads, self.num_kv_heads, self.head_dim,
            size if size > 1 else _DECODED_BYTES, window, self.hidden_size,
        )  # fmt: skip


WritingBytes = Callable[[GroupLengths, RankShape, int], int]
"""What is held at once while one request's survivors are written in so many layers."""


def compaction_bytes(
    config: CompressionConfig, shape: RankShape, writers: Sequence[WritingBytes] = ()
) -> int:
    """Most device memory that the compactions of one step hold at once.

    Parameters
    ----------
    config : CompressionConfig
        The server's setting; what a request names on its own may take more.
    shape : RankShape
        The model, and the longest request.
    writers : sequence of callable
        Who writes survivors beside the compactor itself.

    Returns
    -------
    int
        Bytes, from above. 0 where no request is long enough to be compacted.
    """
    configs = (config, *config.by_task.values())
    return max(_bytes_of(each, shape, writers) for each in configs)


def _bytes_of(config: CompressionConfig, shape: RankShape, writers: Sequence[WritingBytes]) -> int:
    groups = layer_groups(shape.num_layers, config.layer_groups)
    own = [groups[index] for index in shape.own_layers]
    most_layers = max(own.count(group) for group in set(own))
    share, kept = _survivors(config, shape, max(groups) + 1)
    if not share:
        return 0
    # Requests are compacted together up to MAX_TOKENS; a longer one alone.
    num_tokens = max(MAX_TOKENS, shape.max_model_len)
    num_tokens = min(num_tokens, shape.max_num_reqs * shape.max_model_len)
    per_layer = num_tokens * shape.num_kv_heads
    scores = 4 * per_layer * most_layers
    layer = shape.layer(config.observation_window)
    scoring = scores + config.build_policy().working_bytes(layer, num_tokens)
    if shape.absorbs_queries:
        scoring += _absorbed_bytes(config, shape)
    num_kept = int(share * per_layer * most_layers)
    choosing = max(scores + 8 * num_kept, (8 + _SORT_BYTES) * num_kept)
    row = (1 if shape.absorbs_queries else 2) * shape.head_dim * shape.cache_dtype.itemsize
    writing = [_ASIDE * row * int(share * shape.max_model_len)]
    writing += [each(lengths, shape, most_layers) for each in writers for lengths in kept]
    largest = max(scoring, choosing, 8 * num_kept + max(writing))
    # The host's numbers: block tables, lengths and which tokens stay.
    return largest + (max(groups) + 1) * 2 * num_tokens


def _absorbed_bytes(config: CompressionConfig, shape: RankShape) -> int:
    """Absorbed queries of the window of all requests that are compacted at once, and a stack of
    them.
    """
    if config.build_policy().queries is not Queries.WINDOW:
        return 0
    shortest = []
    if config.compresses_prompts:
        shortest.append(config.min_prompt_len)
    if config.compresses_while_decoding:
        shortest.append(config.interval)
    at_once = MAX_TOKENS // max(min(shortest, default=0), shape.block_size)
    num_requests = min(shape.max_num_reqs, max(at_once, 1))
    width = shape.num_heads * shape.head_dim * shape.cache_dtype.itemsize
    return 2 * num_requests * config.observation_window * width


def _survivors(
    config: CompressionConfig, shape: RankShape, num_groups: int
) -> tuple[float, list[GroupLengths]]:
    """Largest share of a prompt that any group keeps, and all lengths, over prompts' lengths."""
    per_row = codes_per_row(shape.head_dim * shape.cache_dtype.itemsize)
    share: float = 0.0
    kept: list[GroupLengths] = []
    length = shape.max_model_len
    while length >= max(config.min_prompt_len, shape.block_size):
        cache = GroupCache(length, permanent_ranges(length, config))
        caches = [cache] * num_groups
        lengths = next_lengths(length, length, caches, config, shape.block_size, per_row)
        for own in lengths:
            if own is not None:
                share = max(share, own.num_survivors / length)
                kept.append(own)
        if config.extends_codebooks:  # of what an interval leaves, in whole blocks
            grown = config.interval + shape.block_size
            after = [
                after_compaction(each, own) if own else each
                for each, own in zip(caches, lengths, strict=True)
            ]
            longer = [replace(each, num_tokens=each.num_tokens + grown) for each in after]
            more = next_lengths(length, length + grown, longer, config, shape.block_size, per_row)
            kept += [own for own in more if own is not None and own.coded_before]
        length //= 2
    return share, kept
