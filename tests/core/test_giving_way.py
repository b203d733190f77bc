"""Who is admitted, who may grow, and what gives way for that: vLLM's real block pool."""

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.request import RequestStatus

from tests.core.test_block_manager import BLOCK
from tests.core.test_room import Pool
from vllm_kvcompress.core.room import Room


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
        assert request.request_id in ("r", "new")
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
    assert asked.asked == [
        {"num_new_tokens": BLOCK, "reserved_blocks": number} for number in (5, 7)
    ]
    for num_tokens, admitted in ((15 * BLOCK, True), (15 * BLOCK + 1, False)):
        new = request("r", num_tokens, RequestStatus.WAITING, 2 * BLOCK)
        given = pool.room.allocate(asked, new, BLOCK, full_sequence_must_fit=True)
        assert (given == ()) == admitted, "13 of 18 free blocks are not set aside"
    assert len(asked.asked) == 3, "vLLM would not have counted what is set aside"
    assert pool.room.num_lacking == 14


def test_whoever_joins_blocks_is_counted_as_if_it_held_them() -> None:
    pool = Pool(1 + 20)
    pool.add("other", 4)
    hits = KVCacheBlocks((pool.books.req_to_blocks["other"],))
    joins = ("r", hits)
    pool.room.reserve = SimpleNamespace(  # type: ignore[assignment]
        num_blocks=lambda joining=None: 5 if joining == joins else 0,
        note=lambda request: None, note_joined=lambda: None,
    )  # fmt: skip
    asked = Asked(pool.room, 0)
    new = request("r", 20 * BLOCK, RequestStatus.WAITING)
    for blocks in (hits, KVCacheBlocks(([],))):
        pool.room.allocate(asked, new, BLOCK, new_computed_blocks=blocks)
    assert [each.get("reserved_blocks", 0) for each in asked.asked] == [5, 0]


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
