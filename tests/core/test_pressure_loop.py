"""The trigger "pressure" in vLLM's own schedulers: stock's steps in an ample pool, random load."""

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

from tests.core.test_scheduler_loop import LOOPS, SETTING, Loop, prompt
from tests.inside import preempt
from vllm_kvcompress.core.block_manager import register_manager
from vllm_kvcompress.core.tracked_request import Phase, SkipReason
from vllm_kvcompress.messages import StepPlan

KEYDIFF = {**SETTING, "trigger": "pressure", "interval": 32, "observation_window": 8}
SNAPKV = {**KEYDIFF, "preset": "snapkv"}
STOCK = {"sync": Scheduler, "async": AsyncScheduler}
SMALL = 1 + 2 * 20
"""320 tokens in each of two groups."""

Watch = Callable[[Any], None]


def watched(loop: Loop, watch: Watch) -> Loop:
    """A loop that shows every step's output."""
    schedule = loop.scheduler.schedule

    def show(*args: Any) -> Any:
        output = schedule(*args)
        watch(output)
        return output

    loop.scheduler.schedule = show
    return loop


def crowd(loop: Loop, max_tokens: int = 60) -> None:
    for number, length in enumerate((100, 150, 40, 200, 33, 90)):
        loop.add(f"r{number}", prompt(length, number), max_tokens)
    loop.add("again", prompt(150, 1), max_tokens)  # r1's prompt: a hit in stock vLLM


@pytest.mark.parametrize("name", STOCK)
def test_an_ample_pool_is_scheduled_as_stock_vllm_does(name: str, probe_model: str) -> None:
    """The same tokens of the same requests in every step, and the same prefix-cache hits."""
    register_manager()
    steps: dict[type, list[tuple]] = {}
    hits = []
    for kind in (STOCK[name], LOOPS[name][0]):
        rows: list[tuple] = []
        loop = Loop(probe_model, kind, 0, num_blocks=400, setting=SNAPKV)
        watched(loop, lambda output, rows=rows: rows.append(_row(output)))  # type: ignore[misc]
        crowd(loop)
        loop.run()
        steps[kind] = rows
        hits.append(loop.hits)
    stock, ours = steps.values()
    assert ours == stock and len(ours) > 60
    assert hits[0] == hits[1] and hits[0]["again"] > 0
    assert loop.scheduler.stats.uncompressed == {SkipReason.AMPLE_MEMORY: 7}
    assert not loop.scheduler.stats.compactions


def _row(output: Any) -> tuple:
    step = StepPlan.of(output)
    assert not step.plans and not step.query_slots, "nobody records, nothing is compacted"
    assert all(setup.marks == () for setup in step.setups.values())
    return tuple(output.num_scheduled_tokens.items()), output.finished_req_ids


@pytest.mark.parametrize("setting", [KEYDIFF, SNAPKV], ids=["keydiff", "snapkv"])
@pytest.mark.parametrize("name", STOCK)
def test_fewer_preemptions_than_stock_in_a_small_pool(
    name: str, setting: dict, probe_model: str
) -> None:
    register_manager()
    counts = []
    for kind in (STOCK[name], LOOPS[name][0]):
        loop = Loop(probe_model, kind, 0, num_blocks=SMALL, setting=setting)
        preempted: list[str] = []
        _count_preemptions(loop, preempted)
        crowd(loop, max_tokens=100)
        loop.run()
        counts.append((len(preempted), loop.num_steps))
        assert len(loop.finished) == 7
    (stock, stock_steps), (ours, steps) = counts
    assert ours < stock and steps < stock_steps, counts
    stats = loop.scheduler.stats
    assert stats.deferrals == 0 and stats.compactions
    pool = loop.scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == SMALL - 1


def _count_preemptions(loop: Loop, found: list[str]) -> None:
    preempt = loop.scheduler._preempt_request

    def count(request: Any, *args: Any, **kwargs: Any) -> None:
        found.append(request.request_id)
        preempt(request, *args, **kwargs)

    loop.scheduler._preempt_request = count


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.parametrize("setting", [KEYDIFF, SNAPKV], ids=["keydiff", "snapkv"])
def test_random_load_leaves_nothing_behind(name: str, setting: dict, probe_model: str) -> None:
    """Arrivals, aborts and preemptions; books are checked in every step, the marks as well."""
    loop = Loop(probe_model, *LOOPS[name], num_blocks=SMALL, setting=setting)
    loop.max_steps = 3000
    scheduler, rng = loop.scheduler, random.Random(3)
    compacted: dict[str, list[int]] = {}
    restarts: list[bool] = []

    def check(output: Any) -> None:
        for new in output.scheduled_new_reqs:
            compacted[new.req_id] = []  # it starts from nothing, perhaps once more
            tracked = scheduler.planner.requests[new.req_id]
            assert tracked.marks or tracked.phase is Phase.RESTING
            if scheduler.requests[new.req_id].num_preemptions:
                restarts.append(bool(tracked.marks))
        for plan in StepPlan.of(output).plans:
            assert scheduler.pressure.is_on or not plan.while_decoding
            before = compacted[plan.request_id]
            assert not before or plan.position - before[-1] >= setting["interval"]
            before.append(plan.position)

    watched(loop, check)
    aborted = set()
    for number in range(120):
        if len(scheduler.requests) < 8:
            length = rng.choice([20, 60, 100, 150, 200])
            # Some prompts begin alike: requests share blocks.
            loop.add(f"r{number}", prompt(length, rng.choice([0, number])), rng.choice([5, 40, 90]))
        for _ in range(rng.randrange(8)):
            loop.step()
        if scheduler.requests and rng.random() < 0.3:
            name = rng.choice(list(scheduler.requests))
            scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
            aborted.add(name)
            scheduler.check_integrity()
        if len(scheduler.running) > 1 and rng.random() < 0.1:
            preempt(SimpleNamespace(scheduler=scheduler), scheduler.running[-1])
            scheduler.check_integrity()
    loop.run()
    while loop.under_way:
        loop._take(*loop.under_way.popleft())
    free = scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    assert free == SMALL - 1 and not scheduler.planner.requests
    assert loop.num_steps > 400 and len(aborted) > 10
    stats = scheduler.stats
    assert stats.compactions["keydiff/decode" if setting is KEYDIFF else "snapkv/decode"] > 5
    assert stats.compactions["keydiff/prompt" if setting is KEYDIFF else "snapkv/prompt"] > 5
    assert stats.uncompressed[SkipReason.AMPLE_MEMORY] > 0
    assert stats.deferrals == 0
    assert True in restarts and len(restarts) > 3
