"""Requests with one prompt: the first is compacted, the others read what it has kept.

What lies in which slot is watched by a worker that knows only what it is told (told_worker.py).
"""

import random
from types import SimpleNamespace
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.lora.request import LoRARequest
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher
from vllm.v1.request import Request, RequestStatus

from lab import shared_blocks
from tests.core.test_scheduler_loop import BLOCK, LOOPS, Loop, prompt
from tests.core.test_shared_blocks import Marks, finish
from tests.core.watched_loop import UNEVEN, Watched, watch
from tests.inside import preempt
from vllm_kvcompress.core.tracked_request import Phase
from vllm_kvcompress.messages import StepPlan
from vllm_kvcompress.plans import Purpose

PROMPT = prompt(150)
PLAIN: dict[str, Any] = {**UNEVEN, "budget": {"tokens": 48, "floor": 1}, "layer_budget": {}}
KEPT = 2 * 3
"""Blocks of one copy, in two groups."""


@pytest.fixture(params=LOOPS)
def loop(request: pytest.FixtureRequest, probe_model: str) -> Watched:
    return made(probe_model, kind=request.param)


def made(
    probe_model: str, num_blocks: int = 200, kind: str = "sync", setting: Any = PLAIN, seqs: int = 8
) -> Watched:
    found = watch(
        Watched(probe_model, *LOOPS[kind], num_blocks, setting=setting, max_num_seqs=seqs)
    )
    found.max_steps = 9000
    return found


def taken(loop: Watched) -> int:
    """Blocks that compactions took, so far."""
    return sum(loop.stats.blocks_taken.values())


def copies(loop: Watched) -> int:
    return len(loop.scheduler.compactions.equal._copies)


def phase(loop: Watched, name: str) -> Phase:
    return loop.scheduler.planner.requests[name].phase


def test_one_copy_is_made_and_all_read_it(loop: Watched) -> None:
    names = [f"r{number}" for number in range(5)]
    for name in names:
        loop.add(name, PROMPT, 40)
    loop.add("other", prompt(150, 50), 40)
    seen: dict[str, list[list[int]]] = {}
    while loop.step():
        for name in names:
            if name in loop.scheduler.requests and phase(loop, name) is Phase.DONE:
                rows = [manager.req_to_blocks[name][:3] for manager in loop.scheduler._managers]
                seen[name] = [[block.block_id for block in row] for row in rows]
                assert {m.evicted[name] for m in loop.scheduler._managers} == {144 - 48}
    assert len(seen) == 5 and all(found == seen["r0"] for found in seen.values())
    assert loop.stats.compactions == {"keydiff/prompt": 6}
    assert taken(loop) == 2 * KEPT and not loop.stats.uncompressed
    assert loop.hits["r0"] == 0 and {loop.hits[name] for name in names[1:]} == {144}
    assert loop.pool.get_num_free_blocks() == loop.usable and not copies(loop)


def test_who_comes_later_reads_it_as_long_as_somebody_does(loop: Watched) -> None:
    first = loop.add("first", PROMPT, 60)
    while first.num_output_tokens < 5:
        loop.step()
    second = loop.add("second", PROMPT, 60)
    while second.num_output_tokens < 5:
        loop.step()
    loop.scheduler.finish_requests("first", RequestStatus.FINISHED_ABORTED)
    loop.add("third", PROMPT, 60)
    loop.run()
    assert taken(loop) == KEPT and loop.stats.compactions == {"keydiff/prompt": 3}
    assert not copies(loop)
    loop.ask("much later", PROMPT)
    assert taken(loop) == 2 * KEPT
    assert loop.pool.get_num_free_blocks() == loop.usable


