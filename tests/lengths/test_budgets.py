"""Budgets: properties over many lengths, and numbers worked out by hand."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_kvcompress.config.settings import (
    CompressionConfig,
    LayerBudgetConfig,
    LayerGroupsConfig,
)
from vllm_kvcompress.errors import ConfigError
from vllm_kvcompress.lengths.budgets import (
    after_compaction,
    budget_tokens,
    compaction_lengths,
    forced_ranges,
    group_budgets,
    group_lengths,
    layer_groups,
    next_lengths,
    permanent_ranges,
    target_tokens,
)
from vllm_kvcompress.lengths.layer_budgets import Shape, preference, pyramid, windowkv
from vllm_kvcompress.plans import GroupCache, GroupLengths


def config(**fields) -> CompressionConfig:
    base = {"policy": {"name": "keydiff"}, "budget": {"ratio": 0.12, "floor": 1}}
    return CompressionConfig.model_validate({**base, "min_prompt_len": 0, **fields})


def budgets_of(num_tokens: int, setting: CompressionConfig, num_groups: int) -> list[int]:
    return group_budgets(num_tokens, target_tokens(num_tokens, setting), setting, num_groups)


def forced_of(num_tokens: int, setting: CompressionConfig) -> tuple[tuple[int, int], ...]:
    cache = GroupCache(num_tokens, permanent_ranges(num_tokens, setting))
    return forced_ranges(cache, setting.observation_window)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ({"count": 1}, [0, 0, 0, 0, 0, 0, 0]),
        ({"count": 3}, [0, 0, 0, 1, 1, 2, 2]),
        ({"count": 7}, [0, 1, 2, 3, 4, 5, 6]),
        ({"count": 99}, [0, 1, 2, 3, 4, 5, 6]),
        ({"size": 3}, [0, 0, 0, 1, 1, 2, 2]),
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
    assert budgets_of(2000, config(budget={"tokens": 1, "floor": 1}), 2) == [1, 1]


WINDOWKV = {  # average: released form at gamma 8, printed form; from the paper's table
    512: ([732, 586, 440, 292], [987, 670, 354, 37]),
    1024: ([1463, 1171, 879, 585], [1975, 1341, 707, 73]),
    2048: ([2926, 2341, 1756, 1170], [3950, 2682, 1414, 146]),
}


@pytest.mark.parametrize("average", WINDOWKV)
def test_windowkv_pyramids_by_hand(average: int) -> None:
    """The paper's budgets count no observation window: ours are its plus the window."""
    released, printed = WINDOWKV[average]
    for form, expected in (("released", released), ("printed", printed)):
        fields = {
            "budget": {"tokens": average + 16, "floor": 1},
            "observation_window": 16,
            "layer_budget": {"shape": "windowkv", "form": form},
        }
        found = budgets_of(7950, config(**fields), 4)
        assert [each - 16 for each in found] == expected
    fields["layer_budget"] = {"shape": "windowkv", "gamma": 7}
    qwen = {512: [768, 598, 428, 256], 1024: [1536, 1195, 854, 512], 2048: [3072, 2390, 1708, 1024]}
    assert [each - 16 for each in budgets_of(15500, config(**fields), 4)] == qwen[average]


def test_linear_by_hand() -> None:
    """n = 1020, w = 20: r = 0.4 gives 0.75 .. 0.05; r = 0.8 gives 1 .. 0.6; r = 0.03 is uniform."""
    fields = {"observation_window": 20, "layer_budget": {"shape": "linear"}}
    for tokens, expected in (
        (420, [770, 537, 303, 70]),
        (820, [1020, 887, 753, 620]),
        (50, [50, 50, 50, 50]),
        (520, [970, 670, 370, 70]),  # r = 0.5: 0.95 .. 0.05
    ):
        setting = config(**fields, budget={"tokens": tokens, "floor": 1})
        assert budgets_of(1020, setting, 4) == expected
    fields |= {"budget": {"tokens": 420, "floor": 1}}
    wider = config(**{**fields, "layer_budget": {"shape": "linear", "beta": 0.1}})
    assert budgets_of(1020, wider, 4) == [720, 520, 320, 120]


