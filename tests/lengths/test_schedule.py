"""Compactions of a request in order, and what leads up to them: numbers worked out by hand."""

from typing import Any

import pytest

from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.lengths.budgets import (
    after_compaction,
    compaction_lengths,
    compacts_again,
    continued_cache,
    evicting_marks,
    forced_ranges,
    group_lengths,
    linked_lengths,
    next_lengths,
    permanent_ranges,
    prompt_marks,
)
from vllm_kvcompress.lengths.peak import peak_tokens
from vllm_kvcompress.lengths.schedule import Start, compactions, first_kept
from vllm_kvcompress.plans import BookLengths, GroupCache, GroupLengths, RequestOptions

BLOCK = 16
SINKS = ((0, 4),)
BOOK = BookLengths(num_tokens=60, num_entries=16, num_code_rows=16)


def config(**fields: Any) -> CompressionConfig:
    base = {"policy": {"name": "keydiff"}, "budget": {"tokens": 64, "floor": 1}}
    base |= {"trigger": "both", "interval": 100, "min_prompt_len": 0}
    base |= {"observation_window": 16, "num_sink_tokens": 4}
    return CompressionConfig.model_validate({**base, **fields})


def steps(prompt_len: int, num_tokens: int, setting: CompressionConfig, **more: Any) -> list:
    """Position, tokens before and tokens after, of every compaction of one layer group."""
    found = compactions(prompt_len, num_tokens, setting, 1, BLOCK, **more)
    return [(each.position, each.before[0].num_tokens, each.after[0].num_tokens) for each in found]


def test_a_request_by_hand() -> None:
    """Of 200: 192 in blocks and 8 behind them; 56 of the 64 come from the blocks, 4 whole ones."""
    expected = [(200, 200, 72), (300, 172, 76), (400, 176, 64)]
    assert steps(200, 499, config()) == expected
    assert steps(200, 400, config()) == expected
    assert steps(200, 399, config()) == expected[:2]
    assert steps(200, 499, config(trigger="end_of_prompt")) == expected[:1]
    (first,) = compactions(200, 200, config(), 1, BLOCK)
    assert first.lengths == [GroupLengths(192, 64)]
    assert (first.before, first.after) == ([GroupCache(200, SINKS)], [GroupCache(72, SINKS)])


def test_an_interval_that_evicts_nothing_is_no_compaction() -> None:
    setting = config(trigger="interval", budget={"tokens": 256})
    assert steps(40, 440, setting) == [(340, 340, 260), (440, 360, 264)]
    assert steps(40, 240, setting) == []


def test_a_request_that_begins_with_a_cache() -> None:
    """50 slots hold the first 150 tokens."""
    start = Start(150, [GroupCache(50, SINKS)], (200,))
    assert steps(200, 300, config(), start=start) == [(200, 100, 68), (300, 168, 72)]
    assert peak_tokens(200, 350, config(), 1, BLOCK, start=start) == [168]
    # The end of its prompt is not compacted: the first interval is counted from there.
    unmarked = Start(150, [GroupCache(50, SINKS)], ())
    assert steps(200, 300, config(), start=unmarked) == [(300, 200, 72)]
    assert peak_tokens(200, 299, config(), 1, BLOCK, start=unmarked) == [199]
    # All that it holds lies behind its prompt.
    longer = Start(250, [GroupCache(150, SINKS)], ())
    assert steps(200, 350, config(), start=longer) == [(350, 250, 74)]


def test_what_the_first_compaction_of_each_group_keeps() -> None:
    """Of 65 tokens, first none and then 4 lie behind the blocks: 5 blocks, then 4."""
    assert first_kept(192, 400, config(budget={"tokens": 65}), 1, BLOCK) == [80]
    # 151 : 17 of 168 beside the window: the first group has nothing to give at 170 tokens.
    unequal = config(
        budget={"tokens": 100}, layer_budget={"shape": "preference", "preferences": [9, 1]}
    )
    assert first_kept(170, 170, unequal, 2, BLOCK) == [0, 32]
    assert first_kept(170, 270, unequal, 2, BLOCK) == [160, 32]


@pytest.mark.parametrize(
    ("prompt_len", "marks"),
    [
        (216, (16, 116, 216)),  # whose window the queries of the first 16 tokens are
        (215, (115, 215)),
        (100, (100,)),
        (99, ()),  # shorter than min_prompt_len
    ],
)
def test_marks_are_counted_back_from_the_end(prompt_len: int, marks: tuple[int, ...]) -> None:
    setting = config(trigger="prompt", prompt_interval=100, min_prompt_len=100)
    assert prompt_marks(prompt_len, setting) == marks
    at_end = config(trigger="end_of_prompt", min_prompt_len=100)
    assert prompt_marks(prompt_len, at_end) == marks[-1:]
    assert prompt_marks(prompt_len, config(trigger="interval")) == ()


def test_marks_that_evict_nothing_are_left_out() -> None:
    setting = config(trigger="prompt", prompt_interval=100)
    assert evicting_marks(350, setting, 2, BLOCK) == (150, 250, 350), "50 are under the budget"
    assert evicting_marks(350, config(budget={"tokens": 400}), 2, BLOCK) == ()
    coded = config(trigger="end_of_prompt", budget={"ratio": 1.0}, codebook={"shallow": 0.5})
    assert evicting_marks(350, coded, 2, BLOCK, 16) == (350,), "coded, all of it"
    pinned = config(trigger="prompt", prompt_interval=100, pinned=[[0, 150]])
    assert evicting_marks(350, pinned, 2, BLOCK) == (250, 350), "150 are pinned"


