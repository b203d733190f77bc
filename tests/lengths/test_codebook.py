"""Sizes of codebooks: properties over many lengths, and numbers worked out by hand.

T tokens' codes take one slot: 32 for head_dim 64 in float32, 16 for head_dim 64 in 16 bits.
"""

import math
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec

from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.core.planner import Planner
from vllm_kvcompress.core.report import savings_line
from vllm_kvcompress.kernels.codebook.format import codes_per_row
from vllm_kvcompress.lengths.budgets import (
    after_compaction,
    compaction_lengths,
    forced_ranges,
    group_budgets,
    group_lengths,
    next_lengths,
    permanent_ranges,
    target_tokens,
)
from vllm_kvcompress.lengths.codebook import book_lengths, coded_groups, extended_lengths
from vllm_kvcompress.lengths.geometry import ModelGeometry
from vllm_kvcompress.lengths.sizing import request_usage
from vllm_kvcompress.plans import BookLengths, GroupCache, GroupLengths, RequestOptions
from vllm_kvcompress.spec import CompressedAttentionSpec

MODEL = ModelGeometry(num_layers=4, num_kv_heads=2, head_dim=64, dtype="float16")
CODES = 16


def config(**fields: Any) -> CompressionConfig:
    base = {"policy": {"name": "keydiff"}, "budget": {"ratio": 0.5, "floor": 1}}
    base |= {"codebook": {"shallow": 0.5}, "min_prompt_len": 0, "interval": 40}
    return CompressionConfig.model_validate({**base, **fields})


def test_codes_per_slot_by_hand() -> None:
    """6 int16 each, and a power of two of them: 64 floats of 4 bytes twice are 256 int16."""
    widths = {6: 1, 11: 1, 12: 2, 128: 16, 191: 16, 192: 32, 256: 32, 512: 64}
    assert {width: codes_per_row(width) for width in widths} == widths
    with pytest.raises(ValueError, match="5 int16"):
        codes_per_row(5)


def test_a_prompt_by_hand() -> None:
    """1,000 tokens are 31 blocks of 32 and 8 tokens; 500 are kept, 492 of them in blocks.

    A quarter is 123 entries in 4 blocks; 492 codes at 16 per slot are 31 slots in 1 block.
    """
    found = book_lengths(1000, 500, [(0, 4), (984, 1000)], 0.25, 32, CODES)
    assert found == GroupLengths(992, 160, BookLengths(492, 128, 32))
    assert (found.evicted, found.num_survivors, found.tokens_evicted) == (832, 492, 500)
    # 0.26 would be 127.92 entries, 0.261 are 128.4.
    assert book_lengths(1000, 500, [], 0.26, 32, CODES).book.num_entries == 128
    assert book_lengths(1000, 500, [], 0.261, 32, CODES).book.num_entries == 160


def test_forced_tokens_are_coded_whatever_the_budget() -> None:
    found = book_lengths(1000, 10, [(0, 300), (990, 1000)], 0.25, 32, CODES)
    assert found.book == BookLengths(302, 96, 32), "2 of the last 10 are in the region"


def test_one_token_is_coded_where_the_tail_is_all_of_the_budget() -> None:
    """A region of 31 blocks must leave something: a block of entries and a block of codes."""
    found = book_lengths(1000, 3, [], 0.25, 32, CODES)
    assert found == GroupLengths(31 * 32, 2 * 32, BookLengths(1, 32, 32))


