"""What is kept for those who come, over vLLM's real block pool: how much, and who gives way."""

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.core.block_pool import BlockPool

from tests.core.test_block_manager import BLOCK
from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.core.kept_cache import (
    Kept,
    Kind,
    Place,
    Reason,
    is_served,
    num_common,
    place_of,
    tokens_of,
)
from vllm_kvcompress.core.kept_store import KeptCaches
from vllm_kvcompress.core.tracked_request import CompactionSchedule
from vllm_kvcompress.metrics import CompressionStats

USABLE, MOST = 40, 10


class Store:
    """Caches by name, each of so many blocks in two groups; room for ten blocks."""

    def __init__(self) -> None:
        self.pool = BlockPool(1 + USABLE, enable_caching=False, hash_block_size=BLOCK)
        self.stats, self.changes = CompressionStats(), 0
        self.kept = KeptCaches(self.pool, MOST, self.stats, self.change)

    def change(self) -> None:
        self.changes += 1

    def place(self, name: str) -> Place:
        return Place(name, None, None, Kind.SHARED_PREFIX if name < "n" else Kind.SESSION)

    def make(self, *sizes: int) -> Kept:
        config = parse_config("keydiff")
        assert config is not None
        blocks = [self.pool.get_new_blocks(size) for size in sizes]
        schedule = CompactionSchedule([], 8)
        return Kept(tokens_of(range(9)), blocks, schedule, 8, config)

    def put(self, name: str, *sizes: int) -> Kept:
        kept = self.make(*sizes)
        self.kept.put(self.place(name), kept)
        return kept

    def read(self, kept: Kept) -> None:
        """A request holds all of it."""
        for group in kept.blocks:
            self.pool.touch(group)

    def leave(self, kept: Kept) -> None:
        for group in kept.blocks:
            self.pool.free_blocks(group)

    @property
    def names(self) -> str:
        return "".join(place.name for place in self.kept._kept)

    @property
    def num_used(self) -> int:
        return USABLE - self.pool.get_num_free_blocks()


def test_as_much_as_there_is_room_for_is_kept_and_the_longest_unused_goes_first() -> None:
    store = Store()
    for name in "abx":
        store.put(name, 1, 2)
    store.kept.use(store.place("a"))
    assert store.names == "bxa" and not store.changes
    assert [place.name for place, _ in store.kept.of(Kind.SHARED_PREFIX)] == ["b", "a"]
    store.put("y", 0, 1)
    assert store.names == "bxay" and store.num_used == MOST, "not one too many"
    store.put("z", 1, 0)
    assert store.names == "xayz" and store.changes == 1
    assert store.stats.shared_prefixes_given_back == {Reason.LIMIT: 1}
    store.put("x", 3, 0)
    assert store.names == "ayzx" and store.num_used == 8
    assert store.stats.sessions_given_back == {Reason.REPLACED: 1}
    store.kept.check_integrity()
    store.kept.clear()
    assert store.num_used == 0
    assert store.stats.sessions_given_back == {Reason.REPLACED: 1, Reason.RESET: 3}
    assert store.stats.shared_prefixes_given_back == {Reason.LIMIT: 1, Reason.RESET: 1}


def test_what_is_too_large_sends_nothing_else_away() -> None:
    store = Store()
    store.put("a", 2, 2)
    store.put("x", 5, 6)
    assert store.names == "a" and store.num_used == 4
    assert store.stats.sessions_given_back == {Reason.TOO_LARGE: 1}
    store.put("y", 5, 5)
    assert store.names == "y", "all of the room is for it"


def test_what_is_read_takes_no_room_until_nobody_reads_it() -> None:
    store = Store()
    first, second = store.make(3, 3), store.make(4, 4)
    for name, kept in (("a", first), ("b", second)):
        store.read(kept)
        store.kept.put(store.place(name), kept)
    assert store.names == "ab" and store.kept.num_idle == 0
    assert not store.kept.give_way(), "nothing would come free"
    store.leave(second)
    assert store.kept.num_idle == 8
    store.kept.trim()
    assert store.names == "ab"
    store.leave(first)
    store.kept.trim()
    assert store.names == "b" and store.num_used == 8
    store.read(second)
    store.put("x", 1, 1)
    assert store.kept.give_way() and store.names == "b", "the oldest is read"
    assert store.stats.sessions_given_back == {Reason.ROOM: 1}


