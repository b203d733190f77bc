"""Most that a request holds at once while its prompt is computed, and later.

Compactions inside a prompt bound it: between them the cache grows by what the setting's
`prompt_interval` says, and while decoding by its `interval`. A compaction's copies count nothing:
where the pool has no room for them, it happens in place.
"""

from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.lengths.schedule import Start, compactions


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
        What its prompt begins with; None: with nothing.
    """
    shape = num_groups, block_size, codes_per_row
    behind, done = [0] * num_groups, 0
    if start is not None:
        behind, done = [cache.num_tokens for cache in start.caches], start.num_tokens
    peaks = behind
    for each in compactions(prompt_len, num_tokens, config, *shape, start=start):
        peaks = [
            max(peak, cache.num_tokens) for peak, cache in zip(peaks, each.before, strict=True)
        ]
        behind, done = [cache.num_tokens for cache in each.after], each.position
    rest = num_tokens - done
    return [max(peak, held + rest) for peak, held in zip(peaks, behind, strict=True)]
