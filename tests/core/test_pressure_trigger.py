"""Whose cache is compressed while memory is scarce, and when: planner, slots and vLLM's pool."""

from collections.abc import Sequence
from types import SimpleNamespace

import pytest
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.kv_cache_utils import KVCacheBlock

from tests.core.test_block_manager import BLOCK
from tests.core.test_room import Pool
from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.core.compactions import Compactions
from vllm_kvcompress.core.planner import Planner
from vllm_kvcompress.core.pressure import Pressure
from vllm_kvcompress.core.query_slots import QuerySlots
from vllm_kvcompress.core.resting import Resting
from vllm_kvcompress.core.tracked_request import Phase, SkipReason, TrackedRequest
from vllm_kvcompress.messages import RequestSetup
from vllm_kvcompress.metrics import CompressionStats
from vllm_kvcompress.request_options import parse_request

USABLE, WINDOW, INTERVAL = 100, 8, 32
SETTING = {
    "preset": "keydiff",
    "trigger": "pressure",
    "pressure": {"when": 0.8, "until": 0.5},
    "budget": {"tokens": 2 * BLOCK, "floor": 1},
    "observation_window": WINDOW,
    "interval": INTERVAL,
    "min_prompt_len": 0,
}
"""2 blocks are kept."""


class World:
    """A scheduler's part of a step over a pool of 100 blocks."""

    def __init__(self, num_slots: int = 0, **fields: object) -> None:
        config = parse_config({**SETTING, **fields})
        assert config is not None
        self.pool = Pool(1 + USABLE)
        self.planner = Planner(config, 1, block_size=BLOCK, rations_queries=True)
        self.stats = CompressionStats()
        self.slots = QuerySlots(self.planner, num_slots, self.stats)
        self.compactions = Compactions(
            self.planner, [self.pool.books], [0], self.pool.books.block_pool, 4096, self.stats
        )
        self.room = self.compactions.room
        found = Pressure.of(config, self.planner, self.room, self.slots, 0)
        assert found is not None
        self.pressure = found
        self.running: dict[str, SimpleNamespace] = {}
        self.compacted: list[tuple[str, int]] = []

    def add(
        self, name: str, num_blocks: int, shares: str | None = None, num_shared: int = 0
    ) -> TrackedRequest:
        """A request behind its prompt of so many blocks less one token, which comes next."""
        length = num_blocks * BLOCK - 1
        tracked = self.planner.add(name, length, parse_request(None))
        self.pool.add(name, num_blocks, shares, num_shared)
        self.running[name] = SimpleNamespace(
            request_id=name, num_computed_tokens=length, prompt_token_ids=[1], num_preemptions=0
        )
        return tracked

    def remove(self, name: str) -> TrackedRequest | None:
        request = self.running.pop(name)
        self.slots.release(name)
        self.pool.free(name)
        self.compactions.forget(name)
        return self.planner.remove(name, request.num_computed_tokens)

    def step(self, names: str | None = None) -> None:
        """One token for every request, or for these."""
        self.compactions.commit()
        self.slots.release_idle(lambda name: self.running[name].num_computed_tokens)
        self.pressure.update(list(self.running.values()), lambda request: 0)
        due = []
        for name, request in self.running.items():
            computed = request.num_computed_tokens
            if names is not None and name not in names:
                continue
            count = self.planner.clip_chunk(name, computed, 1, computed + 1)
            count = self.slots.clip(name, computed, count)
            assert count == 1, "nobody waits"
            request.num_computed_tokens = computed + 1
            self.pool.books.allocate_new_blocks(name, computed + 1, computed + 1)
            if self.planner.note_progress(name, computed + 1):
                due.append(request)
        for plan in self.compactions.plan(due):
            self.compacted.append((plan.request_id, plan.position))
            assert plan.while_decoding
        self.slots.check_integrity()
        self.pool.books.check_integrity()

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step()

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.compacted]

    def held(self) -> int:
        self.compactions.commit()
        return self.room.num_held


def test_nothing_happens_below_the_high_mark() -> None:
    world = World(num_slots=4, preset="snapkv")
    for name in "abc":
        world.add(name, 25)
        assert world.planner.max_cached_tokens(name) is None, "whole hits, as in stock vLLM"
        setup = RequestSetup(world.planner.config, ())
        assert world.planner.setups_of([name]) == {name: setup}, "no queries are kept"
    world.steps(BLOCK + 1)
    assert world.room.num_held == 78 and not world.slots.owned
    world.steps(1)
    assert world.room.num_held == 81, "noticed by the next step"
    world.steps(1 + WINDOW)
    assert world.names == ["a", "b"] and world.planner.requests["a"].counted
    assert world.stats.deferrals == 0


def test_the_largest_gain_comes_first_and_the_low_mark_is_kept() -> None:
    world = World()
    for name, size in {"a": 20, "b": 40, "c": 22}.items():
        world.add(name, size)
    world.step()
    assert world.compacted == [("b", 40 * BLOCK)], "it is 37 blocks, and 32 are too many"
    world.steps(1)
    assert world.held() <= 50 and not world.pressure.is_on
    world.steps(10)
    assert world.names == ["b"]


