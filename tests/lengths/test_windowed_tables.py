"""Block tables beside windowed layers, against those that vLLM makes."""

import pytest

from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.lengths.geometry import ModelGeometry
from vllm_kvcompress.lengths.windowed_tables import count_tables, groups_warning, plan_warnings


def groups(num_full: int, count: int) -> list[int]:
    return [index * count // num_full for index in range(num_full)]


@pytest.mark.parametrize(
    ("num_full", "num_windowed", "count", "tables"),
    [
        (10, 52, 1, 7),  # Gemma-3-27B
        (10, 52, 2, 13),
        (10, 52, 5, 31),
        (18, 18, 1, 2),  # gpt-oss-120b
        (18, 18, 2, 4),
        (3, 15, 1, 6),  # Gemma 3 270M
        (3, 15, 3, 18),
        (13, 12, 1, 2),  # within 1.5 times: padded to one width
        (32, 0, 4, 4),
    ],
)
def test_tables_are_those_of_vllm(
    num_full: int, num_windowed: int, count: int, tables: int
) -> None:
    assert count_tables(groups(num_full, count), num_windowed) == tables
    assert len(vllm_groups(groups(num_full, count), num_windowed)) == tables


def vllm_groups(group_of_layer: list[int], num_windowed: int) -> list:
    """What the allocator itself makes of the specs."""
    torch = pytest.importorskip("torch")
    kv_cache_utils = pytest.importorskip("vllm.v1.core.kv_cache_utils")
    from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

    from vllm_kvcompress.spec import CompressedAttentionSpec

    shape = {"block_size": 32, "num_kv_heads": 1, "head_size": 64, "dtype": torch.float32}
    specs: dict = {
        f"full.{index}": CompressedAttentionSpec.from_full(FullAttentionSpec(**shape), group)
        for index, group in enumerate(group_of_layer)
    }
    for index in range(num_windowed):
        specs[f"window.{index}"] = SlidingWindowSpec(**shape, sliding_window=512)
    if max(group_of_layer) == 0 and not num_windowed:
        return [specs]
    return kv_cache_utils._get_kv_cache_groups_uniform_page_size(specs)


def test_the_warning_says_what_is_multiplied() -> None:
    config = parse_config({"preset": "pyramidkv", "layer_groups": {"count": 5}})
    assert config is not None
    warning = groups_warning(config, 10, 52)
    assert warning is not None and "5 layer groups beside 52 windowed layers" in warning
    assert "31 block tables where one group makes 7" in warning and "layer_groups.count" in warning
    assert groups_warning(config, 10, 0) is None, "no windowed layers"
    one = parse_config("snapkv")
    assert one is not None and groups_warning(one, 10, 52) is None


def test_plan_says_both() -> None:
    geometry = ModelGeometry(10, 16, 128, "bfloat16", 131072, num_windowed=52, window=1024)
    config = parse_config({"preset": "pyramidkv", "layer_groups": {"count": 2}})
    assert config is not None
    lines = list(plan_warnings(config, geometry))
    assert len(lines) == 2 and "52 further layers keep the last 1024" in lines[0]
    assert "13 block tables" in lines[1]
    assert not list(plan_warnings(config, ModelGeometry(32, 8, 128, "bfloat16")))
