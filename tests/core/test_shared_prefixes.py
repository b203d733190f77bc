"""Prefixes that are compressed once and read by many, in vLLM's own schedulers, without a model."""

import random
from collections.abc import Callable
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.lora.request import LoRARequest
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher
from vllm.v1.request import Request, RequestStatus

from tests.core.test_scheduler_loop import BLOCK, LOOPS, prompt
from tests.core.watched_loop import UNEVEN, Watched, watch
from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.core.tracked_request import Phase

DOCUMENT = prompt(210)
SHARED = {"kv_shared_prefix": 205}
WHOLE = 192
"""Tokens of its whole blocks."""

EVERYWHERE = {**UNEVEN, "trigger": "all", "prompt_interval": 64, "interval": 16}
ALWAYS = {**UNEVEN, "shared_blocks": "always"}
PRESSURE = {**UNEVEN, "trigger": "pressure"}


@pytest.fixture(params=LOOPS)
def loop(request: pytest.FixtureRequest, probe_model: str) -> Watched:
    return watch(Watched(probe_model, *LOOPS[request.param], 200))


def made(probe_model: str, num_blocks: int = 200, kind: str = "sync", **options: Any) -> Watched:
    return watch(Watched(probe_model, *LOOPS[kind], num_blocks, **options))


def question(number: int, length: int = 30) -> list[int]:
    return [*DOCUMENT[:205], *prompt(length, 7 * number)]


def blocks_of(loop: Watched, name: str, count: int) -> list[list[int]]:
    """Ids of a request's first blocks, by group."""
    found = [manager.req_to_blocks[name][:count] for manager in loop.scheduler._managers]
    return [[block.block_id for block in blocks] for blocks in found]


def shared_blocks(loop: Watched) -> set[int]:
    return {block.block_id for block in loop.scheduler.reuse.kept.held_blocks()}


