"""What a compaction gains, and where its survivors go: vLLM's real block pool."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from tests.core.test_block_manager import BLOCK, fill, manager
from tests.inside import has_declined
from vllm_kvcompress.core.host_groups import HostGroup
from vllm_kvcompress.core.kept_cache import Kept, Kind, Place, tokens_of
from vllm_kvcompress.core.kept_store import KeptCaches
from vllm_kvcompress.core.room import Room
from vllm_kvcompress.core.tracked_request import CompactionSchedule
from vllm_kvcompress.metrics import CompressionStats
from vllm_kvcompress.plans import GroupLengths


class Pool:
    """One KV cache group over 64 blocks; requests that may share their first blocks."""

    def __init__(self, num_blocks: int = 65) -> None:
        self.books = manager(num_blocks)
        self.views_left = 0
        self.room = Room([self.books], [0], self.books.block_pool, 4096, self.give_up)

    def add(
        self, name: str, num_blocks: int, shares: str | None = None, num_shared: int = 0
    ) -> None:
        if shares is not None:
            hits = self.books.req_to_blocks[shares][:num_shared]
            self.books.block_pool.touch(hits)
            self.books.req_to_blocks[name] = list(hits)
        fill(self.books, name, num_blocks * BLOCK)

    def free(self, name: str) -> None:
        self.books.free(name)
        self.room.note_change(name)

    def give_up(self) -> bool:
        for name in reversed(self.books.views):
            return self.books.give_up_view(name) > 0
        return False

    def take_view(self, name: str, num_blocks: int) -> None:
        self.books.views[name] = self.books.block_pool.get_new_blocks(num_blocks)

    def keep(self, num_blocks: int) -> None:
        """A cache that outlives its request."""
        pool = self.books.block_pool
        if self.room.kept is None:
            stats = CompressionStats()
            self.room.kept = KeptCaches(pool, 64, stats, self.room.note_change)
        blocks, held = pool.get_new_blocks(num_blocks), CompactionSchedule(compacted_at=1)
        place = Place(str(len(self.room.waiting_blocks())), None, None, Kind.SESSION)
        self.room.kept.put(place, Kept(tokens_of([1]), [blocks], held, 1, None))

    def keep_of(self, name: str) -> None:
        """A cache that outlives its request, of blocks that another one holds, too."""
        blocks = self.books.req_to_blocks[name]
        self.books.block_pool.touch(blocks)
        self.keep(0)
        (place,) = self.room.kept._kept
        self.room.kept.put(place, replace(self.room.kept.take(place), blocks=[list(blocks)]))

    def set_aside(self, num_blocks: int, own: dict[str, int] | None = None) -> None:
        """For coming compactions; `own` says what it is less by without that of a request."""

        def count(joining: Any = None, without: str | None = None) -> int:
            return num_blocks - (own or {}).get(without, 0)

        self.room.reserve = SimpleNamespace(
            num_blocks=count, note=lambda request: None, note_change=lambda request_id=None: None
        )


def due(num_blocks: int, num_kept: int) -> list[GroupLengths | None]:
    return [GroupLengths(num_blocks * BLOCK, num_kept * BLOCK)]


def worth(pool: Pool, due: dict[str, Any]) -> set[str]:
    """Those that are compacted now."""
    return pool.room.worthwhile(due)


# --- what a compaction gains --------------------------------------------------------------


def test_private_blocks_are_worth_it() -> None:
    pool = Pool()
    pool.add("r", 10)
    assert worth(pool, {"r": due(10, 9)}) == {"r"}


def test_blocks_that_stay_with_others_are_not() -> None:
    pool = Pool()
    pool.add("other", 10)
    pool.add("r", 12, "other", 10)
    assert worth(pool, {"r": due(12, 3)}) == set(), "2 come free, 3 are taken"
    pool.room.note_change()
    assert worth(pool, {"r": due(12, 2)}) == set(), "2 are taken: that gains nothing"
    pool.room.note_change()
    assert worth(pool, {"r": due(12, 1)}) == {"r"}, "1 is taken"


def test_siblings_are_compacted_together_where_that_gains() -> None:
    pool = Pool()
    for name in "abc":
        pool.add(name, 10, None if name == "a" else "a", 10)
    lengths = {name: due(10, 3) for name in "abc"}
    assert worth(pool, {"a": due(10, 3), "b": due(10, 3)}) == set(), "c holds all of them"
    assert worth(pool, lengths) == set("abc"), "10 come free, 9 are taken"
    pool.room.note_change()
    assert worth(pool, {name: due(10, 4) for name in "abc"}) == set(), "12 are taken"


def test_siblings_need_room_for_all() -> None:
    pool = Pool(1 + 10 + 5)
    pool.add("a", 10)
    pool.add("b", 10, "a", 10)
    both = {"a": due(10, 3), "b": due(10, 3)}
    pool.take_view("a", 1)
    for _ in range(2):
        assert worth(pool, both) == set(), "6 are taken, 4 are free"
    assert worth(pool, {"a": due(10, 2), "b": due(10, 2)}) == {"a", "b"}
    pool.add("other", 1)
    assert worth(pool, {"a": due(10, 2), "b": due(10, 2)}) == set()
    pool.give_up()
    assert worth(pool, {"a": due(10, 2), "b": due(10, 2)}) == {"a", "b"}, "no owner has changed"


def test_siblings_that_were_declined_in_steps_of_their_own_are_compacted_together() -> None:
    pool = Pool()
    pool.add("a", 10)
    pool.add("b", 10, "a", 10)
    a, b = {"a": due(10, 3)}, {"b": due(10, 3)}
    for alone in (a, b, a, b):
        assert worth(pool, alone) == set()
    assert worth(pool, {**a, **b}) == {"a", "b"}, "no block has lost an owner meanwhile"


def test_families_take_their_blocks_one_behind_the_other() -> None:
    """Each takes 6 of what `alone` leaves, and gives 10 back one step later."""
    for num_free, families in ((4 + 5, ""), (4 + 6, "ab"), (4 + 11, "ab"), (4 + 12, "abcd")):
        pool = Pool(1 + 10 + 10 + 10 + num_free)
        pool.add("alone", 10)
        for first, second in ("ab", "cd"):
            pool.add(first, 10)
            pool.add(second, 10, first, 10)
        lengths = {name: due(10, 4 if name == "alone" else 3) for name in ("alone", *"abcd")}
        for _ in range(2):
            assert worth(pool, lengths) == {"alone", *families}, num_free


def test_what_some_free_anyway_does_not_speak_for_others() -> None:
    """a and b are worth it alone; the blocks that only they share are no gain of c's."""
    pool = Pool(1 + 100)
    pool.add("a", 20)
    pool.add("b", 25, "a", 5)
    pool.books.block_pool.touch(shared := pool.books.req_to_blocks["a"][4:5])
    pool.books.req_to_blocks["c"] = list(shared)
    lengths = {"a": due(20, 2), "b": due(25, 2), "c": due(1, 1)}
    assert worth(pool, lengths) == {"a", "b"}


