"""Views of a request, without an engine: when they are taken, how large, for how many drafts."""

import pytest

from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.core.draft.views import ViewSchedule, links_blocks
from vllm_kvcompress.core.planner import Planner
from vllm_kvcompress.core.tracked_request import Phase, SkipReason, TrackedRequest
from vllm_kvcompress.plans import GroupCache, GroupLengths, Purpose
from vllm_kvcompress.request_options import parse_request

BLOCK = 32


def planner(**fields) -> Planner:
    return Planner(parse_config(fields), num_layer_groups=2, block_size=BLOCK)


def drafting(preset: str = "keydiff", **draft) -> Planner:
    """The request keeps what it holds."""
    draft = {"tokens": 4, **draft}
    return planner(preset=preset, mode="draft", draft=draft, budget={"tokens": 512})


def beside(view_tokens: int) -> Planner:
    """The request is evicted to 512 tokens, and drafts over fewer."""
    draft = {"tokens": 4, "budget": {"tokens": view_tokens}}
    return planner(preset="keydiff", budget={"tokens": 512}, draft=draft)


def add(plan: Planner, prompt_len: int, extra: dict | None = None) -> TrackedRequest:
    return plan.add("r", prompt_len, parse_request(extra))


def do_work(plan: Planner, num_certain: int) -> None:
    assert plan.note_progress("r", num_certain)
    tracked = plan.requests["r"]
    plan.note_planned(tracked)
    plan.commit(tracked)


# --- alone --------------------------------------------------------------------------------


def test_a_request_drafts_from_its_view_on() -> None:
    plan = drafting()
    tracked = add(plan, 2000)
    assert tracked.view.num_drafts == tracked.view.num_draft_steps == 0
    do_work(plan, 2000)
    assert tracked.phase is Phase.DONE and tracked.view.taken_at == 2000
    assert tracked.counted and not tracked.compaction.lengths, "it holds what it held"
    assert tracked.view.num_drafts == tracked.view.num_draft_steps == 4
    assert not plan.note_progress("r", 9000), "views are not taken again unless asked for"
    assert plan.clip_chunk("r", 2000, 5, 2001) == 5, "drafts run on"
    plan.restart("r")
    assert tracked.phase is Phase.ARMED and tracked.view.num_drafts == 0


def test_drafting_nothing_is_opting_out() -> None:
    tracked = add(drafting(), 2000, {"kv_draft_tokens": 0})
    assert tracked.skip_reason == SkipReason.OPTED_OUT


def test_a_request_may_ask_for_fewer_drafts() -> None:
    plan = drafting()
    tracked = add(plan, 2000, {"kv_draft_tokens": 2})
    do_work(plan, 2000)
    assert tracked.view.num_drafts == 2


def test_adaptive_lengths_follow_acceptance() -> None:
    plan = drafting(adaptive=True)
    view = add(plan, 2000).view
    view.observe(4, 1)  # without a view there is nothing to learn
    do_work(plan, 2000)
    assert view.num_drafts == view.num_draft_steps == 4, "it begins with what was asked for"
    view.observe(4, 1)
    assert (view.num_drafts, view.num_draft_steps) == (2, 3)
    assert plan.view_of("nobody") is None


