"""The block manager over vLLM's real block pool: nothing lost, nothing shared by mistake."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.kv_cache_interface import FullAttentionSpec

from tests.inside import pending
from vllm_kvcompress.core.block_manager import CompressedAttentionManager
from vllm_kvcompress.plans import GroupCache, GroupLengths, GroupPlan, Purpose
from vllm_kvcompress.spec import CompressedAttentionSpec

BLOCK = 16


def spec(layer_group: int = 0) -> CompressedAttentionSpec:
    full = FullAttentionSpec(block_size=BLOCK, num_kv_heads=2, head_size=8, dtype=torch.float32)
    return CompressedAttentionSpec.from_full(full, layer_group)


def manager(num_blocks: int = 33) -> CompressedAttentionManager:
    pool = BlockPool(num_blocks, enable_caching=False, hash_block_size=BLOCK)
    return CompressedAttentionManager(
        spec(),
        block_pool=pool,
        enable_caching=False,
        kv_cache_group_id=0,
        scheduler_block_size=BLOCK,
    )


def fill(books: CompressedAttentionManager, request_id: str, num_tokens: int) -> None:
    books.allocate_new_blocks(request_id, num_tokens, num_tokens)


def plan_of(
    books: CompressedAttentionManager,
    request_id: str,
    region: int,
    kept: int,
    purpose: Purpose = Purpose.EVICT,
) -> GroupPlan:
    cache = GroupCache(region + 6, ((0, 4),))
    return books.plan(purpose, request_id, GroupLengths(region, kept), cache, ((0, 4),))


def test_a_compaction_step_by_step() -> None:
    books = manager()
    fill(books, "r", 150)  # 10 blocks
    before = [block.block_id for block in books.req_to_blocks["r"]]
    plan = plan_of(books, "r", 144, 32)
    assert plan.source_blocks == tuple(before[:9])
    assert plan.tail_blocks == tuple(before[9:])
    assert plan.lengths == GroupLengths(144, 32) and plan.forced == ((0, 4),)
    assert plan.cache == GroupCache(150, ((0, 4),)), "what is pinned stays known"
    assert len(plan.destination_blocks) == 2
    assert not set(plan.destination_blocks) & set(before), "destinations are private"
    assert books.block_pool.get_num_free_blocks() == 32 - 12
    books.check_integrity()
    assert books.commit("r")
    assert [block.block_id for block in books.req_to_blocks["r"]] == list(plan.block_row)
    assert books.evicted == {"r": 112}
    assert books.block_pool.get_num_free_blocks() == 32 - 3
    assert not books.commit("r"), "a second commit does nothing"


def test_later_blocks_are_counted_by_physical_length() -> None:
    books = manager()
    fill(books, "r", 150)
    plan_of(books, "r", 144, 32)
    books.commit("r")
    books.num_cached_block["r"] = 0  # a running request, for the host
    # Logical 160 is physical 48: the three blocks it has. Logical 161 needs a fourth.
    assert books.get_num_blocks_to_allocate("r", 160, [], 150, 150, 160) == 0
    assert books.get_num_blocks_to_allocate("r", 161, [], 150, 150, 161) == 1
    assert books.allocate_new_blocks("r", 160, 160) == []
    assert len(books.allocate_new_blocks("r", 161, 161)) == 1
    assert len(books.req_to_blocks["r"]) == 4


def test_a_second_compaction_counts_on() -> None:
    books = manager()
    fill(books, "r", 150)
    plan_of(books, "r", 144, 32)
    books.commit("r")
    fill(books, "r", 230)  # physical 118: eight blocks
    plan = plan_of(books, "r", 112, 48)
    assert len(plan.source_blocks) == 7 and len(plan.tail_blocks) == 1
    books.check_integrity()
    books.commit("r")
    assert books.evicted == {"r": 112 + 64}
    assert len(books.req_to_blocks["r"]) == 4
    books.free("r")
    assert books.block_pool.get_num_free_blocks() == 32


@pytest.mark.parametrize("committed", [False, True])
def test_freeing_returns_everything(committed: bool) -> None:
    books = manager()
    fill(books, "r", 150)
    plan_of(books, "r", 144, 32)
    if committed:
        books.commit("r")
    books.free("r")
    assert books.block_pool.get_num_free_blocks() == 32
    assert not books.evicted and pending(books, "r") is None and not books.held_blocks()
    books.check_integrity()
    assert not books.commit("r"), "a commit that comes too late does nothing"
    assert "r" not in books.req_to_blocks


def test_a_request_that_comes_back_starts_from_nothing() -> None:
    """A rival's dropped-token counter survived preemption."""
    books = manager()
    fill(books, "r", 150)
    plan_of(books, "r", 144, 32)
    books.commit("r")
    books.free("r")
    assert len(books.allocate_new_blocks("r", 150, 150)) == 10


