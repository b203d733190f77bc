"""How many blocks are set aside: vLLM's real block pool, and compactions in every order."""

from itertools import permutations
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.kv_cache_utils import KVCacheBlock

from tests.core.test_block_manager import BLOCK
from tests.core.test_room import Pool
from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.core.planner import Planner
from vllm_kvcompress.core.reserve import Reserve
from vllm_kvcompress.lengths.schedule import Start
from vllm_kvcompress.plans import GroupCache, RequestOptions

CONFIG = parse_config(
    {
        "preset": "keydiff", "budget": {"tokens": BLOCK, "floor": 1}, "min_prompt_len": 0,
        "num_sink_tokens": 0, "observation_window": 1,
    }
)  # fmt: skip


class Sharers:
    """Requests of whole blocks, in a pool of one KV cache group."""

    def __init__(self) -> None:
        assert CONFIG is not None
        self.pool = Pool(1000)
        self.books = self.pool.books
        self.waiting: list[KVCacheBlock] = []
        self.adopting: set[str] = set()
        self.planner = Planner(CONFIG, num_layer_groups=1, block_size=BLOCK)
        self.reserve = Reserve(
            self.planner, [self.books], [0], 4096, lambda: self.waiting, self.adopting.__contains__
        )
        self.kept: dict[str, int] = {}

    def add(self, name: str, num_blocks: int, num_kept: int, num_shared: int = 0) -> None:
        """A request that keeps so many blocks of its own, and begins like the first one."""
        first = next(iter(self.books.req_to_blocks), None)
        self.pool.add(name, num_blocks, first, num_shared)
        self.note(name, num_blocks, num_kept)
        self.reserve.note_joined()

    def note(self, name: str, num_blocks: int, num_kept: int) -> None:
        prompt_len = num_blocks * BLOCK
        options = RequestOptions(budget_tokens=num_kept * BLOCK)
        self.planner.add(name, prompt_len, options)
        self.reserve.note(self.request(name, num_blocks))
        self.kept[name] = num_kept

    def request(self, name: str, num_blocks: int) -> SimpleNamespace:
        return SimpleNamespace(request_id=name, num_prompt_tokens=num_blocks * BLOCK, max_tokens=50)

    def most_lacking(self, order: tuple[str, ...]) -> int:
        """Free blocks that compactions take in this order, each in a step of its own."""
        held = {name: [b.block_id for b in self.books.req_to_blocks[name]] for name in self.kept}
        free = lowest = 0
        for name in order:
            others = {number for other, ids in held.items() if other != name for number in ids}
            num_own = sum(number not in others for number in held.pop(name))
            lowest = min(lowest, free - max(self.kept[name] - num_own, 0))
            free += num_own - self.kept[name]
        return -lowest


def sharers(*requests: tuple[int, int, int]) -> Sharers:
    found = Sharers()
    for number, each in enumerate(requests):
        found.add("abcdefgh"[number], *each)
    return found


# --- how many -----------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_of_requests_with_one_prompt_all_but_one_need_a_copy(count: int) -> None:
    found = sharers((20, 5, 0), *[(20, 5, 20)] * (count - 1))
    assert found.reserve.num_blocks() == 5 * (count - 1)


def test_blocks_of_their_own_count_first() -> None:
    both = (25, 5, 20), (25, 5, 20)
    assert sharers((25, 5, 0), *both).reserve.num_blocks() == 0
    assert sharers((20, 5, 0), *both).reserve.num_blocks() == 5, "if it is compacted first"
    assert sharers((20, 5, 0), (22, 5, 20), (22, 5, 20)).reserve.num_blocks() == 5 + 3


def test_whoever_is_never_compacted_keeps_its_blocks() -> None:
    found = sharers((20, 5, 0))
    found.pool.add("outsider", 20, "a", 20)
    found.reserve.note_joined()
    assert found.reserve.num_blocks() == 5
    found.add("b", 20, 5, 20)
    assert found.reserve.num_blocks() == 10, "nor is the last of the two alone"
    found.pool.free("outsider")
    found.reserve.note_change("outsider")
    assert found.reserve.num_blocks() == 5


