"""What a compaction gains, where its survivors go, and what gives way: vLLM's real block pool."""

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.request import RequestStatus

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
    lengths = {"r": due(10, 3)}
    for _ in range(3):
        assert worth(pool, lengths) == set()
    pool.free("other")
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
    room = Room([pool.books, HostGroup(bound)], [0, None], pool.books.block_pool, 4096)
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


def test_blocks_that_others_hold_are_never_overwritten() -> None:
    pool = Pool(1 + 10)
    pool.add("other", 8)
    pool.add("r", 10, "other", 8)
    assert pool.room.own_destinations("r", due(10, 2)) == [2]
    assert pool.room.own_destinations("r", due(10, 3)) is None


# --- admission and what gives way ---------------------------------------------------------


def request(name: str, num_tokens: int, status: RequestStatus, computed: int = 0) -> Any:
    return SimpleNamespace(
        request_id=name, num_tokens=num_tokens, num_computed_tokens=computed, status=status
    )


class Host:
    """What vLLM's allocate_slots does, as far as `Room` is concerned: all or nothing."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.calls = 0

    def __call__(self, request: Any, num_new_tokens: int, **options: Any) -> list | None:
        self.calls += 1
        num_tokens = request.num_computed_tokens + num_new_tokens
        missing = self.pool.room.num_growth(request.request_id, num_tokens)
        if missing > self.pool.room.num_free:
            return None
        return self.pool.books.allocate_new_blocks(request.request_id, num_tokens, num_tokens)


@pytest.mark.parametrize("status", [RequestStatus.RUNNING, RequestStatus.WAITING])
def test_views_give_way_newest_first_and_no_more_than_needed(status: RequestStatus) -> None:
    pool = Pool(1 + 30)
    pool.add("a", 10)
    pool.add("b", 5)
    pool.take_view("a", 6)
    pool.take_view("b", 6)
    assert pool.room.num_free == 3
    new = request("new", 8 * BLOCK, status)
    assert len(pool.room.allocate(Host(pool), new, 8 * BLOCK)) == 8
    assert list(pool.books.views) == ["a"]
    pool.books.check_integrity()


def test_views_stay_where_giving_them_up_would_not_help() -> None:
    pool = Pool(1 + 20)
    pool.add("a", 10)
    pool.take_view("a", 6)
    new = request("new", 11 * BLOCK, RequestStatus.WAITING)
    assert pool.room.allocate(Host(pool), new, 11 * BLOCK) is None
    assert list(pool.books.views) == ["a"]


def test_a_view_gives_way_to_an_eviction() -> None:
    pool = Pool(1 + 20)
    pool.add("a", 10)
    pool.take_view("a", 6)
    assert not pool.room.make_free(11)
    assert pool.room.make_free(9) and not pool.books.views


class Asked:
    """Notes what vLLM is asked with, and says no until so many blocks are free."""

    def __init__(self, room: Room, num_wanted: int = 10**6) -> None:
        self.room, self.num_wanted = room, num_wanted
        self.asked: list[dict[str, Any]] = []

    def __call__(self, request: Any, num_new_tokens: int, **options: Any) -> Any:
        self.asked.append({"num_new_tokens": num_new_tokens, **options})
        return () if self.room.num_free >= self.num_wanted else None


@pytest.mark.parametrize(
    ("options", "num_held_hits", "lacking"),
    [
        ({}, 0, 3),
        ({"num_lookahead_tokens": 1}, 0, 4),
        ({"num_lookahead_tokens": BLOCK, "num_new_computed_tokens": BLOCK}, 0, 5),
        ({"num_new_computed_tokens": 4 * BLOCK}, 0, 7),
        ({"num_new_computed_tokens": 4 * BLOCK}, 3, 4),
        ({"full_sequence_must_fit": True}, 0, 18),
        ({"full_sequence_must_fit": False}, 0, 3),
        ({"full_sequence_must_fit": True, "num_lookahead_tokens": BLOCK}, 0, 19),
        ({"full_sequence_must_fit": True, "num_new_computed_tokens": 17 * BLOCK}, 0, 20),
        ({"num_lookahead_tokens": 10**6}, 0, 4096 // BLOCK - 2),
    ],
)
def test_a_request_lacks_what_its_step_takes_it_to(
    options: dict[str, Any], num_held_hits: int, lacking: int
) -> None:
    """It holds 2 blocks and computes 3 of its 20; hits that nobody holds are free blocks."""
    pool = Pool()
    pool.add("r", 2)
    if "num_new_computed_tokens" in options:
        blocks = pool.books.block_pool
        hits = [*blocks.get_new_blocks(num_held_hits), *blocks.blocks[60:61]]
        options = {**options, "new_computed_blocks": KVCacheBlocks((hits,))}
    new = request("r", 20 * BLOCK, RequestStatus.WAITING, 2 * BLOCK)
    asked = Asked(pool.room)
    assert pool.room.allocate(asked, new, 3 * BLOCK, **options) is None
    assert asked.asked == [{"num_new_tokens": 3 * BLOCK, **options}]
    assert pool.room.num_lacking == lacking
    pool.room.allocate(asked, request("r", 20 * BLOCK, RequestStatus.WAITING, 2 * BLOCK), BLOCK)
    assert pool.room.num_lacking == lacking, "the most of all requests"


def test_a_request_that_is_refused_lacks_one_block_at_least() -> None:
    pool = Pool()
    pool.add("r", 2)
    new = request("r", 2 * BLOCK, RequestStatus.WAITING)
    assert pool.room.allocate(Asked(pool.room), new, BLOCK) is None
    assert pool.room.num_lacking == 1


def test_what_is_set_aside_is_kept_from_whoever_asks() -> None:
    pool = Pool(1 + 20)
    pool.add("r", 2)
    pool.set_aside(5)
    new = request("r", 20 * BLOCK, RequestStatus.WAITING, 2 * BLOCK)
    asked = Asked(pool.room, 0)
    assert pool.room.allocate(asked, new, BLOCK) == ()
    assert pool.room.allocate(asked, new, BLOCK, reserved_blocks=2) == ()
    assert [each["reserved_blocks"] for each in asked.asked] == [5, 7]
    for num_tokens, admitted in ((15 * BLOCK, True), (15 * BLOCK + 1, False)):
        new = request("r", num_tokens, RequestStatus.WAITING, 2 * BLOCK)
        given = pool.room.allocate(asked, new, BLOCK, full_sequence_must_fit=True)
        assert (given == ()) == admitted, "13 of 18 free blocks are not set aside"
    assert len(asked.asked) == 3, "vLLM would not have counted what is set aside"
    assert pool.room.num_lacking == 14


@pytest.mark.parametrize(("num_aside", "is_enough"), [(0, True), (2, True), (3, False)])
def test_views_and_kept_caches_give_way_while_that_is_enough(
    num_aside: int, is_enough: bool
) -> None:
    """4 blocks are free, 6 more would be; 8 are asked for."""
    pool = Pool(1 + 10 + 4)
    pool.add("a", 4)
    pool.take_view("a", 3)
    pool.keep(2)
    pool.keep(1)
    if num_aside:
        pool.set_aside(num_aside)
    assert pool.room.num_free == 4
    new = request("new", 8 * BLOCK, RequestStatus.WAITING)
    given = pool.room.allocate(Asked(pool.room, 8 + num_aside), new, 8 * BLOCK)
    assert (given == ()) == is_enough
    assert pool.room.num_free == (10 if is_enough else 4), "else nothing gives way"


def test_kept_caches_give_way_before_views() -> None:
    pool = Pool(1 + 10)
    pool.add("a", 2)
    pool.take_view("a", 3)
    pool.keep(2)
    assert pool.room.make_free(5)
    assert pool.room.kept is not None and not pool.room.kept.num_idle and pool.books.views
    assert pool.room.make_free(8) and not pool.books.views
    assert pool.room.make_free(8) and not pool.room.make_free(9)
