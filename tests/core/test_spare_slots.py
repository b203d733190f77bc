"""Steps that need nothing are answered at once, and never one that needs something."""

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request, RequestStatus

from tests.inside import never_answer, pending, spare_slots
from vllm_kvcompress.core.block_manager import register_manager
from vllm_kvcompress.core.room import Room
from vllm_kvcompress.core.spare_slots import SpareSlots
from vllm_kvcompress.plans import GroupCache, GroupLengths, Purpose
from vllm_kvcompress.spec import CompressedAttentionSpec

BLOCK, MAX_LEN = 16, 400


class Host:
    """A real KV cache manager of vLLM over our groups, asked through `Room` as its scheduler is."""

    def __init__(self, num_groups: int, num_blocks: int = 200) -> None:
        register_manager()
        init_none_hash(sha256)
        full = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32)
        groups = [
            KVCacheGroupSpec([f"layer.{n}"], CompressedAttentionSpec.from_full(full, n))
            for n in range(num_groups)
        ]
        config = KVCacheConfig(num_blocks, kv_cache_tensors=[], kv_cache_groups=groups)
        self.manager = KVCacheManager(config, MAX_LEN, BLOCK, BLOCK)
        self.groups = list(self.manager.coordinator.single_type_managers)
        self.room = Room(self.groups, list(range(num_groups)), self.manager.block_pool, MAX_LEN)
        self.num_calls = 0
        self.requests: dict[str, Request] = {}

    def _ask(self, *args: Any, **options: Any) -> Any:
        self.num_calls += 1
        return self.manager.allocate_slots(*args, **options)

    def admit(self, name: str, num_prompt: int, lookahead: int) -> bool:
        request = Request(
            name, [len(name)] * num_prompt, SamplingParams(max_tokens=MAX_LEN), None,
            block_hasher=get_request_block_hasher(BLOCK, sha256),
        )  # fmt: skip
        hits, num_hit, _ = self.manager.get_computed_blocks(request)
        given = self.room.allocate(
            self._ask, request, num_prompt - num_hit, num_new_computed_tokens=num_hit,
            new_computed_blocks=hits, num_lookahead_tokens=lookahead, full_sequence_must_fit=True,
        )  # fmt: skip
        if given is None:
            return False
        request.status = RequestStatus.RUNNING
        request.num_computed_tokens = num_prompt
        self.requests[name] = request
        return True

    def decode(self, name: str, num_drafts: int, num_accepted: int, lookahead: int) -> Any:
        """One step of a running request; what it gave, None if it is to be preempted."""
        request = self.requests[name]
        if request.num_tokens + num_drafts + 1 > MAX_LEN:
            return ()
        request.append_output_token_ids(7)
        given = self.room.allocate(
            self._ask, request, 1 + num_drafts, num_lookahead_tokens=lookahead
        )
        if given is not None:
            accepted = min(num_drafts, num_accepted)
            request.append_output_token_ids([8] * accepted)
            request.num_computed_tokens += 1 + accepted
        return given and [len(blocks) for blocks in given.blocks]

    def compact(self, name: str) -> None:
        request = self.requests[name]
        for number, group in enumerate(self.groups):
            region = (request.num_computed_tokens - group.evicted.get(name, 0)) // BLOCK * BLOCK
            kept = min((1 + number) * BLOCK, region)
            if self.manager.block_pool.get_num_free_blocks() < kept // BLOCK or kept == region:
                continue
            group.plan(Purpose.EVICT, name, GroupLengths(region, kept), GroupCache(region, ()), ())

    def commit(self, name: str) -> None:
        committed = [group.commit(name) for group in self.groups]
        if any(committed):
            for group in self.groups:
                group.mark_lossy(name)
            self.room.note_change()

    def free(self, name: str) -> None:
        self.manager.free(self.requests.pop(name))
        self.room.note_change(name)

    def books(self) -> list[Any]:
        return [
            (
                {
                    name: [block.block_id for block in blocks]
                    for name, blocks in group.req_to_blocks.items()
                },
                dict(group.num_cached_block),
                [
                    block.block_hash
                    for name in self.requests
                    for block in group.req_to_blocks.get(name, [])
                ],
            )
            for group in self.groups
        ]  # fmt: skip


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["admit", *["decode"] * 6, "compact", "commit", "free"]),
        st.sampled_from(["a", "bb", "ccc"]),
        st.integers(0, 3),
        st.integers(0, 40),
    ),
    max_size=80,
)