def test_a_prompt_of_the_least_length_is_compacted() -> None:
    for prompt_len, expected in ((512, [GroupLengths(512, 64)] * 2), (511, [None] * 2)):
        found = compaction_lengths(prompt_len, config(min_prompt_len=512), 2, BLOCK)
        assert found == expected
    assert compaction_lengths(512, config(trigger="interval"), 2, BLOCK) == [None] * 2


def test_one_block_comes_free_at_least() -> None:
    assert group_lengths(64, 48, [], BLOCK) == GroupLengths(64, 48)
    assert group_lengths(64, 49, [], BLOCK) is None
    assert group_lengths(64, 0, [], BLOCK) == GroupLengths(64, 16), "and one is kept"
    assert group_lengths(70, 20, [(0, 4), (30, 50), (60, 70)], BLOCK) == GroupLengths(64, 32)


def test_touching_ranges_are_one() -> None:
    setting = config(pinned=[[4, 8], [20, 200], [30, 40]])
    assert permanent_ranges(100, setting) == ((0, 8), (20, 100))
    assert permanent_ranges(20, setting) == ((0, 8),)
    assert forced_ranges(GroupCache(10, ()), 16) == ((0, 10),), "a window longer than the cache"


@pytest.mark.parametrize(
    ("forced", "kept_len"),
    [
        ([(0, 4)], 32),
        ([(0, 4), (70, 71), (150, 170)], 48),  # blocks 0, 4 and 9
        ([(0, 4), (15, 17), (165, 170)], 32),  # 0 and 1; the last is behind the region
        ([(0, 144)], 144),
        ([(0, 145)], None),
    ],
)
def test_a_view_is_made_of_whole_blocks(forced: list, kept_len: int | None) -> None:
    found = linked_lengths(GroupLengths(160, 32), forced, BLOCK)
    assert found == (None if kept_len is None else GroupLengths(160, kept_len))
    assert linked_lengths(None, forced, BLOCK) is None


def test_a_longer_prompt_brings_pins_of_its_own() -> None:
    """70 slots hold the first 290 tokens; what lay behind these is not the request's."""
    cache = GroupCache(80, ((0, 4), (60, 64), (68, 75)))
    setting = config(pinned=[[280, 300], [310, 320]])
    found = continued_cache(cache, 220, 290, 400, setting)
    assert found == GroupCache(80, ((0, 4), (60, 64), (68, 80), (90, 100)))
    found = continued_cache(cache, 220, 290, 290, setting)
    assert found == GroupCache(80, ((0, 4), (60, 64), (68, 70)))
    coded = GroupCache(80, (), BOOK)
    assert continued_cache(coded, 220, 290, 290, setting).book == BOOK


def test_pins_across_the_end_of_the_region() -> None:
    after = after_compaction(GroupCache(100, ((0, 4), (90, 98))), GroupLengths(96, 32))
    assert after == GroupCache(36, ((0, 10), (32, 34)))


def test_generated_tokens_trigger_more() -> None:
    plain, coded = GroupCache(80, SINKS), GroupCache(80, (), BOOK)
    at_end = config(trigger="end_of_prompt")
    assert not compacts_again(at_end, [plain])
    assert compacts_again(config(), [plain])
    extends = config(trigger="end_of_prompt", codebook={"shallow": 0.5, "extend": True})
    assert compacts_again(extends, [plain, coded]) and not compacts_again(extends, [plain])


def test_a_codebook_is_made_where_it_takes_less_than_the_tokens() -> None:
    """64 tokens in 2 + 1 blocks of 4; with as many entries as tokens there is nothing to gain."""
    sizes = 320, 320, [GroupCache(320, SINKS)] * 2
    for share, first in ((0.5, GroupLengths(320, 48, BookLengths(64, 32, 16))), (1.0, None)):
        setting = config(codebook={"shallow": 0.5, "entries": share})
        found = next_lengths(*sizes, setting, BLOCK, 16)
        assert found == [first or GroupLengths(320, 64), GroupLengths(320, 64)]


def test_a_shared_prefix_is_whole_blocks() -> None:
    assert RequestOptions(shared_prefix=111).shared_len(BLOCK) == 96
    assert RequestOptions(shared_prefix=112).shared_len(BLOCK) == 112
    assert RequestOptions().shared_len(BLOCK) is None


def test_a_codebook_grows_with_what_is_generated() -> None:
    """160 tokens take 5 blocks of entries and one of codes; the other group stays as it is."""
    setting = config(trigger="end_of_prompt", codebook={"shallow": 0.5})
    sizes = setting, 2, BLOCK, 16
    prompt, later = compactions(320, 420, *sizes)
    assert compaction_lengths(320, *sizes) == prompt.lengths
    assert [each.num_tokens for each in prompt.after] == [48, 64]
    grown = GroupLengths(144, 96, BookLengths(160, 80, 16), 64, 48)
    assert (later.position, later.lengths) == (420, [grown, None])
    assert [each.num_tokens for each in later.before] == [148, 164]
    assert [each.num_tokens for each in later.after] == [100, 164]
    assert first_kept(320, 420, *sizes) == [48, 64]
    assert peak_tokens(320, 700, *sizes)[1] == 64 + 380


def test_other_groups_go_back_to_their_budget_beside_a_codebook() -> None:
    caches = [GroupCache(148, (), BookLengths(64, 32, 16)), GroupCache(164, SINKS)]
    grown = GroupLengths(144, 96, BookLengths(160, 80, 16), 64, 48)
    for extend, first in ((True, grown), (False, None)):
        setting = config(codebook={"shallow": 0.5, "extend": extend})
        found = next_lengths(320, 420, caches, setting, BLOCK, 16)
        assert found == [first, GroupLengths(160, 64)]
