"""Models some of whose layers have a recurrent state: those that attend are compacted, only they.

The reference is transformers over the same survivors (`Replay`), whose recurrent layers go on from
the state that the whole prompt has left. Granite 4 has Mamba layers and runs with prefix caching
(vLLM's mode "align": states are kept at block boundaries), LFM2 has short convolutions and runs
without (mode "none": one state per request). Qwen3-Next and Qwen3.5 have linear attention.

vLLM on a CPU has three faults that would hide what is tested; none concerns compression:

- its Mamba kernel cannot export a state from within a chunk of a prompt, although its layer says
  so, and the server ends with an IndexError at the first prompt;
- its rotary kernel misreads queries of three dimensions, as LFM2's are;
- its linear attention takes bfloat16 alone, in which rounding decides on these models' tokens.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from vllm.model_executor.layers.mamba.mamba_mixer2 import MambaMixer2
from vllm.platforms import current_platform

from lab.delta_rule import in_any_precision
from lab.random_hybrids import write_random_hybrid
from lab.random_models import distinct_tokens
from lab.text_of_multimodal import served_as_text
from lab.torch_rotary import rotary_in_torch
from tests.e2e.conftest import assert_idle, held, opened, serving
from tests.e2e.crowd import check_crowd
from tests.inside import managers, preempt
from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.core.block_manager import CompressedAttentionManager
from vllm_kvcompress.core.host_groups import HostGroup
from vllm_kvcompress.evaluation.engine import Engine
from vllm_kvcompress.evaluation.replay import Replay

pytestmark = pytest.mark.engine

BLOCK = 96
"""What vLLM makes of blocks of 32 tokens, for one must be as large as a state of Granite's."""
NUM_TOKENS = 12
SETTING: dict[str, Any] = {
    "preset": "snapkv",
    "budget": {"ratio": 0.25, "floor": 1},
    "min_prompt_len": 64,
}
TWO_GROUPS = {**SETTING, "preset": "pyramidkv", "layer_groups": {"count": 2}}
ENGINE: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "max_model_len": 1024,
    "max_num_batched_tokens": 160,
    "block_size": 32,
}
UNCOMPRESSED = {"kv_compression": "none"}


@pytest.fixture(scope="module", autouse=True)
def without_faults_of_the_cpu() -> Iterator[None]:
    if not current_platform.is_cpu():
        yield
        return
    spec = MambaMixer2.get_kv_cache_spec
    with rotary_in_torch(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            MambaMixer2,
            "get_kv_cache_spec",
            lambda self, config: replace(
                spec(self, config),
                num_prefill_checkpoint_blocks=0,
                prefill_checkpoint_alignment=None,
            ),
        )
        yield


@pytest.fixture(scope="module")
def granite(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_random_hybrid(tmp_path_factory.mktemp("granite4"), "granite4"))


@pytest.fixture(scope="module")
def engine(granite: str) -> Iterator[Engine]:
    with opened(granite, SETTING, **ENGINE) as engine:
        yield engine


@pytest.fixture(scope="module")
def replay(granite: str) -> Replay:
    return Replay(granite, BLOCK)


def expected(replay: Replay, tokens: list[int], setting: Any, count: int = NUM_TOKENS) -> list[int]:
    """Tokens of transformers."""
    return replay.generate(replay.prefill(tokens), setting and parse_config(setting), count)


def run(engine: Engine, name: str, tokens: list[int], count: int = NUM_TOKENS, **more: Any) -> Any:
    """A request's result."""
    engine.add(name, tokens, count, more.get("xargs"), ignore_eos=True)
    engine.drain()
    return engine.results[name]


def test_attention_alone_is_compacted(engine: Engine, replay: Replay) -> None:
    """In chunks of one block of 96 tokens, where states are kept."""
    prompt = distinct_tokens(500)
    assert {type(each) for each in managers(engine)} == {CompressedAttentionManager, HostGroup}
    assert {each.block_size for each in managers(engine)} == {BLOCK}
    whole = expected(replay, prompt, None)
    assert run(engine, "kept", prompt, xargs=UNCOMPRESSED).token_ids == whole
    engine.add("compressed", prompt, NUM_TOKENS, ignore_eos=True)
    while len(engine.results["compressed"].token_ids) < 3:
        engine.step()
        engine.scheduler.check_integrity()
    # 125 of 480 tokens, in whole blocks: 1, and the tail.
    blocks = held(engine, "compressed")
    assert blocks[True] == [3] and all(count <= 2 for count in blocks[False]), blocks
    engine.drain()
    assert_idle(engine)
    compressed = expected(replay, prompt, SETTING)
    assert engine.results["compressed"].token_ids == compressed != whole


@pytest.mark.parametrize("preset", ["windowkv", "keydiff", "h2o", "criticalkv"])
def test_other_policies(engine: Engine, replay: Replay, preset: str) -> None:
    task = {"task": "aggregation"} if preset == "windowkv" else {}
    setting = {**SETTING, "preset": preset, **task}
    tokens = distinct_tokens(500, seed=1)
    with serving(engine, setting):
        found = run(engine, preset, tokens).token_ids
    config = parse_config(setting)
    assert config is not None
    chosen = config.by_task.get("aggregation", config)
    assert found == replay.generate(replay.prefill(tokens), chosen, NUM_TOKENS)


