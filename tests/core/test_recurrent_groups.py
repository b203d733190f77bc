"""Layers with a recurrent state beside layers that are compacted: vLLM's manager, and our books."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHash
from vllm.v1.core.single_type_kv_cache_manager import MambaManager
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec, MambaSpec
from vllm.v1.kv_cache_layout import KVCacheLayout

from tests.core.test_whole_group import spec, vllm_groups
from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.core.block_manager import CompressedAttentionManager
from vllm_kvcompress.core.host_groups import HostGroup, blocks_per_state
from vllm_kvcompress.core.report import savings_line
from vllm_kvcompress.core.room import Room
from vllm_kvcompress.spec import GroupMap

BLOCK = 16
SETTING = {"preset": "keydiff", "budget": {"tokens": 32, "floor": 1}, "min_prompt_len": 0}


def state_spec(mode: str = "align", block_size: int = BLOCK, **fields: Any) -> MambaSpec:
    """A state as large as a block of the attention's."""
    return MambaSpec(
        block_size=block_size,
        shapes=((BLOCK * 32,),),
        dtypes=(torch.float32,),
        mamba_cache_mode=mode,
        **fields,
    )


class Books:
    """One compacted group and one of states, over one pool."""

    def __init__(self, num_blocks: int = 65) -> None:
        self.pool = BlockPool(num_blocks, enable_caching=True, hash_block_size=BLOCK)
        common: dict[str, Any] = {
            "block_pool": self.pool, "enable_caching": True, "scheduler_block_size": BLOCK,
        }  # fmt: skip
        self.own = CompressedAttentionManager(spec(0), kv_cache_group_id=0, **common)
        self.states = HostGroup(MambaManager(state_spec(), kv_cache_group_id=1, **common), 0)
        self.room = Room([self.own, self.states], [0, None], self.pool, 4096)

    def cache(self, name: str, num_tokens: int) -> None:
        """What vLLM does once a chunk is scheduled that ends here."""
        hashes = [BlockHash(f"{name}{i}".encode()) for i in range(num_tokens // BLOCK)]
        request: Any = SimpleNamespace(
            request_id=name, block_hashes=hashes, num_prompt_tokens=num_tokens,
            num_tokens=num_tokens, shared_prefix_boundary=0,
        )  # fmt: skip
        for manager in (self.own, self.states._manager):
            manager.allocate_new_blocks(name, num_tokens, num_tokens)
            manager.cache_blocks(request, num_tokens, replay_boundaries=())

    def hit(self, name: str, group: int) -> bool:
        """Whether another request would find the first block, or the state behind it."""
        return self.pool.get_cached_block(BlockHash(f"{name}0".encode()), [group]) is not None


def test_a_state_over_a_compacted_past_is_found_by_nobody() -> None:
    books = Books()
    books.cache("exact", BLOCK)
    assert books.hit("exact", 0) and books.hit("exact", 1)
    for manager in (books.own, books.states):
        manager.mark_lossy("lossy")
    books.cache("lossy", BLOCK)
    assert not books.hit("lossy", 0) and not books.hit("lossy", 1)
    books.states.forget("lossy")
    books.cache("lossy", 2 * BLOCK)
    assert books.hit("lossy", 1), "the name is used again, by a request that starts from nothing"


def test_growth_of_states_is_bounded() -> None:
    """A prompt of 1,000 blocks holds two states at once, one read and one written."""
    books = Books()
    books.own.allocate_new_blocks("r", BLOCK, BLOCK)
    books.states._manager.allocate_new_blocks("r", BLOCK, BLOCK)
    assert books.room.num_growth("r", 2 * BLOCK) == 2
    assert books.room.num_growth("r", 1000 * BLOCK) == 999 + 2
    assert books.room.num_growth("new", 1000 * BLOCK) == 1000 + 2


@pytest.mark.parametrize(
    ("made", "count"),
    [
        (state_spec("none", 4096), 1),
        (state_spec("align"), 2),
        (state_spec("align", num_prefill_checkpoint_blocks=1), 3),
    ],
)
def test_blocks_per_state(made: MambaSpec, count: int) -> None:
    assert blocks_per_state(made) == count


@pytest.mark.parametrize(("mode", "block_size"), [("align", BLOCK), ("none", 4096)])
def test_vllm_lays_states_beside_layer_groups(mode: str, block_size: int) -> None:
    """Blocks of layer groups have one size, whatever a block of states stands for."""
    specs: dict[str, Any] = {}
    for layer in range(8):
        attends = layer % 2
        made = spec(layer // 4) if attends else state_spec(mode, block_size)
        specs[f"layers.{layer}"] = made
    groups = vllm_groups(KVCacheLayout.LBHNC, specs)
    found = GroupMap.of(each.kv_cache_spec for each in groups)
    assert found.layer_groups.count(None) == 2
    assert (found.num_layer_groups, found.block_size) == (2, BLOCK)


def test_the_line_at_start_counts_states_as_they_are() -> None:
    groups = [
        KVCacheGroupSpec(["layers.1", "layers.3"], spec(0)),
        KVCacheGroupSpec(["layers.0", "layers.2"], state_spec()),
    ]
    config = KVCacheConfig(num_blocks=65, kv_cache_tensors=[], kv_cache_groups=groups)
    line = savings_line(parse_config(SETTING), config, 1024)
    assert "1 layer group(s) in 1 block table(s)" in line
    assert "recurrent states left to vLLM in 1 more" in line and "draft" not in line
    assert "keeps 4 of 66 blocks" in line, "2 of 64, and the two of the states"
