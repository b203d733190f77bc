"""Budgets as whole tokens: pure functions of lengths and configuration.

Scheduler and worker both call these and must get the same answer, so nothing here may depend on
anything but the arguments. Ratios exist only in the configuration and end here.
"""

import math

from vllm_kvcompress.config import CompressionConfig, LayerGroupsConfig
from vllm_kvcompress.plans import GroupLengths


def layer_groups(num_layers: int, config: LayerGroupsConfig) -> list[int]:
    """Return the group number of every layer: consecutive runs, numbered from 0.

    With `count`, sizes differ by at most one, larger groups first; a count above the number of
    layers gives one group per layer.
    """
    if config.size is not None:
        return [layer // config.size for layer in range(num_layers)]
    assert config.count is not None
    count = min(config.count, num_layers)
    small, larger = divmod(num_layers, count)
    sizes = [small + 1] * larger + [small] * (count - larger)
    return [group for group, size in enumerate(sizes) for _ in range(size)]


def budget_tokens(prompt_len: int, config: CompressionConfig) -> int:
    """Tokens of the prompt to keep, averaged over layers, in [1, prompt_len]."""
    if config.budget.ratio is not None:
        tokens = int(prompt_len * config.budget.ratio)
    else:
        assert config.budget.tokens is not None
        tokens = config.budget.tokens
    return min(max(tokens, config.budget.floor), prompt_len)


def group_budgets(prompt_len: int, config: CompressionConfig, num_groups: int) -> list[int]:
    """Tokens to keep in each layer group, first group first.

    The pyramid is PyramidKV's (arXiv 2406.02069, as in KVCache-Factory), over groups instead of
    layers: with C the average and w the observation window, the last group gets
    (C - w) / beta + w, the first 2 (C - w) - (C - w) / beta + w, linear in between; a first group
    larger than the prompt is clipped and the last one raised, so that the average stays C.
    """
    average = budget_tokens(prompt_len, config)
    window = min(config.observation_window, prompt_len)
    spread = average - window
    if config.layer_budget.shape == "uniform" or num_groups == 1 or spread <= 0:
        return [average] * num_groups
    lowest = spread / config.layer_budget.beta
    highest = 2 * spread - lowest
    if highest > prompt_len - window:
        highest = prompt_len - window
        lowest = 2 * spread - highest
    step = (highest - lowest) / (num_groups - 1)
    return [window + round(highest - step * group) for group in range(num_groups)]


def forced_ranges(prompt_len: int, config: CompressionConfig) -> list[tuple[int, int]]:
    """Prompt positions that are never evicted, as disjoint ascending half-open ranges.

    Sinks, the observation window and pins; pins beyond the prompt are cut off.
    """
    window_start = max(prompt_len - config.observation_window, 0)
    ranges = [(0, config.num_sink_tokens), (window_start, prompt_len)]
    ranges += [(start, end) for start, end in config.pinned]
    merged: list[tuple[int, int]] = []
    for start, end in sorted((s, min(e, prompt_len)) for s, e in ranges):
        if start >= end:
            continue
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def group_lengths(
    prompt_len: int, budget: int, forced: list[tuple[int, int]], block_size: int
) -> GroupLengths | None:
    """Region and survivors of one layer group, or None where no block would come free.

    The region is every full block of the prompt. Survivors are rounded up to whole blocks, so a
    group keeps its budget and at most ``block_size - 1`` tokens more, or all forced tokens.
    """
    region = prompt_len // block_size * block_size
    num_forced = sum(min(end, region) - start for start, end in forced if start < region)
    wanted = max(budget - (prompt_len - region), num_forced, 1)
    kept = math.ceil(wanted / block_size) * block_size
    return GroupLengths(region, kept) if kept < region else None


def compaction_lengths(
    prompt_len: int, config: CompressionConfig, num_groups: int, block_size: int
) -> list[GroupLengths | None]:
    """Lengths of every layer group for a prompt; all None means "leave the request alone"."""
    if prompt_len < config.min_prompt_len:
        return [None] * num_groups
    forced = forced_ranges(prompt_len, config)
    return [
        group_lengths(prompt_len, budget, forced, block_size)
        for budget in group_budgets(prompt_len, config, num_groups)
    ]