def test_who_differs_in_anything_makes_a_copy(probe_model: str) -> None:
    loop = made(probe_model)
    first = loop.add("first", PROMPT, 300)
    while first.num_output_tokens < 2:
        loop.step()
    others: list[tuple[list[int], Any, dict[str, Any]]] = [
        ([*PROMPT[:-1], 9], None, {}),
        ([*PROMPT, 9], None, {}),
        (PROMPT[:-1], None, {}),
        ([9, *PROMPT[1:]], None, {}),
        (PROMPT, {"kv_pin": [0, 16]}, {}),
        (PROMPT, {"kv_compression": "knorm", "kv_budget_tokens": 48}, {}),
        (PROMPT, {"kv_session": "chat"}, {}),
        (PROMPT, None, {"cache_salt": "other"}),
        (PROMPT, None, {"lora_request": LoRARequest("adapter", 1, "/nowhere")}),
    ]
    for number, (text, xargs, options) in enumerate(others):
        before = taken(loop)
        loop.num_steps = 0
        request = loop.add(f"r{number}", text, 3, xargs, **options)
        while not request.is_finished():
            loop.step()
        is_short = "knorm" in str(xargs)  # that preset's min_prompt_len
        assert taken(loop) == before + (0 if is_short else KEPT), number
    before = taken(loop)
    loop.add("equal", PROMPT, 3, {"kv_budget_tokens": 48})
    loop.run()
    assert taken(loop) == before


def test_the_end_of_a_prompt_is_compared_token_by_token(probe_model: str) -> None:
    """vLLM's hashes cover whole blocks."""
    loop = made(probe_model)
    for number in range(3):
        loop.add(f"r{number}", [*PROMPT[:-1], 7 + number % 2], 20)
    loop.run()
    assert taken(loop) == 2 * KEPT


def test_prompts_of_which_others_may_not_read_the_blocks(probe_model: str) -> None:
    loop = made(probe_model)
    hasher = get_request_block_hasher(BLOCK, sha256)
    for name in ("a", "b"):
        params = SamplingParams(max_tokens=5, prompt_logprobs=1)
        loop.worker.salts[name] = None
        loop.scheduler.add_request(Request(name, PROMPT, params, None, block_hasher=hasher))
    loop.run()
    assert taken(loop) == 2 * KEPT


def test_nothing_is_set_aside_for_those_who_read_a_copy(probe_model: str) -> None:
    """The pool holds the copy, the whole prompt once, and what each has behind it; no more copies:
    all begin in one step."""
    loop = made(probe_model, 1 + 36, setting={**PLAIN, "shared_blocks": "always"})
    first = loop.add("first", PROMPT, 60)
    while first.num_output_tokens < 3:
        loop.step()
    others = [loop.add(f"r{number}", PROMPT, 5) for number in range(5)]
    loop.step()
    assert [each.num_computed_tokens for each in others] == [len(PROMPT)] * 5
    loop.run()
    assert taken(loop) == KEPT and not loop.stats.deferrals


@pytest.mark.parametrize("end", ["abort", "preempt"])
@pytest.mark.parametrize("at", [64, 149, 150, 152])
def test_if_the_first_goes_another_takes_over(end: str, at: int, loop: Watched) -> None:
    first = loop.add("first", PROMPT, 40)
    for name in ("r1", "r2"):
        loop.add(name, PROMPT, 40)
    while first.num_computed_tokens < at:
        loop.step()
    if end == "abort":
        loop.scheduler.finish_requests("first", RequestStatus.FINISHED_ABORTED)
    else:
        preempt(SimpleNamespace(scheduler=loop.scheduler), first)
    loop.run()
    assert loop.finished >= {"r1", "r2"} and not loop.stats.uncompressed.keys() - {"short_output"}
    assert taken(loop) <= 2 * KEPT
    assert loop.pool.get_num_free_blocks() == loop.usable and not copies(loop)


@pytest.mark.parametrize("wait", [0, 1, 3])
def test_a_reader_that_is_preempted_reads_it_again(wait: int, loop: Watched) -> None:
    first = loop.add("first", PROMPT, 90)
    while first.num_output_tokens < 5:
        loop.step()
    reader = loop.add("reader", PROMPT, 40)
    while reader.status is not RequestStatus.RUNNING:
        loop.step()
    for _ in range(wait):
        loop.step()
    preempt(SimpleNamespace(scheduler=loop.scheduler), reader)
    loop.run()
    assert reader.num_preemptions == 1 and taken(loop) == KEPT
    assert loop.pool.get_num_free_blocks() == loop.usable


