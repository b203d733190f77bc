"""How a request begins with a kept cache: of an earlier turn of its conversation, or a prefix.

Lengths alone: what is in the blocks, and whose they are, is for sessions.py and shared_prefixes.py.
Preempted, such a request starts again from nothing.
"""

from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.core.tracked_request import CompactionSchedule, Phase, TrackedRequest
from vllm_kvcompress.lengths.budgets import (
    continued_cache,
    next_lengths,
    permanent_ranges,
    prompt_marks,
)
from vllm_kvcompress.lengths.schedule import Start


def window_read(config: CompressionConfig) -> int:
    """Last tokens before a compaction that must be computed, not found."""
    return config.observation_window if config.build_policy().queries.value != "none" else 1


def num_reusable(tracked: TrackedRequest, num_common: int, compacted_at: int) -> int | None:
    """Tokens that a request may continue, of `num_common` that the earlier turn has as well.

    At least one token must be computed, and so must those whose queries the end of the prompt
    reads. Where fewer have come since the last compaction, at a length of `compacted_at`, the
    prompt ends without one. All that this compaction has seen must be common: None if it is not.
    """
    assert tracked.config is not None
    limit = tracked.prompt_len - window_read(tracked.config)
    if limit < compacted_at:
        limit = tracked.prompt_len - 1
    num_tokens = min(num_common, limit)
    return num_tokens if num_tokens >= compacted_at else None


def pins_alike(tracked: TrackedRequest, num_tokens: int, prompt_len: int) -> bool:
    """Whether the same of the first `num_tokens` tokens are pinned as in the earlier prompt.

    What was generated then is part of the prompt now, and may have been evicted since.
    """
    assert tracked.config is not None
    before = permanent_ranges(min(num_tokens, prompt_len), tracked.config)
    return permanent_ranges(num_tokens, tracked.config) == before


def continue_from(
    tracked: TrackedRequest,
    held: CompactionSchedule,
    num_tokens: int,
    block_size: int,
    codes_per_row: int | None,
) -> None:
    """Arm a request that begins with `num_tokens` tokens of what an earlier turn held."""
    config, prompt_len = tracked.config, tracked.prompt_len
    assert config is not None
    caches = [
        continued_cache(cache, evicted, num_tokens, prompt_len, config)
        for cache, evicted in zip(held.caches, held.evicted, strict=True)
    ]
    tracked.compaction = CompactionSchedule(caches, held.compacted_at)
    at_end = tracked.compaction.caches_at(prompt_len)
    gains = next_lengths(prompt_len, prompt_len, at_end, config, block_size, codes_per_row)
    ahead = num_tokens + window_read(config)
    marks = tuple(mark for mark in prompt_marks(prompt_len, config) if mark >= ahead)
    tracked.marks = marks if any(gains) else ()
    tracked.peaks = {}
    tracked.start = Start(num_tokens, tracked.compaction.caches_at(num_tokens), tracked.marks)
    if tracked.marks:
        tracked.next_at = tracked.marks[0]
    elif config.compresses_while_decoding:
        tracked.next_at = prompt_len + config.interval
    else:
        tracked.next_at, tracked.phase = prompt_len, Phase.DONE


def begin_with(tracked: TrackedRequest, held: CompactionSchedule, num_tokens: int) -> None:
    """A request begins with a shared prefix of `num_tokens` tokens, and is compacted no more."""
    tracked.compaction = CompactionSchedule(list(held.caches), held.compacted_at)
    tracked.start, tracked.marks, tracked.peaks = Start(num_tokens, held.caches, ()), (), {}
    tracked.next_at, tracked.phase = num_tokens, Phase.DONE
