"""Prompts larger than the pool: served in bounded memory, refused where they cannot be."""

from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest
from vllm.exceptions import VLLMValidationError

from tests.e2e.conftest import assert_idle, opened
from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.core.report import savings_line
from vllm_kvcompress.evaluation.engine import Engine

pytestmark = pytest.mark.engine

SETTING = {
    "preset": "snapkv",
    "trigger": "prompt",
    "prompt_interval": 256,
    "budget": {"tokens": 256},
    "min_prompt_len": 300,
}
PEAK = 16 + 8
"""Blocks of 32 tokens: the budget and an interval, and what is behind the last full block."""
POOL = {"max_model_len": 4096, "num_blocks": PEAK + 1, "max_num_batched_tokens": 200}
LENGTHS = (4090, 3000, 700, 2049, 299, 1500)


def prompt(length: int, seed: int) -> list[int]:
    return [5 + (seed + i * 7919) % 4000 for i in range(length)]


GROUPS = {**SETTING, "preset": "windowkv", "layer_groups": {"count": 4}, "task": "localization"}
GROUPS |= {"policy": {"window_size": 32, "layers_per_leader": None}}
GROUPS |= {"layer_budget": {"shape": "uniform"}}
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "one group": (SETTING, POOL),
    "generated tokens, too": ({**SETTING, "trigger": "all", "interval": 64}, POOL),
    "groups, asynchronous": (
        GROUPS,
        {**POOL, "num_blocks": 4 * PEAK + 1, "async_scheduling": True},
    ),
}


@pytest.fixture(scope="module")
def engine(probe_model: str, request: pytest.FixtureRequest) -> Iterator[Engine]:
    setting, options = KINDS[getattr(request, "param", "one group")]
    with opened(probe_model, setting, **options) as engine:
        yield engine


def most_held(engine: Engine) -> int:
    """Blocks in use at most while everything is served."""
    most = 0
    while engine.engine.has_unfinished_requests():
        engine.step()
        most = max(most, engine.num_usable_blocks - engine.pool.get_num_free_blocks())
        engine.scheduler.check_integrity()
    return most


def test_the_line_at_the_start_says_what_is_held(engine: Engine) -> None:
    line = savings_line(parse_config(SETTING), engine.scheduler.kv_cache_config, 4096)
    assert (
        "back to its budget every 256 tokens of the prompt, counted back from its end: no prompt "
        "holds more than 17 blocks on its way, of the pool's 24" in line
    )


def test_stock_does_not_start_with_such_a_pool(probe_model: str) -> None:
    with pytest.raises(ValueError, match=r"max seq len \(4096\)"):
        Engine(probe_model, None, **POOL)


def test_the_longest_prompt_is_served_within_the_pool(engine: Engine) -> None:
    """4,090 tokens in 768 slots. What is held goes back to the budget at every mark."""
    engine.add("long", prompt(4090, 1), 6, ignore_eos=True)
    assert most_held(engine) <= PEAK
    assert len(engine.results["long"].token_ids) == 6
    counts = engine.scheduler.stats.compactions
    assert counts == {"snapkv/prompt": 15}  # at 506, 762, ..., 3,834, and the end
    assert not engine.num_preemptions
    assert_idle(engine)


@pytest.mark.parametrize("engine", ["one group", "groups, asynchronous"], indirect=True)
def test_tokens_are_the_same_alone_and_in_a_crowd(engine: Engine) -> None:
    prompts = [prompt(length, 100 * seed) for seed, length in enumerate(LENGTHS)]
    alone = []
    for each in prompts:
        alone += engine.generate([each], 12, ignore_eos=True)
    names = [f"crowd-{length}" for length in LENGTHS]
    for name, each in zip(names, prompts, strict=True):
        engine.add(name, each, 12, ignore_eos=True)
    engine.add("aborted", prompt(3500, 7), 12)
    while engine.engine.has_unfinished_requests():
        engine.step()
        engine.scheduler.check_integrity()
        request = engine.live().get("aborted")
        if request is not None and request.num_computed_tokens > 1000:
            engine.abort("aborted")
    assert [engine.results[name].token_ids for name in names] == alone
    assert engine.scheduler.stats.deferrals == 0
    assert len({tuple(tokens) for tokens in alone}) > 1
    assert_idle(engine)


def test_a_prompt_that_keeps_too_much_is_refused(engine: Engine) -> None:
    for extra in ({"kv_compression": "none"}, {"kv_budget_tokens": 700}):
        with pytest.raises(VLLMValidationError, match=r"needs \d+ KV cache blocks .* has 24"):
            engine.add("refused", prompt(4000, 2), 6, extra)
    engine.results.pop("refused")
    short = engine.generate([prompt(600, 2)], 6, {"kv_compression": "none"}, ignore_eos=True)
    assert len(short[0]) == 6
    assert_idle(engine)


def test_an_output_ends_where_the_pool_does(engine: Engine) -> None:
    """As at the end of the model's longest sequence: 24 blocks hold 768 tokens."""
    extra = {"kv_compression": "none"}
    (tokens,) = engine.generate([prompt(700, 3)], 500, extra, ignore_eos=True)
    assert len(tokens) == 68
    (tokens,) = engine.generate([prompt(1024, 3)], 800, ignore_eos=True)
    assert len(tokens) == 512  # behind the 256 that are kept
    assert_idle(engine)


@pytest.mark.parametrize("engine", ["generated tokens, too"], indirect=True)
def test_an_output_that_is_compressed_on_its_way_runs_to_its_end(engine: Engine) -> None:
    """A prompt without a mark, and 299 + 900 tokens in 768 slots."""
    (tokens,) = engine.generate([prompt(299, 6)], 900, ignore_eos=True)
    assert len(tokens) == 900
    assert engine.scheduler.stats.compactions["snapkv/decode"] >= 900 // 64 - 2
    assert not engine.num_preemptions
    assert_idle(engine)


def test_nobody_waits_behind_a_request_that_never_fits(engine: Engine) -> None:
    """Where the API server could not tell, the engine answers with an error."""
    with patch("vllm_kvcompress.host.request_checks.check_pool"):
        engine.add("never", prompt(2000, 4), 6, {"kv_compression": "none"})
    engine.add("next", prompt(2000, 5), 6, ignore_eos=True)
    engine.drain(max_steps=100)
    assert engine.results["never"].finished and not engine.results["never"].token_ids
    assert len(engine.results["next"].token_ids) == 6
    assert_idle(engine)