def test_new_weights_make_new_copies(probe_model: str) -> None:
    loop = made(probe_model)
    first = loop.add("first", PROMPT, 60)
    while first.num_output_tokens < 5:
        loop.step()
    # vLLM refuses while requests run, unless it is told to start them again; what is there is old.
    loop.scheduler.reset_prefix_cache()
    loop.ask("second", PROMPT, 5)
    assert taken(loop) == 2 * KEPT


@pytest.mark.parametrize("more", [{}, {"shared_blocks": "always"}], ids=["default", "always"])
@pytest.mark.parametrize("kind", LOOPS)
def test_all_start_again_where_running_requests_are_reset(
    kind: str, more: dict[str, str], probe_model: str
) -> None:
    loop = made(probe_model, kind=kind, setting={**PLAIN, **more})
    texts = [PROMPT, PROMPT, PROMPT, prompt(100, 5)]
    requests = [loop.add(f"r{number}", text, 30) for number, text in enumerate(texts)]
    for wait in (1, 2, 3, 4, 5, 7, 9):
        for _ in range(wait):
            loop.step()
        options = {"reset_running_requests": wait > 3}  # by name, or by place, as vLLM does
        by = ((), options) if wait % 2 else (tuple(options.values()), {})
        assert loop.scheduler.reset_prefix_cache(*by[0], **by[1]) is (wait > 3)
        loop.scheduler.check_integrity()
        loop.check_blocks()
        assert not copies(loop) and not any(each.promised for each in loop.scheduler._managers)
        if wait > 3:
            assert loop.pool.get_num_free_blocks() == loop.usable and not loop.scheduler.running
    loop.run()
    assert all(each.num_preemptions >= 3 and each.is_finished() for each in requests)
    assert loop.pool.get_num_free_blocks() == loop.usable


