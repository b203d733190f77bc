"""The life of a request, without an engine."""

from vllm_kvcompress.config import parse_config
from vllm_kvcompress.core.planner import Planner, SkipReason, State
from vllm_kvcompress.request_options import parse_request


def planner(preset: str = "snapkv", **fields) -> Planner:
    return Planner(parse_config({"preset": preset, **fields}), num_layer_groups=2, block_size=32)


def add(plan: Planner, prompt_len: int, extra: dict | None = None, **kwargs):
    return plan.add("r", prompt_len, parse_request(extra), **kwargs)


def test_a_long_prompt_is_armed_and_due_at_its_end() -> None:
    plan = planner()
    tracked = add(plan, 2000)
    assert (tracked.state, tracked.num_query_tokens) == (State.ARMED, 64)
    assert not plan.note_progress("r", 1024)
    assert plan.note_progress("r", 2000)
    assert tracked.state is State.DUE
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
        assert (tracked.state, tracked.skip_reason) == (State.SKIPPED, reason)
        assert not plan.note_progress("r", 5000)
        assert plan.max_cached_tokens("r") is None
        assert plan.clip_chunk("r", 0, 5000) == 5000


def test_the_observation_window_must_be_computed() -> None:
    plan = planner()
    add(plan, 2000)
    assert plan.max_cached_tokens("r") == 2000 - 64
    plan = planner("keydiff")
    add(plan, 2000)
    assert plan.max_cached_tokens("r") == 1999


def test_a_resumed_request_stops_at_the_end_of_its_prompt() -> None:
    plan = planner()
    tracked = add(plan, 2000)
    plan.note_progress("r", 2000)
    tracked.state = State.DONE
    assert plan.clip_chunk("r", 2000, 5) == 5
    plan.restart("r")
    assert tracked.state is State.ARMED
    assert plan.clip_chunk("r", 0, 1024) == 1024
    assert plan.clip_chunk("r", 1024, 1024) == 976
    assert plan.clip_chunk("r", 1984, 16) == 16
    assert plan.clip_chunk("r", 2000, 10) == 10


def test_skipped_and_unknown_requests_survive_restart_and_remove() -> None:
    plan = planner()
    tracked = add(plan, 10)
    plan.restart("r")
    assert tracked.state is State.SKIPPED
    assert plan.remove("r") is tracked
    assert plan.remove("r") is None
    plan.restart("r")
    assert not plan.note_progress("r", 10)


def test_one_requests_options_do_not_reach_the_next() -> None:
    plan = planner()
    add(plan, 2000, {"kv_compression": "keydiff", "kv_budget_tokens": 1000})
    plan.remove("r")
    assert add(plan, 2000).policy == "snapkv"
    assert plan.requests["r"].lengths[0].kept_len == 224
