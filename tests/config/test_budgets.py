"""Budgets: properties over many lengths, and numbers worked out by hand."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_kvcompress.budgets import (
    budget_tokens,
    compaction_lengths,
    forced_ranges,
    group_budgets,
    group_lengths,
    layer_groups,
)
from vllm_kvcompress.config import CompressionConfig, LayerGroupsConfig


def config(**fields) -> CompressionConfig:
    base = {"policy": {"name": "keydiff"}, "budget": {"ratio": 0.12, "floor": 1}}
    return CompressionConfig.model_validate({**base, "min_prompt_len": 0, **fields})


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ({"count": 1}, [0, 0, 0, 0, 0, 0, 0]),
        ({"count": 3}, [0, 0, 0, 1, 1, 2, 2]),
        ({"count": 7}, [0, 1, 2, 3, 4, 5, 6]),
        ({"count": 99}, [0, 1, 2, 3, 4, 5, 6]),
        ({"size": 3}, [0, 0, 0, 1, 1, 1, 2]),
        ({"size": 9}, [0] * 7),
    ],
)
def test_layer_groups_are_consecutive(setting: dict, expected: list[int]) -> None:
    assert layer_groups(7, LayerGroupsConfig(**setting)) == expected


def test_budgets_by_hand() -> None:
    assert budget_tokens(2000, config()) == 240
    assert budget_tokens(2000, config(budget={"tokens": 512})) == 512
    assert budget_tokens(300, config(budget={"tokens": 512})) == 300
    assert budget_tokens(2000, config(budget={"ratio": 0.01, "floor": 64})) == 64


def test_pyramid_by_hand() -> None:
    """C = 200, w = 20: last group 180 / 20 + 20 = 29, first 360 - 9 + 20 = 371, mean 200."""
    fields = {
        "budget": {"tokens": 200, "floor": 1},
        "observation_window": 20,
        "layer_budget": {"shape": "pyramid", "beta": 20},
    }
    assert group_budgets(2000, config(**fields), 4) == [371, 257, 143, 29]
    assert group_budgets(2000, config(**fields), 1) == [200]


def test_a_pyramid_wider_than_the_prompt_is_clipped_and_keeps_its_mean() -> None:
    fields = {"budget": {"ratio": 0.7}, "layer_budget": {"shape": "pyramid"}}
    budgets = group_budgets(1000, config(**fields), 5)
    assert budgets[0] == 1000
    assert abs(sum(budgets) / 5 - 700) <= 1


@settings(max_examples=300, deadline=None)
@given(
    prompt_len=st.integers(1, 5000),
    ratio=st.floats(0.01, 1),
    window=st.integers(1, 128),
    sinks=st.integers(0, 64),
    block_size=st.sampled_from([16, 32, 64, 128]),
    shape=st.sampled_from(["uniform", "pyramid"]),
    num_groups=st.integers(1, 9),
    pins=st.lists(st.tuples(st.integers(0, 5000), st.integers(1, 600)), max_size=4),
)
def test_lengths_keep_their_promises(
    prompt_len, ratio, window, sinks, block_size, shape, num_groups, pins
) -> None:
    setting = config(
        budget={"ratio": ratio, "floor": 1},
        observation_window=window,
        num_sink_tokens=sinks,
        layer_budget={"shape": shape},
        pinned=[[start, start + size] for start, size in pins],
    )
    forced = forced_ranges(prompt_len, setting)
    budgets = group_budgets(prompt_len, setting, num_groups)
    lengths = compaction_lengths(prompt_len, setting, num_groups, block_size)
    assert abs(sum(budgets) / num_groups - budget_tokens(prompt_len, setting)) <= 1
    for budget, each in zip(budgets, lengths, strict=True):
        if each is None:
            continue
        assert each.region_len % block_size == each.kept_len % block_size == 0
        assert 0 < each.kept_len < each.region_len <= prompt_len
        assert prompt_len - each.region_len < block_size, "only the last, partial block is outside"
        kept = each.kept_len + prompt_len - each.region_len
        in_region = sum(min(e, each.region_len) - s for s, e in forced if s < each.region_len)
        assert each.kept_len >= in_region, "forced tokens always fit"
        assert kept >= min(budget, prompt_len)
        tail = prompt_len - each.region_len
        assert kept < max(budget, in_region + tail, tail + 1) + block_size


@settings(max_examples=200, deadline=None)
@given(
    pins=st.lists(st.tuples(st.integers(0, 200), st.integers(1, 60)), max_size=5),
    sinks=st.integers(0, 20),
    window=st.integers(1, 40),
)
def test_forced_ranges_are_the_union(pins, sinks, window) -> None:
    setting = config(
        num_sink_tokens=sinks,
        observation_window=window,
        pinned=[[start, start + size] for start, size in pins],
    )
    expected = set(range(sinks)) | set(range(max(150 - window, 0), 150))
    for start, size in pins:
        expected |= set(range(start, start + size))
    found = forced_ranges(150, setting)
    assert [i for s, e in found for i in range(s, e)] == sorted(i for i in expected if i < 150)


def test_nothing_is_done_where_no_block_would_come_free() -> None:
    assert group_lengths(100, 90, [], 32) is None
    assert group_lengths(31, 1, [], 32) is None
    assert group_lengths(2000, 2000, [], 32) is None
    assert compaction_lengths(511, config(min_prompt_len=512), 2, 32) == [None, None]
    assert compaction_lengths(2000, config(budget={"ratio": 1.0}), 2, 32) == [None, None]


def test_changing_the_budget_changes_what_is_kept() -> None:
    """A rival shipped a server whose budget had no effect."""
    kept = [
        compaction_lengths(4000, config(budget={"ratio": r}), 1, 32)[0].kept_len
        for r in (0.06, 0.12, 0.25, 0.5)
    ]
    assert kept == [256, 480, 1024, 2016]