def test_families_are_counted_apart() -> None:
    found = sharers((20, 5, 0), (20, 4, 20))
    for name in "xy":
        found.pool.add(name, 10, None if name == "x" else "x", 10)
        found.note(name, 10, 3)
    assert found.reserve.num_blocks() == 5 + 3


def test_who_would_join_is_counted_with_what_it_would_hold() -> None:
    found = sharers((20, 5, 0))
    found.note("b", 20, 5)
    hits = KVCacheBlocks((found.books.req_to_blocks["a"][:18],))
    assert found.reserve.num_blocks(("b", hits)) == 3, "each has 2 blocks for itself"
    assert found.reserve.num_blocks() == 0
    free = KVCacheBlocks((found.books.block_pool.blocks[900:918],))
    assert found.reserve.num_blocks(("b", free)) == 0, "nobody holds these"


def test_what_waits_for_a_next_turn_is_no_sharer() -> None:
    found = sharers((20, 5, 0))
    found.waiting = found.books.req_to_blocks["a"][:18]
    found.books.block_pool.touch(found.waiting)
    found.reserve.note_joined()
    assert found.reserve.num_blocks() == 0


def test_those_that_are_due_in_one_step_need_a_copy_each() -> None:
    """Unless there is no room: then the second waits, whoever it is."""
    found = sharers((20, 5, 0), (20, 5, 20), (20, 5, 20))
    a, b, c = (found.request(name, 20) for name in "abc")
    found.reserve.begin_step()
    assert found.reserve.hold(a, 319, 1, num_free=10) == 1
    assert found.reserve.num_blocks() == 10
    assert found.reserve.hold(b, 319, 1, num_free=10) == 1
    assert found.reserve.num_blocks() == 10, "the third will be alone"
    assert found.reserve.hold(c, 300, 20, num_free=10) == 0, "it would be due, too"
    assert found.reserve.hold(c, 300, 19, num_free=10) == 19
    assert found.reserve.num_blocks() == 10
    assert found.reserve.num_blocks(without="a") == 5
    found.reserve.begin_step()
    assert found.reserve.hold(c, 319, 1, num_free=0) == 1, "who is first never waits"


def test_who_is_not_due_never_waits() -> None:
    found = sharers((20, 5, 0), (20, 5, 20), (20, 5, 20))
    a, b, c = (found.request(name, 20) for name in "abc")
    assert found.reserve.hold(a, 319, 1, num_free=0) == 1
    assert found.reserve.hold(b, 300, 19, num_free=0) == 19
    assert found.reserve.hold(c, 319, 1, num_free=0) == 0
    found.reserve.begin_step()
    found.planner.requests["a"].compaction.compacted_at = 320
    assert found.reserve.hold(a, 320, 1, num_free=0) == 1
    assert found.reserve.hold(c, 319, 1, num_free=0) == 1, "a has been compacted"


def test_a_step_that_was_not_taken_is_forgotten() -> None:
    found = sharers((20, 5, 0), (20, 5, 20))
    for name in "ab":
        found.reserve.hold(found.request(name, 20), 319, 1, num_free=100)
    assert found.reserve.num_blocks() == 10
    found.reserve.begin_step()
    assert found.reserve.num_blocks() == 5


def test_blocks_that_those_who_are_due_give_up_are_private_afterwards() -> None:
    """a and c share 20 blocks, b 10 of these; a is compacted in this step."""
    found = sharers((20, 15, 0), (20, 15, 10), (20, 15, 20))
    found.reserve.hold(found.request("a", 20), 319, 1, num_free=100)
    assert found.reserve.num_blocks() == 15 + 5, "a's copy, and that of b or c"


