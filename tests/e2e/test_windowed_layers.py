"""Models some of whose layers attend to a window: the others are compacted, and only they.

The reference is transformers over the same survivors (`Replay`), with windows as Hugging Face has
them.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lab.random_models import distinct_tokens, write_random_model
from tests.e2e.conftest import assert_idle, held, opened, serving
from tests.e2e.crowd import check_crowd
from tests.inside import managers, preempt
from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.core.block_manager import CompressedAttentionManager
from vllm_kvcompress.core.host_groups import HostGroup
from vllm_kvcompress.evaluation.engine import Engine
from vllm_kvcompress.evaluation.inspection import load_replay
from vllm_kvcompress.evaluation.replay import Prefilled, Replay
from vllm_kvcompress.evaluation.replay_batch import ReplayBatch

pytestmark = pytest.mark.engine

BLOCK, WINDOW, NUM_TOKENS = 32, 96, 12
SETTING: dict[str, Any] = {
    "preset": "snapkv",
    "budget": {"ratio": 0.25, "floor": 1},
    "min_prompt_len": 64,
}
TWO_GROUPS = {**SETTING, "preset": "pyramidkv", "layer_groups": {"count": 2}}
DECODING = {**TWO_GROUPS, "trigger": "both", "interval": 32}
ENGINE: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "max_model_len": 1024,
    "max_num_batched_tokens": 160,
    "block_size": BLOCK,
    # Hash all blocks of windowed layers, not only those at the end of prompts: more to be found.
    "prefix_cache_retention_interval": None,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp("gemma3")
    return str(write_random_model(folder, "gemma3"))


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    return distinct_tokens(500)


@pytest.fixture(scope="module")
def engine(model: str) -> Iterator[Engine]:
    with opened(model, SETTING, **ENGINE) as engine:
        yield engine


@pytest.fixture(scope="module")
def replay(model: str) -> Replay:
    return Replay(model, BLOCK)


@pytest.fixture(scope="module")
def prefilled(replay: Replay, prompt: list[int]) -> Prefilled:
    return replay.prefill(prompt)


@pytest.fixture(scope="module")
def whole(replay: Replay, prefilled: Prefilled) -> list[int]:
    """Tokens of the uncompressed model."""
    return replay.generate(prefilled, None, NUM_TOKENS)


def test_the_full_layers_alone_are_compacted(
    engine: Engine, replay: Replay, prefilled: Prefilled, whole: list[int], prompt: list[int]
) -> None:
    assert {type(each) for each in managers(engine)} == {CompressedAttentionManager, HostGroup}
    engine.add("kept", prompt, NUM_TOKENS, {"kv_compression": "none"}, ignore_eos=True)
    engine.drain()
    assert engine.results["kept"].token_ids == whole
    engine.add("compressed", prompt, NUM_TOKENS, ignore_eos=True)
    while len(engine.results["compressed"].token_ids) < 3:
        engine.step()
        engine.scheduler.check_integrity()
    blocks = held(engine, "compressed")
    assert blocks[True] == [5], "25 % of 500 tokens is 4 blocks of 32, and the tail"
    assert all(count <= -(-WINDOW // BLOCK) + 1 for count in blocks[False])
    engine.drain()
    assert_idle(engine)
    expected = replay.generate(prefilled, parse_config(SETTING), NUM_TOKENS)
    assert engine.results["compressed"].token_ids == expected != whole


def test_settings_that_eval_measures_together_are_the_engines(
    engine: Engine, model: str, prompt: list[int]
) -> None:
    """Caches of unequal lengths that are decoded at once, as `kvcompress eval` and `tune` do it."""
    replay = load_replay(Path(model), BLOCK)
    prefilled = replay.prefill(prompt)
    settings: list[dict[str, Any] | None] = [
        {**SETTING, "preset": preset, "budget": {"ratio": ratio, "floor": 1}}
        for preset in ("snapkv", "tova")
        for ratio in (0.5, 0.12)
    ]
    settings.append(None)
    caches = [replay.rows(prefilled, parse_config(setting))[0] for setting in settings]
    first = torch.full((len(caches),), prefilled.first_token)
    expected = ReplayBatch(replay, caches, len(prompt)).decode(first, NUM_TOKENS)
    assert len({tuple(tokens) for tokens in expected}) == len(settings)
    for setting, tokens in zip(settings, expected, strict=True):
        options = {"kv_compression": "none"} if setting is None else None
        with serving(engine, setting or SETTING):
            found = engine.generate([prompt], NUM_TOKENS, options, ignore_eos=True)
        assert found == [tokens], setting


@pytest.mark.parametrize("preset", ["windowkv", "keydiff", "expected_attention", "criticalkv"])
def test_other_policies(
    engine: Engine, replay: Replay, prefilled: Prefilled, prompt: list[int], preset: str
) -> None:
    task = {"task": "aggregation"} if preset == "windowkv" else {}
    setting = {**SETTING, "preset": preset, **task}
    with serving(engine, setting):
        engine.add(preset, prompt, NUM_TOKENS, ignore_eos=True)
        engine.drain()
    config = parse_config(setting)
    assert config is not None
    expected = replay.generate(prefilled, config.by_task.get("aggregation", config), NUM_TOKENS)
    assert engine.results[preset].token_ids == expected


def test_a_hit_that_ends_inside_the_window_gives_the_tokens_of_a_cold_run(
    engine: Engine, replay: Replay, prompt: list[int]
) -> None:
    """The hit is bounded before the windowed layers' blocks are chosen, not cut afterwards.

    vLLM would find 512 tokens, and blocks of the window before them.
    """
    tokens = distinct_tokens(520, seed=3)
    engine.add("first", tokens, NUM_TOKENS, ignore_eos=True)
    engine.drain()
    engine.add("again", tokens, NUM_TOKENS, ignore_eos=True)
    engine.drain()
    cold, warm = engine.results["first"], engine.results["again"]
    assert warm.num_cached_tokens == 480, "520 less the observation window, in whole blocks"
    expected = replay.generate(replay.prefill(tokens), parse_config(SETTING), NUM_TOKENS)
    assert cold.token_ids == warm.token_ids == expected


def test_what_follows_a_compaction_is_found_by_nobody(engine: Engine, replay: Replay) -> None:
    """Windowed layers hash none of it either: an uncompressed request may hash the same tokens."""
    tokens = distinct_tokens(400, seed=4)
    engine.add("lossy", tokens, 80, ignore_eos=True)
    while len(engine.results["lossy"].token_ids) < 70:
        engine.step()
    request_id = engine.live()["lossy"].request_id
    for manager in managers(engine):
        if isinstance(manager, HostGroup):
            full = manager.req_to_blocks[request_id][13:14]  # of tokens 416 to 448
            assert [block.block_hash for block in full if not block.is_null] == [None]
    engine.drain()
    longer = tokens + engine.results["lossy"].token_ids
    engine.add("exact", longer, NUM_TOKENS, {"kv_compression": "none"}, ignore_eos=True)
    engine.drain()
    assert engine.results["exact"].num_cached_tokens == 384, "the blocks of the prompt alone"
    engine.add("hit", longer, NUM_TOKENS, {"kv_compression": "none"}, ignore_eos=True)
    engine.drain()
    expected = replay.generate(replay.prefill(longer), None, NUM_TOKENS)
    for name in ("exact", "hit"):
        assert engine.results[name].token_ids == expected, name
    assert (engine.results["hit"].num_cached_tokens or 0) > 384


def test_preempted_and_compacted_again(engine: Engine, prompt: list[int]) -> None:
    tokens = distinct_tokens(450, seed=5)
    engine.add("alone", tokens, 24, ignore_eos=True)
    engine.drain()
    engine.add("preempted", tokens, 24, ignore_eos=True)
    while len(engine.results["preempted"].token_ids) < 8:
        engine.step()
    preempt(engine, engine.live()["preempted"])
    engine.drain()
    assert_idle(engine)
    assert engine.results["preempted"].token_ids == engine.results["alone"].token_ids


def test_a_crowd_in_a_small_pool(engine: Engine, replay: Replay) -> None:
    check_crowd(engine, replay, SETTING)
    assert_idle(engine)


def test_two_layer_groups_and_decoding(model: str, prompt: list[int], replay: Replay) -> None:
    with opened(model, DECODING, **ENGINE) as engine:
        own = [each for each in managers(engine) if isinstance(each, CompressedAttentionManager)]
        assert len(own) == 2
        engine.add("two", prompt, NUM_TOKENS, ignore_eos=True)
        engine.drain()
        expected = replay.generate(replay.prefill(prompt), parse_config(TWO_GROUPS), NUM_TOKENS)
        assert engine.results["two"].token_ids == expected
        engine.add("long", prompt, 100, ignore_eos=True)
        engine.drain()
        assert engine.scheduler.stats.compactions["snapkv/decode"] >= 2
        assert_idle(engine)
