"""With `shared_blocks: always` every compaction happens at its mark, whoever holds the blocks.

What lies in which slot is watched by a worker that knows only what it is told (told_worker.py).
"""

import random
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.request import RequestStatus

from tests.core.test_pressure_loop import watched
from tests.core.test_scheduler_loop import BLOCK, LOOPS, Loop, prompt
from tests.core.test_sessions import CHAT, Chats
from tests.core.watched_loop import watch
from tests.inside import preempt
from vllm_kvcompress.core.report import savings_line
from vllm_kvcompress.core.tracked_request import SkipReason
from vllm_kvcompress.lengths.schedule import compactions, first_kept
from vllm_kvcompress.messages import StepPlan

SHARED = {
    "preset": "keydiff",
    "budget": {"tokens": 32, "floor": 1},
    "min_prompt_len": 0,
    "layer_groups": {"count": 2},
    "observation_window": 8,
    "shared_blocks": "always",
}
LOCKSTEP = {
    **SHARED, "trigger": "interval", "interval": 32, "budget": {"tokens": 96, "floor": 1}
}  # fmt: skip
"""Requests of one prompt that start together are due together: 2 of 14 blocks are their own, and 6
are kept, so each lacks 4 in each of two groups."""
SETTINGS: dict[str, dict[str, Any]] = {
    "end of prompt": SHARED,
    "interval": {**SHARED, "trigger": "interval", "interval": 32},
    "lockstep": LOCKSTEP,
    "both": {**SHARED, "trigger": "both", "interval": 32, "preset": "snapkv"},
    "prompt": {**SHARED, "trigger": "prompt", "prompt_interval": 48},
    "all": {
        **SHARED, "trigger": "all", "prompt_interval": 64, "interval": 32, "preset": "snapkv"
    },
    "much kept": {**SHARED, "budget": {"ratio": 0.75, "floor": 1}},
    "unequal": {
        **SHARED, "trigger": "both", "interval": 32, "budget": {"tokens": 64, "floor": 1},
        "layer_budget": {"shape": "pyramid"},
    },
}  # fmt: skip
PLAIN = {"kv_compression": "none"}
SOME: list[Any] = [PLAIN, {"kv_budget_tokens": 16}, {"kv_budget_tokens": 96}, CHAT]
SMALL = 1 + 2 * 26
"""416 tokens in each of two groups."""


class Marks:
    """Where every request is compacted, held against where it would be alone."""

    def __init__(self, chats: Loop) -> None:
        self.scheduler = chats.scheduler
        self.positions: dict[str, list[int]] = {}
        self.counts: Counter[str] = Counter()
        watched(chats, self.check)

    def check(self, output: Any) -> None:
        for new in output.scheduled_new_reqs:
            self.positions[new.req_id] = []  # it starts from nothing, perhaps once more
            self.counts["restarts"] += self.scheduler.requests[new.req_id].num_preemptions > 0
        for plan in StepPlan.of(output).plans:
            self.positions[plan.request_id].append(plan.position)
            self.counts["in place"] += any(group.in_place for group in plan.groups if group)
        for name in output.num_scheduled_tokens:
            blocks = self.scheduler._managers[0].req_to_blocks[name]
            self.counts["shared"] += any(block.ref_cnt > 1 for block in blocks)
            expected = list(self._expected(name))
            assert self.positions[name][: len(expected)] == expected, name

    def _expected(self, name: str) -> Iterator[int]:
        """Up to what the request has computed for certain."""
        request, planner = self.scheduler.requests[name], self.scheduler.planner
        tracked = planner.requests[name]
        if tracked.config is not None and tracked.skip_reason is None:
            certain = request.num_computed_tokens - request.num_output_placeholders
            shape = planner.num_layer_groups, BLOCK
            for each in compactions(
                tracked.prompt_len, certain, tracked.config, *shape, start=tracked.start
            ):
                yield each.position


def opened(model: str, loop: str, setting: dict, num_blocks: int, seqs: int = 12) -> Chats:
    chats = watch(Chats(model, *LOOPS[loop], num_blocks, setting=setting, max_num_seqs=seqs))
    chats.max_steps = 9000
    return chats