def test_as_many_are_chosen_as_the_low_mark_needs() -> None:
    world = World()
    for name, size in {"a": 20, "b": 35, "c": 28}.items():
        world.add(name, size)
    world.step()
    assert world.names == ["b", "c"], "b alone would leave 51"
    assert world.held() <= 50


@pytest.mark.parametrize(("num_lacking", "names"), [(40, []), (60, ["a"]), (90, ["a", "b"])])
def test_a_request_that_got_no_blocks_counts_like_the_high_mark(
    num_lacking: int, names: list[str]
) -> None:
    """45 blocks are held: that is below the low mark, and too much for some that wait."""
    world = World()
    world.add("a", 25)
    world.add("b", 20)
    world.room.num_lacking = num_lacking
    world.step()
    assert world.pressure.is_on and world.names == names
    assert world.held() <= max(USABLE - num_lacking, 10)
    world.step()
    assert not world.pressure.is_on and world.names == names


def test_what_vllm_keeps_free_is_beside_what_was_asked_for() -> None:
    world = World()
    found = Pressure.of(world.planner.config, world.planner, world.room, world.slots, 10)
    assert found is not None
    world.pressure = found
    world.add("a", 25)
    world.add("b", 20)
    world.room.num_lacking = 50
    world.step()
    assert world.names == ["a"] and world.held() <= USABLE - 50 - 10


def test_only_as_many_are_chosen_as_find_a_slot() -> None:
    world = World(num_slots=1, preset="snapkv")
    for name in "abc":
        world.add(name, 30 if name < "c" else 25)
    first = 30 * BLOCK - 1
    for _ in range(WINDOW):
        world.step()
        assert set(world.slots.owned) == {"a"}
    assert world.compacted == [("a", first + WINDOW)]
    world.steps(WINDOW)
    assert world.compacted[1:] == [("b", first + 2 * WINDOW)]
    assert world.stats.deferrals == 0
    world.step()
    assert not world.slots.owned and world.held() <= 50


def test_a_request_that_is_chosen_and_not_scheduled_keeps_its_turn() -> None:
    world = World(num_slots=1, preset="snapkv")
    world.add("a", 30)
    world.add("b", 28)
    world.pool.add("filler", 27)
    for _ in range(4):
        world.step("b")
        assert world.planner.requests["b"].phase is Phase.RESTING, "the slot is promised"
    world.steps(WINDOW)
    assert world.compacted == [("a", 30 * BLOCK - 1 + WINDOW)]
    world.steps(WINDOW)
    assert world.names == ["a", "b"], "a alone leaves 58 blocks"


def test_a_request_is_compressed_again_when_it_has_grown_by_an_interval() -> None:
    world = World()
    world.add("a", 45)
    world.pool.add("filler", 50)
    world.steps(3 * INTERVAL)
    first = 45 * BLOCK
    assert world.compacted == [("a", first), ("a", first + INTERVAL + 1), ("a", first + 66)]
    assert world.stats.compactions == {"keydiff/decode": 3}


def test_whoever_was_chosen_rests_again_when_there_is_memory() -> None:
    world = World(num_slots=2, preset="snapkv")
    tracked = world.add("a", 45)
    world.add("b", 40)
    world.steps(3)
    assert set(world.slots.owned) == {"a"} and tracked.phase is Phase.ARMED
    world.remove("b")
    world.step()
    assert tracked.phase is Phase.RESTING
    world.steps(2 * WINDOW)
    assert not world.compacted and not world.slots.owned
    gone = world.remove("a")
    assert gone is not None and gone.skip_reason == SkipReason.AMPLE_MEMORY
    assert world.room.num_held == 0


def test_requests_that_share_blocks_are_compressed_together_or_not_at_all() -> None:
    world = World()
    world.add("a", 30)
    world.add("b", 31, "a", 29)
    world.pool.add("filler", 50)
    world.step()
    assert sorted(world.names) == ["a", "b"] and world.held() <= 50 + 2 * 4
    world = World()
    tracked = world.add("a", 30)
    world.pool.add("other", 30, "a", 29)
    world.pool.add("filler", 50)
    world.steps(INTERVAL)
    assert not world.compacted and tracked.next_at > 30 * BLOCK, "not sized in every step"
    gone = world.remove("a")
    assert gone is not None and gone.skip_reason == SkipReason.SHARED_PROMPT


def test_a_family_without_free_blocks_for_its_survivors_rests() -> None:
    """Nobody is deferred for it."""
    world = World()
    world.add("a", 40)
    for name in "bc":
        world.add(name, 41, "a", 40)
    world.pool.add("filler", 53)
    world.step()
    assert world.planner.requests["a"].is_shared, "it was chosen"
    world.step()
    assert not world.compacted and world.stats.deferrals == 0
    assert all(each.phase is Phase.RESTING for each in world.planner.requests.values())


# --- the start ----------------------------------------------------------------------------


def started(world: World, name: str, hits: Sequence[KVCacheBlock] = ()) -> TrackedRequest:
    tracked = world.planner.requests[name]
    request = SimpleNamespace(request_id=name, num_tokens=tracked.prompt_len)
    world.pressure.start(request, KVCacheBlocks((hits,)))
    return tracked


