"""Requests that are not compressed: which, why, and what workers hear of them."""

import pytest

from tests.core.test_planner import add, compact, planner
from vllm_kvcompress.core.tracked_request import Phase, SkipReason
from vllm_kvcompress.messages import RequestSetup
from vllm_kvcompress.request_options import parse_request


@pytest.mark.parametrize("trigger", ["end_of_prompt", "pressure"])
def test_prompts_from_the_shortest_length_on_are_compressed(trigger: str) -> None:
    """A shorter one may be chosen under pressure once it has generated an interval of tokens."""
    budget = {"tokens": 64, "floor": 1}
    plan = planner(trigger=trigger, min_prompt_len=400, budget=budget, interval=100)
    short, long = add(plan, 399), add(plan, 400)
    if trigger == "pressure":
        assert (short.next_at, long.next_at) == (499, 400)
        assert short.phase is long.phase is Phase.RESTING
    else:
        assert (short.skip_reason, long.skip_reason) == (SkipReason.SHORT_PROMPT, None)
        plan = planner(min_prompt_len=400, budget={"tokens": 500})
        assert add(plan, 399).skip_reason == SkipReason.SHORT_PROMPT
        assert add(plan, 400).skip_reason == SkipReason.UNDER_BUDGET


@pytest.mark.parametrize(("max_output", "is_read"), [(0, False), (1, False), (2, True)])
def test_nobody_reads_what_is_compacted_before_a_last_token(max_output: int, is_read: bool) -> None:
    tracked = add(planner(), 2000, max_output=max_output)
    assert tracked.skip_reason == (None if is_read else SkipReason.SHORT_OUTPUT)


def test_workers_hear_of_requests_that_will_be_compressed() -> None:
    plan = planner()
    tracked = add(plan, 2000)
    plan.add("short", 10, parse_request(None))
    plan.add("out", 2000, parse_request({"kv_compression": "none"}))
    plan.add_invalid("invalid", 2000)
    setups = plan.setups_of(["nobody", "short", "out", "invalid", "r"])
    assert setups == {"r": RequestSetup(tracked.config, (2000,), ())}


def test_a_request_with_invalid_options_is_served_uncompressed() -> None:
    plan = planner()
    tracked = plan.add_invalid("r", 2000)
    assert plan.requests["r"] is tracked and tracked.prompt_len == 2000
    assert (tracked.phase, tracked.skip_reason) == (Phase.SKIPPED, SkipReason.INVALID_OPTIONS)
    assert not plan.note_progress("r", 2000) and plan.remove("r") is None


def test_a_request_that_went_wrong_begins_with_nothing_and_stays_so() -> None:
    plan = planner()
    tracked = add(plan, 2000)
    assert plan.note_progress("r", 2000)
    compact(plan)
    plan.give_up("r")
    assert tracked.compaction.compacted_at == 0 and not any(tracked.compaction.evicted)
    assert (tracked.phase, tracked.skip_reason) == (Phase.SKIPPED, SkipReason.FAILED)
    assert tracked.marks == () and plan.clip_chunk("r", 0, 3000, 3000) == 3000


def test_others_that_hold_its_blocks_are_why_a_request_was_not_compressed() -> None:
    plan = planner()
    tracked = add(plan, 2000)
    assert plan.remove("nobody") is None
    assert plan.note_progress("r", 2000)
    plan.decline(tracked)
    plan.restart("r")
    assert not tracked.is_shared and plan.note_progress("r", 2000)
    plan.decline(tracked)
    plan.put_off(tracked)
    assert not tracked.is_shared, "there were no blocks for it when it was tried last"
    plan.decline(tracked)
    compact(plan)
    assert not tracked.is_shared
    plan.restart("r")
    tracked.counted = False
    assert plan.note_progress("r", 2000)
    plan.decline(tracked)
    assert plan.remove("r").skip_reason == SkipReason.SHARED_PROMPT


def test_who_has_nothing_to_give_at_its_prompts_end_was_under_budget() -> None:
    """Behind a mark that waited there may be nothing left for the last one."""
    plan = planner()
    tracked = add(plan, 2000)
    tracked.marks, tracked.next_at = (1999, 2000), 1999
    plan.fit = lambda tracked, position: setattr(tracked, "position", position)  # type: ignore[method-assign]
    for position, is_under in ((1999, False), (2000, True)):
        assert not plan.note_progress("r", position)
        assert tracked.was_under_budget is is_under
    gone = plan.remove("r")
    assert gone is not None and gone.skip_reason == SkipReason.UNDER_BUDGET
