"""A request that is said to be far from its next trigger is touched by nothing that is skipped."""

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.core.planner import Planner
from vllm_kvcompress.core.query_slots import QuerySlots
from vllm_kvcompress.core.tracked_request import Phase
from vllm_kvcompress.metrics import CompressionStats
from vllm_kvcompress.request_options import parse_request

_COMMON: dict[str, Any] = {
    "observation_window": 8, "budget": {"tokens": 32, "floor": 1}, "min_prompt_len": 16
}  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {
    "prompt's end": {"preset": "snapkv"},
    "while decoding": {"preset": "snapkv", "trigger": "interval", "interval": 24},
    "both": {"preset": "snapkv", "trigger": "both", "interval": 24},
    "without queries": {"preset": "keydiff", "trigger": "both", "interval": 16},
    "inside prompts": {"preset": "keydiff", "trigger": "all", "interval": 24,
                       "prompt_interval": 32},
    "drafts": {"preset": "snapkv", "mode": "draft", "draft": {"refresh_every": 24}},
    "pressure": {"preset": "snapkv", "trigger": "pressure"},
}  # fmt: skip
LIFE = st.tuples(
    st.integers(4, 150), st.lists(st.tuples(st.integers(1, 40), st.integers(0, 4)), max_size=25)
)


def live(setting: dict[str, Any], prompt_len: int, steps: list[tuple[int, int]]) -> Counter[bool]:
    """Asks everything that a scheduler skips; how often it would have, and how often not."""
    planner = Planner(parse_config({**_COMMON, **setting}), 1, block_size=8, rations_queries=True)
    slots = QuerySlots(planner, 4, CompressionStats())
    tracked = planner.add("r", prompt_len, parse_request(None))
    computed, asked = 0, Counter[bool]()
    for size, num_unverified in steps:
        before, end = dict(slots.owned), computed + size
        is_quiet = tracked.is_undisturbed(end)
        asked[is_quiet] += 1
        unverified = min(num_unverified, max(computed - tracked.position, 0))
        counts = [
            planner.clip_chunk("r", computed, size, known, waiting)
            for known in (computed, end)
            for waiting in (0, unverified)
        ]
        allowed = slots.clip("r", computed, min(counts))
        if is_quiet:
            assert counts == [size] * 4 and allowed == size and slots.owned == before
        if not allowed:
            break
        start, computed = computed, computed + allowed
        is_quiet, phase = tracked.is_undisturbed(computed), tracked.phase
        slots.provide([("r", start, computed)])
        is_due = planner.note_progress("r", computed)
        if is_quiet:
            assert not is_due and tracked.phase is phase and slots.owned == before
        if is_due:
            planner.note_planned(tracked)
            assert not tracked.is_undisturbed(0), "its blocks and slot are under way"
            planner.commit(tracked)
        slots.release_idle(lambda name: computed)  # noqa: B023
    return asked


@pytest.mark.parametrize("name", SETTINGS)
@given(LIFE)
@settings(max_examples=150, deadline=None)
def test_nothing_is_missed(name: str, life: tuple[int, list[tuple[int, int]]]) -> None:
    live(SETTINGS[name], *life)


@pytest.mark.parametrize("name", SETTINGS)
def test_most_steps_are_passed_over(name: str) -> None:
    """One token at a time behind a prompt: of 100 steps, those near a trigger are looked at."""
    asked = live(SETTINGS[name], 60, [(60, 0), *[(1, 0)] * 100])
    wanted = {"prompt's end": 99, "drafts": 0, "both": 40, "while decoding": 40}
    assert asked[True] >= wanted.get(name, 60), asked
    assert name == "pressure" or asked[False] > 0


def test_a_skipped_request_is_never_looked_at() -> None:
    planner = Planner(parse_config({**_COMMON, **SETTINGS["both"]}), 1, block_size=8)
    tracked = planner.add("r", 2000, parse_request({"kv_compression": "none"}))
    assert tracked.phase is Phase.SKIPPED and tracked.is_undisturbed(10**6)