def test_who_reads_what_an_equal_keeps_and_who_is_not_compressed_needs_no_blocks() -> None:
    found = sharers((20, 5, 0), (20, 7, 20), (20, 5, 20))
    assert found.reserve.num_blocks() == 12
    found.adopting.add("b")
    found.reserve.note_joined()
    assert found.reserve.num_blocks() == 10, "b holds its blocks for longer than the others"
    found = sharers((20, 5, 0), (20, 7, 20))
    found.pool.room.reserve = found.reserve
    found.pool.free("b")
    found.planner.give_up("b")
    found.pool.add("b", 20, "a", 20)
    found.reserve.note(found.request("b", 20))
    found.reserve.note_joined()
    assert found.reserve.num_blocks() == 5, "a's alone"


def test_that_somebody_shares_is_not_forgotten_for_one_that_does_not() -> None:
    found = sharers((20, 5, 0), (20, 5, 20), (20, 5, 0))
    for _ in range(2):
        assert found.reserve.num_blocks() == 5
        found.reserve.note_change()


def test_a_cache_that_a_request_begins_with_changes_what_is_to_come_for_it() -> None:
    found = sharers((20, 5, 0), (20, 3, 20), (20, 5, 20))
    b = found.request("b", 20)
    for marks, expected in (((320,), 3 + 5), ((), 10), ((320,), 3 + 5)):
        cache = GroupCache(10 * BLOCK, ())
        found.planner.requests["b"].start = Start(10 * BLOCK, [cache], marks)
        for _ in range(2):
            assert found.reserve.hold(b, 319, 1, num_free=100) == 1
            assert found.reserve.num_blocks() == expected
    found.pool.room.reserve = found.reserve
    found.pool.free("b")
    found.pool.add("b", 20, "a", 20)
    found.reserve.note(b)
    found.reserve.note_joined()
    assert found.reserve.num_blocks() == 10, "it lost its blocks: this step does not compact it"


def test_groups_that_are_never_compacted_need_nothing() -> None:
    found = Sharers()
    managers: list[Any] = [object(), found.books]
    found.reserve = Reserve(found.planner, managers, [None, 0], 4096, lambda: ())
    for name in "ab":
        found.add(name, 20, 5, 20)
    assert found.reserve.num_blocks() == 5


def test_a_layer_group_that_is_compacted_late_is_looked_for_at_every_mark() -> None:
    setting = {
        "preset": "keydiff", "budget": {"tokens": 3 * BLOCK, "floor": 1}, "min_prompt_len": 0,
        "num_sink_tokens": 0, "observation_window": 1, "trigger": "prompt",
        "prompt_interval": 4 * BLOCK, "layer_budget": {"shape": "pyramid"},
        "layer_groups": {"count": 2},
    }  # fmt: skip
    config = parse_config(setting)
    assert config is not None
    planner = Planner(config, num_layer_groups=2, block_size=BLOCK)
    planner.add("r", 10 * BLOCK, RequestOptions())
    books: list[Any] = [SimpleNamespace(block_size=BLOCK, req_to_blocks={}) for _ in range(2)]
    reserve = Reserve(planner, books, [0, 1], 4096, lambda: ())
    reserve.note(SimpleNamespace(request_id="r", num_prompt_tokens=10 * BLOCK, max_tokens=50))
    assert planner.requests["r"].marks == (96, 160)
    _, coming = reserve._coming["r"]
    assert coming == ((1, 96, 6, 1), (0, 160, 10, 6)), "the lower layers keep more"


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(2, 12), st.integers(1, 8), st.integers(0, 10)),
        min_size=2,
        max_size=5,
    )
)
def test_it_is_enough_in_every_order(requests: list[tuple[int, int, int]]) -> None:
    most = requests[0][0]
    fitting = [(n, min(kept, n - 1), min(shared, n, most)) for n, kept, shared in requests]
    fitting[0] = (*fitting[0][:2], 0)
    found = sharers(*fitting)
    aside = found.reserve.num_blocks()
    assert all(found.most_lacking(order) <= aside for order in permutations(found.kept))
