"""Draft lengths that follow what was accepted."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_kvcompress.core.draft.history import DraftHistory


def test_lengths_by_hand() -> None:
    history = DraftHistory(limit=4)
    assert (history.length, history.rate) == (4, 1.0)
    history.observe(4, 1)
    assert history.length == 2, "one more than was accepted"
    assert history.rate == pytest.approx(1 + 0.2 * (0.25 - 1))
    history.observe(2, 2)
    assert history.length == 3
    history.observe(3, 0)
    assert history.length == 1
    for _ in range(5):
        history.observe(history.length, history.length)
    assert history.length == 4, "never above the limit"


def test_fewer_drafts_than_asked_for_teach_nothing_about_more() -> None:
    history = DraftHistory(limit=8, length=5)
    history.observe(2, 2)
    assert history.length == 5


@pytest.mark.parametrize(("num_drafts", "num_accepted"), [(0, 0), (2, 3), (2, -1)])
def test_what_cannot_be_is_not_counted(num_drafts: int, num_accepted: int) -> None:
    history = DraftHistory(limit=4)
    with pytest.raises(AssertionError):
        history.observe(num_drafts, num_accepted)
    assert history == DraftHistory(limit=4)


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6)), max_size=40))
def test_lengths_and_rates_stay_in_range(steps: list[tuple[int, int]]) -> None:
    history = DraftHistory(limit=6)
    for drafts, accepted in steps:
        history.observe(drafts, min(accepted, drafts))
        assert 1 <= history.length <= 6
        assert 0 <= history.rate <= 1
    assert history.num_steps == len(steps)
