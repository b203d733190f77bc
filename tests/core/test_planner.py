"""The life of a request, without an engine."""

from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.core.planner import Planner
from vllm_kvcompress.core.tracked_request import Phase, SkipReason
from vllm_kvcompress.request_options import parse_request


def planner(preset: str = "snapkv", **fields) -> Planner:
    return Planner(parse_config({"preset": preset, **fields}), num_layer_groups=2, block_size=32)


def add(plan: Planner, prompt_len: int, extra: dict | None = None, **kwargs):
    return plan.add("r", prompt_len, parse_request(extra), **kwargs)


def test_a_long_prompt_is_armed_and_due_at_its_end() -> None:
    plan = planner()
    tracked = add(plan, 2000)
    assert (tracked.phase, tracked.next_at) == (Phase.ARMED, 2000)
    assert not plan.note_progress("r", 1024)
    assert plan.note_progress("r", 2000)
    assert tracked.phase is Phase.DUE
    assert plan.note_progress("r", 2001), "still due while the pool has no room"


def test_every_reason_to_skip() -> None:
    for kwargs, reason in [
        ({"prompt_len": 100}, SkipReason.SHORT_PROMPT),
        ({"prompt_len": 2000, "extra": {"kv_compression": "none"}}, SkipReason.OPTED_OUT),
        ({"prompt_len": 2000, "extra": {"kv_budget_ratio": 1.0}}, SkipReason.UNDER_BUDGET),
        ({"prompt_len": 2000, "extra": {"kv_pin": [0, 2000]}}, SkipReason.UNDER_BUDGET),
        ({"prompt_len": 2000, "streaming": True}, SkipReason.STREAMING_INPUT),
    ]:
        plan = planner()
        tracked = add(plan, **kwargs)
        assert (tracked.phase, tracked.skip_reason) == (Phase.SKIPPED, reason)
        assert not plan.note_progress("r", 5000)
        assert plan.max_cached_tokens("r") is None
        assert plan.clip_chunk("r", 0, 5000, 5000) == 5000


def test_the_observation_window_must_be_computed() -> None:
    plan = planner()
    add(plan, 2000)
    assert plan.max_cached_tokens("r") == 2000 - 16
    plan = planner("keydiff")
    add(plan, 2000)
    assert plan.max_cached_tokens("r") == 1999


def test_a_resumed_request_stops_at_the_end_of_its_prompt() -> None:
    plan = planner()
    tracked = add(plan, 2000)
    plan.note_progress("r", 2000)
    compact(plan)
    assert tracked.phase is Phase.DONE
    assert plan.clip_chunk("r", 2000, 5, 2005) == 5
    plan.restart("r")
    assert tracked.phase is Phase.ARMED
    assert plan.clip_chunk("r", 0, 1024, 2500) == 1024
    assert plan.clip_chunk("r", 1024, 1024, 2500) == 976
    assert plan.clip_chunk("r", 1984, 16, 2500) == 16
    assert plan.clip_chunk("r", 2000, 10, 2500) == 10


def test_skipped_and_unknown_requests_survive_restart_and_remove() -> None:
    plan = planner()
    tracked = add(plan, 10)
    plan.restart("r")
    assert tracked.phase is Phase.SKIPPED
    assert plan.view_of("r") is tracked.view and plan.must_record("r")
    assert plan.remove("r") is None, "counted when it came"
    assert not plan.requests
    plan.restart("r")
    assert not plan.note_progress("r", 10) and not plan.must_record("r")
    assert plan.view_of("r") is None and plan.queries_from("r") is None


def test_one_requests_options_do_not_reach_the_next() -> None:
    plan = planner()
    add(plan, 2000, {"kv_compression": "keydiff", "kv_budget_tokens": 1000})
    plan.remove("r")
    assert add(plan, 2000).policy == "snapkv"
    assert plan.note_progress("r", 2000)
    assert plan.requests["r"].compaction.lengths[0].kept_len == 224


# --- while decoding -----------------------------------------------------------------------


def decoding(**fields) -> Planner:
    fields = {"trigger": "both", "interval": 100, "budget": {"tokens": 256}, **fields}
    return planner("snapkv", observation_window=32, **fields)


def compact(plan: Planner) -> None:
    tracked = plan.requests["r"]
    plan.note_planned(tracked)
    plan.commit(tracked)


def test_intervals_count_generated_tokens() -> None:
    """A rival armed its first trigger on absolute length: a long prompt fired it at once."""
    plan = decoding(trigger="interval")
    tracked = add(plan, 2000)
    assert (tracked.phase, tracked.next_at) == (Phase.ARMED, 2100)
    assert not plan.note_progress("r", 2000)
    assert not plan.note_progress("r", 2099)
    assert plan.note_progress("r", 2100)
    assert tracked.while_decoding and tracked.position == 2100
    compact(plan)
    assert (tracked.phase, tracked.next_at) == (Phase.ARMED, 2200)
    assert [cache.num_tokens for cache in tracked.compaction.caches] == [276, 276]
    assert not plan.note_progress("r", 2199)
    assert plan.note_progress("r", 2200)
    assert tracked.compaction.lengths[0].region_len == 352, "276 + 100 tokens, whole blocks"