def test_who_would_bring_the_pool_to_the_high_mark_is_compressed_at_its_end() -> None:
    world = World()
    world.pool.add("filler", 61)
    world.planner.add("new", 300, parse_request(None))
    world.step()
    assert started(world, "new").marks == (300,) and not world.pressure.is_on, "19 blocks more"
    hits = world.pool.books.req_to_blocks["filler"][:1]
    assert started(world, "new", hits).phase is Phase.RESTING, "18 more: one is a hit"
    hits = [world.pool.books.block_pool.blocks[-1]]
    assert hits[0].ref_cnt == 0
    assert started(world, "new", hits).marks == (300,), "a hit that nobody holds is a free block"


def test_who_starts_while_memory_is_scarce_is_compressed_at_the_end_of_its_prompt() -> None:
    world = World(preset="snapkv")
    world.planner.add("new", 300, parse_request(None))
    assert started(world, "new").phase is Phase.RESTING
    world.pool.add("filler", 85)
    world.step()
    tracked = started(world, "new")
    assert (tracked.phase, tracked.next_at, tracked.queries_from) == (Phase.ARMED, 300, None)
    assert world.planner.setups_of(["new"])["new"].marks == (300,)
    assert world.planner.max_cached_tokens("new") == 300 - WINDOW
    world.pool.free("filler")
    world.step()
    assert tracked.phase is Phase.ARMED, "the workers were told"
    assert world.planner.note_progress("new", 300)
    world.planner.note_planned(tracked)
    world.planner.commit(tracked)
    assert (tracked.phase, tracked.next_at) == (Phase.RESTING, 300 + INTERVAL)


def test_who_was_not_admitted_is_asked_again() -> None:
    world = World()
    world.planner.add("new", 300, parse_request(None))
    world.pool.add("filler", 85)
    world.step()
    assert started(world, "new").marks == (300,)
    world.pool.free("filler")
    world.step()
    assert (started(world, "new").marks, started(world, "new").phase) == ((), Phase.RESTING)


def test_a_preempted_request_starts_whole_unless_memory_is_scarce() -> None:
    world = World()
    tracked = world.add("a", 85)
    world.steps(2)
    assert tracked.counted
    world.planner.restart("a")
    assert (tracked.phase, tracked.marks, tracked.compaction.compacted_at) == (Phase.RESTING, (), 0)
    world.pressure.is_on = True
    assert started(world, "a").marks == (85 * BLOCK - 1,)


def test_a_short_prompt_counts_from_an_interval_on() -> None:
    world = World(min_prompt_len=200)
    world.planner.add("new", 150, parse_request(None))
    world.pressure.is_on = True
    tracked = started(world, "new")
    assert (tracked.phase, tracked.marks) == (Phase.RESTING, ())
    assert tracked.next_at == 150 + INTERVAL


@pytest.mark.parametrize(("num_computed", "reason"), [(99, None), (100, SkipReason.AMPLE_MEMORY)])
def test_whole_requests_are_counted_once_they_are_behind_their_prompt(
    num_computed: int, reason: str | None
) -> None:
    world = World()
    world.planner.add("a", 100, parse_request(None))
    gone = world.planner.remove("a", num_computed)
    assert gone is not None and gone.skip_reason == reason


def test_a_budget_that_frees_nothing_is_no_ample_memory() -> None:
    world = World(budget={"tokens": 4000, "floor": 1})
    world.add("a", 85)
    world.steps(2)
    gone = world.remove("a")
    assert gone is not None and gone.skip_reason == SkipReason.UNDER_BUDGET


def test_a_request_that_nobody_knows_is_left_alone() -> None:
    resting = Resting(World().planner)
    resting.start("nobody", True)
    assert resting.candidate("nobody", 10**6) is None and not resting.is_chosen("nobody")


# --- settings -----------------------------------------------------------------------------


def test_a_named_preset_has_its_own_trigger_beside_it() -> None:
    world = World()
    tracked = world.planner.add("a", 1000, parse_request({"kv_compression": "snapkv"}))
    assert started(world, "a") is tracked
    assert (tracked.phase, tracked.marks) == (Phase.ARMED, (1000,))
    own = world.planner.add("b", 1000, parse_request({"kv_budget_ratio": 0.5}))
    assert own.phase is Phase.RESTING, "a budget alone does not change the trigger"


def test_a_task_may_wait_for_pressure_and_the_other_not() -> None:
    tasks = {"localization": {"trigger": "pressure"}, "aggregation": {}}
    config = parse_config({"preset": "windowkv", "tasks": tasks, "pressure": {"when": 0.9}})
    assert config is not None
    assert parse_config(config.to_dict()) == config
    world = World()
    found = Pressure.of(config, world.planner, world.room, world.slots, 0)
    assert found is not None and found._high == 90
    assert config.by_task["localization"].pressure.when == 0.9
    assert Pressure.of(parse_config("windowkv"), world.planner, world.room, world.slots, 0) is None