def test_a_declined_compaction_is_looked_at_again_when_an_owner_goes() -> None:
    pool = Pool()
    pool.add("other", 10)
    pool.add("r", 10, "other", 10)
    pool.add("another", 10, "other", 10)
    lengths = {"r": due(10, 3)}
    for name in ("other", "another"):
        for _ in range(3):
            assert worth(pool, lengths) == set()
        pool.free(name)
    assert worth(pool, lengths) == {"r"}
    pool.free("r")
    assert not has_declined(pool.room), "nothing is left behind"


def test_a_declined_compaction_is_looked_at_again_when_it_has_grown() -> None:
    pool = Pool()
    pool.add("other", 10)
    pool.add("r", 12, "other", 10)
    assert worth(pool, {"r": due(12, 3)}) == set()
    fill(pool.books, "r", 20 * BLOCK)
    assert worth(pool, {"r": due(20, 3)}) == {"r"}


# --- how far a request may grow -----------------------------------------------------------


@pytest.mark.parametrize(
    ("num_tokens", "evicted", "most_held", "missing"),
    [
        (10 * BLOCK, 0, None, 0),
        (10 * BLOCK + 1, 0, None, 1),
        (14 * BLOCK, 0, None, 4),
        (5 * BLOCK, 0, None, 0),
        (16 * BLOCK, 4 * BLOCK, None, 2),
        (30 * BLOCK, 0, 12 * BLOCK, 2),
        (30 * BLOCK, 0, 4 * BLOCK, 0),
    ],
)
def test_growth_counts_slots_that_are_there_and_marks_on_the_way(
    num_tokens: int, evicted: int, most_held: int | None, missing: int
) -> None:
    pool = Pool()
    pool.add("r", 10)
    pool.add("other", 3)
    if evicted:
        pool.books.evicted["r"] = evicted
    if most_held is not None:
        pool.books.most_held = lambda name, num_tokens: {"r": most_held}[name]
    assert pool.room.num_growth("r", num_tokens) == missing
    uncompacted = max(num_tokens // BLOCK - 10, 0) if most_held else missing
    assert pool.room.num_growth("r", num_tokens, is_compacted=False) == uncompacted


def test_growth_of_all_groups_and_no_more_than_a_window_holds() -> None:
    pool = Pool()
    pool.add("r", 10)
    bound = SimpleNamespace(
        block_size=BLOCK, kv_cache_spec=None, max_admission_blocks_per_request=6,
        req_to_blocks={"r": [None] * 3}, cache_blocks=lambda: None,
    )  # fmt: skip
    room = Room([pool.books, HostGroup(bound, 0)], [0, None], pool.books.block_pool, 4096)
    assert room.num_growth("r", 12 * BLOCK) == 2 + 6
    assert room.num_growth("r", 5 * BLOCK) == 0 + 2
    assert room.num_growth("new", 2 * BLOCK) == 2 + 2
    bound.max_admission_blocks_per_request = None
    assert room.num_growth("r", 12 * BLOCK) == 2 + 9


@pytest.mark.parametrize(
    ("num_kept", "num_aside", "allowed"),
    [(0, 0, 5 * BLOCK), (0, 2, 3 * BLOCK), (2, 0, 7 * BLOCK), (2, 4, 3 * BLOCK), (0, 5, 0)],
)
def test_a_step_is_clipped_to_the_blocks_that_nobody_must_be_preempted_for(
    num_kept: int, num_aside: int, allowed: int
) -> None:
    """5 blocks are free behind those of the request and the kept ones; its last is half full."""
    pool = Pool(1 + 10 + num_kept + 5)
    pool.add("r", 10)
    pool.books.evicted["r"] = 4 * BLOCK
    pool.books.most_held = lambda name, num_tokens: 4  # it is not compacted on its way now
    num_computed = 14 * BLOCK - 8
    if num_kept:
        pool.keep(num_kept)
    if num_aside:
        pool.set_aside(num_aside)
    request, most = SimpleNamespace(request_id="r"), allowed + 8
    for num_new in (1, 2, 8, 9, most - 1, most, most + 1, most + BLOCK, 4096):
        assert pool.room.clip(request, num_computed, num_new) == min(num_new, most), num_new
    assert pool.room.clip(request, num_computed + 8, 9) == max(min(9, allowed), 1)


def test_blocks_that_requests_hold_are_neither_free_nor_kept() -> None:
    pool = Pool(1 + 20)
    pool.add("r", 7)
    assert (pool.room.num_usable, pool.room.num_held) == (20, 7)
    pool.keep(4)
    assert (pool.room.num_free, pool.room.num_held) == (9, 7)
    assert len(pool.room.waiting_blocks()) == 4 and not Pool().room.waiting_blocks()
    assert pool.room.num_set_aside() == 0
    pool.set_aside(5, {"r": 3})
    assert (pool.room.num_set_aside(), pool.room.num_set_aside("r")) == (5, 2)


# --- where survivors go -------------------------------------------------------------------


def test_free_blocks_are_taken_before_any_of_its_own() -> None:
    pool = Pool(1 + 12)
    pool.add("r", 10)
    assert pool.room.own_destinations("r", due(10, 2)) == [0]
    assert pool.room.own_destinations("r", due(10, 5)) == [3]
    pool.add("other", 2)
    assert pool.room.own_destinations("r", due(10, 5)) == [5]


def test_views_give_way_before_a_block_is_overwritten() -> None:
    pool = Pool(1 + 20)
    pool.add("a", 10)
    pool.take_view("a", 8)
    assert pool.room.own_destinations("a", due(10, 4)) == [0]
    assert not pool.books.views
    pool = Pool(1 + 10 + 2)
    pool.add("a", 10)
    pool.take_view("a", 1)
    assert pool.room.own_destinations("a", due(10, 2)) == [0] and not pool.books.views


@pytest.mark.parametrize(("num_free", "num_own", "is_kept"), [(3, 0, True), (2, 1, False)])
def test_a_kept_cache_gives_way_where_a_compaction_has_to_happen_and_lacks_blocks(
    num_free: int, num_own: int, is_kept: bool
) -> None:
    pool = Pool(1 + 10 + num_free)
    pool.add("r", 10)
    pool.keep_of("r")
    pool.set_aside(0)
    assert pool.room.own_destinations("r", due(10, 3)) == [num_own]
    assert bool(pool.room.waiting_blocks()) is is_kept


def test_blocks_that_others_hold_are_never_overwritten() -> None:
    pool = Pool(1 + 10)
    pool.add("other", 8)
    pool.add("r", 10, "other", 8)
    assert pool.room.own_destinations("r", due(10, 2)) == [2]
    assert pool.room.own_destinations("r", due(10, 3)) is None


def test_what_is_set_aside_for_others_is_overwritten_by_nobody() -> None:
    """4 blocks are free, 3 of them set aside; 2 of these for the request itself."""
    pool = Pool(1 + 10 + 4)
    pool.add("r", 10)
    pool.set_aside(3, {"r": 2})
    assert pool.room.own_destinations("r", due(10, 3)) == [0]
    assert pool.room.own_destinations("r", due(10, 4)) == [1]
    pool.set_aside(6)
    assert pool.room.own_destinations("r", due(10, 3)) == [3], "more is set aside than is free"
    pool.set_aside(3)
    pool.take_view("r", 2)
    assert pool.room.own_destinations("r", due(10, 3)) == [3] and pool.books.views
    pool.set_aside(1)
    assert pool.room.own_destinations("r", due(10, 3)) == [0] and not pool.books.views
