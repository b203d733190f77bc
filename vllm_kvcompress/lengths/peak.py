"""Most that a request holds at once while its prompt is computed, and later.

Compactions inside a prompt bound it: between them the cache grows by what the setting's
`prompt_interval` says, and while decoding by its `interval`. A compaction's copies count nothing:
where the pool has no room for them, it happens in place.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.lengths.budgets import (
    after_compaction,
    compaction_lengths,
    compacts_again,
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
        Tokens of the prompt, and of the sequence.
    config : CompressionConfig
        The request's setting.
    num_groups, block_size : int
        Layer groups, and tokens per block.
    codes_per_row : int or None
        Tokens whose codes a slot takes; needed where the setting has a codebook.
    start : Start or None
        What it begins with; None: with nothing.
    """
    shape = num_groups, block_size, codes_per_row
    if start is None:
        empty = GroupCache(0, permanent_ranges(prompt_len, config))
        lengths_at_end = compaction_lengths(prompt_len, config, *shape)
        marks = prompt_marks(prompt_len, config) if any(lengths_at_end) else ()
        start = Start(0, [empty] * num_groups, marks)
    done, caches = start.num_tokens, list(start.caches)
    peaks, following = _higher([0] * num_groups, caches), iter(start.marks)
    while True:
        mark = next(following, None)
        if mark is None:
            if not compacts_again(config, caches):
                break
            mark = max(done, prompt_len) + config.interval
        if mark > num_tokens:
            break
        caches = _grown(caches, mark - done)
        peaks = _higher(peaks, caches)
        lengths = next_lengths(prompt_len, mark, caches, config, *shape[1:])
        caches = [
            after_compaction(cache, each) if each else cache
            for cache, each in zip(caches, lengths, strict=True)
        ]
        done = mark
    return _higher(peaks, _grown(caches, num_tokens - done))


def longest_prompt_peak(
    max_len: int,
    config: CompressionConfig,
    num_groups: int,
    block_size: int,
    codes_per_row: int | None = None,
) -> list[int]:
    """Most slots that any prompt of up to `max_len` tokens needs, for each layer group.

    A request of such a prompt can always be served, whatever its setting's variants.
    """
    peaks = [0] * num_groups
    for each in config.by_task.values() if config.tasks else (config,):
        for length in _worst_prompts(max_len, each):
            found = peak_tokens(length, length, each, num_groups, block_size, codes_per_row)
            peaks = [max(pair) for pair in zip(peaks, found, strict=True)]
    return peaks


def _worst_prompts(max_len: int, config: CompressionConfig) -> Iterator[int]:
    """Prompts one of which needs most: the longest, the one with the longest way to its end, and
    the longest that is left alone."""
    yield max_len
    if not config.compresses_in_prompts:
        return
    window, step = config.observation_window, config.prompt_interval
    if max_len >= step + window:
        yield max_len - (max_len - window + 1) % step
    yield min(max_len, max(config.min_prompt_len - 1, 1))


def _grown(caches: Sequence[GroupCache], num_tokens: int) -> list[GroupCache]:
    return [replace(each, num_tokens=each.num_tokens + num_tokens) for each in caches]


def _higher(peaks: Sequence[int], caches: Sequence[GroupCache]) -> list[int]:
    return [max(peak, each.num_tokens) for peak, each in zip(peaks, caches, strict=True)]
