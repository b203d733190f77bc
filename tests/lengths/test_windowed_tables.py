"""Block tables beside windowed and recurrent layers, against those that vLLM makes."""

import pytest

from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.lengths.geometry import ModelGeometry
from vllm_kvcompress.lengths.layer_words import FULL, NO_CACHE, STATE, WINDOWED
from vllm_kvcompress.lengths.windowed_tables import (
    LayersBeside,
    count_tables,
    groups_warning,
    plan_warnings,
)


def groups(num_full: int, count: int) -> list[int]:
    return [index * count // num_full for index in range(num_full)]


@pytest.mark.parametrize(
    ("num_full", "beside", "count", "tables"),
    [
        (10, LayersBeside(52), 1, 7),  # Gemma-3-27B
        (10, LayersBeside(52), 2, 13),
        (10, LayersBeside(52), 5, 31),
        (18, LayersBeside(18), 1, 2),  # gpt-oss-120b
        (18, LayersBeside(18), 2, 4),
        (3, LayersBeside(15), 1, 6),  # Gemma 3 270M
        (3, LayersBeside(15), 3, 18),
        (13, LayersBeside(12), 1, 2),  # within 1.5 times: padded to one width
        (32, LayersBeside(), 4, 4),
        (12, LayersBeside(0, 36), 1, 4),  # Qwen3-Next
        (12, LayersBeside(0, 36), 2, 8),
        (4, LayersBeside(0, 36), 2, 20),  # Granite 4
        (6, LayersBeside(6, 12), 2, 8),
    ],
)
def test_tables_are_those_of_vllm(
    num_full: int, beside: LayersBeside, count: int, tables: int
) -> None:
    assert count_tables(groups(num_full, count), beside) == tables
    assert len(vllm_groups(groups(num_full, count), beside)) == tables


def vllm_groups(group_of_layer: list[int], beside: LayersBeside) -> list:
    """What the allocator itself makes of the specs."""
    torch = pytest.importorskip("torch")
    kv_cache_utils = pytest.importorskip("vllm.v1.core.kv_cache_utils")
    from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec, SlidingWindowSpec

    from vllm_kvcompress.spec import CompressedAttentionSpec

    shape = {"block_size": 32, "num_kv_heads": 1, "head_size": 64, "dtype": torch.float32}
    specs: dict = {
        f"full.{index}": CompressedAttentionSpec.from_full(FullAttentionSpec(**shape), group)
        for index, group in enumerate(group_of_layer)
    }
    for index in range(beside.windowed):
        specs[f"window.{index}"] = SlidingWindowSpec(**shape, sliding_window=512)
    page = specs["full.0"].page_size_bytes
    state = {"shapes": ((page // 4,),), "dtypes": (torch.float32,), "block_size": 32}
    for index in range(beside.recurrent):
        specs[f"state.{index}"] = MambaSpec(**state)
    if max(group_of_layer) == 0 and beside == LayersBeside():
        return [specs]
    return kv_cache_utils._get_kv_cache_groups_uniform_page_size(specs)


def test_the_warning_says_what_is_multiplied() -> None:
    config = parse_config({"preset": "pyramidkv", "layer_groups": {"count": 5}})
    assert config is not None
    warning = groups_warning(config, 10, LayersBeside(52))
    assert warning is not None and "5 layer groups beside 52 windowed layers" in warning
    assert "31 block tables where one group makes 7" in warning and "layer_groups.count" in warning
    assert groups_warning(config, 10, LayersBeside()) is None, "no layers of other kinds"
    one = parse_config("snapkv")
    assert one is not None and groups_warning(one, 10, LayersBeside(52)) is None
    two = parse_config({"preset": "snapkv", "layer_groups": {"count": 2}})
    assert two is not None and groups_warning(two, 2, LayersBeside(1)) is None, "3 tables both ways"


def test_layers_are_called_what_they_are() -> None:
    config = parse_config({"preset": "snapkv", "layer_groups": {"count": 2}})
    assert config is not None
    recurrent = groups_warning(config, 12, LayersBeside.among([STATE] * 36 + [FULL] * 12))
    assert recurrent is not None and "windowed" not in recurrent
    assert "2 layer groups beside 36 recurrent layers make 8 block tables" in recurrent
    both = groups_warning(config, 6, LayersBeside(6, 12))
    assert both is not None and "beside 6 windowed layers and 12 recurrent layers make 8" in both
    every = [WINDOWED, FULL, STATE, NO_CACHE, WINDOWED, WINDOWED, STATE]
    assert LayersBeside.among(every) == LayersBeside(windowed=3, recurrent=2)
    # Feed-forward layers that are counted as layers (Nemotron-H) have no block table.
    assert LayersBeside.among([NO_CACHE, FULL] * 4) == LayersBeside()


def test_plan_says_it_of_both_kinds() -> None:
    geometry = ModelGeometry(10, 16, 128, "bfloat16", 131072, num_windowed=52, window=1024)
    config = parse_config({"preset": "pyramidkv", "layer_groups": {"count": 2}})
    assert config is not None
    lines = list(plan_warnings(config, geometry))
    assert len(lines) == 1 and "52 windowed layers make 13 block tables" in lines[0]
    hybrid = ModelGeometry(12, 2, 256, "bfloat16", 262144, num_recurrent=36)
    (line,) = plan_warnings(config, hybrid)
    assert "36 recurrent layers make 8 block tables" in line
    assert not list(plan_warnings(config, ModelGeometry(32, 8, 128, "bfloat16")))