def test_a_shared_source_block_stays_with_its_other_owner() -> None:
    books = manager()
    fill(books, "a", 64)
    shared = list(books.req_to_blocks["a"])
    books.block_pool.touch(shared)
    books.req_to_blocks["b"] = list(shared)
    plan_of(books, "a", 64, 16)
    books.commit("a")
    assert all(block.ref_cnt == 1 for block in shared)
    assert books.req_to_blocks["b"] == shared
    books.free("a")
    books.free("b")
    assert books.block_pool.get_num_free_blocks() == 32


def test_specs_of_different_groups_do_not_merge() -> None:
    assert spec(1).merge([spec(1), spec(1)]).layer_group == 1
    with pytest.raises(AssertionError):
        spec(0).merge([spec(0), spec(1)])
    plain = FullAttentionSpec(block_size=BLOCK, num_kv_heads=2, head_size=8, dtype=torch.float32)
    with pytest.raises(AssertionError):
        spec(0).merge([spec(0), plain])
    assert spec(0).is_uniform_with_collection({"a": spec(0), "b": spec(0)})
    assert not spec(0).is_uniform_with_collection({"a": spec(0), "b": spec(1)})


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=60))
def test_any_order_of_events_keeps_the_books(events) -> None:
    """Requests 0..4; events: 0 allocate, 1 plan, 2 commit, 3 free, 4 grow by a block."""
    books = manager(64)
    planned: set[str] = set()
    lengths: dict[str, int] = {}
    for number, event in events:
        name = str(number)
        if event == 0 and name not in lengths:
            lengths[name] = 100
            if books.block_pool.get_num_free_blocks() >= 7:
                fill(books, name, 100)
            else:
                del lengths[name]
        elif event == 1 and name in lengths and name not in planned:
            if books.block_pool.get_num_free_blocks() >= 2:
                plan_of(books, name, 96, 32)
                planned.add(name)
        elif event == 2:
            books.commit(name)
        elif event == 3:
            books.free(name)
            lengths.pop(name, None)
            planned.discard(name)
        elif event == 4 and name in lengths and pending(books, name) is None:
            if books.block_pool.get_num_free_blocks():
                lengths[name] += BLOCK
                fill(books, name, lengths[name])
        books.check_integrity()
        held = {block.block_id for block in books.held_blocks()}
        assert len(held) + books.block_pool.get_num_free_blocks() == 63
    for name in list(books.req_to_blocks):
        books.free(name)
    assert books.block_pool.get_num_free_blocks() == 63


def test_a_view_is_held_beside_the_requests_blocks() -> None:
    books = manager()
    fill(books, "r", 150)
    own = list(books.req_to_blocks["r"])
    plan = plan_of(books, "r", 144, 32, Purpose.COPIED_VIEW)
    books.commit_view("r")
    assert books.req_to_blocks["r"] == own and not books.evicted
    assert [block.block_id for block in books.views["r"]] == list(plan.destination_blocks)
    assert books.block_pool.get_num_free_blocks() == 32 - 12
    books.check_integrity()
    assert not books.commit("r"), "nothing is pending"