def test_the_prompts_end_and_then_intervals() -> None:
    plan = decoding()
    tracked = add(plan, 2000)
    assert plan.note_progress("r", 2000) and not tracked.while_decoding
    compact(plan)
    assert (tracked.next_at, tracked.while_decoding) == (2100, True)
    assert plan.max_cached_tokens("r") == 2100 - 32


def test_a_late_compaction_while_decoding_takes_in_what_came_since() -> None:
    plan = decoding(trigger="interval")
    tracked = add(plan, 2000)
    assert plan.note_progress("r", 2100)
    assert plan.note_progress("r", 2133), "there was no room until now"
    assert tracked.position == 2133
    compact(plan)
    assert tracked.next_at == 2233
    assert tracked.compaction.compacted_at == 2133, "what came since counts on from there"
    assert plan.note_progress("r", 2233)
    held = tracked.compaction.caches[0].num_tokens
    assert tracked.compaction.lengths[0].region_len == (held + 100) // 32 * 32


def test_a_compaction_while_decoding_waits_for_its_queries() -> None:
    plan = decoding(trigger="interval")
    plan.rations_queries = True
    tracked = add(plan, 2000)
    assert not plan.note_progress("r", 2100) and tracked.lacks_queries
    plan.note_recording("r", 2069)
    assert not plan.note_progress("r", 2100), "one of 32 is missing"
    assert tracked.phase is Phase.ARMED
    assert plan.note_progress("r", 2101) and not tracked.lacks_queries
    plan.note_recording("r", None)
    assert not plan.note_progress("r", 2102), "what came since is taken in, with its queries"
    tracked = add(plan, 2000)
    assert not plan.note_progress("r", 2100)
    assert plan.remove("r").skip_reason == SkipReason.NO_ROOM


def test_an_interval_under_the_budget_is_left_alone() -> None:
    plan = decoding()
    tracked = add(plan, 60)
    assert not plan.note_progress("r", 160)
    assert (tracked.phase, tracked.next_at) == (Phase.ARMED, 260)
    assert not plan.note_progress("r", 260)
    assert plan.note_progress("r", 360)
    assert plan.remove("r").skip_reason == SkipReason.NO_ROOM


def test_requests_that_end_with_the_step_that_compacts_them_are_counted() -> None:
    """Regression: with one output token they were neither compacted nor uncompressed."""
    plan = planner()
    tracked = add(plan, 2000)
    plan.note_progress("r", 2000)
    plan.note_planned(tracked)
    assert plan.remove("r").skip_reason == SkipReason.SHORT_OUTPUT


def test_requests_that_end_before_anything_was_done_are_counted() -> None:
    plan = decoding()
    add(plan, 60)
    assert plan.remove("r").skip_reason == SkipReason.SHORT_OUTPUT
    add(plan, 60)
    plan.note_progress("r", 160)
    assert plan.remove("r").skip_reason == SkipReason.UNDER_BUDGET
    add(plan, 2000)
    plan.note_progress("r", 2000)
    compact(plan)
    assert plan.remove("r") is None


def test_a_resumed_request_stops_at_every_interval() -> None:
    plan = decoding()
    tracked = add(plan, 2000)
    for position in (2000, 2100, 2200):
        assert plan.note_progress("r", position)
        compact(plan)
    plan.restart("r")
    assert (tracked.next_at, tracked.compaction.compacted_at) == (2000, 0)
    assert tracked.compaction.caches[0].num_tokens == 0
    assert plan.clip_chunk("r", 1024, 1024, 2250) == 976
    assert plan.note_progress("r", 2000)
    compact(plan)
    assert plan.clip_chunk("r", 2000, 250, 2250) == 100
    assert plan.clip_chunk("r", 2096, 8, 2097) == 3, "drafts end before the mark"
    assert plan.clip_chunk("r", 2099, 8, 2100) == 1, "one certain token reaches it"
    assert plan.clip_chunk("r", 2099, 1, 2099) == 1, "scheduled ahead"


def test_a_step_waits_for_the_verdict_of_drafts_under_way() -> None:
    """They count as computed: the step behind them could reach the mark, or fall short of it."""
    plan = decoding()
    add(plan, 2000)
    assert plan.note_progress("r", 2000)
    compact(plan)
    assert plan.clip_chunk("r", 2090, 4, 2091, unverified=3) == 4
    assert plan.clip_chunk("r", 2094, 8, 2095, unverified=3) == 5, "not to the mark itself"
    assert plan.clip_chunk("r", 2099, 4, 2100, unverified=3) == 0
    assert plan.clip_chunk("r", 2097, 4, 2098) == 2, "the verdict is there: go on"
    assert plan.clip_chunk("r", 2101, 4, 2102, unverified=1) == 4, "the mark is behind it"


def test_policies_that_read_whole_prompts_take_no_cached_tokens() -> None:
    plan = planner("h2o")
    add(plan, 2000)
    assert plan.max_cached_tokens("r") == 0