@pytest.mark.parametrize(
    ("shape", "fields", "expected"),
    [
        (pyramid, {"beta": 20}, [300, 40 + 520 / 3, 40 + 260 / 3, 40]),
        (windowkv, {"beta": 20, "form": "printed"}, [300, 40 + 520 / 3, 40 + 260 / 3, 40]),
        # 39 / 20 of 150 are 292 for the last; whole steps of 86 between.
        (windowkv, {"beta": 20, "gamma": 39, "form": "released"}, [40, 126, 212, 300]),
    ],
)
def test_a_group_larger_than_the_cache_is_clipped_and_the_other_end_raised(
    shape: Shape, fields: dict, expected: list[float]
) -> None:
    """C = 170, w = 20 of 300 tokens: 292 past the window would be more than the 280 that are."""
    config = LayerBudgetConfig(shape=shape.__name__, **fields)
    assert shape(170, 20, 300, 4, config) == pytest.approx(expected)


def test_preferences_share_out_the_last_token() -> None:
    """41 of 106 tokens, 8 of them the window's: 3 times 33, of which the first can use 98."""
    config = LayerBudgetConfig(shape="preference", preferences=(1e9, 3, 1))
    found = preference(41, 8, 106, 3, config)
    assert found == pytest.approx([106, 8.75, 8.25]) and sum(found) == pytest.approx(3 * 41)


def test_preferences_by_hand() -> None:
    """C = 220, w = 20: 800 tokens are shared 4 : 2 : 1 : 1; the first group takes all it can."""
    fields = {
        "budget": {"tokens": 220, "floor": 1},
        "observation_window": 20,
        "layer_budget": {"shape": "preference", "preferences": [4, 2, 1, 1]},
    }
    assert budgets_of(2000, config(**fields), 4) == [420, 220, 120, 120]
    assert budgets_of(320, config(**fields), 4) == [320, 270, 145, 145]
    with pytest.raises(ConfigError, match="4 numbers and 3 layer groups"):
        budgets_of(2000, config(**fields), 3)


def test_pyramid_by_hand() -> None:
    """C = 200, w = 20: last group 180 / 20 + 20 = 29, first 360 - 9 + 20 = 371, mean 200."""
    fields = {
        "budget": {"tokens": 200, "floor": 1},
        "observation_window": 20,
        "layer_budget": {"shape": "pyramid", "beta": 20},
    }
    assert budgets_of(2000, config(**fields), 4) == [371, 257, 143, 29]
    assert budgets_of(2000, config(**fields), 1) == [200]
    fields["layer_budget"] = {"shape": "pyramid"}  # beta is 20 unless told
    fields["budget"] = {"tokens": 2020, "floor": 1}
    assert budgets_of(8000, config(**fields), 4)[-1] == 100 + 20


def test_a_pyramid_wider_than_the_prompt_is_clipped_and_keeps_its_mean() -> None:
    fields = {"budget": {"ratio": 0.7}, "layer_budget": {"shape": "pyramid"}}
    budgets = budgets_of(1000, config(**fields), 5)
    assert budgets[0] == 1000
    assert abs(sum(budgets) / 5 - 700) <= 1


