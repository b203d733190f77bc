"""Most that any prompt needs: held against every prompt of small settings."""

from itertools import accumulate
from typing import Any

import pytest

from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.lengths.budgets import group_budgets
from vllm_kvcompress.lengths.longest_peak import _largest_shares, longest_prompt_peak
from vllm_kvcompress.lengths.peak import peak_tokens

LONGEST = 240
SHAPES: dict[str, tuple[int, dict[str, Any]]] = {
    "one group": (1, {"shape": "uniform"}),
    "equal": (2, {"shape": "uniform"}),
    "pyramid": (3, {"shape": "pyramid"}),
    "steep": (2, {"shape": "pyramid", "beta": 3}),
    "windowkv": (4, {"shape": "windowkv"}),
    "windowkv as printed": (3, {"shape": "windowkv", "form": "printed"}),
    "the last layers get most": (3, {"shape": "windowkv", "gamma": 20}),
    "linear": (4, {"shape": "linear", "beta": 0.3}),
    "preference": (5, {"shape": "preference", "preferences": [5, 2, 7, 1, 1]}),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "tokens": {"budget": {"tokens": 70, "floor": 1}, "prompt_interval": 37},
    "share": {"budget": {"ratio": 0.3, "floor": 1}, "prompt_interval": 50},
    "most": {"budget": {"ratio": 0.8, "floor": 1}, "prompt_interval": 33},
    "floor": {"budget": {"ratio": 0.1, "floor": 60}, "prompt_interval": 100},
    "tiny": {"budget": {"tokens": 3, "floor": 1}, "prompt_interval": 24, "num_sink_tokens": 0},
    "within a block": {"budget": {"tokens": 70, "floor": 1}, "prompt_interval": 10},
    "pins": {
        "budget": {"tokens": 40, "floor": 1},
        "prompt_interval": 64,
        "pinned": [[30, 90], [200, 230]],
    },
    "short ones are left alone": {
        "budget": {"ratio": 0.2, "floor": 1},
        "prompt_interval": 48,
        "min_prompt_len": 200,
    },
}


def setting(name: str, shape: str, **more: Any) -> CompressionConfig:
    count, layer_budget = SHAPES[shape]
    config = parse_config(
        {
            "preset": "snapkv",
            "trigger": "prompt",
            "observation_window": 8,
            "min_prompt_len": 0,
            "layer_groups": {"count": count},
            "layer_budget": layer_budget,
            **SETTINGS[name],
            **more,
        }
    )
    assert config is not None
    return config


def every_peak(config: CompressionConfig, num_groups: int, block_size: int) -> list[list[int]]:
    """For each longest prompt from one token on: most that it or a shorter one needs."""
    needed = [
        peak_tokens(length, length, config, num_groups, block_size)
        for length in range(1, LONGEST + 1)
    ]
    return list(
        accumulate(needed, lambda most, each: [max(p) for p in zip(most, each, strict=True)])
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", SETTINGS)
def test_no_prompt_needs_more_and_one_needs_nearly_so_much(name: str, shape: str) -> None:
    block_size = 4 if (len(name) + len(shape)) % 2 else 16
    config, num_groups = setting(name, shape), SHAPES[shape][0]
    step, ratio = config.prompt_interval, config.budget.ratio or 0.0
    # Unequal shares are taken as of the longest prompt, which need not have a mark where one is
    # largest; and a window at a mark may lie among the pins.
    slack = block_size + (2 * ratio * step if num_groups > 1 and "equal" not in shape else 0)
    slack += config.observation_window if config.pinned else 0
    needed_by = every_peak(config, num_groups, block_size)
    for max_len in range(1, LONGEST + 1, 3):
        most = needed_by[max_len - 1]
        found = longest_prompt_peak(max_len, config, num_groups, block_size)
        for peak, needed in zip(found, most, strict=True):
            assert needed <= peak <= max(needed + slack, block_size * 2 + step), max_len


@pytest.mark.parametrize(
    "shape", ["pyramid", "steep", "the last layers get most", "linear", "preference"]
)
@pytest.mark.parametrize("ratio", [0.1, 0.4])
def test_shares_are_the_largest_that_any_mark_of_a_long_prompt_leaves(
    shape: str, ratio: float
) -> None:
    config = setting("share", shape, budget={"ratio": ratio, "floor": 1}, prompt_interval=700)
    count, target = SHAPES[shape][0], int(4000 * ratio)
    every = [group_budgets(mark, target, config, count) for mark in range(target, 3300 + 1)]
    largest = [max(shares) for shares in zip(*every, strict=True)]
    assert _largest_shares(4000, config, count) == largest


def test_long_prompts_with_a_budget_of_tokens_need_exactly_so_much() -> None:
    config = setting("tokens", "one group")
    (most,) = every_peak(config, 1, 16)[-1]
    assert longest_prompt_peak(LONGEST, config, 1, 16) == [most] == [70 + 15 + 37]


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"min_prompt_len": 200, "budget": {"tokens": 40, "floor": 1}}, 199),  # has no mark inside
        # 94 pinned tokens, in 6 whole blocks, are more than they and the window.
        ({"pinned": [[0, 94]], "observation_window": 1}, 96 + 15 + 37),
        ({"pinned": [[0, 94]], "observation_window": 8}, 102 + 15 + 37),
    ],
)
def test_what_else_is_held_behind_a_mark(more: dict[str, Any], expected: int) -> None:
    config = setting("tokens", "one group", **more)
    found = longest_prompt_peak(LONGEST, config, 1, 16)
    assert found == [expected] == every_peak(config, 1, 16)[-1] and isinstance(found[0], int)


def test_it_is_what_the_page_says() -> None:
    """Budget in whole blocks, interval, at most one block (docs/long_prompts.md)."""
    for block_size in (16, 32):
        for ratio in (0.12, 0.25):
            config = setting("share", "one group", budget={"ratio": ratio}, prompt_interval=512)
            (found,) = longest_prompt_peak(32_768, config, 1, block_size)
            in_blocks = -(-int(32_768 * ratio) // block_size) * block_size
            assert in_blocks + 512 <= found + block_size <= in_blocks + 512 + 2 * block_size


def test_variants_of_tasks_count_all() -> None:
    def variants(trigger: str) -> CompressionConfig:
        tasks = {"localization": {"budget": {"tokens": 100}}, "aggregation": {"trigger": trigger}}
        config = parse_config({"preset": "windowkv", "trigger": "prompt", "tasks": tasks})
        assert config is not None
        return config

    every = variants("prompt").by_task.values()
    alone = [longest_prompt_peak(50_000, each, 4, 16) for each in every]
    assert longest_prompt_peak(50_000, variants("prompt"), 4, 16) == [
        max(pair) for pair in zip(*alone, strict=True)
    ]
    assert longest_prompt_peak(50_000, variants("both"), 4, 16) == [50_000] * 4
