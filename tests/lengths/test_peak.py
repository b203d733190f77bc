"""Most slots that a request needs: compactions inside its prompt bound them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.lengths.peak import peak_tokens


def setting(**more: object) -> CompressionConfig:
    config = parse_config(
        {
            "preset": "snapkv",
            "trigger": "prompt",
            "prompt_interval": 500,
            "budget": {"tokens": 256},
            **more,
        }
    )
    assert config is not None
    return config


@pytest.mark.parametrize(
    ("prompt_len", "num_tokens", "expected"),
    [
        (1900, 1900, 780),  # 256 + 24 behind the last full block of 1,400 + 500
        (100_000, 100_000, 256 + 28 + 500),
        (1900, 300, 300),
        (1900, 700, 572),  # 272 of the first 400, and 300
        (1900, 2900, 1256 + 12),  # 1,000 generated tokens come behind 268
        (400, 400, 400),  # shorter than min_prompt_len
    ],
)
def test_by_hand(prompt_len: int, num_tokens: int, expected: int) -> None:
    assert peak_tokens(prompt_len, num_tokens, setting(), 1, 32) == [expected]


def test_without_the_trigger_all_of_the_prompt_is_held() -> None:
    config = setting(trigger="end_of_prompt", prompt_interval=2048)
    assert peak_tokens(100_000, 100_000, config, 2, 16) == [100_000] * 2


def test_groups_differ_where_their_budgets_do() -> None:
    config = setting(
        budget={"ratio": 0.1}, layer_groups={"count": 2}, layer_budget={"shape": "pyramid"}
    )
    first, second = peak_tokens(20_000, 20_000, config, 2, 16)
    assert second <= 2000 + 500 < first < 5000


@settings(deadline=None)
@given(st.integers(512, 5000), st.integers(0, 400), st.sampled_from([64, 500, 1999]))
def test_it_is_what_the_planner_ever_holds(prompt_len: int, extra: int, interval: int) -> None:
    from tests.core.test_planner import compact
    from vllm_kvcompress.core.planner import Planner
    from vllm_kvcompress.request_options import parse_request

    config = setting(prompt_interval=interval)
    plan = Planner(config, 1, block_size=32)
    tracked = plan.add("r", prompt_len, parse_request(None))
    done, held = 0, 0
    while done < prompt_len + extra:
        done += plan.clip_chunk("r", done, min(300, prompt_len + extra - done), prompt_len + extra)
        held = max(held, tracked.compaction.caches_at(done)[0].num_tokens)
        if plan.note_progress("r", done):
            compact(plan)
    assert peak_tokens(prompt_len, prompt_len + extra, config, 1, 32) == [held]