@pytest.mark.parametrize("interval", [BLOCK, 130])
def test_prompts_that_are_compacted_inside(engine: Engine, replay: Replay, interval: int) -> None:
    """Marks where states are kept, and elsewhere. A second run, and an exact one, find no more."""
    setting = {**SETTING, "trigger": "prompt", "prompt_interval": interval}
    prompts = [distinct_tokens(length, seed=interval + length) for length in (5 * BLOCK, 421)]
    with serving(engine, setting):
        for name in ("cold", "warm"):
            for number, tokens in enumerate(prompts):
                engine.add(f"{name}-{interval}-{number}", tokens, NUM_TOKENS, ignore_eos=True)
            engine.drain()
    for number, tokens in enumerate(prompts):
        marked, whole = expected(replay, tokens, setting), expected(replay, tokens, None)
        assert marked not in (whole, expected(replay, tokens, SETTING))
        for name in ("cold", "warm"):
            assert engine.results[f"{name}-{interval}-{number}"].token_ids == marked
        exact = run(engine, f"exact-{interval}-{number}", tokens, xargs=UNCOMPRESSED)
        assert exact.token_ids == whole
    assert_idle(engine)


def test_a_hit_ends_where_there_is_a_state_and_leaves_the_window(
    engine: Engine, replay: Replay
) -> None:
    """The look-up is bounded: a hit that is cut afterwards would begin where no state is.

    vLLM keeps a state at a prompt's last block boundary, which is within the window here, and where
    it has seen prompts part: the second one makes it keep one at the bound.
    """
    tokens = distinct_tokens(584, seed=3)  # six blocks and eight tokens
    found = [run(engine, f"time {number}", tokens) for number in range(3)]
    assert [each.num_cached_tokens for each in found] == [0, 0, 480]
    cold = expected(replay, tokens, SETTING)
    assert [each.token_ids for each in found] == [cold] * 3
    whole = run(engine, "whole", tokens, xargs=UNCOMPRESSED)
    assert whole.num_cached_tokens == 576
    assert whole.token_ids == expected(replay, tokens, None)


def test_what_follows_a_compaction_is_found_by_nobody(engine: Engine, replay: Replay) -> None:
    """States that were computed over a compacted past are hashed no more than keys and values."""
    tokens = distinct_tokens(400, seed=4)
    longer = tokens + run(engine, "lossy", tokens, 180).token_ids
    exact = run(engine, "exact", longer, xargs=UNCOMPRESSED)
    assert exact.num_cached_tokens == 384, "the blocks of the prompt alone"
    hit = run(engine, "hit", longer, xargs=UNCOMPRESSED)
    assert hit.num_cached_tokens == 576
    assert exact.token_ids == hit.token_ids == expected(replay, longer, None)


def test_preempted_and_compacted_again(engine: Engine, replay: Replay) -> None:
    """A resumed prompt stops at its end, within a block, where it stopped the first time."""
    tokens = distinct_tokens(450, seed=5)
    engine.add("preempted", tokens, 24, ignore_eos=True)
    while len(engine.results["preempted"].token_ids) < 8:
        engine.step()
    preempt(engine, engine.live()["preempted"])
    engine.drain()
    assert_idle(engine)
    assert engine.results["preempted"].token_ids == expected(replay, tokens, SETTING, 24)


def test_a_crowd_in_a_small_pool(engine: Engine, replay: Replay) -> None:
    check_crowd(engine, replay, SETTING)
    assert_idle(engine)


def test_short_convolutions_two_layer_groups_and_decoding(tmp_path: Path) -> None:
    model = str(write_random_hybrid(tmp_path, "lfm2"))
    replay, prompt = Replay(model, 32), distinct_tokens(500)
    with opened(model, TWO_GROUPS, enable_prefix_caching=False, **ENGINE) as engine:
        own = [each for each in managers(engine) if isinstance(each, CompressedAttentionManager)]
        assert len(own) == 2 and {each.block_size for each in own} == {32}
        whole = expected(replay, prompt, None)
        assert run(engine, "kept", prompt, xargs=UNCOMPRESSED).token_ids == whole
        wanted = expected(replay, prompt, TWO_GROUPS)
        assert run(engine, "two", prompt).token_ids == wanted != whole
        for preset in ("expected_attention", "streaming_llm"):
            setting = {**TWO_GROUPS, "preset": preset}
            with serving(engine, setting):
                found = run(engine, preset, prompt).token_ids
            assert found == expected(replay, prompt, setting), preset
        decoding = {**TWO_GROUPS, "preset": "keydiff", "trigger": "both", "interval": 32}
        with serving(engine, decoding):
            run(engine, "long", prompt, 100)
        assert engine.scheduler.stats.compactions["keydiff/decode"] >= 2
        assert_idle(engine)


@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_5"])
def test_the_delta_rule(tmp_path: Path, name: str) -> None:
    """Attention whose output is gated, and a quarter of whose heads is turned."""
    model, prompt = str(write_random_hybrid(tmp_path, name)), distinct_tokens(500)
    with served_as_text(name), in_any_precision(), opened(model, TWO_GROUPS, **ENGINE) as engine:
        own = [each for each in managers(engine) if isinstance(each, CompressedAttentionManager)]
        assert len(own) == 2
        replay = Replay(model, own[0].block_size)
        whole, wanted = (expected(replay, prompt, each) for each in (None, TWO_GROUPS))
        assert run(engine, "kept", prompt, xargs=UNCOMPRESSED).token_ids == whole
        found = [run(engine, f"time {number}", prompt) for number in range(2)]
        assert [each.token_ids for each in found] == [wanted] * 2 and wanted != whole
        assert found[1].num_cached_tokens > 0
        setting = {**TWO_GROUPS, "preset": "expected_attention"}
        with serving(engine, setting):
            turned = run(engine, "turned", prompt).token_ids
        assert turned == expected(replay, prompt, setting)
        engine.add("preempted", prompt, NUM_TOKENS, ignore_eos=True)
        while len(engine.results["preempted"].token_ids) < 4:
            engine.step()
        preempt(engine, engine.live()["preempted"])
        engine.drain()
        assert engine.results["preempted"].token_ids == wanted
        assert_idle(engine)
