"""Budgets as whole tokens: pure functions of lengths and configuration.

The scheduler plans by these, workers reckon how much memory a plan can take, and `kvcompress plan`
tells beforehand; all must get the same answer, so nothing here may depend on anything but the
arguments. Ratios exist only in the configuration and end here.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

from vllm_kvcompress.config.settings import CompressionConfig, LayerBudgetConfig, LayerGroupsConfig
from vllm_kvcompress.lengths.codebook import book_lengths, coded_groups, extended_lengths
from vllm_kvcompress.lengths.layer_budgets import SHAPES
from vllm_kvcompress.plans import GroupCache, GroupLengths, Span


def layer_groups(num_layers: int, config: LayerGroupsConfig) -> list[int]:
    """Return the group number of every layer: consecutive runs, numbered from 0.

    Sizes differ by at most one, larger groups first. With `size` there are as few groups as have
    no more layers than that; a `count` above the number of layers gives one group per layer.
    """
    if config.size is not None:
        count = -(-num_layers // config.size)
    else:
        assert config.count is not None
        count = min(config.count, num_layers)
    small, larger = divmod(num_layers, count)
    sizes = [small + 1] * larger + [small] * (count - larger)
    return [group for group, size in enumerate(sizes) for _ in range(size)]


def score_leaders(groups: Sequence[int], layers_per_leader: int | None) -> list[int]:
    """Return for every layer the one that scores for it, where layers share scores.

    Parameters
    ----------
    groups : sequence of int
        Layer group of every layer, from `layer_groups`.
    layers_per_leader : int or None
        Layers that follow one leader, itself counted; None: all of a layer group.
    """
    found = []
    for layer, group in enumerate(groups):
        first = groups.index(group)
        size = layers_per_leader or len(groups)
        found.append(layer - (layer - first) % size)
    return found


def target_tokens(prompt_len: int, config: CompressionConfig) -> int:
    """Tokens of a request to keep, averaged over layers, however many there are."""
    if config.budget.ratio is not None:
        tokens = int(prompt_len * config.budget.ratio)
    else:
        assert config.budget.tokens is not None
        tokens = config.budget.tokens
    return max(tokens, config.budget.floor)


def budget_tokens(prompt_len: int, config: CompressionConfig) -> int:
    """Tokens of the prompt to keep, averaged over layers, in [1, prompt_len]."""
    return min(target_tokens(prompt_len, config), prompt_len)


def group_budgets(
    num_tokens: int, target: int, config: CompressionConfig, num_groups: int
) -> list[int]:
    """Tokens to keep in each layer group of `num_tokens`, first group first, in [1, num_tokens]."""
    average = min(target, num_tokens)
    window = min(config.observation_window, num_tokens)
    layer_budget = config.layer_budget
    if num_groups == 1 or average <= window:
        layer_budget = LayerBudgetConfig()
    shape = SHAPES[layer_budget.shape]
    targets = shape(average, window, num_tokens, num_groups, layer_budget)
    return [min(max(round(target), 1), num_tokens) for target in targets]


def permanent_ranges(prompt_len: int, config: CompressionConfig) -> tuple[Span, ...]:
    """Prompt positions that no compaction evicts: sinks and pins, disjoint and ascending."""
    ranges = [(0, config.num_sink_tokens), *((start, end) for start, end in config.pinned)]
    return _merged((start, min(end, prompt_len)) for start, end in ranges)


def _merged(ranges: Iterable[Span]) -> tuple[Span, ...]:
    merged: list[Span] = []
    for start, end in sorted(ranges):
        if start >= end:
            continue
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return tuple(merged)


def forced_ranges(cache: GroupCache, window: int) -> tuple[Span, ...]:
    """Physical positions that survive the next compaction: permanent ones and the last `window`."""
    recent = (max(cache.num_tokens - window, 0), cache.num_tokens)
    return _merged([*cache.permanent, recent])


def group_lengths(
    num_tokens: int, budget: int, forced: Sequence[Span], block_size: int
) -> GroupLengths | None:
    """Region and survivors of one layer group, or None where no block would come free.

    The region is every full block of the tokens. Survivors are rounded up to whole blocks, so a
    group keeps its budget and at most ``block_size - 1`` tokens more, or all forced tokens.
    """
    region = num_tokens // block_size * block_size
    num_forced = sum(min(end, region) - start for start, end in forced if start < region)
    wanted = max(budget - (num_tokens - region), num_forced, 1)
    kept = math.ceil(wanted / block_size) * block_size
    return GroupLengths(region, kept) if kept < region else None


def linked_lengths(
    lengths: GroupLengths | None, forced: Sequence[Span], block_size: int
) -> GroupLengths | None:
    """Lengths of a view that is made of whole blocks of the region, as they are.

    A block with one token that must stay is in it; None where that leaves no block out.
    """
    if lengths is None:
        return None
    region = lengths.region_len
    blocks = {
        block
        for start, end in forced
        for block in range(start // block_size, -(-min(end, region) // block_size))
    }
    kept = max(lengths.kept_len, len(blocks) * block_size)
    return replace(lengths, kept_len=kept) if kept < region else None


def after_compaction(cache: GroupCache, lengths: GroupLengths) -> GroupCache:
    """What a group holds once a compaction is done.

    Permanent tokens of the region come first among the survivors, in order; what lies behind the
    region moves down by what was evicted. Nothing is evicted any more from behind a codebook.
    """
    region, evicted = lengths.region_len, lengths.evicted
    if lengths.book is not None:
        return GroupCache(cache.num_tokens - evicted, (), lengths.book)
    inside = sum(min(end, region) - start for start, end in cache.permanent if start < region)
    behind = [
        (max(start, region) - evicted, end - evicted)
        for start, end in cache.permanent
        if end > region
    ]
    return GroupCache(cache.num_tokens - evicted, _merged([(0, inside), *behind]))


def continued_cache(
    cache: GroupCache, evicted: int, num_tokens: int, prompt_len: int, config: CompressionConfig
) -> GroupCache:
    """What a group holds where a longer prompt continues `num_tokens` tokens, by `evicted` fewer.

    Of `cache` nothing that matters lies behind these; pins of the new part of the prompt join in.
    """
    held = num_tokens - evicted
    inside = [(start, min(end, held)) for start, end in cache.permanent]
    behind = [
        (max(start, num_tokens) - evicted, end - evicted)
        for start, end in permanent_ranges(prompt_len, config)
        if end > num_tokens
    ]
    return replace(cache, permanent=_merged([*inside, *behind]))


def prompt_marks(prompt_len: int, config: CompressionConfig) -> tuple[int, ...]:
    """Lengths of a prompt at which its cache is compacted, ascending; the last is its end.

    Those inside it are counted back from there, so that a whole `prompt_interval` comes behind the
    last one: what lies there is read with the end of the prompt in sight. Behind the first one
    that is left come at least `observation_window` tokens, whose queries it reads.
    """
    if prompt_len < config.min_prompt_len or not config.compresses_prompts:
        return ()
    if not config.compresses_in_prompts:
        return (prompt_len,)
    step = config.prompt_interval
    inside = range(prompt_len - step, config.observation_window - 1, -step)
    return (*reversed(inside), prompt_len)


def evicting_marks(
    prompt_len: int,
    config: CompressionConfig,
    num_groups: int,
    block_size: int,
    codes_per_row: int | None = None,
) -> tuple[int, ...]:
    """The `prompt_marks` from the first one on at which anything is evicted.

    Up to there the cache is whole. So whole blocks of it may come from the prefix cache, and no
    chunk need end at the marks that are left out.
    """
    marks = prompt_marks(prompt_len, config)
    for number, mark in enumerate(marks):
        caches = [GroupCache(mark, permanent_ranges(prompt_len, config))] * num_groups
        if any(next_lengths(prompt_len, mark, caches, config, block_size, codes_per_row)):
            return marks[number:]
    return ()


def compaction_lengths(
    prompt_len: int,
    config: CompressionConfig,
    num_groups: int,
    block_size: int,
    codes_per_row: int | None = None,
) -> list[GroupLengths | None]:
    """Lengths of every layer group when a prompt ends; all None means "leave it alone"."""
    if prompt_len < config.min_prompt_len or not config.compresses_prompts:
        return [None] * num_groups
    cache = GroupCache(prompt_len, permanent_ranges(prompt_len, config))
    caches = [cache] * num_groups
    return next_lengths(prompt_len, prompt_len, caches, config, block_size, codes_per_row)


def next_lengths(
    prompt_len: int,
    position: int,
    caches: Sequence[GroupCache],
    config: CompressionConfig,
    block_size: int,
    codes_per_row: int | None = None,
) -> list[GroupLengths | None]:
    """Lengths of a compaction of a sequence of `position` tokens, `prompt_len` of them prompt.

    Parameters
    ----------
    prompt_len, position : int
        Tokens of the prompt, and of the sequence so far.
    caches : sequence of GroupCache
        What each layer group holds of it.
    config : CompressionConfig
        The request's setting.
    block_size : int
        Tokens per block.
    codes_per_row : int or None
        Tokens whose codes a slot takes; needed where the setting has a codebook.
    """
    budgets = group_budgets(position, target_tokens(prompt_len, config), config, len(caches))
    shares = coded_groups(config.codebook, len(caches))
    # Where generated tokens trigger nothing but the extension of codebooks, other groups stay.
    evicts = (
        position <= prompt_len or config.compresses_while_decoding or not config.extends_codebooks
    )
    found: list[GroupLengths | None] = []
    for group, (cache, budget) in enumerate(zip(caches, budgets, strict=True)):
        forced, kept = forced_ranges(cache, config.observation_window), None
        if cache.book is not None:
            if config.extends_codebooks and position > prompt_len:
                assert codes_per_row is not None
                kept = extended_lengths(cache, shares[group], block_size, codes_per_row)
        elif evicts:
            kept = group_lengths(cache.num_tokens, budget, forced, block_size)
            if group in shares and position == prompt_len:
                assert codes_per_row is not None, "a codebook's size depends on the cache's rows"
                coded = book_lengths(
                    cache.num_tokens, budget, forced, shares[group], block_size, codes_per_row
                )
                # Where entries and codes take as much as the tokens, these stay what they are.
                if coded is not None and (kept is None or coded.kept_len < kept.kept_len):
                    kept = coded
        found.append(kept)
    return found


def compacts_again(config: CompressionConfig, caches: Iterable[GroupCache]) -> bool:
    """Whether generated tokens trigger more, once a request holds `caches`."""
    extends = config.extends_codebooks and any(each.book for each in caches)
    return config.compacts_at_intervals or extends
