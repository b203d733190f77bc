"""Models that vLLM runs with transformers' modules around its own attention.

No model here has a class in vLLM. SmolLM3 has layers without rotary embedding, OLMo 2 norms over
all heads at once, Hunyuan norms keys once they are turned, Seed-OSS has biases. The reference is
transformers over the same survivors (`Replay`).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm.config import set_current_vllm_config
from vllm.exceptions import VLLMValidationError

from lab.random_models import distinct_tokens, write_random_model
from tests.e2e.conftest import assert_idle, opened, serving
from tests.e2e.crowd import check_crowd
from tests.inside import managers, preempt
from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.core.block_manager import CompressedAttentionManager
from vllm_kvcompress.core.host_groups import HostGroup
from vllm_kvcompress.errors import ConfigError
from vllm_kvcompress.evaluation.engine import Engine
from vllm_kvcompress.evaluation.replay import Prefilled, Replay
from vllm_kvcompress.host.part_checks import on_transformers_backend
from vllm_kvcompress.request_options import parse_request, resolve_request

pytestmark = pytest.mark.engine

BLOCK, NUM_TOKENS = 32, 12
SETTING: dict[str, Any] = {
    "preset": "snapkv",
    "budget": {"ratio": 0.25, "floor": 1},
    "min_prompt_len": 64,
}
TWO_GROUPS = {**SETTING, "layer_groups": {"count": 2}}
CODED = {
    **TWO_GROUPS,
    "preset": "spindlekv",
    "budget": {"ratio": 0.4, "floor": 1},
    "codebook": {"groups": [0], "shallow": None},
}
ENGINE: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "max_model_len": 1024,
    "max_num_batched_tokens": 160,  # prompts come in chunks
    "block_size": BLOCK,
}


@pytest.fixture(scope="module")
def smollm3(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp("smollm3")
    return str(write_random_model(folder, "smollm3"))


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    return distinct_tokens(500)


@pytest.fixture(scope="module")
def engine(smollm3: str) -> Iterator[Engine]:
    with opened(smollm3, SETTING, **ENGINE) as engine:
        assert on_transformers_backend(engine.scheduler.vllm_config.model_config)
        yield engine


def replay_beside(engine: Engine, model: str) -> Replay:
    """vLLM has decorated transformers' classes by now: they ask for its configuration."""
    with set_current_vllm_config(engine.scheduler.vllm_config):
        return Replay(model, BLOCK)


@pytest.fixture(scope="module")
def replay(engine: Engine, smollm3: str) -> Replay:
    return replay_beside(engine, smollm3)


@pytest.fixture(scope="module")
def prefilled(replay: Replay, prompt: list[int]) -> Prefilled:
    return replay.prefill(prompt)


def test_layers_have_the_parts_that_they_have(engine: Engine) -> None:
    layers = engine.runner.compactor.layers
    assert [bool(layer.rotary.inv_freq.any()) for layer in layers] == [True, False, True, False]
    for layer in layers:
        around = engine.runner.model.get_submodule(layer.name.rpartition(".")[0])
        weight = around.o_proj.weight
        found = layer.output_projection().transpose(0, 1).flatten(1)
        if weight.shape == found.shape:  # where vLLM has not packed it
            assert found.equal(weight)


def test_engine_and_transformers_agree(
    engine: Engine, replay: Replay, prefilled: Prefilled, prompt: list[int]
) -> None:
    whole = replay.generate(prefilled, None, NUM_TOKENS)
    engine.add("kept", prompt, NUM_TOKENS, {"kv_compression": "none"}, ignore_eos=True)
    engine.drain()
    assert engine.results["kept"].token_ids == whole
    engine.add("compressed", prompt, NUM_TOKENS, ignore_eos=True)
    engine.drain()
    assert_idle(engine)
    expected = replay.generate(prefilled, parse_config(SETTING), NUM_TOKENS)
    assert engine.results["compressed"].token_ids == expected != whole


@pytest.mark.parametrize("preset", ["keydiff", "expected_attention", "criticalkv", "h2o"])
def test_presets_that_a_request_names(
    engine: Engine, replay: Replay, prefilled: Prefilled, prompt: list[int], preset: str
) -> None:
    """Expected attention turns queries in the layers that have a rotary embedding alone."""
    extra = {"kv_compression": preset, "kv_budget_ratio": 0.25}
    engine.add(preset, prompt, NUM_TOKENS, extra, ignore_eos=True)
    engine.drain()
    server = parse_config(SETTING)
    assert server is not None
    config = resolve_request(server, parse_request(extra))
    expected = replay.generate(prefilled, config, NUM_TOKENS)
    assert engine.results[preset].token_ids == expected


@pytest.mark.parametrize("preset", ["streaming_llm_rerotated", "spindlekv"])
def test_a_request_is_refused_what_its_layers_cannot_do(
    engine: Engine, prompt: list[int], preset: str
) -> None:
    with pytest.raises(VLLMValidationError, match="some layers of .* have no rotary .*keydiff"):
        engine.add("refused", prompt, NUM_TOKENS, {"kv_compression": preset})
    assert_idle(engine)