@pytest.mark.parametrize(("block_size", "entries"), [(16, 65_536), (48, 65_520)])
def test_entries_have_a_limit_in_whole_blocks(block_size: int, entries: int) -> None:
    """Codes are 16 bits wide."""
    num_tokens = 480_000
    found = book_lengths(num_tokens, num_tokens, [], 0.5, block_size, CODES)
    rows = -(-num_tokens // CODES // block_size) * block_size
    assert found is not None and found.book == BookLengths(num_tokens, entries, rows)
    assert isinstance(found.kept_len, int)


@pytest.mark.parametrize(("entries", "is_coded"), [(0.5, True), (0.75, False)])
def test_a_book_as_large_as_its_tokens_is_none(entries: float, is_coded: bool) -> None:
    """64 of 320 tokens are kept: 4 blocks, or 2 or 3 of entries and one of codes."""
    setting = config(
        budget={"tokens": 64, "floor": 1}, codebook={"shallow": 1.0, "entries": entries}
    )
    (found,) = next_lengths(320, 320, [GroupCache(320, ((0, 4),))], setting, 16, CODES)
    book = BookLengths(64, 32, 16) if is_coded else None
    assert found == GroupLengths(320, 48 if is_coded else 64, book)


def test_an_extension_by_hand() -> None:
    """492 tokens in 4 + 1 blocks, and 8 + 40 behind them: 1 full block more, 524 tokens.

    131 entries would be 5 blocks, 33 slots of codes 2: nothing gained. At 0.2 they are 105.
    """
    before = GroupCache(160 + 48, (), BookLengths(492, 128, 32))
    assert extended_lengths(before, 0.25, 32, CODES) is None
    assert extended_lengths(before, 0.2, 32, CODES) is None, "33 slots of codes are 2 blocks"
    found = extended_lengths(before, 0.2, 32, 32)
    assert found == GroupLengths(192, 160, BookLengths(524, 128, 32), 492, 160)
    assert (found.evicted, found.num_survivors, found.tokens_evicted) == (32, 524, 0)
    assert after_compaction(before, found) == GroupCache(160 + 16, (), found.book)
    # A book with more entries than its share of the tokens keeps them all: they have numbers.
    large = GroupCache(288 + 70, (), BookLengths(492, 256, 32))
    assert extended_lengths(large, 0.1, 32, 32).book == BookLengths(492 + 64, 256, 32)


# --- properties ---------------------------------------------------------------------------

SIZES = {
    "share": st.floats(0.01, 1),
    "block_size": st.sampled_from([16, 32, 64, 128]),
    "codes": st.sampled_from([1, 8, 16, 32, 64]),
}


def slots(num_tokens: int, share: float, block_size: int, codes: int) -> tuple[int, int]:
    """Entries and rows of codes, in exact arithmetic and whole blocks."""
    entries = math.ceil(Fraction(num_tokens) * Fraction(share) / block_size)
    rows = math.ceil(Fraction(math.ceil(Fraction(num_tokens, codes)), block_size))
    return entries * block_size, rows * block_size


@settings(max_examples=300, deadline=None)
@given(
    num_tokens=st.integers(1, 6000),
    budget=st.integers(1, 6000),
    window=st.integers(1, 100),
    sinks=st.integers(0, 200),
    **SIZES,
)
def test_books_keep_their_promises(
    num_tokens, budget, window, sinks, share, block_size, codes
) -> None:
    budget = min(budget, num_tokens)
    setting = config(observation_window=window, num_sink_tokens=sinks)
    forced = forced_ranges(GroupCache(num_tokens, permanent_ranges(num_tokens, setting)), window)
    found = book_lengths(num_tokens, budget, forced, share, block_size, codes)
    region = num_tokens // block_size * block_size
    in_region = sum(min(end, region) - start for start, end in forced if start < region)
    coded = max(budget - (num_tokens - region), in_region, 1)
    entries, rows = slots(min(coded, max(region, 1)), share, block_size, codes)
    if found is None:
        # A share within 1e-9 of a block's end may take one block less than exact arithmetic.
        assert entries + rows >= region or not region
        return
    book = found.book
    assert book is not None and book.num_tokens == coded <= region == found.region_len
    assert (book.num_entries, book.num_code_rows) in ((entries, rows), (entries - block_size, rows))
    assert book.num_entries > book.num_tokens * share - 1e-6
    assert book.num_slots == found.kept_len < region
    assert found.kept_len % block_size == book.num_entries % block_size == 0
    assert book.num_code_rows * codes >= book.num_tokens, "every token has a code"
    assert found.coded_before == found.held_before == 0
    assert found.tokens_evicted == region - book.num_tokens >= 0
    after = after_compaction(GroupCache(num_tokens, ((0, 4),)), found)
    assert after.num_tokens == book.num_slots + num_tokens - region
    assert after.book == book and not after.permanent


@settings(max_examples=200, deadline=None)
@given(
    prompt_len=st.integers(1, 3000),
    ratio=st.floats(0.02, 1),
    steps=st.lists(st.integers(1, 400), min_size=1, max_size=10),
    shape=st.sampled_from(["uniform", "linear"]),
    **SIZES,
)
def test_extensions_keep_their_promises(
    prompt_len, ratio, steps, shape, share, block_size, codes
) -> None:
    """Whatever the lengths: books only grow, regions never do, and memory is `num_slots`."""
    setting = config(
        budget={"ratio": ratio, "floor": 1},
        layer_budget={"shape": shape},
        codebook={"shallow": 0.5, "entries": share},
    )
    cache = GroupCache(prompt_len, permanent_ranges(prompt_len, setting))
    lengths = compaction_lengths(prompt_len, setting, 3, block_size, codes)
    caches = [after_compaction(cache, each) if each else cache for each in lengths]
    coded_at_prompt = [each is not None and each.book is not None for each in lengths]
    assert not coded_at_prompt[2], "only the shallow ones"
    position = prompt_len
    for step in steps:
        position += step
        before = [replace(each, num_tokens=each.num_tokens + step) for each in caches]
        lengths = next_lengths(prompt_len, position, before, setting, block_size, codes)
        caches = [
            after_compaction(held, each) if each else held
            for held, each in zip(before, lengths, strict=True)
        ]
        assert [held.book is not None for held in caches] == coded_at_prompt
        for old, new, each in zip(before, caches, lengths, strict=True):
            if each is None:
                assert old == new
                continue
            book, own = old.book, new.book
            assert book is not None and own is not None, "nothing else happens while decoding"
            assert each.region_len == old.num_tokens // block_size * block_size
            assert each.kept_len == own.num_slots < each.region_len, "it frees a block"
            assert own.num_entries >= book.num_entries, "entries keep their numbers"
            assert own.num_code_rows >= book.num_code_rows
            assert own.num_tokens == book.num_tokens + each.region_len - book.num_slots
            assert own.num_code_rows * codes >= own.num_tokens
            assert each.tokens_evicted == 0 and each.evicted % block_size == 0
            assert (each.coded_before, each.held_before) == (book.num_tokens, book.num_slots)
            # Behind the book is less than a block, and no token is counted twice or lost.
            assert 0 <= new.num_tokens - own.num_slots < block_size
            tokens = own.num_tokens + new.num_tokens - own.num_slots
            assert tokens == book.num_tokens + old.num_tokens - book.num_slots


@settings(max_examples=200, deadline=None)
@given(prompt_len=st.integers(1, 4000), ratio=st.floats(0.02, 1), **SIZES)
def test_where_a_book_does_not_pay_tokens_are_kept(
    prompt_len, ratio, share, block_size, codes
) -> None:
    setting = config(
        budget={"ratio": ratio, "floor": 1}, codebook={"shallow": 0.5, "entries": share}
    )
    found = compaction_lengths(prompt_len, setting, 2, block_size, codes)
    evicting = setting.model_copy(update={"codebook": None})
    kept = compaction_lengths(prompt_len, evicting, 2, block_size)
    assert found[1] == kept[1], "a group that is not coded is compacted as ever"
    budget = group_budgets(prompt_len, target_tokens(prompt_len, setting), setting, 2)[0]
    cache = GroupCache(prompt_len, permanent_ranges(prompt_len, setting))
    forced = forced_ranges(cache, setting.observation_window)
    assert kept[0] == group_lengths(prompt_len, budget, forced, block_size)
    book = book_lengths(prompt_len, budget, forced, share, block_size, codes)
    held = [each.kept_len if each else prompt_len // block_size * block_size for each in kept]
    if book is not None and book.kept_len < held[0]:
        assert found[0] == book
    else:
        assert found[0] == kept[0]
    if share == 1:
        assert found[0] == kept[0], "an entry for every token is no smaller than the tokens"


def test_generated_tokens_evict_nothing_unless_asked_to() -> None:
    """Trigger end_of_prompt: the interval is the codebook's alone. Trigger both: it is not."""
    caches = [GroupCache(1040, ((0, 4),))] * 2
    for trigger, expected in (("end_of_prompt", [False, False]), ("both", [True, True])):
        setting = config(trigger=trigger)
        found = next_lengths(1000, 1040, caches, setting, 32, CODES)
        assert [each is not None for each in found] == expected
        assert all(each.book is None for each in found if each), "books are made of prompts"
    coded = [after_compaction(GroupCache(1000, ()), book_lengths(1000, 500, [], 0.1, 32, CODES))]
    grown = [replace(coded[0], num_tokens=coded[0].num_tokens + 100), caches[1]]
    book = {"shallow": 0.5, "entries": 0.1}
    found = next_lengths(1000, 1100, grown, config(trigger="both", codebook=book), 32, CODES)
    assert found[0].book.num_tokens > coded[0].book.num_tokens and found[1].book is None
    fixed = config(trigger="both", codebook={**book, "extend": False})
    found = next_lengths(1000, 1100, grown, fixed, 32, CODES)
    assert found[0] is None and found[1] is not None, "nothing is evicted from behind a book"


# --- all who reckon say the same ----------------------------------------------------------


@pytest.mark.parametrize("trigger", ["end_of_prompt", "both"])
@pytest.mark.parametrize("extend", [True, False])
@pytest.mark.parametrize(("prompt_len", "entries"), [(1000, 0.2), (1003, [0.5, 0.1]), (70, 0.9)])
def test_sizing_steps_through_what_the_planner_does(
    trigger: str, extend: bool, prompt_len: int, entries
) -> None:
    setting = config(
        trigger=trigger,
        layer_groups={"count": 4},
        layer_budget={"shape": "linear"},
        codebook={"shallow": 0.5, "entries": entries, "extend": extend},
        observation_window=16,
    )
    usage = request_usage(MODEL, setting, prompt_len, output_len=300)
    planner = Planner(setting, 4, block_size=16, codes_per_row=codes_per_row(64 * 2))
    tracked = planner.add("request", prompt_len, RequestOptions())
    first, peak, held, evicted = None, 0, [], [0] * 4
    for position in range(prompt_len, prompt_len + 301):
        blocks = sum(-(-(position - each) // 16) for each in evicted)
        if first is not None:
            held.append(blocks)
        if not planner.note_progress("request", position):
            continue
        lengths = tracked.compaction.lengths
        peak = max(peak, blocks + sum(each.kept_len // 16 for each in lengths if each))
        for group, each in enumerate(lengths):
            evicted[group] += each.evicted if each else 0
        planner.commit(tracked)
        first = first or (blocks, [position - each for each in evicted])
    assert first is not None
    assert usage.blocks_before == first[0]
    assert [group.tokens_after for group in usage.groups] == first[1]
    assert usage.blocks_peak == peak
    assert usage.blocks_decoding == max(held)


def test_the_start_up_line_reckons_with_codebooks() -> None:
    """4 groups of one layer; 2,048 tokens, half of them kept: 64 blocks of 32 each.

    Coded: 1,024 tokens, 0.25 of them entries, 8 blocks, 64 slots of codes, 2 blocks. The others
    keep 32 blocks. 10 + 10 + 32 + 32 of 256.
    """
    groups = [
        KVCacheGroupSpec(
            [f"layers.{number}"],
            CompressedAttentionSpec(
                block_size=32, num_kv_heads=2, head_size=64, dtype=torch.float16, layer_group=number
            ),
        )
        for number in range(4)
    ]
    cache = KVCacheConfig(num_blocks=512, kv_cache_tensors=[], kv_cache_groups=groups)
    book = {"shallow": 0.5, "entries": 0.25}
    line = savings_line(config(codebook=book), cache, 2048)
    assert "keeps 84 of 256 blocks" in line, line
    assert "layer group(s) 0, 1 coded by a codebook, generated tokens too every 40" in line
    line = savings_line(config(codebook={**book, "extend": False}), cache, 2048)
    assert "coded by a codebook" in line and "generated tokens" not in line
    line = savings_line(config(codebook=None), cache, 2048)
    assert "keeps 128 of 256 blocks" in line and "codebook" not in line
    usage = request_usage(MODEL, config(codebook=book, layer_groups={"count": 4}), 2048, 0, 32)
    assert (usage.blocks_before, usage.blocks_after) == (256, 84)


def test_groups_that_are_coded_have_shares() -> None:
    assert coded_groups(config().codebook, 4) == {0: 0.5, 1: 0.5}
    assert coded_groups(None, 4) == {}