def test_while_decoding_they_may_take_what_their_window_does_not_need() -> None:
    """Without a compaction at the prompt's end nothing reads the queries of all of it."""
    plan = planner("expected_attention", trigger="interval", interval=100, observation_window=32)
    add(plan, 2000)
    assert plan.max_cached_tokens("r") == 2100 - 32
    plan = planner("expected_attention", trigger="both", interval=100)
    add(plan, 2000)
    assert plan.max_cached_tokens("r") == 0


# --- codebooks ----------------------------------------------------------------------------


def coding(entries: float = 0.1, **fields) -> Planner:
    """The first of two groups is coded, 32 codes to a slot."""
    book = {"groups": [0], "entries": entries, "extend": fields.pop("extend", True)}
    fields = {"codebook": book, "interval": 100, "layer_budget": {"shape": "uniform"}, **fields}
    found = planner("spindlekv", budget={"tokens": 500, "floor": 1}, **fields)
    found.codes_per_row = 32
    return found


def test_a_codebook_is_extended_and_nothing_else_happens_while_decoding() -> None:
    """2,000 tokens: 484 of the region's 1,984 coded, as 2 blocks of entries and 1 of codes."""
    plan = coding()
    tracked = add(plan, 2000)
    assert plan.note_progress("r", 2000)
    compact(plan)
    assert (tracked.phase, tracked.next_at) == (Phase.ARMED, 2100)
    assert tracked.while_decoding
    coded, plain = tracked.compaction.caches
    assert (coded.num_tokens, coded.book.num_tokens, coded.book.num_slots) == (96 + 16, 484, 96)
    assert (plain.num_tokens, plain.book) == (512 + 16, None), "484 and what fills the block"
    assert not plan.note_progress("r", 2099)
    assert plan.note_progress("r", 2100)
    extended, left_alone = tracked.compaction.lengths
    assert left_alone is None, "the other group keeps what was generated"
    assert (extended.region_len, extended.book.num_tokens) == (96 + 96, 484 + 96)
    assert (extended.coded_before, extended.held_before) == (484, 96)
    compact(plan)
    assert tracked.next_at == 2200
    assert tracked.compaction.caches[1].num_tokens == plain.num_tokens + 100
    assert tracked.compaction.caches[0].num_tokens == 96 + 20


def test_no_book_no_extension() -> None:
    """Asked not to, or entries for every token, which take no less than the tokens."""
    for fields in ({"extend": False}, {"entries": 1.0}):
        plan = coding(**fields)
        tracked = add(plan, 2000)
        assert plan.note_progress("r", 2000)
        assert (tracked.compaction.lengths[0].book is None) == (fields != {"extend": False})
        compact(plan)
        assert tracked.phase is Phase.DONE
        assert not plan.note_progress("r", 2100)
        assert plan.clip_chunk("r", 2000, 500, 2500) == 500
    plan = coding()
    assert add(plan, 500).skip_reason == SkipReason.SHORT_PROMPT, "there is nothing to extend"


def test_an_extension_that_frees_no_block_waits_for_the_next_interval() -> None:
    plan = coding(interval=10)
    tracked = add(plan, 2000)
    assert plan.note_progress("r", 2000)
    compact(plan)
    assert not plan.note_progress("r", 2010), "26 tokens behind the book are no block"
    assert (tracked.phase, tracked.next_at) == (Phase.ARMED, 2020)
    assert tracked.compaction.compacted_at == 2000
    assert plan.note_progress("r", 2020)
    assert tracked.compaction.lengths[0].region_len == 96 + 32
    assert plan.remove("r") is None, "compressed, whatever became of the extension"


def test_an_extension_without_room_takes_in_what_came_since() -> None:
    plan = coding()
    tracked = add(plan, 2000)
    assert plan.note_progress("r", 2000)
    compact(plan)
    assert plan.note_progress("r", 2100) and plan.note_progress("r", 2128)
    assert tracked.position == 2128
    assert tracked.compaction.lengths[0].book.num_tokens == 484 + 128
    compact(plan)
    assert tracked.next_at == 2228


def test_a_resumed_request_is_coded_and_extended_at_the_same_places() -> None:
    plan = coding()
    tracked = add(plan, 2000)
    seen = []
    for _ in range(2):
        for position in (2000, 2100, 2200):
            start = max(tracked.compaction.compacted_at, 1024)
            assert plan.clip_chunk("r", start, 2250 - start, 2250) == position - start
            assert plan.note_progress("r", position)
            seen.append(list(tracked.compaction.lengths))
            compact(plan)
        plan.restart("r")
        assert (tracked.next_at, tracked.compaction.compacted_at) == (2000, 0)
        assert all(cache.book is None for cache in tracked.compaction.caches)
    assert seen[:3] == seen[3:]


def test_drafts_of_others_stop_before_an_extension() -> None:
    plan = coding()
    add(plan, 2000)
    plan.note_progress("r", 2000)
    compact(plan)
    assert plan.clip_chunk("r", 2096, 8, 2097) == 3
    assert plan.clip_chunk("r", 2100, 1, 2097, unverified=3) == 0, "its verdict comes first"
