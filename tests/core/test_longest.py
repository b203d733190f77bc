"""Requests that a pool cannot hold: where they end, and who is told that they cannot be served."""

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_kvcompress.core import longest
from vllm_kvcompress.core.longest import LongestSequence


class Pool:
    """Needs a block for each 10 tokens, of which requests hold so many at most, or a share."""

    def __init__(self, most: int = 10**6, share: float = 1.0) -> None:
        self.most, self.share = most, share

    def num_growth(self, request_id: str, num_tokens: int) -> int:
        held = min(num_tokens, self.most) * self.share if request_id else num_tokens
        return int(-(-held // 10))


def request(prompt_len: int, max_tokens: int) -> Any:
    return SimpleNamespace(request_id="r", num_prompt_tokens=prompt_len, max_tokens=max_tokens)


def bounded(sequence: LongestSequence, *lengths: int) -> int | None:
    each = request(*lengths)
    return each.max_tokens if sequence.bound(each) else None


@pytest.mark.parametrize(
    ("prompt_len", "max_tokens", "expected"),
    [
        (100, 50, 50),
        (100, 100, 100),
        (100, 101, 100),
        (199, 500, 1),
        (200, 1, None),
        (450, 9, None),
    ],
)
def test_a_request_ends_where_the_pool_does(
    prompt_len: int, max_tokens: int, expected: int | None
) -> None:
    assert bounded(LongestSequence(Pool(), 20, 500, 0), prompt_len, max_tokens) == expected


def test_a_pool_that_holds_the_longest_sequence_bounds_nothing() -> None:
    assert bounded(LongestSequence(Pool(), 50, 500, 0), 499, 500) == 500


def test_what_is_compressed_on_its_way_runs_to_its_end() -> None:
    assert bounded(LongestSequence(Pool(most=100), 20, 500, 0), 450, 50) == 50


def test_drafts_need_slots_behind_the_last_token() -> None:
    drafting = LongestSequence(Pool(), 20, 500, num_lookahead=5)
    assert bounded(drafting, 100, 200) == 95
    assert drafting._fits("", 500) is False


def test_the_end_is_that_of_the_requests_own_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    info = SimpleNamespace(info=lambda text, *values: said.append(text % values))
    monkeypatch.setattr(longest, "logger", info)
    assert bounded(LongestSequence(Pool(share=0.5), 20, 500, 0), 100, 400) == 300
    (line,) = said
    assert "request r ends after 300 output tokens instead of 400: the pool of 20 blocks" in line