def test_a_linked_view_takes_no_blocks() -> None:
    books = manager()
    fill(books, "r", 150)
    own = tuple(block.block_id for block in books.req_to_blocks["r"])
    plan = plan_of(books, "r", 144, 32, Purpose.LINKED_VIEW)
    assert (plan.source_blocks, plan.destination_blocks, plan.tail_blocks) == (own[:9], (), own[9:])
    assert books.block_pool.get_num_free_blocks() == 32 - 10
    books.commit_view("r")
    assert not books.views and not books.commit("r")
    books.check_integrity()


def test_a_new_view_frees_the_old_one() -> None:
    books = manager()
    fill(books, "r", 150)
    plan_of(books, "r", 144, 32, Purpose.COPIED_VIEW)
    books.commit_view("r")
    second = plan_of(books, "r", 144, 48, Purpose.COPIED_VIEW)
    assert books.block_pool.get_num_free_blocks() == 32 - 10 - 2 - 3
    books.check_integrity()
    books.commit_view("r")
    assert [block.block_id for block in books.views["r"]] == list(second.destination_blocks)
    assert books.block_pool.get_num_free_blocks() == 32 - 10 - 3


def test_a_request_that_ends_gives_back_its_view_and_what_is_pending() -> None:
    books = manager()
    fill(books, "r", 150)
    plan_of(books, "r", 144, 32, Purpose.COPIED_VIEW)
    books.commit_view("r")
    plan_of(books, "r", 144, 48, Purpose.COPIED_VIEW)
    plan_of(books, "r", 144, 16)
    assert len(books.held_blocks()) == 10 + 2 + 3 + 1
    books.block_pool.free_blocks(books.pop_blocks_for_free("r"))
    assert books.block_pool.get_num_free_blocks() == 32
    assert not books.views and not books.held_blocks()
    books.check_integrity()


def test_a_view_is_given_up_once() -> None:
    books = manager()
    fill(books, "r", 150)
    plan_of(books, "r", 144, 32, Purpose.COPIED_VIEW)
    assert books.give_up_view("r") == 0, "it is not there yet"
    books.commit_view("r")
    assert books.give_up_view("r") == 2 and books.block_pool.get_num_free_blocks() == 32 - 10
    assert books.give_up_view("r") == 0 and not books.views
    books.check_integrity()


def two_owners(books: CompressedAttentionManager) -> None:
    plan_of(books, "r", 144, 32, Purpose.COPIED_VIEW)
    books.views["r"] = list(books._pending_views["r"])


def free_tail(books: CompressedAttentionManager) -> None:
    books.block_pool.free_blocks(books.req_to_blocks["r"][-1:])


def free_destination(books: CompressedAttentionManager) -> None:
    plan_of(books, "r", 144, 32)
    books.block_pool.free_blocks(pending(books, "r").destination[-1:])


def foreign_destination(books: CompressedAttentionManager) -> None:
    """One of the region that another request has got since."""
    lengths, cache = GroupLengths(144, 32), GroupCache(150, ())
    books.plan(Purpose.EVICT, "r", lengths, cache, (), num_own=1)
    books.req_to_blocks["other"] = [books.req_to_blocks["r"].pop(8)]


def hashes_on(books: CompressedAttentionManager) -> None:
    plan_of(books, "r", 144, 32)
    books.commit("r")
    books.lossy.clear()