def test_whoever_shares_a_block_with_its_owner_gives_it_back() -> None:
    store = Store()
    first, second = store.put("a", 2, 2), store.put("x", 2, 2)
    wanted = [*first.blocks[1], *second.blocks[0]]
    store.kept.give_back_sharers(wanted)
    assert store.names == "ax", "nobody else holds them"
    store.pool.touch(second.blocks[0][1:])
    store.kept.give_back_sharers(wanted)
    assert store.names == "a" and store.stats.sessions_given_back == {Reason.ROOM: 1}
    assert store.num_used == 4 + 1


def test_whether_nothing_else_is_held() -> None:
    store = Store()
    kept = store.put("a", 2, 2)
    store.read(kept)
    assert store.kept.is_all, "a block counts once, whoever holds it"
    other = store.pool.get_new_blocks(1)
    assert not store.kept.is_all
    store.pool.free_blocks(other)
    assert store.kept.take(store.place("a")) is kept and not store.kept.is_all
    store.kept.put_back(store.place("a"), kept)
    assert store.kept.get(store.place("a")) is kept and store.kept.is_all


def test_books_that_contradict_each_other_are_found() -> None:
    store = Store()
    kept = store.put("a", 2, 2)
    store.kept.check_integrity()
    store.pool.free_blocks(kept.blocks[0])
    with pytest.raises(AssertionError, match="kept and free"):
        store.kept.check_integrity()
    store = Store()
    store.kept.put_back(store.place("a"), store.make(6, 5))
    with pytest.raises(AssertionError):
        store.kept.check_integrity()
    for compacted_at, is_sound in ((0, False), (1, True), (9, True), (10, False)):
        store = Store()
        store.put("a", 1, 1).held.compacted_at = compacted_at
        if is_sound:
            store.kept.check_integrity()
        else:
            with pytest.raises(AssertionError):
                store.kept.check_integrity()


@pytest.mark.parametrize(
    ("kept", "prompt", "expected"),
    [
        ([1, 2, 3], [1, 2, 3, 4], 3),
        ([1, 2, 3], [1, 2, 3], 3),
        ([1, 2, 3], [1, 2], 2),
        ([1, 2, 3], [1, 9, 3], 1),
        ([1, 2, 3], [9, 2, 3, 4], 0),
        ([1, 2, 3], [], 0),
        ([], [1, 2], 0),
    ],
)
def test_how_much_two_texts_have_in_common(
    kept: list[int], prompt: list[int], expected: int
) -> None:
    assert num_common(tokens_of(kept), prompt) == expected


def test_a_name_is_one_salts_and_one_adapters() -> None:
    def place(salt: str | None, adapter: Any) -> Place:
        request: Any = SimpleNamespace(cache_salt=salt, lora_request=adapter)
        return place_of(request, "chat", Kind.SESSION)

    adapters = [SimpleNamespace(lora_name="law", lora_int_id=number) for number in (1, 2)]
    places = [place(salt, adapter) for salt in (None, "s") for adapter in (None, *adapters)]
    assert len(set(places)) == 6
    assert place("s", adapters[0]) == Place("chat", "s", ("law", 1), Kind.SESSION)


@pytest.mark.parametrize(
    ("token_ids", "images", "expected"),
    [([1], [], True), ([1], ["image"], False), (None, [], False), (None, ["image"], False)],
)
def test_only_prompts_of_token_ids_alone_are_kept(
    token_ids: Any, images: Any, expected: bool
) -> None:
    request: Any = SimpleNamespace(prompt_token_ids=token_ids, mm_features=images)
    assert is_served(request) is expected