def traffic(chats: Loop, num_steps: int, seed: int) -> int:
    """Arrivals that begin alike, aborts and preemptions; how many arrived."""
    scheduler, rng = chats.scheduler, random.Random(seed)
    aborted: set[str] = set()
    count = 0
    while chats.num_steps < num_steps:
        while len(scheduler.requests) < 14 and rng.random() < 0.6:
            tokens = prompt(rng.choice([20, 60, 100, 150, 200]), rng.choice([0, 0, 0, 7, count]))
            tokens += prompt(rng.choice([0, 0, rng.randrange(1, 40)]), count)
            xargs = rng.choice([None] * 6 + SOME)
            chats.add(f"r{count}", tokens, rng.choice([1, 5, 40, 90]), xargs)
            count += 1
        for _ in range(rng.randrange(1, 6)):
            chats.step()
        if scheduler.requests and rng.random() < 0.15:
            aborted.add(name := rng.choice(list(scheduler.requests)))
            scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
            scheduler.check_integrity()
        if len(scheduler.running) > 1 and rng.random() < 0.05:
            preempt(SimpleNamespace(scheduler=scheduler), scheduler.running[-1])
            scheduler.check_integrity()
    finish(chats)
    assert chats.finished | aborted == {f"r{number}" for number in range(count)}
    return count


def finish(chats: Loop) -> None:
    """Run to the end; nothing is left."""
    chats.run()
    while chats.under_way:
        chats._take(*chats.under_way.popleft())
    chats.scheduler.reuse.kept.clear()
    pool = chats.scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
    assert not chats.scheduler.planner.requests


# --- random load --------------------------------------------------------------------------


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("loop", LOOPS)
def test_every_compaction_is_at_its_mark(loop: str, setting: str, probe_model: str) -> None:
    chats = opened(probe_model, loop, SETTINGS[setting], SMALL)
    marks = Marks(chats)
    assert traffic(chats, 100, seed=3) > 20
    assert marks.counts["shared"] > 5
    assert chats.stats.deferrals == 0
    assert SkipReason.SHARED_PROMPT not in chats.stats.uncompressed


@pytest.mark.parametrize("loop", ["sync", "async"])
def test_two_thousand_steps(loop: str, probe_model: str) -> None:
    chats = opened(probe_model, loop, SETTINGS["all"], SMALL)
    marks = Marks(chats)
    assert traffic(chats, 2000, seed=5) > 300
    assert marks.counts["in place"] > 100 and marks.counts["restarts"] > 50
    assert chats.stats.deferrals == 0


def test_without_the_setting_marks_are_missed(probe_model: str) -> None:
    """What the tests above hold against is not so by default."""
    chats = opened(probe_model, "sync", {**SHARED, "shared_blocks": "when_it_pays"}, SMALL)
    Marks(chats)
    with pytest.raises(AssertionError, match=r"^r\d"):
        traffic(chats, 100, seed=3)


@pytest.mark.parametrize("setting", ["end of prompt", "all"])
def test_beside_windowed_layers(setting: str, probe_model: str) -> None:
    """Their blocks come from the same pool and are never compacted."""
    small = 1 + 3 * 26
    loop = Loop(
        probe_model, *LOOPS["async"], small, SETTINGS[setting], max_num_seqs=12, window=48
    )  # fmt: skip
    marks = Marks(loop)
    assert traffic(loop, 200, seed=4) > 40
    assert marks.counts["shared"] > 20 and marks.counts["in place"] > 0
    assert loop.scheduler.stats.deferrals == 0


# --- who waits, and for what --------------------------------------------------------------


def start_together(chats: Chats, *names: str, xargs: Any = None) -> None:
    """Requests of one prompt of 200 tokens that start in the step in which the first ends it."""
    chats.add(names[0], prompt(200), 100)
    for _ in range(3):
        chats.step()
    for name in names[1:]:
        chats.add(name, prompt(200), 100, xargs)
    chats.step()
    assert {each.request_id for each in chats.scheduler.running} == set(names)


def test_of_those_due_together_the_last_waits_for_a_step(probe_model: str) -> None:
    """13 blocks of each group are in use, then 8 for one of the two: 14 more are in use at last."""
    chats = opened(probe_model, "sync", LOCKSTEP, 1 + 2 * (12 + 2 * 3 + 4))
    marks = Marks(chats)
    start_together(chats, "a", "b")
    while not marks.positions["a"]:
        assert chats.scheduler.compactions.room.num_set_aside() <= 2 * 4
        chats.step()
    assert marks.positions == {"a": [232], "b": []}
    lengths = {name: each.num_computed_tokens for name, each in chats.scheduler.requests.items()}
    assert lengths == {"a": 232, "b": 231}
    chats.step()
    assert marks.positions == {"a": [232], "b": [232]}
    chats.step()
    assert chats.scheduler.compactions.room.num_set_aside() == 0
    finish(chats)
    assert not marks.counts["restarts"]


