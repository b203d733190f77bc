"""A cache of 8 bits together with layer groups, and with adapters or drafts.

vLLM's tokens and those of transformers over the same survivors, held in the same 8 bits. Two ranks:
test_tensor_parallel.py. Adapters and n-gram drafts at once are an error of vLLM's own on a CPU.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from vllm import SamplingParams
from vllm.lora.request import LoRARequest

from tests.e2e import adapters as lora
from tests.e2e.conftest import assert_idle, opened, serving
from tests.e2e.eight_bits import SCALES, EightBitReplay, give_scales, needs_eight_bits
from tests.inside import preempt
from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.evaluation.engine import Engine, Result
from vllm_kvcompress.evaluation.replay import Prefilled
from vllm_kvcompress.evaluation.tasks.needle import make_samples

pytestmark = [pytest.mark.engine, needs_eight_bits]

NUM_TOKENS = 24
GROUPS: dict[str, Any] = {
    "layer_groups": {"count": 4},
    "budget": {"ratio": 0.06, "floor": 1},
    "min_prompt_len": 128,
}
SETTING = {"preset": "pyramidkv", **GROUPS}
NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4}
ENGINES: dict[str, dict[str, Any]] = {"lora": lora.ENGINE}
if os.environ.get("KVCOMPRESS_ALL_MODELS"):  # by hand: the test of two ranks shows it already
    ENGINES["ngram"] = {"speculative_config": NGRAM}


class Asked(NamedTuple):
    """One prompt under one adapter, and the same on transformers, with merged weights."""

    token_ids: list[int]
    adapter: LoRARequest | None
    replay: EightBitReplay
    prefilled: Prefilled


class Served(NamedTuple):
    name: str
    engine: Engine
    asked: list[Asked]


@pytest.fixture(scope="module", params=ENGINES)
def served(
    request: pytest.FixtureRequest, probe_model: str, tokenize, tmp_path_factory
) -> Iterator[Served]:
    prompts = [tokenize(sample.prompt) for sample in make_samples(3, 700, tokenize, seed=11)]
    models: list[tuple[str, LoRARequest | None]] = [(probe_model, None)]
    if request.param == "lora":
        folder: Path = tmp_path_factory.mktemp("merged")
        models = [
            (lora.merged(probe_model, each, folder / each.lora_name), each)
            for each in lora.two_adapters(probe_model, tmp_path_factory.mktemp)
        ]
    asked = []
    for model, adapter in models:
        replay = EightBitReplay(model, tuple(SCALES.values()))
        asked += [Asked(each, adapter, replay, replay.prefill(each)) for each in prompts]
    options = {"max_model_len": 1024, "kv_cache_dtype": "fp8", **ENGINES[request.param]}
    with opened(probe_model, SETTING, **options) as engine:
        give_scales(engine)
        yield Served(request.param, engine, asked)


def ask(served: Served, xargs: dict[str, Any] | None = None) -> list[list[int]]:
    """All prompts at once."""
    engine, names = served.engine, [add(served, each, xargs) for each in served.asked]
    engine.drain()
    return [engine.results[name].token_ids for name in names]


def add(served: Served, asked: Asked, xargs: dict[str, Any] | None = None) -> str:
    """One request; its name."""
    engine, name = served.engine, f"asked-{len(served.engine.results)}"
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, extra_args=xargs, ignore_eos=True)
    engine.results[name] = Result()
    tokens = {"prompt_token_ids": asked.token_ids}
    engine.engine.add_request(name, tokens, params, lora_request=asked.adapter)
    return name


def expected(served: Served, setting: dict[str, Any] | None) -> list[list[int]]:
    config = parse_config(setting)
    return [each.replay.generate(each.prefilled, config, NUM_TOKENS) for each in served.asked]


@pytest.mark.parametrize("preset", ["pyramidkv", "adakv"])
def test_tokens_are_those_of_transformers(served: Served, preset: str) -> None:
    """Four layer groups; cold, and over blocks of the prefix cache."""
    engine, setting = served.engine, {"preset": preset, **GROUPS}
    wanted, compactions = expected(served, setting), engine.scheduler.stats.compactions
    assert wanted != expected(served, None), "what is evicted shows in the tokens"
    before = sum(compactions.values())
    with serving(engine, setting):
        for run in ("cold", "warm"):
            steps = engine.num_steps
            assert ask(served) == wanted, run
            if served.name == "ngram":
                assert engine.num_steps - steps < NUM_TOKENS, "drafts are accepted"
    assert sum(compactions.values()) == before + 2 * len(served.asked)
    assert_idle(engine)


def test_preempted_and_compacted_again(served: Served) -> None:
    engine, asked = served.engine, served.asked[0]
    wanted = asked.replay.generate(asked.prefilled, parse_config(SETTING), NUM_TOKENS)
    compactions = engine.scheduler.stats.compactions
    before, name = sum(compactions.values()), add(served, asked)
    while len(engine.results[name].token_ids) < 8:
        engine.step()
    preempt(engine, engine.live()[name])
    engine.drain()
    assert engine.results[name].token_ids == wanted
    assert sum(compactions.values()) == before + 2
    assert_idle(engine)


def test_what_is_not_compressed_is_stocks(served: Served) -> None:
    wanted = expected(served, None)
    assert ask(served, {"kv_compression": "none"}) == wanted
    assert ask(served, {"kv_budget_ratio": 1.0}) == wanted
    assert_idle(served.engine)
