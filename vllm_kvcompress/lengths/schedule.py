"""Every compaction of a request, in order, as the planner decides them if nothing has to wait."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.lengths.budgets import (
    after_compaction,
    compacts_again,
    evicting_marks,
    next_lengths,
    permanent_ranges,
)
from vllm_kvcompress.plans import GroupCache, GroupLengths


@dataclass(frozen=True)
class Compaction:
    """One compaction.

    Attributes
    ----------
    position : int
        Tokens of the sequence by then.
    before, after : list[GroupCache]
        What the layer groups hold.
    lengths : list[GroupLengths or None]
        What is evicted; None for a group that stays as it is.
    """

    position: int
    before: list[GroupCache]
    after: list[GroupCache]
    lengths: list[GroupLengths | None]


@dataclass(frozen=True)
class Start:
    """A cache that a prompt begins with.

    Attributes
    ----------
    num_tokens : int
        Tokens of the prompt that are computed.
    caches : list[GroupCache]
        What the layer groups hold of them.
    marks : tuple[int, ...]
        Lengths of the prompt at which it will be compacted, ascending.
    """

    num_tokens: int
    caches: list[GroupCache]
    marks: tuple[int, ...]


def compactions(
    prompt_len: int,
    num_tokens: int,
    config: CompressionConfig,
    num_groups: int,
    block_size: int,
    codes_per_row: int | None = None,
    start: Start | None = None,
) -> Iterator[Compaction]:
    """Go through a sequence of `num_tokens` tokens, `prompt_len` of them prompt.

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
        What the prompt begins with; None: with nothing.
    """
    if start is None:
        empty = GroupCache(0, permanent_ranges(prompt_len, config))
        ends = evicting_marks(prompt_len, config, num_groups, block_size, codes_per_row)
        start = Start(0, [empty] * num_groups, ends)
    caches, done, marks = start.caches, start.num_tokens, iter(start.marks)
    while True:
        position = next(marks, None)
        if position is None:
            if not compacts_again(config, caches):
                return
            position = max(done, prompt_len) + config.interval
        if position > num_tokens:
            return
        before = grown(caches, position - done)
        lengths = next_lengths(prompt_len, position, before, config, block_size, codes_per_row)
        pairs = list(zip(before, lengths, strict=True))
        caches, done = [after_compaction(b, each) if each else b for b, each in pairs], position
        if any(lengths):
            yield Compaction(position, before, caches, lengths)


def first_kept(
    prompt_len: int,
    num_tokens: int,
    config: CompressionConfig,
    num_groups: int,
    block_size: int,
    codes_per_row: int | None = None,
) -> list[int]:
    """Slots of what the first compaction of each layer group keeps of its region; 0 without one.

    So much room it needs where others hold the region, too: what it leaves behind is private.
    """
    kept = [0] * num_groups
    shape = num_groups, block_size, codes_per_row
    for each in compactions(prompt_len, num_tokens, config, *shape):
        for group, lengths in enumerate(each.lengths):
            if lengths is not None and not kept[group]:
                kept[group] = lengths.kept_len
        if all(kept):
            break
    return kept


def grown(caches: Sequence[GroupCache], num_tokens: int) -> list[GroupCache]:
    """The caches with so many tokens more."""
    return [replace(each, num_tokens=each.num_tokens + num_tokens) for each in caches]
