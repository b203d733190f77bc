"""Latent attention (MLA): one row per token for all heads, scored with absorbed queries.

The reference is transformers over the same survivors (`LatentReplay`), which caches latents, too.
The engine computes in float32, with the prefix cache and prompts in chunks as on a GPU.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lab.latent_engine import ENGINE, as_on_a_gpu
from lab.random_models import distinct_tokens, write_random_model
from lab.torch_rotary import rotary_in_torch
from tests.e2e.conftest import assert_idle, held, opened, serving
from tests.e2e.crowd import check_crowd
from tests.inside import managers, preempt
from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.evaluation.engine import Engine
from vllm_kvcompress.evaluation.replay import Prefilled
from vllm_kvcompress.evaluation.replay_latent import LatentReplay
from vllm_kvcompress.evaluation.seeds import prompt_seed
from vllm_kvcompress.spec import CompressedMLASpec

pytestmark = pytest.mark.engine

BLOCK, NUM_TOKENS = 16, 12
SETTING: dict[str, Any] = {
    "preset": "snapkv",
    "budget": {"ratio": 0.25, "floor": 1},
    "min_prompt_len": 64,
}
TWO_GROUPS = {
    **SETTING,
    "preset": "pyramidkv",
    "layer_groups": {"count": 2},
    "trigger": "both",
    "interval": 32,
}
OPTIONS: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "max_model_len": 1024,
    "max_num_batched_tokens": 160,
    **ENGINE,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp("deepseek")
    return str(write_random_model(folder, "deepseek_v3"))


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    return distinct_tokens(500)


@pytest.fixture(scope="module")
def engine(model: str) -> Iterator[Engine]:
    with as_on_a_gpu(), opened(model, SETTING, **OPTIONS) as engine:
        yield engine


@pytest.fixture(scope="module")
def replay(model: str) -> LatentReplay:
    return LatentReplay(model, BLOCK)


@pytest.fixture(scope="module")
def prefilled(replay: LatentReplay, prompt: list[int]) -> Prefilled:
    return replay.prefill(prompt)


@pytest.fixture(scope="module")
def whole(replay: LatentReplay, prefilled: Prefilled) -> list[int]:
    """Tokens of the uncompressed model."""
    return replay.generate(prefilled, None, NUM_TOKENS)


def test_a_compressed_request_holds_fewer_blocks_and_says_what_transformers_say(
    engine: Engine, replay: LatentReplay, prefilled: Prefilled, whole: list[int], prompt: list[int]
) -> None:
    assert [type(each.kv_cache_spec) for each in managers(engine)] == [CompressedMLASpec]
    engine.add("kept", prompt, NUM_TOKENS, {"kv_compression": "none"}, ignore_eos=True)
    engine.drain()
    assert engine.results["kept"].token_ids == whole
    engine.add("compressed", prompt, NUM_TOKENS, ignore_eos=True)
    while len(engine.results["compressed"].token_ids) < 3:
        engine.step()
        engine.scheduler.check_integrity()
    assert held(engine, "compressed")[True] == [9], (
        "25 % of 500 tokens is 8 blocks of 16, and the tail"
    )
    engine.drain()
    assert_idle(engine)
    expected = replay.generate(prefilled, parse_config(SETTING), NUM_TOKENS)
    assert engine.results["compressed"].token_ids == expected != whole


INSIDE = {"trigger": "prompt", "prompt_interval": 96}
PRESETS = [
    "snapkv",
    "windowkv",
    "tova",
    "knorm",
    "keydiff",
    "random",
    "streaming_llm",
    "rkv",
    "cake",
]
MORE = {
    "windowkv": {"task": "aggregation"},
    "rkv": {"trigger": "both"},
    "snapkv": INSIDE,
    "knorm": INSIDE,
}


@pytest.mark.parametrize("preset", PRESETS)
def test_other_policies(
    engine: Engine, replay: LatentReplay, prefilled: Prefilled, prompt: list[int], preset: str
) -> None:
    setting = {**SETTING, "preset": preset, **MORE.get(preset, {})}
    with serving(engine, setting):
        engine.add(preset, prompt, NUM_TOKENS, ignore_eos=True)
        engine.drain()
    config = parse_config(setting)
    assert config is not None
    config = config.by_task.get("aggregation", config)
    expected = replay.generate(prefilled, config, NUM_TOKENS, prompt_seed(prompt))
    assert engine.results[preset].token_ids == expected


def test_a_prefix_hit_gives_the_tokens_of_a_cold_run(engine: Engine, replay: LatentReplay) -> None:
    tokens = distinct_tokens(512, seed=3)
    engine.add("first", tokens, NUM_TOKENS, ignore_eos=True)
    engine.drain()
    engine.add("again", tokens, NUM_TOKENS, ignore_eos=True)
    engine.drain()
    cold, warm = engine.results["first"], engine.results["again"]
    assert (cold.num_cached_tokens, warm.num_cached_tokens) == (0, 496), (
        "less the window, in blocks"
    )
    expected = replay.generate(replay.prefill(tokens), parse_config(SETTING), NUM_TOKENS)
    assert cold.token_ids == warm.token_ids == expected


def test_what_follows_a_compaction_is_found_by_nobody(engine: Engine, replay: LatentReplay) -> None:
    tokens = distinct_tokens(400, seed=4)
    engine.add("lossy", tokens, 80, ignore_eos=True)
    engine.drain()
    longer = tokens + engine.results["lossy"].token_ids
    engine.add("exact", longer, NUM_TOKENS, {"kv_compression": "none"}, ignore_eos=True)
    engine.drain()
    assert engine.results["exact"].num_cached_tokens == 400, "the blocks of the prompt alone"
    expected = replay.generate(replay.prefill(longer), None, NUM_TOKENS)
    assert engine.results["exact"].token_ids == expected


def test_preempted_and_compacted_again(engine: Engine) -> None:
    """What it had generated is computed again in chunks over what the compaction kept."""
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


def test_requests_of_all_kinds_in_one_batch(
    engine: Engine, replay: LatentReplay, prefilled: Prefilled, whole: list[int], prompt: list[int]
) -> None:
    """Decodes over a compacted past beside chunks of a prompt, which take another way."""
    other = distinct_tokens(470, seed=6)
    engine.add("early", prompt, 30, ignore_eos=True)
    while len(engine.results["early"].token_ids) < 4:
        engine.step()
    engine.add("late", other, NUM_TOKENS, ignore_eos=True)
    engine.add("plain", prompt, NUM_TOKENS, {"kv_compression": "none"}, ignore_eos=True)
    engine.drain()
    config = parse_config(SETTING)
    assert engine.results["early"].token_ids == replay.generate(prefilled, config, 30)
    assert engine.results["late"].token_ids == replay.generate(
        replay.prefill(other), config, NUM_TOKENS
    )
    assert engine.results["plain"].token_ids == whole


def test_a_crowd_in_a_small_pool(engine: Engine, replay: LatentReplay) -> None:
    check_crowd(engine, replay, SETTING)
    assert_idle(engine)


def test_two_layer_groups_and_decoding(
    model: str, prompt: list[int], prefilled: Prefilled, replay: LatentReplay
) -> None:
    """What a preempted request had generated is computed again in chunks, over evicted rows."""
    with as_on_a_gpu(), opened(model, TWO_GROUPS, **OPTIONS) as engine:
        assert len(managers(engine)) == 2
        engine.add("alone", prompt, 100, ignore_eos=True)
        engine.drain()
        expected = replay.generate(prefilled, parse_config(TWO_GROUPS), 32)
        assert engine.results["alone"].token_ids[:32] == expected
        assert engine.scheduler.stats.compactions["snapkv/decode"] >= 2
        engine.add("preempted", prompt, 100, ignore_eos=True)
        while len(engine.results["preempted"].token_ids) < 80:
            engine.step()
            engine.scheduler.check_integrity()
        preempt(engine, engine.live()["preempted"])
        engine.drain()
        assert engine.results["preempted"].token_ids == engine.results["alone"].token_ids
        assert_idle(engine)


def test_the_absorbed_queries_are_those_of_the_heads(engine: Engine) -> None:
    """Products with rows of the cache, in float64, against keys of heads."""
    layer = next(iter(engine.runner.compacted_layers.by_name().values()))
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(8, 5, 96, generator=generator)
    rows = torch.randn(7, 576, generator=generator)
    cached = engine.runner.compactor.layers[0].layout
    found = cached.absorb(query).double() @ rows.double().T
    up = layer.kv_b_proj.weight.double().view(8, 64, 512)[:, :32]
    keys = torch.cat(
        [rows[:, :512].double() @ up.transpose(1, 2), rows[:, 512:].double().expand(8, -1, -1)], -1
    )
    torch.testing.assert_close(found, query.double() @ keys.transpose(1, 2), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["deepseek_v2", "glm4_moe_lite"])
def test_other_families_with_two_layer_groups(tmp_path: Path, prompt: list[int], name: str) -> None:
    """V2 Lite does not compress queries, GLM-4.7-Flash has no YaRN."""
    other = str(write_random_model(tmp_path, name))
    replay = LatentReplay(other, BLOCK)
    prefilled = replay.prefill(prompt)
    whole = replay.generate(prefilled, None, NUM_TOKENS)
    setting = {**TWO_GROUPS, "trigger": "end_of_prompt"}
    expected = replay.generate(prefilled, parse_config(setting), NUM_TOKENS)
    with as_on_a_gpu(), rotary_in_torch(), opened(other, setting, **OPTIONS) as engine:
        assert [type(each.kv_cache_spec) for each in managers(engine)] == [CompressedMLASpec] * 2
        for run, xargs in (("kept", {"kv_compression": "none"}), ("cold", None), ("warm", None)):
            engine.add(run, prompt, NUM_TOKENS, xargs, ignore_eos=True)
            engine.drain()
        assert engine.results["kept"].token_ids == whole
        assert engine.results["cold"].token_ids == expected != whole
        assert engine.results["warm"].token_ids == expected
        assert_idle(engine)