BROKEN = {
    "a free block is held": free_tail,
    "a free block is a destination": free_destination,
    "a block has two owners": two_owners,
    "a destination of its own is none": foreign_destination,
    "a compacted request may be hashed": hashes_on,
    "left: evicted": lambda books: (books.evicted.update(gone=16), books.lossy.add("gone")),
    "left: lossy": lambda books: books.mark_lossy("gone"),
    "left: views": lambda books: books.views.update(gone=[]),
    "left: pending views": lambda books: books._pending_views.update(gone=[]),
    "left: promised": lambda books: books.promised.update(gone=[]),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_books_that_contradict_each_other_are_found(broken: str) -> None:
    books = manager()
    fill(books, "r", 150)
    books.check_integrity()
    BROKEN[broken](books)
    with pytest.raises(AssertionError):
        books.check_integrity()


def test_what_is_promised_is_held_until_it_is_adopted() -> None:
    """Survivors of an equal prompt: they replace the region, and no block is taken."""
    books = manager()
    fill(books, "first", 144)
    plan_of(books, "first", 144, 32)
    books.commit("first")
    fill(books, "r", 150)
    free = books.block_pool.get_num_free_blocks()
    copy = books.req_to_blocks["first"][:2]
    books.block_pool.touch(copy)
    books.promised["r"] = list(copy)
    assert [block.block_id for block in books.held_blocks()[-2:]] == [b.block_id for b in copy]
    plan = plan_of(books, "r", 144, 32, Purpose.ADOPT)
    assert plan.destination_blocks == tuple(block.block_id for block in copy)
    assert not plan.in_place and not books.promised
    assert books.taken("r") == copy and books.taken("first") == books.req_to_blocks["first"]
    assert books.block_pool.get_num_free_blocks() == free
    books.check_integrity()
    assert books.commit("r") and books.evicted["r"] == 112
    assert books.block_pool.get_num_free_blocks() == free + 9
    books.free("first")
    assert books.req_to_blocks["r"][:2] == copy and all(block.ref_cnt == 1 for block in copy)
    books.promised["r"] = books.block_pool.get_new_blocks(1)
    books.free("r")
    assert books.block_pool.get_num_free_blocks() == 32, "a promise is given back as well"


def test_admission_counts_the_most_that_is_ever_held() -> None:
    books = manager()
    asked: list[tuple[str, int]] = []

    def most(request_id: str, num_tokens: int) -> int:
        asked.append((request_id, num_tokens))
        return 64

    books.most_held = most
    more = {"num_tokens_main_model": 320}
    rest = ([], 0, 0)
    assert books.get_num_blocks_to_allocate("r", 320, *rest, **more, apply_admission_cap=True) == 4
    assert asked == [("r", 320)]
    assert books.get_num_blocks_to_allocate("r", 320, *rest, **more) == 20
    books.most_held = lambda *_: 400
    assert books.get_num_blocks_to_allocate("r", 320, *rest, **more, apply_admission_cap=True) == 20


def test_who_takes_blocks_over_holds_none_and_hashes_none() -> None:
    books = manager()
    fill(books, "first", 48)
    blocks = list(books.pop_blocks_for_free("first"))
    books.take_over("r", blocks, 96)
    assert books.req_to_blocks["r"] == blocks and books.evicted == {"r": 96}
    assert books.lossy == {"r"}
    books.check_integrity()
    assert books.get_num_blocks_to_allocate("r", 144, [], 144, 144, 144) == 0, "it is under way"
    with pytest.raises(AssertionError, match="r holds blocks"):
        books.take_over("r", blocks, 0)
    fill(books, "second", 16)
    books.take_over("whole", list(books.pop_blocks_for_free("second")), 0)
    assert "whole" not in books.evicted and "whole" in books.lossy


def test_a_request_evicts_and_takes_a_view_in_one_step() -> None:
    books = manager()
    fill(books, "r", 150)
    view, kept = plan_of(books, "r", 144, 16, Purpose.COPIED_VIEW), plan_of(books, "r", 144, 64)
    assert not set(view.destination_blocks) & set(kept.destination_blocks)
    assert books.block_pool.get_num_free_blocks() == 32 - 10 - 1 - 4
    books.check_integrity()
    assert books.commit("r")
    books.commit_view("r")
    assert books.evicted == {"r": 80}
    assert books.block_pool.get_num_free_blocks() == 32 - 5 - 1
    books.block_pool.free_blocks(books.pop_blocks_for_free("r"))
    assert books.block_pool.get_num_free_blocks() == 32
