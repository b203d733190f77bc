"""Most that a request holds at once while its prompt is computed, and later.

Compactions inside a prompt bound it: between them the cache grows by what the setting's
`prompt_interval` says. A compaction's copies count nothing: where the pool has no room for them, it
happens in place.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.lengths.budgets import (
    after_compaction,
    next_lengths,
    permanent_ranges,
    prompt_marks,
)
from vllm_kvcompress.plans import GroupCache


@dataclass(frozen=True)
class Start:
    """A cache that a prompt begins with.

    Attributes
    ----------
    num_tokens : int
        Tokens of the prompt that are computed.
    caches : sequence of GroupCache
        What each layer group holds of them.
    marks : tuple[int, ...]
        Lengths of the prompt at which it will be compacted, ascending.
    """

    num_tokens: int
    caches: Sequence[GroupCache]
    marks: tuple[int, ...]


def peak_tokens(
    prompt_len: int,
    num_tokens: int,
    config: CompressionConfig,
    num_groups: int,
    block_size: int,
    codes_per_row: int | None = None,
    start: Start | None = None,
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
    start : Start or None
        What it begins with; None: with nothing.
    """
    if start is None:
        empty = GroupCache(0, permanent_ranges(prompt_len, config))
        start = Start(0, [empty] * num_groups, prompt_marks(prompt_len, config))
    done, caches = start.num_tokens, start.caches
    peaks = _higher([0] * num_groups, caches)
    for mark in start.marks:
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