def test_one_computes_and_all_read_the_same_blocks(loop: Watched) -> None:
    names = [f"r{number}" for number in range(4)]
    for number, name in enumerate(names):
        loop.add(name, question(number), 40, SHARED)
    seen: dict[str, list[list[int]]] = {}
    while loop.step():
        for name in names:
            tracked = loop.scheduler.planner.requests.get(name)
            if tracked is not None and tracked.phase is Phase.DONE:
                lost = tracked.compaction.evicted
                seen[name] = blocks_of(loop, name, (WHOLE - max(lost)) // BLOCK)
                assert [m.evicted[name] for m in loop.scheduler._managers] == list(lost)
    assert len(seen) == 4 and all(found == seen["r0"] for found in seen.values())
    assert loop.hits == {"r0": 0, "r1": WHOLE, "r2": WHOLE, "r3": WHOLE}
    assert loop.stats.shared_prefix_requests == {"computed": 1, "reused": 3}
    assert loop.stats.shared_prefix_tokens == 3 * WHOLE
    assert loop.stats.shared_prefixes_kept == 1 and not loop.stats.uncompressed
    assert loop.stats.compactions == {"keydiff/prompt": 1}
    # They wait for the next question.
    kept = shared_blocks(loop)
    assert kept == {number for group in seen["r0"] for number in group} | kept
    assert loop.pool.get_num_free_blocks() == loop.usable - len(kept)
    loop.add("late", question(9), 5, SHARED)
    loop.run()
    assert loop.hits["late"] == WHOLE
    assert loop.scheduler.reset_prefix_cache()
    assert loop.stats.shared_prefixes_given_back == {"reset": 1}
    assert loop.pool.get_num_free_blocks() == loop.usable


def test_the_budget_is_the_prefixs_and_what_follows_stays_whole(probe_model: str) -> None:
    setting = {**UNEVEN, "budget": {"ratio": 0.25, "floor": 1}, "layer_budget": {}}
    loop = made(probe_model, setting=setting)
    for number, length in enumerate((10, 150)):
        request = loop.add(f"r{number}", question(number, length), 60, SHARED)
        while request.num_output_tokens < 50:
            loop.step()
        held = {m.evicted[f"r{number}"] for m in loop.scheduler._managers}
        assert held == {WHOLE - 48}, "a quarter of 192, whatever comes behind"
        loop.run()
    assert loop.hits["r1"] == WHOLE


def test_a_prefix_alone_may_be_sent_ahead(loop: Watched) -> None:
    """A prompt that is the prefix, for one token: it is compressed all the same."""
    loop.add("ahead", DOCUMENT[:WHOLE], 1, {"kv_shared_prefix": WHOLE})
    loop.run()
    assert loop.stats.shared_prefixes_kept == 1 and not loop.stats.uncompressed
    loop.add("again", DOCUMENT[:WHOLE], 1, {"kv_shared_prefix": WHOLE})
    loop.run()
    assert loop.hits["again"] < WHOLE, "one token must be computed"
    assert loop.stats.shared_prefixes_kept == 1, "what is there stays"
    loop.add("question", question(1), 5, SHARED)
    loop.run()
    assert loop.hits["question"] == WHOLE


@pytest.mark.parametrize("setting", [EVERYWHERE, PRESSURE], ids=["all", "pressure"])
def test_other_triggers_end_with_the_prefix(setting: dict[str, Any], probe_model: str) -> None:
    loop = made(probe_model, setting=setting)
    for number in range(2):
        loop.add(f"r{number}", question(number), 100, SHARED)
    loop.run()
    # Of the marks inside the prefix, those at which anything is evicted; none while decoding.
    assert set(loop.stats.compactions) == {"keydiff/prompt"}
    assert loop.stats.shared_prefix_requests == {"computed": 1, "reused": 1}


def test_what_differs_is_not_mixed(probe_model: str) -> None:
    loop = made(probe_model)
    loop.ask("first", question(0), 5, SHARED)
    others: list[tuple[list[int], dict[str, Any], dict[str, Any]]] = [
        ([999, *question(1)[1:]], SHARED, {}),
        (question(1), {"kv_shared_prefix": 176}, {}),
        (question(1), {**SHARED, "kv_budget_tokens": 64}, {}),
        (question(1), {**SHARED, "kv_pin": [0, 64]}, {}),
        (question(1), SHARED, {"cache_salt": "other"}),
        (question(1), SHARED, {"lora_request": LoRARequest("adapter", 1, "/nowhere")}),
    ]
    for number, (text, xargs, options) in enumerate(others):
        loop.ask(f"r{number}", text, 5, xargs, **options)
        assert loop.stats.shared_prefix_requests == {"computed": number + 2}
    loop.ask("same", question(2), 5, {"kv_shared_prefix": 200})
    assert loop.hits["same"] == WHOLE, "the same whole blocks"
    loop.scheduler.planner.config = parse_config({**UNEVEN, "preset": "knorm"})
    loop.ask("policy", question(2), 5, SHARED)
    assert loop.stats.shared_prefix_requests == {"computed": len(others) + 2, "reused": 1}


def test_others_are_served_as_ever(probe_model: str) -> None:
    """A request that names none, and one that is not compressed, are not held up either."""
    loop = made(probe_model)
    for number, xargs in enumerate((SHARED, SHARED, None, {**SHARED, "kv_compression": "none"})):
        loop.add(f"r{number}", question(number), 5, xargs)
    loop.step()
    running = [request.request_id for request in loop.scheduler.running]
    assert running == ["r0"], "a step's tokens are its"
    while len(loop.scheduler.running) < 3:
        loop.step()
    running = [request.request_id for request in loop.scheduler.running]
    assert "r1" not in running or "r1" in loop.hits
    loop.run()
    found = loop.stats.shared_prefix_requests
    assert found == {"computed": 1, "reused": 1, "uncompressed": 1}
    short = {"kv_shared_prefix": 10}
    loop.ask("short", question(5), 5, short)
    assert loop.stats.shared_prefix_requests["uncompressed"] == 2
    assert loop.stats.shared_prefix_tokens == WHOLE, "of the one that began with it"
    # One shares whole blocks with the one that computes, and is not worth it until that is through.
    assert loop.stats.uncompressed == {"opted_out": 1, "under_budget": 1, "shared_prompt": 1}


def test_prompts_that_others_may_not_read_are_compressed_and_not_shared(probe_model: str) -> None:
    loop = made(probe_model)
    params = SamplingParams(max_tokens=5, prompt_logprobs=1, extra_args=SHARED)
    hasher = get_request_block_hasher(BLOCK, sha256)
    loop.worker.salts["hidden"] = None
    loop.scheduler.add_request(Request("hidden", question(0), params, None, block_hasher=hasher))
    loop.run()
    assert loop.stats.shared_prefix_requests == {"unserved": 1}
    assert loop.stats.shared_prefix_tokens == 0
    assert loop.stats.compactions == {"keydiff/prompt": 1} and not shared_blocks(loop)


def test_one_without_a_report_holds_up_no_other(
    probe_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a worker has not reported on is kept once it has, and others meanwhile."""
    loop = made(probe_model)
    prefixes, is_late = loop.scheduler.reuse.prefixes, True
    publish = prefixes.publish

    def published(is_reported: Callable[[str], bool]) -> None:
        publish(lambda name: is_reported(name) and not (is_late and name == "r0"))

    monkeypatch.setattr(prefixes, "publish", published)
    texts = question(0), [999, *question(1)[1:]]
    requests = [loop.add(f"r{n}", text, 60, SHARED) for n, text in enumerate(texts)]
    while requests[1].num_output_tokens < 5:
        loop.step()
    assert requests[0].num_output_tokens > 5 and loop.stats.shared_prefixes_kept == 1
    is_late = False
    loop.run()
    assert loop.stats.shared_prefixes_kept == 2
    loop.ask("late", question(2), 5, SHARED)
    assert loop.stats.shared_prefix_requests == {"computed": 2, "reused": 1}


@pytest.mark.parametrize("end", ["abort", "preempt"])
@pytest.mark.parametrize("at", [64, 192, 205])
def test_if_the_one_that_computes_goes_another_takes_over(end: str, at: int, loop: Watched) -> None:
    first = loop.add("first", question(0), 40, SHARED)
    for number in (1, 2):
        loop.add(f"r{number}", question(number), 40, SHARED)
    while first.num_computed_tokens < at:
        loop.step()
    if end == "abort":
        loop.scheduler.finish_requests("first", RequestStatus.FINISHED_ABORTED)
    else:
        loop.scheduler.running.remove(first)
        loop.scheduler._preempt_request(first, 0.0)
    loop.run()
    assert loop.finished >= {"r1", "r2"}
    assert loop.stats.shared_prefixes_kept == 1
    found = loop.stats.shared_prefix_requests
    assert found["reused"] >= 1 and found["reused"] + found["computed"] == 3
    loop.scheduler.reuse.kept.clear()
    assert loop.pool.get_num_free_blocks() == loop.usable


def test_a_reader_that_is_preempted_begins_with_it_again(loop: Watched) -> None:
    loop.ask("first", question(0), 5, SHARED)
    reader = loop.add("reader", question(1), 40, SHARED)
    while reader.num_output_tokens < 4:
        loop.step()
    loop.scheduler.running.remove(reader)
    loop.scheduler._preempt_request(reader, 0.0)
    loop.run()
    assert loop.hits["reader"] == WHOLE and any(loop.worker.begun["reader"])
    assert loop.stats.shared_prefix_requests == {"computed": 1, "reused": 1}, "counted once"


def test_what_is_read_does_not_give_way_and_what_is_not_does(probe_model: str) -> None:
    loop = made(probe_model, 48)
    reader = loop.add("reader", question(0), 60, SHARED)
    while reader.num_output_tokens < 2:
        loop.step()
    kept = shared_blocks(loop)
    assert kept and loop.scheduler.reuse.kept.num_idle == 0
    big = loop.add("big", prompt(150, 50), 20, {"kv_compression": "none"})
    loop.run()
    assert big.num_preemptions == 0 and "big" in loop.finished
    assert shared_blocks(loop) in (kept, set())
    loop.add("big again", prompt(330, 60), 20, {"kv_compression": "none"})
    loop.run()
    assert not shared_blocks(loop)
    assert loop.stats.shared_prefixes_given_back == {"room": 1}


def test_a_reader_without_room_waits_and_holds_nothing(loop: Watched) -> None:
    loop.ask("first", question(0), 5, SHARED)
    kept = shared_blocks(loop)
    loop.add("runs", prompt(100, 40), 40, {"kv_compression": "none"})
    loop.step()
    taken = loop.pool.get_new_blocks(loop.pool.get_num_free_blocks() - 12)
    loop.usable -= len(taken)
    reader = loop.add("reader", question(1, 120), 5, SHARED)  # 9 blocks more in each group
    before = loop.scheduler.planner.requests["reader"]
    for _ in range(3):
        loop.step()
        assert reader.status is RequestStatus.WAITING and shared_blocks(loop) == kept
        assert loop.scheduler.planner.requests["reader"] is before and before.start is None
    loop.pool.free_blocks(taken)
    loop.usable += len(taken)
    loop.run()
    assert loop.hits["reader"] == WHOLE and shared_blocks(loop) == kept


def test_the_longest_unused_goes_first_once_nobody_reads_it(probe_model: str) -> None:
    setting = {**UNEVEN, "layer_budget": {}, "sessions": {"max_blocks_ratio": 0.08}}
    loop = made(probe_model, setting=setting)  # 15 blocks: two prefixes of 2 groups of 3 blocks
    documents = [[1000 + n, *DOCUMENT[1:205]] for n in range(3)]
    readers = [loop.add(f"r{n}", [*documents[n], 7, 8], 40, SHARED) for n in range(3)]
    while not all(reader.num_output_tokens > 1 for reader in readers):
        loop.step()
    assert len(shared_blocks(loop)) == 18, "as long as they are read, they cost nothing"
    loop.run()
    assert len(shared_blocks(loop)) == 12
    assert loop.stats.shared_prefixes_given_back == {"limit": 1}


def test_shared_sources_and_a_full_pool_hold_a_prefix_up_but_never_change_it(
    probe_model: str,
) -> None:
    """Another request holds the prefix's blocks whole, and there is no room for survivors."""
    loop = made(probe_model)
    holder = loop.add("holder", question(0), 30, {"kv_compression": "none"})
    while not holder.num_output_tokens:
        loop.step()
    loop.add("r1", question(1, 1), 20, SHARED)
    taken = loop.pool.get_new_blocks(loop.pool.get_num_free_blocks() - 5)
    loop.usable -= len(taken)
    while not holder.is_finished():
        loop.step()
        tracked = loop.scheduler.planner.requests["r1"]
        request = loop.scheduler.requests["r1"]
        assert request.num_computed_tokens <= WHOLE or tracked.phase is Phase.DONE
    assert loop.stats.deferrals and loop.scheduler.requests["r1"].num_preemptions
    loop.run()
    assert loop.stats.shared_prefixes_kept == 1 and not loop.stats.uncompressed.keys() - {
        "opted_out"
    }
    loop.pool.free_blocks(taken)


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.parametrize("setting", [UNEVEN, EVERYWHERE, ALWAYS], ids=["end", "all", "always"])
def test_any_traffic(name: str, setting: dict[str, Any], probe_model: str) -> None:
    """Questions about documents among chats and others; aborts, preemptions, resets; small pool."""
    rng, count = random.Random(sum(map(ord, name))), 0
    loop = made(probe_model, 110, name, setting=setting)
    documents = {which: [300 + which, *prompt(90 + 37 * which, which)] for which in range(5)}
    live: dict[str, Request] = {}
    for step in range(800):
        loop.num_steps = 0
        live = {key: each for key, each in live.items() if not each.is_finished()}
        most = (1, 3, 6)[step // 50 % 3]
        if len(live) < most and rng.random() < 0.6:
            which, count = rng.randrange(5), count + 1
            document, own = documents[which], prompt(rng.choice([1, 5, 40]), rng.randrange(90))
            shared = {"kv_shared_prefix": len(document)}
            xargs = rng.choice(
                [shared] * 10 + [None, {"kv_compression": "none"}, {"kv_session": "s"}]
            )
            text = [*document, *own] if rng.random() < 0.9 else document
            request_id = f"r{count}"
            live[request_id] = loop.add(request_id, text, rng.choice([1, 2, 5, 20]), xargs)
        if live and rng.random() < 0.04:
            victim = rng.choice(list(live))
            loop.scheduler.finish_requests(victim, RequestStatus.FINISHED_ABORTED)
        if loop.scheduler.running and rng.random() < 0.04:
            preempted = rng.choice(loop.scheduler.running)
            loop.scheduler.running.remove(preempted)
            loop.scheduler._preempt_request(preempted, 0.0)
        if rng.random() < 0.01:
            loop.scheduler.reset_prefix_cache()
        loop.stop_next = rng.random() < 0.1
        loop.step()
    loop.num_steps = 0
    loop.run()
    found = loop.stats.shared_prefix_requests
    assert found["reused"] > 50 and found["computed"] > 10, found
    loop.scheduler.reuse.kept.clear()
    assert loop.pool.get_num_free_blocks() == loop.usable
