"""Most that a request holds at once while its prompt is computed, and later.

Compactions inside a prompt bound it: between them the cache grows by what the setting's
`prompt_interval` says. A compaction's copies count nothing: where the pool has no room for them, it
happens in place.
"""

from collections.abc import Sequence
from dataclasses import replace

from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.lengths.budgets import (
    after_compaction,
    next_lengths,
    permanent_ranges,
    prompt_marks,
)
from vllm_kvcompress.plans import GroupCache


def peak_tokens(
    prompt_len: int,
    num_tokens: int,
    config: CompressionConfig,
    num_groups: int,
    block_size: int,
    codes_per_row: int | None = None,
) -> list[int]:
    """Most slots that a request of `num_tokens` tokens has ever needed, for each layer group.

    Parameters
    ----------
    prompt_len, num_tokens : int
        Tokens of the prompt, and of the sequence: what comes behind the prompt is counted as if
        generated tokens triggered nothing, for they need not be computed in one go.
    config : CompressionConfig
        The request's setting.
    num_groups, block_size : int
        Layer groups, and tokens per block.
    codes_per_row : int or None
        Tokens whose codes a slot takes; needed where the setting has a codebook.
    """
    caches = [GroupCache(0, permanent_ranges(prompt_len, config))] * num_groups
    peaks, done = [0] * num_groups, 0
    for mark in prompt_marks(prompt_len, config):
        if mark > num_tokens:
            break
        caches = _grown(caches, mark - done)
        peaks = _higher(peaks, caches)
        lengths = next_lengths(prompt_len, mark, caches, config, block_size, codes_per_row)
        caches = [
            after_compaction(cache, each) if each else cache
            for cache, each in zip(caches, lengths, strict=True)
        ]
        done = mark
    return _higher(peaks, _grown(caches, num_tokens - done))


def _grown(caches: Sequence[GroupCache], num_tokens: int) -> list[GroupCache]:
    return [replace(each, num_tokens=each.num_tokens + num_tokens) for each in caches]


def _higher(peaks: Sequence[int], caches: Sequence[GroupCache]) -> list[int]:
    return [max(peak, each.num_tokens) for peak, each in zip(peaks, caches, strict=True)]
