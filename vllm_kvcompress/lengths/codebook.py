"""Sizes of codebooks: pure functions of lengths and configuration, as in ``budgets.py``.

A codebook of N tokens takes E slots for entries and C slots for codes, both in whole blocks, so
that the scheduler knows its size before a vector has been looked at:

    E = share of N, rounded up to blocks, at most 65,536          C = N / T, rounded up to blocks

with T tokens' codes per slot. Tokens of one group that generation adds are coded with E and C of
their new number; E never shrinks.
"""

import math
from collections.abc import Sequence

from vllm_kvcompress.config.codebook import CodebookConfig
from vllm_kvcompress.errors import ConfigError
from vllm_kvcompress.kernels.codebook.format import MAX_ENTRIES
from vllm_kvcompress.plans import BookLengths, GroupCache, GroupLengths, Span


def coded_groups(config: CodebookConfig | None, num_groups: int) -> dict[int, float]:
    """Share of entries of every layer group that is coded, by group number.

    Raises
    ------
    ConfigError
        If a group does not exist, or there is a share too many or too few.
    """
    if config is None:
        return {}
    if config.groups is None:
        assert config.shallow is not None
        numbers = list(range(math.ceil(config.shallow * num_groups - 1e-9)))  # 0.28 * 25 is over 7
    else:
        numbers = sorted(config.groups)
        if numbers[-1] >= num_groups:
            raise ConfigError(
                f"codebook.groups: there is no layer group {numbers[-1]}; "
                f"allowed are 0 to {num_groups - 1}."
            )
    if isinstance(config.entries, float):
        return dict.fromkeys(numbers, config.entries)
    if len(config.entries) != len(numbers):
        raise ConfigError(
            f"codebook.entries: there are {len(config.entries)} numbers and {len(numbers)} coded "
            "layer groups; give one number, or one per coded group."
        )
    return dict(zip(numbers, config.entries, strict=True))


def _blocks(slots: float, block_size: int) -> int:
    """Slots rounded up to whole blocks; a hair above a whole number is rounding of the share."""
    return math.ceil(slots / block_size - 1e-9) * block_size


def _book(num_tokens: int, share: float, block_size: int, codes_per_row: int) -> BookLengths:
    entries = min(_blocks(num_tokens * share, block_size), MAX_ENTRIES // block_size * block_size)
    rows = _blocks(math.ceil(num_tokens / codes_per_row), block_size)
    return BookLengths(num_tokens, entries, rows)


def book_lengths(
    num_tokens: int,
    budget: int,
    forced: Sequence[Span],
    share: float,
    block_size: int,
    codes_per_row: int,
) -> GroupLengths | None:
    """Lengths where a prompt's survivors are coded; None where no block would come free.

    The region is every full block of the tokens, as without a codebook. Of it, so many tokens are
    coded that the group keeps its budget, or all forced tokens.
    """
    region = num_tokens // block_size * block_size
    num_forced = sum(min(end, region) - start for start, end in forced if start < region)
    coded = min(max(budget - (num_tokens - region), num_forced, 1), region)
    book = _book(coded, share, block_size, codes_per_row)
    return GroupLengths(region, book.num_slots, book) if book.num_slots < region else None


def extended_lengths(
    cache: GroupCache, share: float, block_size: int, codes_per_row: int
) -> GroupLengths | None:
    """Lengths where all full blocks behind a codebook are coded too; None where it frees none."""
    old = cache.book
    assert old is not None, "only a codebook can be extended"
    region = cache.num_tokens // block_size * block_size
    total = old.num_tokens + region - old.num_slots
    book = _book(total, share, block_size, codes_per_row)
    book = BookLengths(total, max(book.num_entries, old.num_entries), book.num_code_rows)
    if book.num_slots >= region:
        return None
    return GroupLengths(region, book.num_slots, book, old.num_tokens, old.num_slots)