def compare(events: list[Any], num_groups: int, lookahead: int, num_blocks: int) -> None:
    fast, slow = Host(num_groups, num_blocks), Host(num_groups, num_blocks)
    never_answer(slow.room)
    for event, name, drafts, number in events:
        steps = []
        for host in (fast, slow):
            if (event == "admit") == (name in host.requests):
                continue
            call = {
                "admit": functools.partial(host.admit, name, 20 + 3 * number, lookahead),
                "decode": functools.partial(host.decode, name, drafts, number % 4, lookahead),
                "compact": functools.partial(host.compact, name),
                "commit": functools.partial(host.commit, name),
                "free": functools.partial(host.free, name),
            }[event]
            if event == "compact" and any(pending(group, name) for group in host.groups):
                continue
            steps.append(call())
            if event == "decode" and steps[-1] is None:
                host.free(name)  # preempted
        assert len(steps) in (0, 2) and steps[:1] == steps[1:]
        assert fast.books() == slow.books()
        assert fast.room.num_free == slow.room.num_free


@settings(max_examples=100, deadline=None)
@given(EVENTS, st.integers(1, 3), st.sampled_from([0, 3]), st.sampled_from([40, 200]))
def test_books_are_those_of_a_manager_that_is_always_asked(
    events: list[Any], num_groups: int, lookahead: int, num_blocks: int
) -> None:
    compare(events, num_groups, lookahead, num_blocks)


@pytest.mark.parametrize("lookahead", [0, 3])
def test_steps_that_draft_take_the_blocks_that_vllm_would_give(lookahead: int) -> None:
    steps = [("decode", "a", number % 4, number // 2) for number in range(30)]
    ends = [("compact", "a", 0, 0), ("commit", "a", 0, 0)]
    compare([("admit", "a", 0, 12), *steps, *ends, *steps, *ends, *steps], 2, lookahead, 200)


@pytest.mark.parametrize(
    ("sizes", "records", "num_aside", "is_given"),
    [
        ((16, 16), False, 7, True),
        ((16, 16), False, 8, False),
        ((16, 32), False, 0, False),
        ((16, 16), True, 0, False),
    ],
)
def test_blocks_of_several_sizes_set_aside_or_to_be_cleared_are_vllms_to_give(
    sizes: tuple[int, ...], records: bool, num_aside: int, is_given: bool
) -> None:
    managers: list[Any] = [
        SimpleNamespace(
            block_size=size, records_new_block_ids=records, enable_caching=False, evicted={},
            req_to_blocks={"r": [None] * (64 // size)},
        )
        for size in sizes
    ]  # fmt: skip
    pool = SimpleNamespace(
        get_num_free_blocks=lambda: 9, get_new_blocks=lambda count: [None] * count
    )
    spare = SpareSlots(managers, pool, MAX_LEN, lambda: num_aside)
    request: Any = SimpleNamespace(request_id="r", num_computed_tokens=63, num_tokens=64)
    spare.note(request, 1)
    assert spare.take(request, 1, {}) is not None, "nothing is needed"
    assert (spare.take(request, 2, {}) is not None) is is_given


@pytest.mark.parametrize("num_groups", [1, 4, 32])
def test_vllm_is_asked_once_however_many_groups(num_groups: int) -> None:
    host = Host(num_groups, 1 + 32 * 32)
    assert host.admit("r", 100, 0)
    host.compact("r")
    host.commit("r")
    host.num_calls = 0
    for _ in range(10 * BLOCK):
        assert host.decode("r", 0, 0, 0) is not None
    assert host.num_calls == 1, "to learn what is there"


def test_an_uncompressed_request_is_asked_for_when_a_block_is_full_too() -> None:
    host = Host(1)
    assert host.admit("r", 96, 0)
    host.num_calls = 0
    for _ in range(10 * BLOCK):
        host.decode("r", 0, 0, 0)
    assert host.num_calls == 2 * 10, "a step takes a block, another fills and hashes it"


def test_arguments_of_admission_and_connectors_go_to_vllm() -> None:
    host = Host(1)
    assert host.admit("r", 100, 0)
    assert host.decode("r", 0, 0, 0) is not None
    spare = spare_slots(host.room)
    request = host.requests["r"]
    assert spare.take(request, 1, {"num_lookahead_tokens": 0}) is not None
    for option in ("new_computed_blocks", "reserved_blocks", "full_sequence_must_fit"):
        assert spare.take(request, 1, {option: 0}) is None
    assert spare.take(request, 0, {}) is None, "vLLM raises for it"
    host.free("r")
    assert spare.take(request, 1, {}) is None, "its blocks are gone"


def test_too_few_blocks_are_vllms_decision() -> None:
    host = Host(2, 1 + 2 * 8)
    assert host.admit("r", 100, 0)
    host.compact("r")
    host.commit("r")
    assert host.decode("r", 0, 0, 0) is not None
    others = host.manager.block_pool.get_new_blocks(host.room.num_free - 1)
    host.num_calls = 0
    steps = 0
    while host.decode("r", 0, 0, 0) is not None:
        steps += 1
    assert steps < BLOCK and host.num_calls == 1, "it was asked, and said no"
    assert host.room.num_free == 1, "nothing is half taken"
    host.manager.block_pool.free_blocks(others)
    assert host.decode("r", 0, 0, 0) == [1, 1]