def test_a_promise_of_old_weights_is_not_kept(probe_model: str) -> None:
    """Another's prompt leaves the reader 3 tokens of a step: it is not through with its own."""
    loop = made(probe_model)
    first = loop.add("first", PROMPT, 60)
    while first.num_output_tokens < 2:
        loop.step()
    other, reader = loop.add("other", prompt(63 + 60, 9), 40), loop.add("reader", PROMPT, 40)
    while not reader.num_computed_tokens:
        loop.step()
    promised = [len(each.promised["reader"]) for each in loop.scheduler._managers]
    assert promised == [KEPT // 2] * 2
    assert not loop.scheduler.reset_prefix_cache(), "they run"
    assert not any(each.promised for each in loop.scheduler._managers)
    loop.check_blocks()
    loop.run()
    assert taken(loop) == 3 * KEPT and other.is_finished() and reader.is_finished()
    assert loop.pool.get_num_free_blocks() == loop.usable


def test_nobody_waits_for_one_whose_compaction_does_not_pay(probe_model: str) -> None:
    """An uncompressed request holds its blocks; the default leaves it alone until that ends."""
    loop = made(probe_model)
    outsider = loop.add("outsider", PROMPT, 60, {"kv_compression": "none"})
    while outsider.num_output_tokens < 2:
        loop.step()
    requests = [loop.add(name, PROMPT, 100) for name in ("a", "b", "c")]
    while not all(each.num_output_tokens for each in requests):
        loop.step()
    assert not outsider.is_finished() and {phase(loop, name) for name in "abc"} == {Phase.DUE}
    loop.run()
    assert loop.pool.get_num_free_blocks() == loop.usable


@pytest.mark.parametrize(
    "extra",
    [{"trigger": "both", "interval": 32}, {"trigger": "prompt", "prompt_interval": 64}],
    ids=["both", "prompt"],
)
def test_other_triggers_make_copies_as_ever(extra: dict[str, Any], probe_model: str) -> None:
    loop = made(probe_model, setting={**PLAIN, **extra, "observation_window": 8})
    for name in ("a", "b"):
        loop.add(name, PROMPT, 60)
    assert not loop.scheduler.compactions.equal._keys
    loop.run()
    assert loop.finished == {"a", "b"}


# --- tokens do not depend on who runs beside ----------------------------------------------

KINDS = {"uneven": UNEVEN, "plain": PLAIN, "queries": {**PLAIN, "preset": "snapkv"}}


@pytest.mark.parametrize("shared_blocks", ["when_it_pays", "always"])
@pytest.mark.parametrize(
    ("name", "kind"),
    [*((name, "uneven") for name in LOOPS), ("async", "plain"), ("sync", "queries")],
)
def test_any_traffic(name: str, kind: str, shared_blocks: str, probe_model: str) -> None:
    """Equal prompts, and some with a beginning in common and more of their own than is kept: by
    default, too, each is compacted at its mark. Aborts, preemptions, small pool.

    Nobody generates one token alone: such a request is never compressed, and holds the blocks."""
    setting = {**KINDS[kind], "observation_window": 8, "shared_blocks": shared_blocks}
    loop = made(probe_model, 1 + 2 * 30, name, setting)
    marks, rng, count = Marks(loop), random.Random(sum(map(ord, name + kind))), 0
    adopted: list[str] = []
    schedule = loop.scheduler.schedule

    def count_adopted(*args: Any) -> Any:
        output = schedule(*args)
        plans = StepPlan.of(output).plans
        adopted.extend(p.request_id for p in plans if p.purpose is Purpose.ADOPT)
        return output

    loop.scheduler.schedule = count_adopted
    while loop.num_steps < 200:
        while len(loop.scheduler.requests) < 10 and rng.random() < 0.5:
            which = rng.choice([0, 0, 0, 1, 2])
            text = [*prompt(64), *prompt(100 + which, 30 * which)]
            if rng.random() < 0.2:
                text = [*prompt(64), *prompt(110, 100 + count)]
            loop.add(f"r{count}", text, rng.choice([5, 30, 60]))
            count += 1
        for _ in range(rng.randrange(1, 4)):
            loop.step()
        if loop.scheduler.requests and rng.random() < 0.1:
            victim = rng.choice(list(loop.scheduler.requests))
            loop.scheduler.finish_requests(victim, RequestStatus.FINISHED_ABORTED)
            loop.scheduler.check_integrity()
        if len(loop.scheduler.running) > 1 and rng.random() < 0.1:
            preempt(SimpleNamespace(scheduler=loop.scheduler), rng.choice(loop.scheduler.running))
            loop.scheduler.check_integrity()
    finish(loop)
    assert len(adopted) > 5 and marks.counts["restarts"] > 1, (len(adopted), marks.counts)
    assert not loop.stats.deferrals and "shared_prompt" not in loop.stats.uncompressed


def test_beside_windowed_layers(probe_model: str) -> None:
    loop = Loop(probe_model, *LOOPS["async"], 120, PLAIN, max_num_seqs=8, window=48)
    for number in range(6):
        loop.add(f"r{number}", PROMPT, 10 + 9 * number)
    finish(loop)
    stats = loop.scheduler.stats
    assert sum(stats.blocks_taken.values()) == KEPT
    assert stats.compactions == {"keydiff/prompt": 6}


def test_many_samples_of_one_prompt_hold_less_than_stock() -> None:
    prompts = shared_blocks._prompts(2500, 8)
    whole = shared_blocks.run(prompts, 1.0, None, 400)
    for which in ("when_it_pays", "always"):
        found = shared_blocks.run(prompts, 0.25, which, 400)
        assert found.peak < whole.peak and found.settled < whole.settled / 3
        assert found.compactions == 8 and found.steps <= whole.steps + 1