@settings(max_examples=300, deadline=None)
@given(
    prompt_len=st.integers(1, 5000),
    ratio=st.floats(0.01, 1),
    window=st.integers(1, 128),
    sinks=st.integers(0, 64),
    block_size=st.sampled_from([16, 32, 64, 128]),
    shape=st.sampled_from(["uniform", "pyramid", "linear", "windowkv"]),
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
    forced = forced_of(prompt_len, setting)
    budgets = budgets_of(prompt_len, setting, num_groups)
    lengths = compaction_lengths(prompt_len, setting, num_groups, block_size)
    slack = num_groups if shape == "windowkv" else 1  # whose steps are whole tokens
    assert abs(sum(budgets) / num_groups - budget_tokens(prompt_len, setting)) <= slack
    assert all(1 <= budget <= prompt_len for budget in budgets)
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
    found = forced_of(150, setting)
    assert [i for s, e in found for i in range(s, e)] == sorted(i for i in expected if i < 150)


def test_nothing_is_done_where_no_block_would_come_free() -> None:
    assert group_lengths(100, 90, [], 32) is None
    assert group_lengths(31, 1, [], 32) is None
    assert group_lengths(2000, 2000, [], 32) is None
    assert compaction_lengths(511, config(min_prompt_len=512), 2, 32) == [None, None]
    assert compaction_lengths(2000, config(budget={"ratio": 1.0}), 2, 32) == [None, None]


SHAPES = [
    {"shape": "uniform"},
    {"shape": "pyramid"},
    {"shape": "windowkv"},
    {"shape": "windowkv", "form": "printed"},
    {"shape": "windowkv", "gamma": 16},
    {"shape": "linear"},
    {"shape": "preference", "preferences": [9, 1, 3, 1]},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_budget_of_the_whole_prompt_evicts_nothing(shape: dict) -> None:
    for budget in ({"ratio": 1.0}, {"tokens": 9000}):
        setting = config(budget=budget, layer_budget=shape)
        assert budgets_of(2000, setting, 4) == [2000] * 4
        assert compaction_lengths(2000, setting, 4, 32) == [None] * 4


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("ratio", [0.2, 0.6, 0.8, 0.95])
def test_every_shape_spends_the_budget(shape: dict, ratio: float) -> None:
    """Groups that are clipped hand over what they cannot use."""
    setting = config(budget={"ratio": ratio}, layer_budget=shape)
    found = budgets_of(2000, setting, 4)
    assert max(found) <= 2000
    assert abs(sum(found) / 4 - 2000 * ratio) <= 2


def test_changing_the_budget_changes_what_is_kept() -> None:
    """A rival shipped a server whose budget had no effect."""
    kept = [
        compaction_lengths(4000, config(budget={"ratio": r}), 1, 32)[0].kept_len
        for r in (0.06, 0.12, 0.25, 0.5)
    ]
    assert kept == [256, 480, 1024, 2016]


def test_what_a_compaction_leaves_behind() -> None:
    """Sinks and pins of the region come first; those behind it move down."""
    cache = GroupCache(200, ((0, 4), (50, 60), (170, 180), (190, 195)))
    after = after_compaction(cache, GroupLengths(region_len=176, kept_len=64))
    assert after == GroupCache(200 - 112, ((0, 20), (64, 68), (78, 83)))
    again = after_compaction(after, GroupLengths(region_len=80, kept_len=32))
    assert again == GroupCache(40, ((0, 26), (32, 35)))


def test_every_interval_goes_back_to_the_budget() -> None:
    """Ten intervals of 100 tokens: never more than budget, interval and two blocks are held."""
    setting = config(budget={"tokens": 256}, trigger="interval", interval=100)
    caches = [GroupCache(0, ((0, 4),))] * 2
    position = 40
    for _ in range(10):
        position += 100
        grown = 140 if position == 140 else 100
        caches = [GroupCache(c.num_tokens + grown, c.permanent) for c in caches]
        lengths = next_lengths(40, position, caches, setting, 32)
        assert all(lengths) == (position >= 340), "240 tokens are under the budget"
        caches = [
            after_compaction(c, each) if each else c
            for c, each in zip(caches, lengths, strict=True)
        ]
        assert all(c.num_tokens < 256 + 32 for c in caches)
        assert all(c.permanent == ((0, 4),) for c in caches)


@settings(max_examples=100, deadline=None)
@given(
    start=st.integers(1, 600),
    steps=st.lists(st.integers(1, 300), min_size=1, max_size=8),
    pins=st.lists(st.tuples(st.integers(0, 600), st.integers(1, 80)), max_size=3),
    shape=st.sampled_from(["uniform", "pyramid", "linear", "windowkv"]),
)
def test_repeated_compactions_keep_their_promises(start, steps, pins, shape) -> None:
    setting = config(
        budget={"tokens": 128, "floor": 1},
        trigger="interval",
        layer_budget={"shape": shape},
        pinned=[[a, a + size] for a, size in pins],
    )
    permanent = permanent_ranges(start, setting)
    num_permanent = sum(end - begin for begin, end in permanent)
    caches = [GroupCache(start, permanent)] * 3
    position = start
    for step in steps:
        position += step
        caches = [GroupCache(c.num_tokens + step, c.permanent) for c in caches]
        lengths = next_lengths(start, position, caches, setting, 32)
        caches = [
            after_compaction(c, each) if each else c
            for c, each in zip(caches, lengths, strict=True)
        ]
        for cache in caches:
            assert sum(end - begin for begin, end in cache.permanent) == num_permanent
            assert cache.permanent[-1][1] <= cache.num_tokens
