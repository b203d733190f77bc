"""One request's progress: where its steps end, what it holds, which queries it needs."""

import pytest

from vllm_kvcompress.core.tracked_request import CompactionSchedule, Phase, TrackedRequest
from vllm_kvcompress.plans import GroupCache, GroupLengths


def test_what_groups_hold_grows_with_the_sequence_and_shrinks_with_a_compaction() -> None:
    held = CompactionSchedule([GroupCache(10, ((0, 4),)), GroupCache(20, ())], compacted_at=100)
    assert held.evicted == (90, 80)
    assert [each.num_tokens for each in held.caches_at(130)] == [40, 50]
    held.lengths = [GroupLengths(32, 16), None]
    held.commit(130)
    assert held.compacted_at == 130 and held.evicted == (106, 80)
    assert [each.num_tokens for each in held.caches] == [24, 50]
    held.lengths = [None]
    with pytest.raises(ValueError, match="shorter"):
        held.commit(140)


@pytest.mark.parametrize(
    ("position", "stop"), [(0, 40), (39, 40), (40, 90), (90, 100), (100, 160), (160, None)]
)
def test_steps_end_at_the_trigger_and_at_marks(position: int, stop: int | None) -> None:
    tracked = TrackedRequest(160, None, marks=(40, 100, 160), next_at=90)
    assert tracked.stop_behind(position) == stop


@pytest.mark.parametrize(
    ("window", "last_quiet"), [(0, 99), (1, 99), (2, 98), (8, 92)], ids=str
)  # fmt: skip
def test_an_armed_request_is_left_alone_until_its_window(window: int, last_quiet: int) -> None:
    tracked = TrackedRequest(60, None, next_at=100, query_window=window)
    assert tracked.is_undisturbed(last_quiet) and not tracked.is_undisturbed(last_quiet + 1)


def test_phases_in_which_nothing_is_due() -> None:
    quiet = {
        phase for phase in Phase if TrackedRequest(60, None, phase=phase).is_undisturbed(10**6)
    }
    assert quiet == {Phase.RESTING, Phase.DONE, Phase.SKIPPED}


@pytest.mark.parametrize(
    ("window", "since", "position", "is_there"),
    [
        (0, None, 100, True),
        (8, None, 100, False),
        (8, 92, 100, True),
        (8, 93, 100, False),
        (8, 0, 5, True),
        (8, 1, 5, False),
    ],
)
def test_a_compaction_needs_a_whole_window_of_queries(
    window: int, since: int | None, position: int, is_there: bool
) -> None:
    tracked = TrackedRequest(60, None, query_window=window, queries_since=since)
    assert tracked.has_queries(position) == is_there