def test_where_there_is_room_for_both_nobody_waits(probe_model: str) -> None:
    chats = opened(probe_model, "sync", LOCKSTEP, 1 + 2 * (12 + 2 * 3 + 8))
    marks = Marks(chats)
    start_together(chats, "a", "b")
    while not marks.positions["a"]:
        chats.step()
    assert marks.positions == {"a": [232], "b": [232]}


def test_who_would_join_waits_until_there_is_room_for_both_sides(probe_model: str) -> None:
    """The first has 13 blocks, and 3 are free: enough for the other's own one. But both would be
    due in that step, and lack 2 each."""
    chats = opened(probe_model, "sync", SHARED, 1 + 2 * (13 + 3))
    chats.add("first", prompt(200), 30)
    for _ in range(3):
        chats.step()
    chats.add("second", prompt(200), 30)
    chats.step()
    assert [each.request_id for each in chats.scheduler.running] == ["first"]
    chats.step()
    assert len(chats.scheduler.running) == 2, "the first has been compacted"
    finish(chats)


def test_an_outsider_may_not_grow_into_what_is_set_aside(probe_model: str) -> None:
    """It shares the blocks and is never compacted: it is preempted, for a block of its own."""
    chats = opened(probe_model, "sync", LOCKSTEP, 1 + 2 * (12 + 2 * 2 + 4))
    marks = Marks(chats)
    start_together(chats, "a", "outsider", xargs=PLAIN)
    room = chats.scheduler.compactions.room
    config = chats.scheduler.planner.config
    kept = first_kept(200, 300, config, 2, BLOCK)
    assert room.num_set_aside() == sum(kept) // BLOCK - 2 * 2 == 2 * (6 - 2)
    line = savings_line(config, chats.scheduler.kv_cache_config, 512)
    assert "for each but one up to 12 blocks are set aside" in line
    outsider = chats.scheduler.requests["outsider"]
    while not outsider.num_preemptions:
        chats.step()
    assert room.num_set_aside() == 0, "nobody shares the blocks any more"
    finish(chats)
    assert marks.positions["a"][0] == 232


def test_a_request_alone_needs_nothing_but_its_blocks(probe_model: str) -> None:
    """It finds its own blocks again, in a pool that holds it and no more."""
    chats = opened(probe_model, "sync", SHARED, 1 + 2 * 14)
    marks = Marks(chats)
    for name in ("first", "again"):
        chats.add(name, prompt(200), 20)
        finish(chats)
        assert marks.positions[name] == [200]
    assert chats.hits["again"] > 0


def test_what_waits_for_a_next_turn_gives_way(probe_model: str) -> None:
    """The first layer group of a turn has kept all of its blocks, and another request finds them.
    Its compaction, which finds no free ones, overwrites them once they are given back."""
    setting = {
        **SHARED, "budget": {"tokens": 150, "floor": 1}, "sessions": {"max_blocks_ratio": 1},
        "layer_budget": {"shape": "linear", "beta": 0.1},
    }  # fmt: skip
    chats = opened(probe_model, "sync", setting, 200)
    marks = Marks(chats)
    chats.ask("turn", prompt(200), 8)
    taken = chats.pool.get_new_blocks(chats.pool.get_num_free_blocks() - 14)
    other = chats.add("other", prompt(200), 40, {"kv_budget_tokens": 96})
    chats.check_blocks = lambda: None  # type: ignore[method-assign]  # some are taken
    chats.step()
    assert marks.positions["other"] == [200] and chats.hits["other"] == 192
    assert not chats.scheduler.reuse.kept.held_blocks() and marks.counts["in place"] == 1
    assert chats.stats.sessions_given_back == {"room": 1} and not other.num_preemptions
    chats.pool.free_blocks(taken)
    finish(chats)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_compaction_that_finds_no_blocks_starts_over(loop: str, probe_model: str) -> None:
    """Nothing that is known leads there; if anything does, nobody goes on uncompressed."""
    chats = opened(probe_model, loop, SHARED, 100)
    scheduler, room = chats.scheduler, chats.scheduler.compactions.room
    answers = [None, *[[0, 0]] * 9]
    room.own_destinations = lambda *_: answers.pop(0)  # type: ignore[method-assign]
    positions: list[int] = []

    def check(output: Any) -> None:
        positions.extend(plan.position for plan in StepPlan.of(output).plans)
        for name in output.num_scheduled_tokens:
            is_behind = scheduler.requests[name].num_computed_tokens > 200
            assert not is_behind or positions == [200]

    watched(chats, check)
    request = chats.add("r", prompt(200), 30)
    finish(chats)
    assert (request.num_preemptions, positions) == (1, [200])
    assert chats.stats.deferrals == 1 and len(request.output_token_ids) == 30
