"""How much of an earlier turn is of use, and what is due after that: lengths by hand."""

from typing import Any

import pytest

from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.core.planner import Planner
from vllm_kvcompress.core.tracked_request import CompactionSchedule, Phase, TrackedRequest
from vllm_kvcompress.core.turns import begin_with, continue_from, num_reusable, pins_alike
from vllm_kvcompress.lengths.peak import peak_tokens
from vllm_kvcompress.lengths.schedule import Start, grown
from vllm_kvcompress.plans import GroupCache
from vllm_kvcompress.request_options import parse_request

BLOCK = 16
BASE = {
    "preset": "snapkv",
    "budget": {"tokens": 64, "floor": 1},
    "observation_window": 16,
    "min_prompt_len": 0,
}


def armed(prompt_len: int, **fields: Any) -> tuple[Planner, TrackedRequest]:
    planner = Planner(parse_config({**BASE, **fields}), 1, BLOCK)
    return planner, planner.add("r", prompt_len, parse_request(None))


def held(num_tokens: int, compacted_at: int) -> CompactionSchedule:
    return CompactionSchedule([GroupCache(num_tokens, ((0, 4),))], compacted_at)


def continued(planner: Planner, num_tokens: int) -> TrackedRequest:
    """The request goes on from so many tokens of a turn that kept 80 of 300; its state before."""
    before = planner.set_aside("r")
    sizes = planner.block_size, planner.codes_per_row
    continue_from(planner.requests["r"], held(80, 300), num_tokens, *sizes)
    return before


@pytest.mark.parametrize(
    ("prompt_len", "num_common", "compacted_at", "expected"),
    [
        (500, 320, 300, 320),  # all that is common
        (330, 320, 300, 314),  # the window's queries are computed again
        (316, 315, 300, 300),  # just a window since
        (310, 305, 300, 305),  # fewer than a window since: its end goes without
        (301, 301, 300, 300),  # one token at least
        (300, 300, 300, None),
        (500, 299, 300, None),  # what the compaction has seen is another text
        (250, 250, 300, None),
    ],
)
def test_what_is_reusable(
    prompt_len: int, num_common: int, compacted_at: int, expected: int | None
) -> None:
    _, tracked = armed(prompt_len)
    assert num_reusable(tracked, num_common, compacted_at) == expected


def test_policies_without_queries_need_one_token_alone() -> None:
    _, tracked = armed(330, preset="keydiff")
    assert num_reusable(tracked, 329, 300) == 329
    assert num_reusable(tracked, 330, 300) == 329


def test_the_end_of_the_prompt_is_compacted_over_what_is_there() -> None:
    planner, _ = armed(500)
    before = continued(planner, 320)
    tracked = planner.requests["r"]
    assert (tracked.marks, tracked.next_at, tracked.phase) == ((500,), 500, Phase.ARMED)
    assert planner.setups_of(["r"])["r"].evicted == (220,)
    assert planner.clip_chunk("r", 320, 200, 600) == 180
    assert planner.note_progress("r", 500)
    (lengths,) = tracked.compaction.lengths
    # 280 slots are held: 17 full blocks, and a budget of 64 for all that was and is there.
    assert lengths is not None and (lengths.region_len, lengths.kept_len) == (272, 64)
    assert before.start is None and before.compaction.evicted == (0,)
    planner.restart("r")
    assert planner.requests["r"].start is None and planner.setups_of(["r"])["r"].evicted == ()


def test_a_turn_that_gains_nothing_is_left_alone() -> None:
    planner, _ = armed(310)
    continued(planner, 305)
    tracked = planner.requests["r"]
    assert (tracked.phase, tracked.marks) == (Phase.DONE, ())
    assert not planner.note_progress("r", 310)
    assert planner.remove("r") is None, "it was compressed, by an earlier turn"


def test_a_mark_that_frees_nothing_is_none() -> None:
    """80 slots and 30 tokens behind them are within the budget."""
    planner, _ = armed(330, budget={"tokens": 120, "floor": 1})
    continued(planner, 305)
    tracked = planner.requests["r"]
    assert (tracked.phase, tracked.marks, tracked.next_at) == (Phase.DONE, (), 330)


def test_generated_tokens_trigger_what_the_prompt_did_not() -> None:
    planner, _ = armed(310, trigger="both", interval=32)
    continued(planner, 305)
    assert (planner.requests["r"].marks, planner.requests["r"].next_at) == ((), 342)


def test_marks_inside_the_rest_of_the_prompt() -> None:
    """Not those behind which the window's queries are missing."""
    planner, _ = armed(900, trigger="prompt", prompt_interval=200)
    continued(planner, 390)
    tracked = planner.requests["r"]
    assert tracked.marks == (500, 700, 900), "counted from its own end"
    # 170 slots at 390 tokens, 280 at the first mark; it keeps 64 of 17 blocks, and a tail of 8.
    assert planner.most_held(0, "r", 900) == 280
    start = tracked.start
    assert peak_tokens(900, 450, planner.config, 1, BLOCK, start=start) == [230]
    planner, _ = armed(900, trigger="prompt", prompt_interval=200)
    continued(planner, 484)
    assert planner.requests["r"].marks == (500, 700, 900), "just the window is computed"
    planner, _ = armed(900, trigger="prompt", prompt_interval=200)
    continued(planner, 485)
    assert planner.requests["r"].marks == (700, 900), "the window before 500 is not all computed"
    assert planner.most_held(0, "r", 900) == 480


def test_a_request_behind_a_shared_prefix_is_compacted_no_more() -> None:
    planner, tracked = armed(500, trigger="prompt", prompt_interval=200)
    assert tracked.marks == (100, 300, 500) and planner.most_held(0, "r", 500) < 280
    before = planner.set_aside("r")
    begin_with(planner.requests["r"], prefix := held(80, 300), 300)
    tracked = planner.requests["r"]
    assert (tracked.phase, tracked.marks, tracked.next_at) == (Phase.DONE, (), 300)
    assert tracked.start == Start(300, prefix.caches, ())
    assert planner.setups_of(["r"])["r"].evicted == (220,)
    assert tracked.compaction.caches_at(320) == grown(prefix.caches, 20)
    assert [planner.most_held(0, "r", length) for length in (500, 900)] == [280, 680]
    assert not any(planner.note_progress("r", length) for length in (300, 500, 900))
    assert before.start is None and prefix.caches == held(80, 300).caches


def test_pins_of_the_new_part_join_those_that_are_held() -> None:
    planner, _ = armed(500, pinned=[[310, 340], [400, 420]])
    continued(planner, 320)
    (cache,) = planner.requests["r"].compaction.caches
    assert cache.permanent == ((0, 4), (100, 120), (180, 200))


@pytest.mark.parametrize(("earlier_prompt", "alike"), [(300, True), (240, True), (200, False)])
def test_pins_of_an_answer_are_not_alike(earlier_prompt: int, alike: bool) -> None:
    _, tracked = armed(500, pinned=[[0, 240]])
    assert pins_alike(tracked, 320, earlier_prompt) is alike
