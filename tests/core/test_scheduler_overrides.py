"""What our scheduler does beside compacting: answers, counts, hits, and books that must agree."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.engine import FinishReason
from vllm.v1.metrics.stats import PrefixCacheStats
from vllm.v1.request import RequestStatus

from tests.core.test_scheduler_loop import BLOCK, LOOPS, SETTING, Loop, prompt
from tests.inside import preempt
from vllm_kvcompress.core.continuation import Continuation
from vllm_kvcompress.core.tracked_request import Phase
from vllm_kvcompress.messages import take_counts
from vllm_kvcompress.plans import RequestOptions

SNAPKV = {**SETTING, "preset": "snapkv", "observation_window": 8}


def made(probe_model: str, num_blocks: int = 200, setting: Any = SETTING) -> Loop:
    return Loop(probe_model, *LOOPS["sync"], num_blocks, setting=setting)


def compacted(probe_model: str) -> Loop:
    """A loop with a request "r" that has been compacted."""
    loop = made(probe_model)
    request = loop.add("r", prompt(100), 300)
    while request.num_output_tokens < 3:
        loop.step()
    return loop


def lost_more(scheduler: Any) -> None:
    scheduler._managers[1].evicted["r"] += BLOCK


def lost_unnoticed(scheduler: Any) -> None:
    scheduler.planner.requests["r"].compaction.compacted_at += BLOCK


def lost_though_skipped(scheduler: Any) -> None:
    scheduler.planner.requests["r"].phase = Phase.SKIPPED


def left_behind(scheduler: Any) -> None:
    scheduler.planner.add("gone", 100, RequestOptions())


def set_aside_and_taken(scheduler: Any) -> None:
    room = scheduler.compactions.room
    room.num_set_aside = lambda *_: room.num_free + 1


BROKEN: list[Callable[[Any], None]] = [
    lost_more, lost_unnoticed, lost_though_skipped, left_behind, set_aside_and_taken,
]  # fmt: skip


def test_books_that_contradict_each_other_are_found(probe_model: str) -> None:
    for broken in BROKEN:
        loop = compacted(probe_model)
        loop.scheduler.check_integrity()
        broken(loop.scheduler)
        with pytest.raises(AssertionError):
            loop.scheduler.check_integrity()


def test_all_that_is_free_may_be_set_aside(probe_model: str) -> None:
    scheduler = compacted(probe_model).scheduler
    room = scheduler.compactions.room
    room.num_set_aside = lambda *_: room.num_free
    scheduler.check_integrity()


def test_counts_are_sent_once_with_vllms(probe_model: str) -> None:
    loop = compacted(probe_model)
    assert loop.scheduler.make_stats() is None, "vLLM counts nothing here"
    manager = loop.scheduler.kv_cache_manager
    loop.scheduler.log_stats = manager.log_stats = True
    manager.prefix_cache_stats = PrefixCacheStats()
    counts = take_counts(loop.scheduler.make_stats())
    assert counts is not None and counts["compactions"] == {"keydiff/prompt": 1}
    assert take_counts(loop.scheduler.make_stats()) is None
    drafts, graphs = object(), object()
    stats = loop.scheduler.make_stats(drafts, cudagraph_stats=graphs)
    assert (stats.spec_decoding_stats, stats.cudagraph_stats) == (drafts, graphs), "vLLM's own"


def test_one_that_never_fits_is_answered_with_an_error_and_others_go_on(probe_model: str) -> None:
    """To its own API server, with the step's other answers."""
    loop = made(probe_model, 24)
    answers: list[tuple[int, Any]] = []
    update = loop.scheduler.update_from_output

    def note(*args: Any) -> Any:
        found = update(*args)
        answers.extend((client, each) for client, row in found.items() for each in row.outputs)
        return found

    loop.scheduler.update_from_output = note
    loop.add("runs", prompt(60), 5)
    loop.step()
    for number in (0, 1):
        loop.add(f"long {number}", prompt(400, number), 5, client_index=number)
    loop.run()
    errors = {
        each.request_id: (client, each.new_token_ids)
        for client, each in answers
        if each.finish_reason is FinishReason.ERROR
    }
    assert errors == {"long 0": (0, []), "long 1": (1, [])}
    assert loop.finished == {"runs", "long 0", "long 1"}
    runs = [each for _, each in answers if each.request_id == "runs"]
    assert sum(len(each.new_token_ids) for each in runs) == 5


