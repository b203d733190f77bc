"""vLLM's own managers beside ours: what they may no longer hash, and when they may again."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.kv_cache_interface import SlidingWindowSpec

from vllm_kvcompress.core.host_groups import HostGroup, blocks_per_state

BLOCK, WINDOW = 4, 8


def request(name: str, num_tokens: int) -> Any:
    """What a manager reads of a request."""
    hashes = [bytes([number]) * 32 for number in range(num_tokens // BLOCK)]
    return SimpleNamespace(
        request_id=name, block_hashes=hashes, num_tokens=num_tokens, lora_request=None,
        all_token_ids=list(range(num_tokens)), skip_reading_prefix_cache=False, mm_features=[],
        cache_salt=None, prompt_embeds=None, shared_prefix_boundary=0,
    )  # fmt: skip


@pytest.fixture
def manager() -> SlidingWindowManager:
    spec = SlidingWindowSpec(
        block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32, sliding_window=WINDOW
    )
    pool = BlockPool(num_gpu_blocks=32, enable_caching=True, hash_block_size=BLOCK)
    return SlidingWindowManager(
        spec, block_pool=pool, enable_caching=True, kv_cache_group_id=0, scheduler_block_size=BLOCK,
        max_admission_blocks_per_request=32,
    )  # fmt: skip


def num_hashed(manager: SlidingWindowManager, name: str) -> int:
    blocks = manager.req_to_blocks[name]
    return sum(block.block_hash is not None for block in blocks if not block.is_null)


def test_a_lossy_request_hashes_no_more(manager: SlidingWindowManager) -> None:
    group = HostGroup(manager, 0)
    one, other = request("one", 32), request("other", 32)
    for each in (one, other):
        manager.allocate_new_blocks(each.request_id, 32, 32)
    manager.cache_blocks(one, 8, replay_boundaries=())
    assert num_hashed(manager, "one") == 2
    group.mark_lossy("one")
    manager.cache_blocks(one, 32, replay_boundaries=())
    assert num_hashed(manager, "one") == 2, "what follows an eviction is another request's to find"
    manager.cache_blocks(other, 32, replay_boundaries=())
    assert num_hashed(manager, "other") == 8
    group.check_integrity()
    group.forget("one")
    manager.cache_blocks(one, 32, replay_boundaries=())
    assert num_hashed(manager, "one") == 8


def test_books_left_behind_are_found(manager: SlidingWindowManager) -> None:
    group = HostGroup(manager, 0)
    (block,) = manager.allocate_new_blocks("r", BLOCK, BLOCK)
    group.mark_lossy("gone")
    with pytest.raises(AssertionError, match="gone left its books"):
        group.check_integrity()
    group.forget("gone")
    group.check_integrity()
    block.ref_cnt -= 1
    with pytest.raises(AssertionError, match="held and free"):
        group.check_integrity()


@pytest.mark.parametrize(("mode", "count"), [("none", 1 + 3), ("all", 1 + 3), ("align", 2 + 3 + 5)])
def test_a_recurrent_state_has_blocks_for_drafts_and_checkpoints(mode: str, count: int) -> None:
    spec: Any = SimpleNamespace(
        mamba_cache_mode=mode, num_speculative_blocks=3, num_prefill_checkpoint_blocks=5
    )
    assert blocks_per_state(spec) == count
