"""Models with windowed layers and something else: soft caps, sinks, no RoPE, heads of two sizes.

For each a tiny random model of the real class: vLLM's tokens and those of transformers over the
same survivors, by policies that read queries of a window, of the whole prompt, and keys alone.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from lab.random_models import distinct_tokens, write_random_model
from tests.e2e.conftest import assert_idle, opened, serving
from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.evaluation.engine import Engine
from vllm_kvcompress.evaluation.replay import Replay

pytestmark = pytest.mark.engine

BLOCK, NUM_TOKENS = 32, 12
SETTING: dict[str, Any] = {
    "preset": "snapkv",
    "budget": {"ratio": 0.25, "floor": 1},
    "min_prompt_len": 64,
}
BOOK = {"shallow": 1.0, "entries": 0.5, "key_threshold": 0.9, "value_threshold": 0.9}
SERVED = ["gemma2", "gemma4", "gpt_oss", "exaone4"]
if os.environ.get("KVCOMPRESS_ALL_MODELS"):  # by hand: it adds what exaone4 shows already
    SERVED.append("cohere2")


class Served(NamedTuple):
    """A model in both engines."""

    name: str
    engine: Engine
    replay: Replay


@pytest.fixture(scope="module", params=SERVED)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    folder: Path = tmp_path_factory.mktemp(request.param)
    model = str(write_random_model(folder, request.param))
    engine: dict[str, Any] = {
        "skip_tokenizer_init": True, "max_model_len": 1024, "max_num_batched_tokens": 160,
        "block_size": BLOCK,
    }  # fmt: skip
    with opened(model, SETTING, **engine) as engine:
        yield Served(request.param, engine, Replay(model, BLOCK))


def check(served: Served, name: str, setting: dict[str, Any] | None) -> None:
    """Equal tokens, twice: the second time the prompt's blocks are found in the cache."""
    engine, replay, prompt = served.engine, served.replay, distinct_tokens(500)
    expected = replay.generate(replay.prefill(prompt), parse_config(setting), NUM_TOKENS)
    options = {"kv_compression": "none"} if setting is None else None
    with serving(engine, setting or SETTING):
        for run in ("cold", "warm"):
            engine.add(f"{name}-{run}", prompt, NUM_TOKENS, options, ignore_eos=True)
            engine.drain()
            assert engine.results[f"{name}-{run}"].token_ids == expected, (name, run)
    assert_idle(engine)


def test_stock(served: Served) -> None:
    check(served, "stock", None)


@pytest.mark.parametrize("preset", ["snapkv", "h2o", "cake", "criticalkv", "keydiff", "spindlekv"])
def test_policies(served: Served, preset: str) -> None:
    setting = {**SETTING, "preset": preset}
    if preset == "spindlekv":  # scores every query head alone; its preset asks for layer groups
        setting = {**SETTING, "policy": {"name": "spindlekv"}}
    check(served, preset, setting)


@pytest.mark.parametrize("preset", ["expected_attention", "codebook"])
def test_what_needs_a_plain_rotary_embedding(served: Served, preset: str) -> None:
    """In layers that turn nothing, nothing is turned back."""
    if served.name in ("gemma4", "gpt_oss"):
        pytest.skip("scaled rotary embedding: refused, see tests/host")
    setting = {**SETTING, "preset": preset}
    if preset == "codebook":
        setting = {**SETTING, "codebook": BOOK}
    check(served, preset, setting)