def test_a_view_is_taken_again_after_so_many_tokens_of_the_whole_cache() -> None:
    plan = drafting(refresh_every=100)
    view = add(plan, 2000).view
    do_work(plan, 2000)
    first = view.lengths
    assert not plan.note_progress("r", 2099)
    do_work(plan, 2103)
    assert view.taken_at == 2103
    assert [each.region_len for each in view.lengths] == [2103 // 32 * 32] * 2
    assert view.lengths[0].kept_len <= first[0].kept_len + 32, "the budget stays"
    assert not plan.note_progress("r", 2202)
    assert plan.note_progress("r", 2203)


def test_a_view_is_taken_again_when_drafts_fare_badly() -> None:
    plan = drafting(refresh_below=0.5)
    view = add(plan, 2000).view
    do_work(plan, 2000)
    for _ in range(3):
        view.observe(4, 0)
        assert not plan.note_progress("r", 2050), "too early to tell"
    view.observe(4, 0)
    assert view.drafts is not None and view.drafts.rate < 0.5
    view.drafts.rate = 0.5
    assert not plan.note_progress("r", 2050), "it is no less than was asked for"
    view.observe(4, 0)
    do_work(plan, 2050)
    assert not plan.note_progress("r", 2060), "the new view starts with a clean record"


def test_the_number_of_drafts_is_carried_over_to_the_next_view() -> None:
    """What a text lets through does not change with the view."""
    plan = drafting(adaptive=True, refresh_every=100)
    view = add(plan, 2000).view
    do_work(plan, 2000)
    view.observe(4, 1)
    do_work(plan, 2100)
    assert (view.num_drafts, view.num_draft_steps) == (2, 3)
    assert view.drafts is not None and (view.drafts.num_steps, view.drafts.rate) == (0, 1.0)


def test_a_view_that_was_given_up_is_not_taken_again() -> None:
    plan = drafting(refresh_every=100)
    tracked = add(plan, 2000)
    assert not list(plan.idle_views())
    do_work(plan, 2000)
    assert [name for name, _ in plan.idle_views()] == ["r"]
    plan.give_up_view("r")
    assert tracked.view.num_drafts == 0 and not list(plan.idle_views())
    assert not plan.note_progress("r", 2500)
    plan.restart("r")
    do_work(plan, 2000)
    assert tracked.view.num_drafts == 4


# --- linked -------------------------------------------------------------------------------


def windows(size: int = BLOCK, **groups):
    policy = {"window_size": size, "layers_per_leader": None}
    return parse_config(
        {"preset": "windowkv", "mode": "draft", "policy": policy, "layer_groups": groups}
    )


def test_views_of_whole_blocks_are_linked() -> None:
    server = windows(count=2)
    assert links_blocks(server, server, BLOCK)
    assert ViewSchedule.of(server, server, BLOCK).purpose is Purpose.LINKED_VIEW
    assert not links_blocks(windows(BLOCK - 8, count=2), server, BLOCK), "parts of blocks"
    evicting = parse_config({"preset": "windowkv", "policy": {"window_size": BLOCK}})
    assert not links_blocks(evicting, evicting, BLOCK)


def test_a_setting_for_other_layer_groups_is_not_linked() -> None:
    """Its policy chooses alike for layers of its own groups; block tables are the server's."""
    server, other = windows(count=2), windows(count=4)
    assert not links_blocks(other, server, BLOCK)
    assert ViewSchedule.of(other, server, BLOCK).purpose is Purpose.COPIED_VIEW
    plan = Planner(server, num_layer_groups=2, block_size=8)
    for preset, purpose in ((None, Purpose.LINKED_VIEW), ("windowkv_llama3", Purpose.COPIED_VIEW)):
        options = parse_request({"kv_compression": preset, "kv_budget_ratio": 0.1})
        tracked = plan.add("r", 2000, options, task="localization")
        assert tracked.config is not None
        assert tracked.config.build_policy().granularity % 8 == 0
        assert plan.note_progress("r", 2000)
        assert [each for each, _ in tracked.work] == [purpose]


# --- beside an eviction -------------------------------------------------------------------


def test_a_smaller_view_is_taken_with_the_eviction() -> None:
    plan = beside(128)
    tracked = add(plan, 2000)
    assert plan.note_progress("r", 2000)
    assert [purpose for purpose, _ in tracked.work] == [Purpose.EVICT, Purpose.COPIED_VIEW]
    for kept, view in zip(tracked.compaction.lengths, tracked.view.lengths, strict=True):
        assert view.kept_len < kept.kept_len and view.region_len == kept.region_len == 1984
    plan.note_planned(tracked)
    plan.commit(tracked)
    assert tracked.view.num_drafts == 4 and tracked.phase is Phase.DONE
    assert not plan.note_progress("r", 3000)


@pytest.mark.parametrize("view_tokens", [512, 500, 600])
def test_a_view_as_large_as_the_cache_is_none(view_tokens: int) -> None:
    plan = beside(view_tokens)
    tracked = add(plan, 2000)
    assert plan.note_progress("r", 2000)
    assert [purpose for purpose, _ in tracked.work] == [Purpose.EVICT]
    plan.note_planned(tracked)
    plan.commit(tracked)
    assert tracked.view.num_drafts == 0 and not list(plan.idle_views())


def test_layer_groups_that_keep_everything_may_have_a_smaller_view() -> None:
    view = add(beside(128), 2000).view
    lengths = [GroupLengths(1984, 128), GroupLengths(1984, 1984), None, GroupLengths(1984, 128)]
    evicted = [None, None, GroupLengths(1984, 512), GroupLengths(1984, 96)]
    view.fit(lambda config: lengths, [], evicted, BLOCK)
    assert view.lengths == [lengths[0], None, None, None]
    view.fit(lambda config: lengths, [], [None] * 4, BLOCK)
    assert view.lengths == [], "nothing is evicted, so no view is taken with it"


def test_an_eviction_goes_on_without_the_view_there_is_no_room_for() -> None:
    plan = beside(128)
    tracked = add(plan, 2000)
    assert plan.note_progress("r", 2000)
    plan.drop_view(tracked)
    assert [purpose for purpose, _ in tracked.work] == [Purpose.EVICT]
    plan.note_planned(tracked)
    plan.commit(tracked)
    assert tracked.view.num_drafts == 0 and tracked.compaction.compacted_at == 2000


def test_a_prompt_under_the_budget_has_no_view_either() -> None:
    tracked = add(beside(128), 520)
    assert tracked.skip_reason == SkipReason.UNDER_BUDGET


def test_a_linked_view_has_room_for_every_block_with_a_token_that_must_stay() -> None:
    """64 tokens of a budget, the last 8 of 200, and pins in two blocks: 3 blocks of 6 whole ones.

    A layer group that keeps everything has no view; nor one whose whole blocks are all needed.
    """
    config = parse_config({"preset": "keydiff", "mode": "draft", "observation_window": 8})
    assert config is not None
    schedule = ViewSchedule(config, Purpose.LINKED_VIEW)
    pinned = GroupCache(200, ((30, 34), (100, 101)))
    caches = [pinned, GroupCache(200, ()), GroupCache(200, ((0, 192),)), pinned]
    schedule.fit(lambda _: [GroupLengths(192, 64)] * 3 + [None], caches, [], BLOCK)
    assert schedule.lengths == [GroupLengths(192, 96), GroupLengths(192, 64), None, None]
    schedule.fit(lambda _: [GroupLengths(192, 32)], [GroupCache(194, ())], [], BLOCK)
    assert schedule.lengths == [GroupLengths(192, 32)], "6 of the last 8 are in one block"
    schedule = ViewSchedule(config, Purpose.COPIED_VIEW)
    schedule.fit(lambda _: [GroupLengths(192, 64)], [pinned], [], BLOCK)
    assert schedule.lengths == [GroupLengths(192, 64)], "tokens are chosen, not blocks"


def test_a_views_share_of_accepted_drafts_counts_after_four_verifications() -> None:
    plan = drafting(refresh_below=0.5)
    tracked = add(plan, 2000)
    do_work(plan, 2000)
    for number in range(1, 5):
        tracked.view.observe(4, 0)
        assert plan.note_progress("r", 2000 + number) is (number == 4)
