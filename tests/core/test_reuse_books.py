"""Books of what requests share, in vLLM's own schedulers: contradictions in them are found.

Every loop of ours asks these checks in each step; a check that finds nothing would watch nothing.
"""

from collections.abc import Callable
from typing import Any

import pytest
from vllm.v1.request import RequestStatus

from tests.core.test_scheduler_loop import LOOPS, Loop, prompt
from tests.core.watched_loop import UNEVEN, Watched, watch
from vllm_kvcompress.core.kept_cache import Kind
from vllm_kvcompress.core.reuse import Reuse
from vllm_kvcompress.core.tracked_request import Phase

SHARED = {"kv_shared_prefix": 192}


def made(probe_model: str, **options: Any) -> Watched:
    return watch(Watched(probe_model, *LOOPS["sync"], 200, setting=UNEVEN, **options))


def found_out(scheduler: Any) -> bool:
    try:
        scheduler.check_integrity()
    except AssertionError:
        return True
    return False


# --- a prompt that two have ---------------------------------------------------------------


def equal_prompts(probe_model: str) -> Any:
    loop = made(probe_model)
    requests = [loop.add(name, prompt(150), 300) for name in ("first", "second")]
    while min(each.num_output_tokens for each in requests) < 3:
        loop.step()
    equal = loop.scheduler.compactions.equal
    assert [copy.readers for copy in equal._copies.values()] == [{"first", "second"}]
    return loop.scheduler


def copy_of(scheduler: Any) -> Any:
    (copy,) = scheduler.compactions.equal._copies.values()
    return copy


def unknown_key(scheduler: Any) -> None:
    equal = scheduler.compactions.equal
    key = equal._keys["first"]
    equal._keys["gone"] = key
    equal._requests[key]["gone"] = scheduler.requests["first"]


def unknown_request(scheduler: Any) -> None:
    equal = scheduler.compactions.equal
    equal._requests[equal._keys["first"]]["gone"] = scheduler.requests["first"]


def no_reader(scheduler: Any) -> None:
    copy_of(scheduler).readers.clear()


def foreign_reader(scheduler: Any) -> None:
    copy_of(scheduler).readers.add("other")


def other_row(scheduler: Any) -> None:
    row = scheduler._managers[1].req_to_blocks["second"]
    row[0], row[1] = row[1], row[0]


def released(scheduler: Any) -> None:
    copy_of(scheduler).blocks[1][-1].ref_cnt -= 1


# --- a prefix, and a chat -----------------------------------------------------------------


def reused(probe_model: str) -> Any:
    loop = made(probe_model)
    loop.ask("chat", prompt(200, 50), 8, {"kv_session": "chat"})
    loop.ask("kept", [*prompt(192), 7], 8, SHARED)
    loop.add("computes", [*prompt(192, 9), 7], 8, SHARED)
    loop.step()
    prefixes = loop.scheduler.reuse.prefixes
    assert set(prefixes._computing.values()) == {"computes"} == prefixes._wanted.keys()
    return loop.scheduler


def unknown_wish(scheduler: Any) -> None:
    wanted = scheduler.reuse.prefixes._wanted
    wanted["gone"] = wanted["computes"]


def other_place(scheduler: Any) -> None:
    computing = scheduler.reuse.prefixes._computing
    ((place, _),) = scheduler.reuse.kept.of(Kind.SHARED_PREFIX)
    computing[place] = "computes"


def missing_block(kind: Kind) -> Callable[[Any], None]:
    def miss(scheduler: Any) -> None:
        ((_, kept),) = scheduler.reuse.kept.of(kind)
        kept.blocks[1].pop()

    return miss


EQUAL = [unknown_key, unknown_request, no_reader, foreign_reader, other_row, released]
REUSED = [
    unknown_wish, other_place, missing_block(Kind.SESSION), missing_block(Kind.SHARED_PREFIX),
]  # fmt: skip


@pytest.mark.parametrize(("made_of", "broken"), [(equal_prompts, EQUAL), (reused, REUSED)])
def test_contradictions_are_found(
    made_of: Callable[[str], Any], broken: list[Callable[[Any], None]], probe_model: str
) -> None:
    for each in broken:
        scheduler = made_of(probe_model)
        assert not found_out(scheduler)
        each(scheduler)
        assert found_out(scheduler), each


