"""The spec of latent caches (MLA): vLLM's own sizes, our groups, our manager."""

from dataclasses import fields

import pytest
import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from tests.planning import groups_of_one_page_size
from vllm_kvcompress.core.block_manager import CompressedAttentionManager, register_manager
from vllm_kvcompress.spec import CompressedAttentionSpec, CompressedMLASpec, GroupMap

HOST = MLAAttentionSpec(
    block_size=16, num_kv_heads=1, head_size=576, dtype=torch.bfloat16, max_tp_shards=1,
    cache_dtype_str="auto",
)  # fmt: skip


def spec(layer_group: int) -> CompressedMLASpec:
    found = CompressedMLASpec.from_full(HOST, layer_group)
    assert type(found) is CompressedMLASpec
    return found


def test_a_page_has_rows_and_no_values() -> None:
    ours = spec(0)
    assert ours.page_size_bytes == HOST.page_size_bytes == 16 * 576 * 2
    for each in fields(MLAAttentionSpec):
        assert getattr(ours, each.name) == getattr(HOST, each.name), each.name
    assert CompressedMLASpec(
        block_size=16, num_kv_heads=1, head_size=576, dtype=torch.bfloat16
    ) == (
        CompressedMLASpec.from_full(
            MLAAttentionSpec(block_size=16, num_kv_heads=1, head_size=576, dtype=torch.bfloat16), 0
        )
    ), "vLLM's defaults, not those of keys and values"


def test_layers_of_one_group_merge_and_of_two_do_not() -> None:
    merged = CompressedMLASpec.merge([spec(1), spec(1)])
    assert merged == spec(1)
    with pytest.raises(AssertionError, match=r"layer groups \['0', '1'\] do not merge"):
        CompressedMLASpec.merge([spec(0), spec(1)])
    with pytest.raises(AssertionError):
        CompressedMLASpec.merge([spec(0), CompressedAttentionSpec.merge([spec(0)])])
    assert spec(0).is_uniform_with_collection({"a": spec(0)})
    assert not spec(0).is_uniform_with_collection({"a": spec(0), "b": spec(1)})


def test_every_layer_group_has_block_tables_of_its_own() -> None:
    layers = {f"layers.{number}": spec(number // 2) for number in range(4)}
    groups = groups_of_one_page_size(layers)  # type: ignore[arg-type]
    assert [group.layer_names for group in groups] == [
        ["layers.0", "layers.1"],
        ["layers.2", "layers.3"],
    ]
    found = GroupMap.of(group.kv_cache_spec for group in groups)
    assert (found.layer_groups, found.num_layer_groups, found.block_size) == ((0, 1), 2, 16)


def test_our_manager_serves_it() -> None:
    register_manager()
    register_manager()
    assert KVCacheSpecRegistry.get_manager_class(spec(0)) is CompressedAttentionManager
    assert KVCacheSpecRegistry.get_manager_class(HOST) is not CompressedAttentionManager
    base = KVCacheSpecRegistry.get_uniform_type_base_spec(spec(0))
    assert base is FullAttentionSpec, "vLLM may group it with what attends to everything"
