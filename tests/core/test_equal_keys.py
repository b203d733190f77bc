"""Which prompts are equal: whoever comes second waits for the first."""

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.request import RequestStatus

from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.core.equal_prompts import EqualPrompts
from vllm_kvcompress.core.planner import Planner
from vllm_kvcompress.core.reports import Reports
from vllm_kvcompress.core.tracked_request import Phase
from vllm_kvcompress.request_options import parse_request

BLOCK = 16
SETTING = {"preset": "keydiff", "budget": {"tokens": 32, "floor": 1}, "min_prompt_len": 0}
PROMPT = list(range(100))


class Equals:
    """Requests that arrive, and vLLM's hashes of their whole blocks."""

    def __init__(self, hash_size: int = BLOCK, is_hashed: bool = True, **fields: Any) -> None:
        config = parse_config({**SETTING, **fields})
        assert config is not None
        self.hash_size, self.is_hashed = hash_size, is_hashed
        self.planner = Planner(config, num_layer_groups=1, block_size=BLOCK)
        pool = SimpleNamespace(hash_block_size=hash_size)
        self.equal = EqualPrompts(self.planner, [], [], pool, Reports(), lambda: None)

    def add(
        self, name: str, tokens: Any = PROMPT, options: Any = None, max_output: int = 9, **more: Any
    ) -> Any:
        ends = range(self.hash_size, len(tokens) + 1, self.hash_size)
        request = SimpleNamespace(
            request_id=name, prompt_token_ids=list(tokens), mm_features=[],
            block_hashes=[str(tokens[:end]) for end in ends] if self.is_hashed else [],
            skip_reading_prefix_cache=False, status=RequestStatus.RUNNING,
        )  # fmt: skip
        vars(request).update(more)
        asked = parse_request(options, len(tokens))
        self.planner.add(name, len(tokens), asked, max_output=max_output)
        self.equal.add(request)
        return request

    def waits(self, first: Any, second: Any) -> bool:
        """Whether the second waits for the first, which never waits."""
        assert not self.equal.must_wait(first) and not self.equal.must_wait(first)
        return self.equal.must_wait(second)


ENDS_OTHERWISE, FOURTH_BLOCK = [*PROMPT[:-1], 7], [*PROMPT[:60], 7, *PROMPT[61:]]
LAST_BLOCK = [*PROMPT[:90], 7, *PROMPT[91:]]


@pytest.mark.parametrize(
    ("second", "waits"),
    [
        ({}, True),
        ({"options": {"kv_budget_tokens": 32}}, True),
        ({"tokens": ENDS_OTHERWISE}, False),
        ({"tokens": FOURTH_BLOCK}, False),
        ({"tokens": LAST_BLOCK}, False),
        ({"tokens": [*PROMPT, 7]}, False),
        ({"tokens": PROMPT[:-1]}, False),
        ({"options": {"kv_budget_tokens": 48}}, False),
        ({"options": {"kv_pin": [0, 16]}}, False),
        ({"options": {"kv_compression": "none"}}, False),
    ],
)
def test_equal_is_who_has_the_same_tokens_and_setting(second: Any, waits: bool) -> None:
    equals = Equals()
    assert equals.waits(equals.add("a"), equals.add("b", **second)) is waits


@pytest.mark.parametrize(
    "both",
    [
        {"options": {"kv_session": "chat"}},
        {"options": {"kv_shared_prefix": 64}},
        {"options": {"kv_compression": "none"}},
        {"max_output": 1},
        {"mm_features": ["image"]},
        {"skip_reading_prefix_cache": True},
    ],
)
def test_some_have_no_equals(both: Any) -> None:
    equals = Equals()
    assert not equals.waits(equals.add("a", **both), equals.add("b", **both))


@pytest.mark.parametrize(
    ("setting", "waits"),
    [
        ({}, True),
        ({"hash_size": 64}, True),
        ({"hash_size": 128}, False),
        ({"is_hashed": False}, False),
        ({"trigger": "both", "interval": 64}, False),
        ({"trigger": "prompt", "prompt_interval": 48}, False),
        ({"trigger": "pressure"}, False),
    ],
)
def test_whole_blocks_are_hashed_and_compacted_once(setting: Any, waits: bool) -> None:
    equals = Equals(**setting)
    assert equals.waits(equals.add("a"), equals.add("b")) is waits


def test_whoever_is_first_is_waited_for_while_it_runs() -> None:
    equals = Equals()
    a, b, c = (equals.add(name) for name in "abc")
    assert equals.waits(a, b) and equals.equal.must_wait(c)
    a.status = RequestStatus.PREEMPTED
    assert not equals.equal.must_wait(b), "b takes over"
    assert equals.equal.must_wait(a) and equals.equal.must_wait(c)
    equals.equal.note_ended("b")
    equals.planner.remove("b")
    assert not equals.equal.must_wait(c)
    equals.equal.check_integrity()
    equals.planner.requests["c"].is_shared = True
    assert equals.equal.must_wait(a)
    equals.planner.requests["c"].phase = Phase.DUE
    assert not equals.equal.must_wait(a), "c's compaction waits for others"


def test_of_several_prompts_each_is_offered_once_it_is_compacted() -> None:
    """One that is not yet, or of which nothing was evicted, does not hold up the others."""
    equals = Equals()
    requests = {name: equals.add(name, [*PROMPT[:-1], number]) for number, name in enumerate("abc")}
    for each in requests.values():
        assert not equals.equal.must_wait(each)
    equals.add("own", [*PROMPT[:-1], 2])
    for name, compacted_at in (("b", 0), ("c", len(PROMPT)), ("own", len(PROMPT))):
        tracked = equals.planner.requests[name]
        tracked.phase, tracked.compaction.compacted_at = Phase.DONE, compacted_at
    equals.equal.publish()
    assert [name for name in "abc" if equals.equal.will_read(name)] == ["c"]
    assert [name for name in (*"abc", "own") if equals.equal.reads(name)] == ["c"]
    others = {name: equals.add(f"{name}2", [*PROMPT[:-1], n]) for n, name in enumerate("abc")}
    assert [name for name, each in others.items() if equals.equal.must_wait(each)] == ["a"]