@pytest.mark.parametrize(("length", "hit"), [(103, 80), (104, 96), (105, 96)])
def test_the_queries_that_a_policy_reads_are_computed_again(
    length: int, hit: int, probe_model: str
) -> None:
    """The last eight; whole blocks before them are taken from the prefix cache."""
    loop = made(probe_model, setting=SNAPKV)
    for name in ("first", "second"):
        loop.add(name, prompt(length), 8)
        loop.run()
    assert loop.hits == {"first": 0, "second": hit}


def test_a_streaming_session_is_judged_once(probe_model: str) -> None:
    """Its first chunk; the others come under the same id, while the prompt is not all there."""
    loop = made(probe_model)
    judged: list[str] = []
    admit = loop.scheduler.admission.admit

    def note(request: Any) -> None:
        judged.append(request.request_id)
        admit(request)

    loop.scheduler.admission.admit = note
    loop.add("s", prompt(100), 5, resumable=True)
    loop.add("s", prompt(20), 5, resumable=True)
    assert judged == ["s"]
    assert loop.scheduler.planner.requests["s"].phase is Phase.SKIPPED


def test_prompts_are_held_back_where_vllm_says_so(probe_model: str) -> None:
    """Of ranks that share the load, one waits with prompts for the others."""
    for throttle, expected in ((True, {"r": 1}), (False, {"r": 1, "late": 63})):
        loop = compacted(probe_model)
        loop.add("late", prompt(100, 5), 5)
        assert loop.scheduler.schedule(throttle).num_scheduled_tokens == expected


@pytest.mark.parametrize("num_uncached", [0, 2 * BLOCK])
def test_a_junction_that_a_group_has_not_cached_is_pinned_where_vllm_would(
    num_uncached: int, probe_model: str
) -> None:
    """Where a hit is cut."""
    loop = made(probe_model, setting=SNAPKV)
    loop.add("first", prompt(200), 8)
    loop.run()
    coordinator = loop.scheduler.kv_cache_manager.coordinator
    find = coordinator.find_longest_cache_hit
    coordinator.find_longest_cache_hit = lambda *args: (*find(*args)[:2], num_uncached)
    found = loop.scheduler._get_local_prefix_cache_hit(loop.add("second", prompt(103), 8))
    assert found[1:] == (80, 80 + num_uncached if num_uncached else 0, False)


def test_what_is_kept_has_no_junction_and_is_the_same_in_all_groups(probe_model: str) -> None:
    loop, shared = made(probe_model), {"kv_shared_prefix": 96}
    loop.add("first", prompt(150), 8, shared)
    loop.run()
    found = loop.scheduler._get_local_prefix_cache_hit(loop.add("next", prompt(150), 8, shared))
    assert isinstance(found[0], Continuation) and found[1:] == (96, 0, False)


@pytest.mark.parametrize("args", [(True,), ()])
def test_blocks_that_a_connector_reads_are_not_freed_at_once(
    args: tuple[bool, ...], probe_model: str
) -> None:
    """vLLM says so, by place or by name."""
    loop = compacted(probe_model)
    request = loop.scheduler.requests["r"]
    request.status = RequestStatus.FINISHED_ABORTED
    loop.scheduler.running.remove(request)
    loop.scheduler._free_request(request, *args, **{} if args else {"delay_free_blocks": True})
    assert loop.scheduler.requests == {"r": request}
    assert (
        loop.scheduler._managers[0].req_to_blocks["r"]
        and "r" not in loop.scheduler.planner.requests
    )


@pytest.mark.parametrize("is_preempted", [True, False])
def test_windowed_layers_hash_again_once_a_request_is_gone(
    is_preempted: bool, probe_model: str
) -> None:
    loop = Loop(probe_model, *LOOPS["sync"], 200, setting=SETTING, window=48)
    request = loop.add("r", prompt(100), 300)
    while request.num_output_tokens < 3:
        loop.step()
    beside = loop.scheduler._managers[2]
    assert beside.lossy == {"r"}
    if is_preempted:
        preempt(SimpleNamespace(scheduler=loop.scheduler), request)
    else:
        loop.scheduler.finish_requests("r", RequestStatus.FINISHED_ABORTED)
    assert not beside.lossy
    loop.scheduler.check_integrity()


def test_who_starved_and_does_not_run_any_more_is_left_alone(probe_model: str) -> None:
    """It ended meanwhile, or has been preempted. Whoever runs starts over."""
    loop = compacted(probe_model)
    other = loop.add("other", prompt(100, 5), 300)
    while not other.num_output_tokens:
        loop.step()
    preempt(SimpleNamespace(scheduler=loop.scheduler), other)
    loop.scheduler.compactions._starved = ["gone", "other", "r"]
    loop.step()
    assert other.num_preemptions == loop.scheduler.requests["r"].num_preemptions == 1
    loop.run()
    assert loop.finished == {"r", "other"}
