"""A draft model's blocks beside the target's: never planned, never taken for a layer group."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    UniformTypeKVCacheSpecs,
)
from vllm.v1.kv_cache_layout import KVCacheLayout

from tests.inside import scheduler_of
from tests.planning import get_kv_cache_groups
from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.config.settings import LayerGroupsConfig
from vllm_kvcompress.core.block_manager import CompressedAttentionManager, register_manager
from vllm_kvcompress.core.compactions import Compactions
from vllm_kvcompress.core.planner import Planner
from vllm_kvcompress.core.query_slots import QuerySlots
from vllm_kvcompress.core.report import savings_line
from vllm_kvcompress.core.reuse import Reuse
from vllm_kvcompress.core.scheduler import num_unverified
from vllm_kvcompress.core.tracked_request import Phase
from vllm_kvcompress.lengths.budgets import layer_groups
from vllm_kvcompress.metrics import CompressionStats
from vllm_kvcompress.plans import CompactionPlan
from vllm_kvcompress.request_options import parse_request
from vllm_kvcompress.spec import CompressedAttentionSpec, GroupMap

BLOCK = 16
SETTING = {"preset": "keydiff", "budget": {"tokens": 32, "floor": 1}, "min_prompt_len": 0}


def spec(layer_group: int | None, block_size: int = BLOCK, heads: int = 2) -> Any:
    full = FullAttentionSpec(
        block_size=block_size, num_kv_heads=heads, head_size=8, dtype=torch.float32
    )
    return CompressedAttentionSpec.from_full(full, layer_group)


class Books:
    """A scheduler's books of one request, "r", without an engine.

    Two block tables of layer group 0, then one of a draft model with larger blocks.
    """

    specs = (spec(0), spec(0), spec(None, 2 * BLOCK))

    def __init__(self, num_blocks: int = 65) -> None:
        self.pool = BlockPool(num_blocks, enable_caching=False, hash_block_size=BLOCK)
        self.managers = [
            CompressedAttentionManager(
                each,
                block_pool=self.pool,
                enable_caching=False,
                kv_cache_group_id=group,
                scheduler_block_size=2 * BLOCK,
            )
            for group, each in enumerate(self.specs)
        ]
        group_map = GroupMap.of(self.specs)
        self.planner = Planner(parse_config(SETTING), group_map.num_layer_groups, BLOCK)
        self.stats = CompressionStats()
        self.compactions = Compactions(
            self.planner, self.managers, group_map.layer_groups, self.pool, 4096, self.stats
        )
        slots = QuerySlots(self.planner, 0, self.stats)
        room = self.compactions.room
        reuse = Reuse(
            self.planner,
            self.managers,
            group_map.layer_groups,
            room,
            self.compactions.reports,
            self.stats,
        )
        books = {"planner": self.planner, "query_slots": slots, "reuse": reuse}
        books["compactions"] = self.compactions
        self.scheduler = scheduler_of(self.managers, **books)

    def prefill(self, num_tokens: int) -> Any:
        """Allocate the prompt in every group; what the scheduler knows once it is scheduled."""
        for manager in self.managers:
            manager.allocate_new_blocks("r", num_tokens, num_tokens)
        self.planner.add("r", num_tokens, parse_request(None))
        request = SimpleNamespace(
            request_id="r",
            num_computed_tokens=num_tokens,
            num_output_placeholders=0,
            prompt_token_ids=[1] * num_tokens,
        )
        self.scheduler.requests["r"] = request
        return request

    def plan(self, num_tokens: int) -> list[CompactionPlan]:
        """Prefill, and what the step plans at its end."""
        request = self.prefill(num_tokens)
        assert self.planner.note_progress("r", num_tokens)
        return self.compactions.plan([request])


def in_place(plan: CompactionPlan) -> list[int]:
    """Source blocks that are overwritten, by group."""
    groups = [group for group in plan.groups if group is not None]
    return [len({*each.destination_blocks} & {*each.source_blocks}) for each in groups]


def test_a_compaction_leaves_the_draft_models_blocks_alone() -> None:
    books = Books()
    (plan,) = books.plan(150)  # 10 blocks twice, 5 of the draft model's
    own = list(books.managers[2].req_to_blocks["r"])
    assert [group is None for group in plan.groups] == [False, False, True]
    assert books.pool.get_num_free_blocks() == 64 - 25 - 2 * 2
    books.compactions.commit()
    books.scheduler.check_integrity()
    assert books.planner.requests["r"].phase is Phase.DONE
    assert [dict(manager.evicted) for manager in books.managers] == [{"r": 112}, {"r": 112}, {}]
    assert books.managers[2].req_to_blocks["r"] == own
    assert books.pool.get_num_free_blocks() == 64 - 2 * 3 - 5
    stats = books.stats
    assert stats.tokens_evicted == {"keydiff/0": 112}, "one layer group, counted once"
    assert stats.blocks_taken == {"keydiff": 2 * 2}
    assert stats.blocks_returned == {"keydiff": 2 * 9}


def test_later_blocks_of_the_draft_model_are_counted_by_logical_length() -> None:
    books = Books()
    books.plan(150)
    books.compactions.commit()
    new = [manager.allocate_new_blocks("r", 161, 161) for manager in books.managers]
    # Logical 161 is physical 49, the fourth block of the target; and the sixth of the draft model.
    assert [len(blocks) for blocks in new] == [1, 1, 1]
    for manager in books.managers:
        manager.free("r")
    assert books.pool.get_num_free_blocks() == 64


def test_room_is_needed_for_the_targets_survivors_alone() -> None:
    books = Books(1 + 25 + 4)
    (plan,) = books.plan(150)
    assert in_place(plan) == [0, 0]
    books = Books(1 + 25 + 3)
    (plan,) = books.plan(150)
    assert in_place(plan) == [1, 0], "one block of the first group's own"
    assert books.stats.deferrals == 0
    books.compactions.commit()
    books.scheduler.check_integrity()
    for manager in books.managers:
        manager.free("r")
    assert books.pool.get_num_free_blocks() == 28


def test_an_eviction_from_the_draft_model_is_found_out() -> None:
    books = Books()
    books.prefill(150)
    books.managers[2].evicted["r"] = 32
    books.managers[2].mark_lossy("r")
    with pytest.raises(AssertionError, match="of the draft model"):
        books.scheduler.check_integrity()


# --- specs --------------------------------------------------------------------------------


def test_a_draft_models_spec_merges_with_its_own_kind_only() -> None:
    assert spec(None).merge([spec(None), spec(None)]).layer_group is None
    plain = FullAttentionSpec(block_size=BLOCK, num_kv_heads=2, head_size=8, dtype=torch.float32)
    for other in (spec(0), plain):
        with pytest.raises(AssertionError):
            spec(None).merge([spec(None), other])
    assert spec(None).is_uniform_with_collection({"a": spec(None)})
    assert not spec(None).is_uniform_with_collection({"a": spec(None), "b": spec(0)})


def vllm_groups(layout: KVCacheLayout, specs: dict[str, Any]) -> list[KVCacheGroupSpec]:
    """What vLLM makes of layers."""
    register_manager()
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        cache_config=SimpleNamespace(get_resolved_kv_cache_layout=lambda: layout),
        attention_config=None,
        speculative_config=None,
    )
    return get_kv_cache_groups(config, specs)


def with_draft_model(draft_heads: int) -> dict[str, Any]:
    """Four layers in two groups, and two layers of a draft model."""
    specs = {f"layers.{layer}": spec(layer // 2, heads=4) for layer in range(4)}
    return specs | {
        f"draft_model.layers.{layer}": spec(None, heads=draft_heads) for layer in range(2)
    }


@pytest.mark.parametrize("num_layers", [28, 30, 32, 33, 36, 40, 48, 61, 80])
def test_groups_of_a_size_are_block_tables_of_that_size(num_layers: int) -> None:
    """A small group left over would make vLLM cut all others to its size."""
    for size in (1, 4, 8, 16):
        numbers = layer_groups(num_layers, LayerGroupsConfig(size=size))
        specs = {f"layers.{layer}": spec(number) for layer, number in enumerate(numbers)}
        tables = vllm_groups(KVCacheLayout.LBHNC, specs)
        assert len(tables) == max(numbers) + 1 == -(-num_layers // size)


@pytest.mark.parametrize(
    ("draft_heads", "block_sizes"),
    [(4, [16, 16, 16]), (2, [16, 16, 32]), (8, [32, 32, 16]), (3, [16, 16, 16])],
)
def test_vllm_gives_a_draft_model_block_tables_of_its_own(draft_heads: int, block_sizes) -> None:
    """Blocks are equal in bytes: a layer with fewer heads gets longer ones."""
    groups = vllm_groups(KVCacheLayout.LBHNC, with_draft_model(draft_heads))
    assert [each.kv_cache_spec.block_size for each in groups] == block_sizes
    found = GroupMap.of(each.kv_cache_spec for each in groups)
    assert (found.layer_groups, found.num_layer_groups) == ((0, 1, None), 2)
    assert found.block_size == block_sizes[0]


def test_wrapped_specs_are_understood() -> None:
    """Where a block holds all layers of its table, vLLM wraps the specs of a group."""
    groups = vllm_groups(KVCacheLayout.BLHNC, with_draft_model(2))
    assert any(isinstance(each.kv_cache_spec, UniformTypeKVCacheSpecs) for each in groups)
    found = GroupMap.of(each.kv_cache_spec for each in groups)
    assert (found.layer_groups, found.num_layer_groups, found.block_size) == ((0, 1, None), 2, 16)


def test_the_line_at_start_counts_the_draft_model_as_kept() -> None:
    groups = [KVCacheGroupSpec([f"layer.{n}"], each) for n, each in enumerate(Books.specs)]
    config = KVCacheConfig(num_blocks=65, kv_cache_tensors=[], kv_cache_groups=groups)
    line = savings_line(parse_config(SETTING), config, 1024)
    assert "1 layer group(s) in 2 block table(s), block size 16" in line
    assert "the draft model's cache kept whole in 1 more" in line
    # 64 + 64 + 32 blocks; of the first two, 2 each are kept.
    assert "keeps 36 of 160 blocks" in line


def test_the_line_at_start_says_when_memory_is_scarce() -> None:
    groups = [KVCacheGroupSpec(["layer.0"], Books.specs[0])]
    cache = KVCacheConfig(num_blocks=65, kv_cache_tensors=[], kv_cache_groups=groups)
    marks = {"trigger": "pressure", "pressure": {"when": 0.9, "until": 0.6}}
    line = savings_line(parse_config({**SETTING, **marks}), cache, 1024)
    when = "only (from 90% of the blocks held to 60%, or a request gets none)"
    assert f", while memory is scarce {when}, prompts from" in line
    assert line.endswith(" once its prompt is done, or when it is chosen while decoding")


def test_the_line_at_start_names_blocks_that_lie_idle_on_a_stage() -> None:
    """A group without layers on the first pipeline stage takes as much there as any other."""
    stage = [KVCacheGroupSpec(["layer.0"], Books.specs[0]), KVCacheGroupSpec([], Books.specs[1])]
    one = [KVCacheGroupSpec([f"layer.{n}"], each) for n, each in enumerate(Books.specs[:2])]
    lines = []
    for groups in (stage, one):
        config = KVCacheConfig(num_blocks=65, kv_cache_tensors=[], kv_cache_groups=groups)
        lines.append(savings_line(parse_config(SETTING), config, 1024))
    idle = ", blocks of 1 of them idle on the first pipeline stage"
    assert lines[0].replace(idle, "") == lines[1] != lines[0]


# --- drafts under way ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("placeholders", "own", "expected"),
    [
        (0, 0, 0),  # synchronous
        (0, 4, 0),  # synchronous, the step's own drafts
        (1, 0, 0),  # a step without drafts is under way
        (4, 0, 3),  # a step with three drafts is under way
        (8, 4, 3),  # and another of that kind has just been scheduled
        (5, 4, 0),
    ],
)
def test_drafts_without_verdict(placeholders: int, own: int, expected: int) -> None:
    request: Any = SimpleNamespace(num_output_placeholders=placeholders)
    assert num_unverified(request, own) == expected