# --- who waits ----------------------------------------------------------------------------


def test_a_prompt_that_is_the_prefix_waits_for_nobody(probe_model: str) -> None:
    """It could not begin with all of it. One that goes on behind the prefix waits."""
    loop = made(probe_model)
    first = loop.add("first", [*prompt(192), 7], 8, SHARED)
    loop.step()
    must_wait = loop.scheduler.reuse.prefixes.must_wait
    assert not must_wait(first)
    assert must_wait(loop.add("longer", [*prompt(192), 9], 8, SHARED))
    assert not must_wait(loop.add("same", prompt(192), 8, SHARED))
    assert not must_wait(loop.add("other", [*prompt(192, 3), 9], 8, SHARED))
    assert not must_wait(loop.add("whole", [*prompt(192), 9], 8))
    loop.scheduler.reuse.give_up("first")
    assert not must_wait(loop.scheduler.requests["longer"]), "it computes the prefix now"
    assert must_wait(loop.add("third", [*prompt(192), 3], 8, SHARED)) is False, "that has not begun"
    loop.run()
    assert loop.finished >= {"first", "longer", "same", "other", "whole", "third"}


def test_beside_windowed_layers_nothing_is_kept_for_others(probe_model: str) -> None:
    loop = Loop(probe_model, *LOOPS["sync"], 200, UNEVEN, window=48)
    for number in range(2):
        loop.add(f"r{number}", [*prompt(192), number], 8, SHARED)
    loop.add("chat", prompt(200, 50), 8, {"kv_session": "chat"})
    loop.run()
    stats = loop.scheduler.stats
    assert stats.shared_prefix_requests == {"unserved": 2}
    assert loop.finished == {"r0", "r1", "chat"}
    assert not stats.shared_prefixes_kept and not stats.sessions_kept


def test_beside_a_draft_models_layers_nothing_is_kept_for_others(probe_model: str) -> None:
    """They are ours, too, and belong to no layer group."""
    loop = made(probe_model)
    found = loop.scheduler
    parts = found.compactions.room, found.compactions.reports, found.stats
    found.reuse = Reuse(found.planner, found._managers, [0, None], *parts)
    loop.add("r", [*prompt(192), 7], 8, SHARED)
    assert loop.stats.shared_prefix_requests == {"unserved": 1}
    loop.ask("chat", prompt(200, 50), 8, {"kv_session": "chat"})
    assert not loop.stats.shared_prefixes_kept and not loop.stats.sessions_kept


def test_a_prefix_that_cannot_be_kept_does_not_hold_up_another(probe_model: str) -> None:
    """One is not compacted yet, of one nothing was evicted."""
    loop = made(probe_model)
    prefixes, planned = loop.scheduler.reuse.prefixes, loop.scheduler.planner.requests
    loop.scheduler.reuse.publish = lambda: None
    for number, name in enumerate("abc"):
        loop.add(name, [*prompt(192, 9 * number), 7], 30, SHARED)
    while {planned[name].phase for name in "abc"} != {Phase.DONE}:
        loop.step()
    planned["b"].compaction.compacted_at = 0
    for phase, kept, computing in ((Phase.ARMED, 1, {"a"}), (Phase.DONE, 2, set())):
        planned["a"].phase = phase
        prefixes.publish(lambda name: True)
        assert loop.stats.shared_prefixes_kept == kept
        assert set(prefixes._computing.values()) == computing


def test_what_ends_with_an_error_is_kept_for_nobody(probe_model: str) -> None:
    """Its prefix was compacted in the step before, and is not committed yet."""
    for status, count in ((RequestStatus.FINISHED_ERROR, 0), (RequestStatus.FINISHED_ABORTED, 1)):
        loop = made(probe_model)
        request = loop.add("first", [*prompt(192), 7], 8, SHARED)
        while not loop.scheduler.compactions.is_planned("first"):
            loop.step()
        request.status = status
        loop.scheduler.reuse.prefixes.end(
            request, loop.scheduler.compactions.settle, lambda name: True
        )
        assert loop.stats.shared_prefixes_kept == count
        assert not loop.scheduler.reuse.prefixes._wanted
        assert not loop.scheduler.reuse.prefixes._computing
