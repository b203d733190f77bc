"""Compression inside prompts: the engine's tokens are those of a replay over survivors alone.

The replay is held against plain attention by tests/evaluation/test_replay_marks.py. Steps compute
at most 160 tokens and marks are 96 apart, so that chunks end at both.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from lab.random_models import distinct_tokens, write_random_model
from tests.e2e.conftest import assert_idle, opened, serving
from tests.e2e.crowd import CHUNK, check_crowd
from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.core.compactions import prompt_checksum
from vllm_kvcompress.evaluation.engine import Engine
from vllm_kvcompress.evaluation.replay import Replay

pytestmark = pytest.mark.engine

BLOCK, INTERVAL, WINDOW, NUM_TOKENS = 32, 96, 8, 12
SETTING: dict[str, Any] = {
    "preset": "snapkv",
    "layer_groups": {"count": 2},
    "layer_budget": {"shape": "pyramid", "beta": 3},
    "budget": {"ratio": 0.25, "floor": 1},
    "trigger": "prompt",
    "prompt_interval": INTERVAL,
    "observation_window": WINDOW,
    "min_prompt_len": 64,
}
CASES: dict[str, dict[str, Any]] = {
    "the window's queries": {},
    "keys alone": {"preset": "keydiff"},
    "windows, one layer leads": {
        "preset": "windowkv",
        "policy": {"window_size": 32, "layers_per_leader": None},
        "tasks": {},
    },
    "by chance": {"preset": "random"},
    "pins": {"pinned": [[90, 130], [300, 310]]},
    "turned keys": {"preset": "streaming_llm_rerotated"},
    "marks at every chunk's end": {"prompt_interval": CHUNK},
}
LENGTHS = 500, 3 * INTERVAL + WINDOW, 3 * INTERVAL + WINDOW - 1, 97, 421
"""Before the second's first mark lies just a window; the third, one token short, has none there."""


class Served(NamedTuple):
    """A model in both engines."""

    engine: Engine
    replay: Replay


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """Full layers alone, scheduled one step ahead; and windowed layers between them."""
    folder: Path = tmp_path_factory.mktemp(request.param)
    model = str(write_random_model(folder, request.param))
    with opened(
        model,
        SETTING,
        async_scheduling=request.param == "llama",
        skip_tokenizer_init=True,
        max_model_len=1024,
        max_num_batched_tokens=CHUNK,
        block_size=BLOCK,
    ) as engine:
        yield Served(engine, Replay(model, BLOCK))


@pytest.mark.parametrize("name", CASES)
def test_tokens_are_those_of_the_replay(served: Served, name: str) -> None:
    """All requests at once: their marks and chunks fall into each other's steps."""
    engine, replay = served
    setting = {**SETTING, **CASES[name]}
    config = parse_config(setting)
    prompts = [distinct_tokens(length, seed=60 + length) for length in LENGTHS]
    stats = engine.scheduler.stats
    assert engine.scheduler.reset_prefix_cache()
    with serving(engine, setting):
        before = sum(stats.compactions.values())
        for number, prompt in enumerate(prompts):
            engine.add(f"{name}-{number}", prompt, NUM_TOKENS, ignore_eos=True)
        seeds = {
            key: prompt_checksum(each, each.num_prompt_tokens)
            for key, each in engine.live().items()
        }
        engine.drain()
    expected = []
    for number, prompt in enumerate(prompts):
        tokens = engine.results[f"{name}-{number}"].token_ids
        prefilled, seed = replay.prefill(prompt), seeds[f"{name}-{number}"]
        assert replay.generate(prefilled, config, NUM_TOKENS, seed) == tokens, number
        expected.append(tokens)
    assert sum(stats.compactions.values()) - before >= 2 * len(prompts)
    assert stats.deferrals == 0
    at_the_end = parse_config({**setting, "trigger": "end_of_prompt", "prompt_interval": 2048})
    other = replay.generate(replay.prefill(prompts[0]), at_the_end, NUM_TOKENS)
    assert other != expected[0], "or marks change nothing"
    assert_idle(engine)


def test_nothing_lossy_is_found_in_the_prefix_cache(served: Served) -> None:
    """Blocks behind the first eviction hold what was computed over survivors."""
    engine, replay = served
    prompt, none = distinct_tokens(516, seed=1), {"kv_compression": "none"}
    has_windows = len(replay.full_layers) < len(replay.layers)
    prefilled = replay.prefill(prompt)
    whole = replay.generate(prefilled, None, NUM_TOKENS)
    lossy = replay.generate(prefilled, parse_config(SETTING), NUM_TOKENS)
    assert whole != lossy and engine.scheduler.reset_prefix_cache()
    first = 516 - 3 * INTERVAL  # at the marks before it no more is held than the budget
    runs = {
        "first": (None, lossy, 0),
        # All before that mark's window.
        "second": (None, lossy, (first - WINDOW) // BLOCK * BLOCK),
        # All that lies before the mark is exact.
        "whole": (none, whole, first // BLOCK * BLOCK),
        # Now all of the prompt is there, exact; the same is taken as before.
        "third": (None, lossy, (first - WINDOW) // BLOCK * BLOCK),
    }
    for name, (xargs, expected, num_cached) in runs.items():
        engine.add(name, prompt, NUM_TOKENS, xargs, ignore_eos=True)
        engine.drain()
        assert engine.results[name].token_ids == expected, name
        found = engine.results[name].num_cached_tokens
        # Windowed layers keep fewer blocks in the cache, and all layers must have a hit.
        assert found == num_cached or (has_windows and found < num_cached), name
    assert_idle(engine)


def test_a_crowd(served: Served) -> None:
    check_crowd(*served, SETTING)
    assert_idle(served.engine)