def test_a_server_is_refused_the_same_before_weights_are_loaded(smollm3: str) -> None:
    from vllm.engine.arg_utils import EngineArgs

    args = EngineArgs(model=smollm3, additional_config={"kv_compression": "spindlekv"})
    with pytest.raises(ConfigError, match=r"policy\.name: spindlekv .*choose one of the presets"):
        args.create_engine_config()


def test_prefix_hits_and_preemption(engine: Engine, replay: Replay) -> None:
    tokens = distinct_tokens(512, seed=3)
    expected = replay.generate(replay.prefill(tokens), parse_config(SETTING), NUM_TOKENS)
    for name in ("cold", "warm", "preempted"):
        engine.add(name, tokens, NUM_TOKENS, ignore_eos=True)
        if name == "preempted":
            while len(engine.results[name].token_ids) < 5:
                engine.step()
            preempt(engine, engine.live()[name])
        engine.drain()
        assert_idle(engine)
        assert engine.results[name].token_ids == expected, name
    assert engine.results["warm"].num_cached_tokens == 480


def test_a_crowd_in_a_small_pool(engine: Engine, replay: Replay) -> None:
    check_crowd(engine, replay, SETTING)
    assert_idle(engine)


def test_decoding_is_compacted_too(engine: Engine, prompt: list[int]) -> None:
    with serving(engine, {**SETTING, "preset": "keydiff", "trigger": "both", "interval": 32}):
        engine.add("long", prompt, 100, ignore_eos=True)
        engine.drain()
    assert engine.scheduler.stats.compactions["keydiff/decode"] >= 2
    assert_idle(engine)


def test_olmo2_with_two_layer_groups_and_a_codebook(tmp_path: Path, prompt: list[int]) -> None:
    model = str(write_random_model(tmp_path, "olmo2"))
    with opened(model, CODED, **ENGINE) as engine:
        replay = replay_beside(engine, model)
        prefilled = replay.prefill(prompt)
        whole = replay.generate(prefilled, None, NUM_TOKENS)
        assert on_transformers_backend(engine.scheduler.vllm_config.model_config)
        assert len(managers(engine)) == 2
        settings = {
            "coded": CODED,
            "pyramidkv": {**TWO_GROUPS, "preset": "pyramidkv"},
            "turned": {**TWO_GROUPS, "preset": "streaming_llm_rerotated"},
            "expected": {**TWO_GROUPS, "preset": "expected_attention"},
        }
        for name, setting in settings.items():
            with serving(engine, setting):
                engine.add(name, prompt, NUM_TOKENS, ignore_eos=True)
                engine.drain()
                assert_idle(engine)
            expected = replay.generate(prefilled, parse_config(setting), NUM_TOKENS)
            assert engine.results[name].token_ids == expected != whole, name


def test_olmo3_whose_other_layers_have_windows(tmp_path: Path, prompt: list[int]) -> None:
    model = str(write_random_model(tmp_path, "olmo3"))
    with opened(model, SETTING, **ENGINE) as engine:
        replay = replay_beside(engine, model)
        prefilled = replay.prefill(prompt)
        whole = replay.generate(prefilled, None, NUM_TOKENS)
        kinds = [type(each) for each in managers(engine)]
        assert kinds == [HostGroup, CompressedAttentionManager]
        for preset in ("snapkv", "keydiff", "h2o", "criticalkv"):
            setting = {**SETTING, "preset": preset}
            expected = replay.generate(prefilled, parse_config(setting), NUM_TOKENS)
            with serving(engine, setting):
                for run in ("cold", "warm"):
                    engine.add(f"{preset}-{run}", prompt, NUM_TOKENS, ignore_eos=True)
                    engine.drain()
                    found = engine.results[f"{preset}-{run}"].token_ids
                    assert found == expected != whole, (preset, run)
        assert_idle(engine)


@pytest.mark.parametrize("name", ["hunyuan", "seed_oss"])
def test_others_with_two_layer_groups(tmp_path: Path, prompt: list[int], name: str) -> None:
    model = str(write_random_model(tmp_path, name))
    with opened(model, TWO_GROUPS, **ENGINE) as engine:
        replay = replay_beside(engine, model)
        prefilled = replay.prefill(prompt)
        whole = replay.generate(prefilled, None, NUM_TOKENS)
        assert on_transformers_backend(engine.scheduler.vllm_config.model_config)
        assert len(managers(engine)) == 2
        for preset in ("pyramidkv", "criticalkv", "expected_attention"):
            if (name, preset) == ("hunyuan", "expected_attention"):
                with pytest.raises(VLLMValidationError, match="how layers turn them in .* not kno"):
                    engine.add(preset, prompt, NUM_TOKENS, {"kv_compression": preset})
                continue
            setting = {**TWO_GROUPS, "preset": preset}
            expected = replay.generate(prefilled, parse_config(setting), NUM_TOKENS)
            with serving(engine, setting):
                for run in ("cold", "warm"):
                    engine.add(f"{preset}-{run}", prompt, NUM_TOKENS, ignore_eos=True)
                    engine.drain()
                    found = engine.results[f"{preset}-{run}"].token_ids
                    assert found == expected != whole, (preset, run)
        assert_idle(engine)
