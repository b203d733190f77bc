"""Most that any prompt up to some length holds while it is computed.

Marks inside a prompt are counted back from its end, so that any position may be a mark. Behind one
a group holds its share of the budget, or all forced tokens; as whole blocks alone are evicted, it
may hold one token less than a block besides. To that the next `prompt_interval` tokens come.
"""

from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.lengths.budgets import group_budgets, permanent_ranges, target_tokens

_NUM_LENGTHS = 256
"""Lengths at which the shares of the layer groups are compared, before it is done closely."""


def longest_prompt_peak(
    max_len: int, config: CompressionConfig, num_groups: int, block_size: int
) -> list[int]:
    """Most slots that any prompt of up to `max_len` tokens needs, for each layer group.

    A request of such a prompt can always be served, whatever its setting's variants. One of these
    prompts needs so much, or about a block less (`peak.peak_tokens`).
    """
    peaks = [0] * num_groups
    for each in config.by_task.values() if config.tasks else (config,):
        if not each.compresses_in_prompts:
            return [max_len] * num_groups  # all of it, until its end
        step, window = each.prompt_interval, each.observation_window
        before_mark = permanent_ranges(max_len - step, each)
        permanent = sum(end - start for start, end in before_mark)
        in_blocks = -(-permanent // block_size) * block_size
        for group, share in enumerate(_largest_shares(max_len, each, num_groups)):
            kept = max(share, permanent + window, in_blocks, block_size)
            # Prompts below `min_prompt_len` have no mark inside.
            most = max(kept + block_size - 1 + step, each.min_prompt_len - 1)
            peaks[group] = max(peaks[group], min(most, max_len))
    return peaks


def _largest_shares(max_len: int, config: CompressionConfig, num_groups: int) -> list[int]:
    """Most tokens of each layer group that any mark leaves, of the budget of the longest prompt.

    Where shares are unequal they depend on the mark: a cache no longer than the average is whole,
    and what a group that gets less still has to give up is least there. As the sequence becomes
    longer a share rises and falls once at most, or falls and rises.
    """
    target = target_tokens(max_len, config)
    last = max(max_len - config.prompt_interval, target)

    def shares(marks: range) -> list[tuple[list[int], int]]:
        return [(group_budgets(mark, target, config, num_groups), mark) for mark in marks]

    if num_groups == 1 or config.layer_budget.shape == "uniform":
        return group_budgets(last, target, config, num_groups)
    stride = max((last - target) // _NUM_LENGTHS, 1)
    coarse = shares(range(target, last + 1, stride)) + shares(range(last, last + 1))
    largest = []
    for group in range(num_groups):
        near = max(coarse, key=lambda each: each[0][group])[1]
        close = shares(range(max(near - stride, target), min(near + stride, last) + 1))
        largest.append(max(each[0][group] for each in close))
    return largest
