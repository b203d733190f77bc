"""Compactions that overwrite blocks of their own request: vLLM's block pool with prefix caching."""

from typing import Any

import pytest
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.request import Request

from tests.core.test_block_manager import BLOCK, spec
from tests.inside import pending
from vllm_kvcompress.core.block_manager import CompressedAttentionManager
from vllm_kvcompress.plans import GroupCache, GroupLengths, GroupPlan, PlanKind, Purpose


class World:
    """A manager whose only request, "r", has ten hashed blocks and a part of another."""

    def __init__(self, num_blocks: int = 1 + 11) -> None:
        init_none_hash(sha256)
        self.pool = BlockPool(num_blocks, enable_caching=True, hash_block_size=BLOCK)
        self.books = CompressedAttentionManager(
            spec(),
            block_pool=self.pool,
            enable_caching=True,
            kv_cache_group_id=0,
            scheduler_block_size=BLOCK,
        )
        self.request = Request(
            request_id="r",
            prompt_token_ids=list(range(10 * BLOCK + 6)),
            sampling_params=SamplingParams(max_tokens=8),
            pooling_params=None,
            block_hasher=get_request_block_hasher(BLOCK, sha256),
        )
        self.books.allocate_new_blocks("r", 10 * BLOCK + 6, 10 * BLOCK + 6)
        self.books.cache_blocks(self.request, 10 * BLOCK, replay_boundaries=[])

    def plan(self, num_own: int, kept: int = 3) -> GroupPlan:
        lengths, cache = GroupLengths(10 * BLOCK, kept * BLOCK), GroupCache(10 * BLOCK + 6, ())
        return self.books.plan(Purpose.EVICT, "r", lengths, cache, (), num_own)

    def found(self) -> list[Any]:
        """Blocks of the prompt that a request with the same tokens would be given."""
        hits = [self.pool.get_cached_block(each, [0]) for each in self.request.block_hashes]
        return [hit[0].block_id if hit else None for hit in hits]


@pytest.mark.parametrize("num_own", [0, 1, 3])
def test_the_last_blocks_of_the_region_are_overwritten_and_found_by_nobody(num_own: int) -> None:
    world = World(1 + 11 + 3 - num_own)
    before = world.found()
    assert None not in before
    plan = world.plan(num_own)
    assert world.pool.get_num_free_blocks() == 0
    assert list(plan.destination_blocks[3 - num_own :]) == before[10 - num_own :]
    assert plan.kind is (PlanKind.TOKENS_IN_PLACE if num_own else PlanKind.TOKENS)
    assert world.found() == before[: 10 - num_own] + [None] * num_own
    world.books.check_integrity()
    world.books.commit("r")
    assert world.pool.get_num_free_blocks() == 10 - num_own, "the tail stays, and three"
    assert [each.block_id for each in world.books.req_to_blocks["r"]] == list(plan.block_row)
    assert world.found() == before[: 10 - num_own] + [None] * num_own
    world.books.check_integrity()
    world.books.free("r")
    assert world.pool.get_num_free_blocks() == 14 - num_own


@pytest.mark.parametrize("num_own", [1, 3])
def test_a_request_that_is_gone_before_the_swap_returns_every_block_once(num_own: int) -> None:
    world = World(1 + 11 + 3 - num_own)
    world.plan(num_own)
    world.books.free("r")
    assert world.pool.get_num_free_blocks() == 14 - num_own
    assert pending(world.books, "r") is None and not world.books.lossy
    world.books.check_integrity()


def test_nothing_is_hashed_between_the_plan_and_the_swap() -> None:
    """Asynchronous scheduling hashes a step's blocks when its output arrives: they hold others."""
    world = World()
    world.plan(3)
    world.books.num_cached_block["r"] = 0
    world.books.cache_blocks(world.request, 10 * BLOCK, replay_boundaries=[])
    assert world.found()[7:] == [None] * 3
    world.books.check_integrity()


def test_integrity_finds_an_overwritten_block_that_others_hold() -> None:
    world = World()
    world.plan(3)
    world.pool.touch(world.books.req_to_blocks["r"][9:10])
    with pytest.raises(AssertionError, match="r"):
        world.books.check_integrity()
